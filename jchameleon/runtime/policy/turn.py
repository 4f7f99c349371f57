"""One call of `Planner.plan`: what policies see, and what the plan collects."""

import math
import operator
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from jchameleon.runtime.policy.admission import Capacity
from jchameleon.runtime.policy.candidates import State
from jchameleon.runtime.policy.estimator import Estimator
from jchameleon.runtime.policy.prefix import released_pages
from jchameleon.runtime.policy.request import Request
from jchameleon.runtime.policy.rows import Row

if TYPE_CHECKING:
    from jchameleon.runtime.policy.planner import Planner


class Turn:
    """The `AdmissionView` and `PrefetchView` of one iteration."""

    def __init__(self, planner: "Planner", now_s: float) -> None:
        self._planner = planner
        self.now_s = now_s
        self._arrived: dict[str, Request] = {}
        self.ended: list[Request] = []
        self.requeued: list[Request] = []
        self.outgrown: list[Request] = []
        self.admitted: list[str] = []
        self.hits: list[str] = []
        self.kv_pages: list[tuple[str, tuple[int, ...]]] = []
        self.lanes: list[tuple[str, int, float]] = []
        self.bypasses: list[tuple[str, str]] = []
        self.cached: list[tuple[str, int]] = []
        self.swapped: list[tuple[str, int, tuple[int, ...]]] = []
        self.grown: list[tuple[str, tuple[int, ...]]] = []
        self.squashed: list[tuple[str, str]] = []
        self.evicted: list[str] = []
        self.failed: list[tuple[str, str, str]] = []
        self.device_lost = False
        # The line itself changes when the policy has returned, so that it may admit,
        # squash and reject while it iterates.
        self._left: dict[str, None] = {}
        self._returning: dict[str, Row] = {}
        self._releases: list[tuple[float, int]] | None = None
        # Adapters of requests that were tried and lack pages; None is the base model.
        self.lacking: dict[str | None, None] = {}

    @property
    def waiting(self) -> Iterator[Request]:
        running = self._planner._running
        for row in self._planner._waiting.values():
            request_id = row.request.request_id
            if request_id not in running and request_id not in self._left:
                yield row.request

    @property
    def arrived(self) -> Sequence[Request]:
        return tuple(self._arrived.values())

    @property
    def running(self) -> Iterator[Request]:
        for row in tuple(self._planner._running.values()):
            yield row.request

    @property
    def num_running(self) -> int:
        return len(self._planner._running)

    @property
    def capacity(self) -> Capacity:
        return self._planner._capacity

    @property
    def estimator(self) -> Estimator:
        return self._planner._estimator

    def predicted_tokens(self, request: Request) -> int:
        row = self._row(request)
        if row.kv_pages == 0:
            self._planner._predict_again(row)
        return row.predicted_tokens

    def produced_tokens(self, request: Request) -> int:
        return self._row(request).produced_tokens

    def squashes(self, request: Request) -> int:
        return self._row(request).squashes

    def adapter_pages(self, request: Request) -> int:
        adapter = self._row(request).adapter
        return 0 if adapter is None else adapter.num_pages

    def adapter_rank(self, request: Request) -> int:
        adapter = self._row(request).adapter
        return 0 if adapter is None else adapter.rank

    def adapter_absent(self, request: Request) -> bool:
        adapter = self._row(request).adapter
        return adapter is not None and adapter.state is State.ABSENT

    def missing_pages(self, request: Request, without: Sequence[Request] = ()) -> int:
        rows = [self._running_row(one) for one in without]
        return self._planner._missing_pages(self._waiting_row(request), rows)[1]

    def wait_for_pages_s(self, pages: int) -> float:
        if pages <= 0:
            return 0.0
        freed = 0
        for after_s, more_pages in self._predicted_releases():
            freed += more_pages
            if freed >= pages:
                return after_s
        return math.inf

    def try_admit(
        self,
        request: Request,
        *,
        lane: int | None = None,
        wrs: float | None = None,
        passing: Request | None = None,
    ) -> bool:
        if request.request_id in self._returning:
            return False  # squashed in this very call
        if (lane is None) != (wrs is None) or (lane is not None and lane < 0):
            raise ValueError(f"{lane=} and {wrs=} must both be there, lane 0 or above")
        if passing is not None and self._waiting_row(passing).request == request:
            raise ValueError(f"request_id={request.request_id!r} cannot pass itself")
        if not self._planner._try_admit(self._waiting_row(request), self):
            return False
        if lane is not None and wrs is not None:
            self.lanes.append((request.request_id, operator.index(lane), float(wrs)))
        if passing is not None:
            self.bypasses.append((request.request_id, passing.request_id))
            self._planner._bypasses += 1
        self._releases = None
        return True

    def can_squash(self, request: Request) -> bool:
        row = self._running_row(request)
        return (
            row.squashes < self._planner.config.max_squashes
            and row.settled
            and request.request_id not in self.admitted
        )

    def squash(self, request: Request, reason: str) -> bool:
        if not self.can_squash(request):
            return False
        row = self._running_row(request)
        self._planner._squash(row, reason, self)
        self._returning[request.request_id] = row
        self._releases = None
        return True

    def reject(self, request: Request, reason: str) -> None:
        row = self._waiting_row(request)
        if request.request_id in self._returning:
            raise ValueError(f"request_id={request.request_id!r} was squashed just now")
        if not isinstance(reason, str) or not reason:
            raise ValueError(f"{reason=} must be a text")
        if row.adapter is not None:
            self._planner._residency.drop_queued(row.adapter.uid)
        self._left[request.request_id] = None
        self.failed.append((request.request_id, reason, "rejected"))

    def note_arrival(self, request: Request) -> None:
        """Report a new request to policies."""
        self._arrived[request.request_id] = request

    def note_end(self, request: Request) -> None:
        """Report an ended request, unless policies have never heard of it."""
        if self._arrived.pop(request.request_id, None) is None:
            self.ended.append(request)

    def note_swap(self, row: Row, first_block: int, pages: tuple[int, ...]) -> None:
        """Report pages that a running row has got for those it had."""
        if pages:
            self.swapped.append((row.request.request_id, first_block, pages))

    def note_start(self, row: Row) -> None:
        """Let an admitted row begin behind the blocks that it holds, and report it."""
        planner = self._planner
        if row.keys:
            planner._space.prefix.queried_tokens += row.prefill_tokens
        if row.blocks:
            self.note_cached(row, len(row.blocks) * planner.config.block_tokens)

    def note_cached(self, row: Row, tokens: int) -> None:
        """Let a row skip tokens that it need not run; report and count them."""
        row.prefilled_tokens += tokens
        self._planner._space.prefix.hit_tokens += tokens
        self.cached.append((row.request.request_id, tokens))

    def note_stop(self, request_id: str) -> None:
        """Take back what was reported of pages that a request no longer has."""
        self.grown = [one for one in self.grown if one[0] != request_id]
        self.swapped = [one for one in self.swapped if one[0] != request_id]
        self.cached = [one for one in self.cached if one[0] != request_id]

    def return_to_line(self, row: Row) -> None:
        """Put a squashed row before all of its priority."""
        request = row.request
        self._planner._waiting.add(
            request.request_id, row, request.priority, first=True
        )

    def settle_line(self) -> None:
        """Take out who was admitted or rejected, put back who was squashed."""
        waiting = self._planner._waiting
        for request_id in self.admitted:
            waiting.pop(request_id)
        for request_id in self._left:
            left = waiting.pop(request_id)
            assert left is not None
            self.note_end(left.request)
        # The oldest ends up first.
        for row in sorted(self._returning.values(), key=lambda row: -row.seq):
            self.return_to_line(row)

    def _predicted_releases(self) -> list[tuple[float, int]]:
        """Return (seconds from now, pages that fall free then), soonest first."""
        if self._releases is None:
            refs: dict[str, int] = {}
            releases = self._planner._space.copies_ahead(self.estimator)
            ends = self._predicted_ends()
            kv_pages = released_pages([row for _, row in ends])
            for (ends_in_s, row), pages in zip(ends, kv_pages, strict=True):
                adapter = row.adapter
                if adapter is not None:
                    refs[adapter.uid] = refs.get(adapter.uid, 0) + 1
                    if refs[adapter.uid] == adapter.refs and not adapter.pinned:
                        pages += adapter.num_pages
                releases.append((ends_in_s, pages))
            self._releases = sorted(releases)
        return self._releases

    def _predicted_ends(self) -> list[tuple[float, Row]]:
        """Return (seconds from now, row) of running requests, soonest end first."""
        estimator, running = self.estimator, self._planner._running
        rows = len(running)
        decode_s = estimator.step_s(prefill_tokens=0, decode_rows=rows)
        ends = []
        for row in running.values():
            left = max(1, row.predicted_tokens - row.produced_tokens)
            ends_in_s = left * decode_s
            pending = row.prefill_tokens - row.prefilled_tokens
            if pending:
                adapter = row.adapter
                absent = adapter is not None and adapter.state is not State.RESIDENT
                ends_in_s = estimator.run_s(
                    prefill_tokens=pending,
                    output_tokens=left,
                    load_pages=adapter.num_pages if adapter and absent else 0,
                    decode_rows=rows,
                )
            ends.append((ends_in_s, row))
        return sorted(ends, key=lambda pair: (pair[0], pair[1].seq))

    def _row(self, request: Request) -> Row:
        planner, request_id = self._planner, request.request_id
        row = planner._waiting.get(request_id) or planner._running.get(request_id)
        row = row or self._returning.get(request_id)
        if row is None:
            raise ValueError(f"request_id={request_id!r} neither waits nor runs")
        return row

    def _waiting_row(self, request: Request) -> Row:
        request_id = request.request_id
        row = self._planner._waiting.get(request_id)
        row = self._returning.get(request_id) if row is None else row
        if row is None or request_id in self._planner._running:
            raise ValueError(f"request_id={request_id!r} does not wait")
        if request_id in self._left:
            raise ValueError(f"request_id={request_id!r} was rejected")
        return row

    def _running_row(self, request: Request) -> Row:
        row = self._planner._running.get(request.request_id)
        if row is None:
            raise ValueError(f"request_id={request.request_id!r} does not run")
        return row
