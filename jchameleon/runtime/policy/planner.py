"""The planner: turns events into the next iteration's plan.

One call of `Planner.plan` is: apply the events (what ended returns its pages at once),
admit, start adapter loads, lay out the token budget. Time is an argument and all state
changes go through events, so the same events give the same plans.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from jchameleon.config import RESERVED_PAGES
from jchameleon.errors import ConfigError
from jchameleon.runtime.policy.admission import AdmissionPolicy
from jchameleon.runtime.policy.events import (
    AdapterRegistered,
    Arrival,
    Cancel,
    Event,
    LoadDone,
    StepDone,
)
from jchameleon.runtime.policy.eviction import EvictionPolicy, choose_victims
from jchameleon.runtime.policy.plan import Books, Load, Plan, PrefillChunk
from jchameleon.runtime.policy.pool import PagePool
from jchameleon.runtime.policy.predictor import LengthPredictor
from jchameleon.runtime.policy.prefetch import PrefetchPolicy
from jchameleon.runtime.policy.request import Request
from jchameleon.runtime.policy.residency import Adapter, AdapterStats, Residency, State


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PlannerConfig:
    """Limits of one planner.

    Attributes:
      num_pages: pages of the pool, with the two reserved ones.
      block_tokens: tokens whose KV entries fill one page.
      max_running: requests admitted at once.
      max_batch_tokens: tokens of one iteration, decode rows and padded chunks.
      max_loads_in_flight: adapter copies under way at once.
      prefill_tile_tokens: prompt chunks are padded to multiples of this.
    """

    num_pages: int
    block_tokens: int
    max_running: int
    max_batch_tokens: int
    max_loads_in_flight: int
    prefill_tile_tokens: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{field.name}={value!r} must be a positive integer")
        if self.num_pages <= RESERVED_PAGES:
            raise ConfigError(
                f"num_pages={self.num_pages} must be above {RESERVED_PAGES}, which "
                "the pool keeps for itself"
            )
        least = self.max_running + self.prefill_tile_tokens
        if self.max_batch_tokens < least:
            raise ConfigError(
                f"max_batch_tokens={self.max_batch_tokens} must be at least "
                f"max_running + prefill_tile_tokens = {least}"
            )

    def kv_pages(self, prompt_tokens: int, max_tokens: int) -> int:
        """Return the pages of a request's KV entries; the last token needs none."""
        return -(-(prompt_tokens + max_tokens - 1) // self.block_tokens)


@dataclasses.dataclass(slots=True, eq=False)
class _Running:
    """An admitted request: how far plans have taken it, and what was reported."""

    request: Request
    adapter: Adapter | None
    kv_pages: int
    prefilled_tokens: int = 0
    planned_tokens: int = 0
    produced_tokens: int = 0


class Planner:
    """All policy state of one engine; not thread-safe, the engine thread owns it."""

    def __init__(
        self,
        config: PlannerConfig,
        *,
        admission: AdmissionPolicy,
        eviction: EvictionPolicy,
        predictor: LengthPredictor,
        prefetch: PrefetchPolicy,
    ) -> None:
        self.config = config
        self._admission = admission
        self._eviction = eviction
        self._predictor = predictor
        self._prefetch = prefetch
        self._pool = PagePool(config.num_pages)
        self._residency = Residency(self._pool)
        # OrderedDict: first item and deletion are O(1) however long the line is.
        self._waiting: OrderedDict[str, Request] = OrderedDict()
        self._running: dict[str, _Running] = {}
        self._kv_pages = 0

    def plan(self, now_s: float, events: Sequence[Event]) -> Plan:
        """Apply `events` in order and return what the engine is to do next.

        Raises:
          ValueError: an event that contradicts the state: a request id that waits or
            runs already, an adapter never registered, a load that is not under way.
        """
        turn = _Turn(self, now_s)
        for event in events:
            self._apply(event, turn)
        self._admission.admit(turn)
        for request_id in turn.admitted:
            del self._waiting[request_id]
        loads = self._start_loads(turn)
        prefill, decode = self._lay_out()
        return Plan(
            failed=tuple(turn.failed),
            evicted=tuple(turn.evicted),
            admitted=tuple(turn.admitted),
            hits=tuple(turn.hits),
            kv_pages=tuple(turn.kv_pages),
            loads=loads,
            prefill=prefill,
            decode=decode,
        )

    def can_ever_fit(
        self, prompt_tokens: int, max_tokens: int, adapter_pages: int
    ) -> str | None:
        """Return why a request can never run in this pool, or None if it can.

        Depends on the configuration alone, so any thread may ask.
        """
        kv_pages = self.config.kv_pages(prompt_tokens, max_tokens)
        usable = self.config.num_pages - RESERVED_PAGES
        if kv_pages + adapter_pages <= usable:
            return None
        return (
            f"prompt of {prompt_tokens} and max_tokens={max_tokens} need {kv_pages} KV "
            f"pages and the adapter {adapter_pages}, the pool has {usable}: lower "
            "max_tokens or enlarge the pool"
        )

    def books(self) -> Books:
        """Return page and event totals as of the last plan."""
        residency = self._residency
        return Books(
            free_pages=self._pool.free_pages,
            kv_pages=self._kv_pages,
            resident_pages=residency.resident_pages,
            loading_pages=residency.loading_pages,
            hits=residency.hits,
            misses=residency.misses,
            evictions=residency.evictions,
            loads=residency.loads,
            load_failures=residency.failures,
            waiting=len(self._waiting),
            running=len(self._running),
        )

    def adapter_stats(self, uid: str) -> AdapterStats:
        """Return one adapter's state and counters; ValueError when never registered."""
        return self._residency.stats(uid)

    def resident_pages(self, uid: str) -> tuple[int, ...] | None:
        """Return a resident adapter's pages in packed order, else None."""
        return self._residency.pages(uid)

    def check(self) -> None:
        """Assert that pool, adapter table, line and rows agree; for tests."""
        config, residency = self.config, self._residency
        self._pool.check()
        residency.check()
        books = self.books()
        assert config.num_pages == RESERVED_PAGES + (
            books.free_pages
            + books.kv_pages
            + books.resident_pages
            + books.loading_pages
        ), f"pages do not add up: {books}"
        assert books.running <= config.max_running
        assert not self._running.keys() & self._waiting.keys()
        refs: dict[str, int] = {}
        queued: dict[str, int] = {}
        assert books.kv_pages == sum(r.kv_pages for r in self._running.values())
        for request_id, row in self._running.items():
            request = row.request
            pages = self._pool.pages_of(("kv", request_id))
            needed = config.kv_pages(request.prompt_tokens, request.max_tokens)
            assert len(pages) == row.kv_pages == needed, f"{request_id}: page count"
            assert 0 <= row.prefilled_tokens <= request.prompt_tokens
            assert 0 <= row.planned_tokens <= request.max_tokens
            if row.adapter is not None:
                uid = row.adapter.uid
                assert row.adapter.state is not State.ABSENT, f"{request_id}: no {uid}"
                refs[uid] = refs.get(uid, 0) + 1
        for request in self._waiting.values():
            if request.adapter_uid is not None:
                uid = request.adapter_uid
                queued[uid] = queued.get(uid, 0) + 1
        for stats in map(residency.stats, residency.uids()):
            assert stats.running == refs.get(stats.uid, 0), f"{stats.uid}: references"
            assert stats.queued == queued.get(stats.uid, 0), f"{stats.uid}: queued"

    def _apply(self, event: Event, turn: "_Turn") -> None:
        match event:
            case Arrival(request):
                self._arrive(request, turn)
            case Cancel(request_id):
                self._end(request_id, turn)
            case AdapterRegistered(uid, rank, num_pages):
                self._residency.register(uid, rank, num_pages)
            case LoadDone(uid, error):
                self._residency.finish_load(uid, failed=error is not None)
                if error is not None:
                    self._fail_users(uid, error, turn)
            case StepDone():
                for request_id, tokens in event.produced:
                    if request_id in self._running:
                        self._running[request_id].produced_tokens += tokens
                for request_id in event.finished:
                    row = self._end(request_id, turn)
                    if row is not None:
                        self._predictor.observe(row.request, row.produced_tokens)

    def _arrive(self, request: Request, turn: "_Turn") -> None:
        request_id, uid = request.request_id, request.adapter_uid
        if request_id in self._waiting or request_id in self._running:
            raise ValueError(f"request_id={request_id!r} waits or runs already")
        adapter_pages = 0 if uid is None else self._residency.get(uid).num_pages
        reason = self.can_ever_fit(
            request.prompt_tokens, request.max_tokens, adapter_pages
        )
        if reason is not None:  # it would block the line for ever
            turn.failed.append((request_id, reason))
            return
        self._waiting[request_id] = request
        if uid is not None:
            self._residency.add_queued(uid)
        turn.arrived.append(request)

    def _end(self, request_id: str, turn: "_Turn") -> _Running | None:
        """Forget a request and return its pages; unknown ids are ignored."""
        request = self._waiting.pop(request_id, None)
        if request is not None:
            if request.adapter_uid is not None:
                self._residency.drop_queued(request.adapter_uid)
            turn.ended.append(request)
            return None
        row = self._running.pop(request_id, None)
        if row is not None:
            self._kv_pages -= self._pool.free(("kv", request_id))
            if row.adapter is not None:
                self._residency.release(row.adapter, turn.now_s)
            turn.ended.append(row.request)
        return row

    def _fail_users(self, uid: str, error: str, turn: "_Turn") -> None:
        # A failed load is rare enough to walk the whole line.
        requests = [row.request for row in self._running.values()]
        requests += self._waiting.values()
        for request in requests:
            if request.adapter_uid == uid:
                self._end(request.request_id, turn)
                turn.failed.append((request.request_id, error))

    def _try_admit(self, request: Request, turn: "_Turn") -> bool:
        request_id, config, residency = request.request_id, self.config, self._residency
        if request_id in self._running or request_id not in self._waiting:
            raise ValueError(f"request_id={request_id!r} does not wait")
        if len(self._running) >= config.max_running:
            return False
        kv_pages = config.kv_pages(request.prompt_tokens, request.max_tokens)
        needed = kv_pages
        spare = self._pool.free_pages + residency.candidates.total_pages
        adapter = None
        if request.adapter_uid is not None:
            adapter = residency.get(request.adapter_uid)
            if adapter.state is State.ABSENT:
                needed += adapter.num_pages
            elif adapter.row >= 0:  # idle now, but this request needs it
                spare -= adapter.num_pages
        if needed > spare:
            return False

        if adapter is not None:
            residency.drop_queued(adapter.uid)
            if residency.acquire(adapter):
                turn.hits.append(request_id)
        short = needed - self._pool.free_pages
        for victim in choose_victims(self._eviction, residency.candidates, short):
            residency.evict(victim)
            turn.evicted.append(victim.uid)
        # KV and adapter together: whoever is admitted can run to its end.
        pages = self._pool.reserve(("kv", request_id), kv_pages)
        self._kv_pages += kv_pages
        if adapter is not None and adapter.state is State.ABSENT:
            residency.reserve(adapter)
        self._running[request_id] = _Running(request, adapter, kv_pages)
        turn.admitted.append(request_id)
        turn.kv_pages.append((request_id, pages))
        return True

    def _start_loads(self, turn: "_Turn") -> tuple[Load, ...]:
        """Start lined-up copies while the link has room; prefetch on what is left."""
        residency, limit = self._residency, self.config.max_loads_in_flight
        loads: list[Load] = []
        while residency.loads_in_flight < limit:
            started = residency.start_next_load()
            if started is None:
                break
            loads.append(Load(*started))
        if residency.loads_in_flight < limit:
            for uid in self._prefetch.candidates(turn):
                adapter = residency.get(uid)
                if adapter.state is not State.ABSENT:
                    continue
                if adapter.num_pages > self._pool.free_pages:
                    continue
                residency.reserve(adapter)
                started = residency.start_next_load()
                assert started is not None
                loads.append(Load(*started))
                if residency.loads_in_flight == limit:
                    break
        return tuple(loads)

    def _lay_out(self) -> tuple[tuple[PrefillChunk, ...], tuple[str, ...]]:
        """Spend the token budget: every decode row, then prompts in admission order."""
        tile = self.config.prefill_tile_tokens
        decode: list[str] = []
        prompts: list[tuple[str, _Running]] = []
        for request_id, row in self._running.items():
            if row.prefilled_tokens < row.request.prompt_tokens:
                if row.adapter is None or row.adapter.state is State.RESIDENT:
                    prompts.append((request_id, row))
            elif row.planned_tokens < row.request.max_tokens:
                # Never beyond the reserved pages, however late `finished` comes.
                row.planned_tokens += 1
                decode.append(request_id)
        # Whole tiles: a chunk that ends before its prompt fills its last tile.
        tiles = (self.config.max_batch_tokens - len(decode)) // tile
        prefill: list[PrefillChunk] = []
        for request_id, row in prompts:
            if tiles == 0:
                break
            start = row.prefilled_tokens
            length = min(row.request.prompt_tokens - start, tiles * tile)
            prefill.append(PrefillChunk(request_id, start, length))
            tiles -= -(-length // tile)
            row.prefilled_tokens += length
            if row.prefilled_tokens == row.request.prompt_tokens:
                row.planned_tokens = 1  # the last chunk samples the first token
        return tuple(prefill), tuple(decode)


class _Turn:
    """One call of `plan`: the view that policies get, and what the plan collects."""

    def __init__(self, planner: Planner, now_s: float) -> None:
        self._planner = planner
        self.now_s = now_s
        self.arrived: list[Request] = []
        self.ended: list[Request] = []
        self.admitted: list[str] = []
        self.hits: list[str] = []
        self.kv_pages: list[tuple[str, tuple[int, ...]]] = []
        self.evicted: list[str] = []
        self.failed: list[tuple[str, str]] = []

    @property
    def waiting(self) -> Iterator[Request]:
        # Those admitted in this turn leave the line when the policy has returned, so
        # that it may admit while it iterates.
        running = self._planner._running
        for request_id, request in self._planner._waiting.items():
            if request_id not in running:
                yield request

    @property
    def running(self) -> Iterator[Request]:
        for row in self._planner._running.values():
            yield row.request

    def predicted_tokens(self, request: Request) -> int:
        return self._planner._predictor.predict(request)

    def try_admit(self, request: Request) -> bool:
        return self._planner._try_admit(request, self)
