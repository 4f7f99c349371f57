"""First come, first served, in turns, and with room kept for adapters."""

import collections
import dataclasses
from collections.abc import Iterator

from jchameleon.config import is_number
from jchameleon.errors import ConfigError
from jchameleon.runtime.policy.admission import AdmissionView
from jchameleon.runtime.policy.request import Request


@dataclasses.dataclass(slots=True, eq=False)
class _Entry:
    """A request from its arrival to its end.

    Attributes:
      seq: how many arrived before it.
      kv_pages: that it is counted at while it runs, else 0.
      overtaken: how often a younger one started while it waited.
    """

    request: Request
    seq: int
    kv_pages: int = 0
    overtaken: int = 0

    def is_overtaken_by(self, other: "_Entry") -> bool:
        """Return whether `other`, which starts now, should have come later."""
        urgent = self.request.priority <= other.request.priority
        return urgent and self.seq < other.seq


class Paced:
    """Admit the line's head every few steps, several requests at once.

    Three rules on top of the order of `fifo`; all are our own.

    Turns. A step that runs prompts costs a fixed time, and makes all that decode wait
    for it. So while anybody decodes, requests start only in every (1 + n //
    `rows_per_step`)-th iteration, n running, at most `max_admitted` of them: the more
    rows wait for a prompt, the more prompts share the wait.

    Room for adapters. KV entries take `adapter_share` of the pool at most to its rest:
    a request that would leave adapters less waits, and all behind it. Where the
    adapters that recent requests named take less, only that is kept, so a pool with
    few adapters, or none, is used in full. KV entries are counted by prompt and
    predicted output, pages that requests share in the prefix cache for each of them.
    While nothing runs, the head starts whatever it takes.

    Passing. Who is admitted loads while others run, and holds back nobody. But where
    pages lack and the adapter is absent, the request is passed: those behind it start
    if they fit. Once younger requests have started before it `max_overtaken` times, it
    comes first, and nobody starts before it does: at the latest when all that run have
    ended. Every start of a younger request of its own or a less urgent priority counts,
    also of one that was sent back to wait; more urgent ones come first in any case.

    Options:
      rows_per_step: running requests for which one more iteration is let pass.
      max_admitted: requests that start in one iteration.
      adapter_share: of the pool's pages, pinned adapters aside, 0 to below 1.
      window_requests: latest arrivals whose adapters count as named recently.
      lookahead_requests: most of the line that may be passed in one iteration.
      max_overtaken: the bound above; 0 lets nobody pass.

    Raises:
      ConfigError: an option is out of its range.
    """

    def __init__(
        self,
        *,
        rows_per_step: int = 24,
        max_admitted: int = 32,
        adapter_share: float = 0.5,
        window_requests: int = 512,
        lookahead_requests: int = 16,
        max_overtaken: int = 32,
    ) -> None:
        for name, number, least in (
            ("rows_per_step", rows_per_step, 1),
            ("max_admitted", max_admitted, 1),
            ("window_requests", window_requests, 1),
            ("lookahead_requests", lookahead_requests, 0),
            ("max_overtaken", max_overtaken, 0),
        ):
            if type(number) is not int or number < least:
                raise ConfigError(
                    f"{name}={number!r} must be an integer, {least} or above"
                )
        if not (is_number(adapter_share) and 0 <= adapter_share < 1):
            raise ConfigError(
                f"adapter_share={adapter_share!r} must be a number from 0 to below 1"
            )
        self._rows_per_step = rows_per_step
        self._max_admitted = max_admitted
        self._adapter_share = adapter_share
        self._lookahead = lookahead_requests
        self._max_overtaken = max_overtaken
        self._recent = _RecentAdapters(window_requests)
        self._iterations = 0  # since anybody started
        self._entries: dict[str, _Entry] = {}
        # Waiting requests that were passed or sent back: only they can be overtaken.
        self._behind: dict[str, _Entry] = {}
        self._arrived = 0
        self._kv_pages = 0

    def admit(self, view: AdmissionView) -> None:
        """Take in what happened; if it is time, admit from the head of the line."""
        self._take_in(view)
        self._iterations += 1
        gap = 1 + view.num_running // self._rows_per_step
        if self._iterations >= gap or not _anyone_decodes(view):
            self._admit(view)

    def forget(self, uid: str) -> None:
        """Keep no room any more for an adapter that was unregistered."""
        self._recent.forget(uid)

    def _take_in(self, view: AdmissionView) -> None:
        # Arrivals last: an id that ended may come again.
        for request in view.ended:
            entry = self._entries.pop(request.request_id)
            self._behind.pop(request.request_id, None)
            self._kv_pages -= entry.kv_pages
        for request in view.requeued:
            if request.request_id in self._entries:  # else it has left meanwhile
                entry = self._entries[request.request_id]
                self._behind[request.request_id] = entry
                self._charge(entry, 0)
        for request in view.outgrown:
            entry = self._entries[request.request_id]
            self._charge(entry, _kv_pages(view, request))
        for request in view.arrived:
            self._entries[request.request_id] = _Entry(request, self._arrived)
            self._arrived += 1
            self._recent.add(request.adapter_uid, view.adapter_pages(request))

    def _charge(self, entry: _Entry, pages: int) -> None:
        self._kv_pages += pages - entry.kv_pages
        entry.kv_pages = pages

    def _admit(self, view: AdmissionView) -> None:
        capacity = view.capacity
        kept = min(self._adapter_share * capacity.pages, self._recent.pages)
        admitted = passed = 0
        num_overdue = len(self._overdue())
        for request in self._line(view):
            entry = self._entries[request.request_id]
            pages = _kv_pages(view, request)
            if view.num_running and self._kv_pages + pages > capacity.pages - kept:
                break
            if not view.try_admit(request):
                full = view.num_running >= capacity.max_running
                if full or not view.adapter_absent(request):
                    break
                self._behind[request.request_id] = entry
                passed += 1
                if passed > self._lookahead or entry.overtaken >= self._max_overtaken:
                    break
                continue
            self._charge(entry, pages)
            self._behind.pop(request.request_id, None)
            num_overdue -= entry.overtaken >= self._max_overtaken
            for other in self._behind.values():
                other.overtaken += other.is_overtaken_by(entry)
            admitted += 1
            if admitted == self._max_admitted or len(self._overdue()) > num_overdue:
                break
        if admitted:
            self._iterations = 0

    def _overdue(self) -> list[_Entry]:
        """Return those overtaken too often, by priority and age."""
        behind = self._behind.values()
        overdue = [e for e in behind if e.overtaken >= self._max_overtaken]
        return sorted(overdue, key=lambda e: (e.request.priority, e.seq))

    def _line(self, view: AdmissionView) -> Iterator[Request]:
        """Yield waiting requests, within a priority those first that are overdue."""
        overdue = collections.deque(entry.request for entry in self._overdue())
        for request in view.waiting:
            is_overdue = request in overdue
            while overdue and overdue[0].priority <= request.priority:
                yield overdue.popleft()
            if not is_overdue:
                yield request


class _RecentAdapters:
    """The distinct adapters that the latest requests named, and their pages.

    Attributes:
      pages: that all of them take.
    """

    def __init__(self, window_requests: int) -> None:
        self.pages = 0
        self._window = window_requests
        self._uids: collections.deque[str | None] = collections.deque()
        self._uses: dict[str | None, tuple[int, int]] = {}  # count, pages

    def add(self, uid: str | None, pages: int) -> None:
        """Count a request; None is the base model."""
        self._uids.append(uid)
        count, _ = self._uses.get(uid, (0, 0))
        if not count:
            self.pages += pages
        self._uses[uid] = (count + 1, pages)
        if len(self._uids) > self._window:
            self._drop(self._uids.popleft())

    def forget(self, uid: str) -> None:
        """Let no request count that named this adapter."""
        if uid in self._uses:
            self.pages -= self._uses.pop(uid)[1]
            self._uids = collections.deque(u for u in self._uids if u != uid)

    def _drop(self, uid: str | None) -> None:
        count, pages = self._uses.pop(uid)
        if count > 1:
            self._uses[uid] = (count - 1, pages)
        else:
            self.pages -= pages


def _anyone_decodes(view: AdmissionView) -> bool:
    # The oldest comes first, so this hardly ever looks at a second one.
    return any(view.produced_tokens(request) for request in view.running)


def _kv_pages(view: AdmissionView, request: Request) -> int:
    """Return the pages of a request's KV entries as predicted."""
    tokens = request.prompt_tokens + view.predicted_tokens(request)
    # The last token is sent out and needs no entry.
    return -(-(tokens - 1) // view.capacity.block_tokens)
