"""The planner: turns events into the next iteration's plan.

One call of `Planner.plan` is: apply the events (what ended returns its pages at once),
give pages to rows that outgrew theirs, admit, start adapter loads, lay out the token
budget. Time is an argument and all state changes go through events, so the same events
give the same plans.
"""

from collections.abc import Mapping, Sequence

from jchameleon.runtime.policy.admission import AdmissionPolicy, Capacity
from jchameleon.runtime.policy.ahead import loads_ahead
from jchameleon.runtime.policy.blame import blaming
from jchameleon.runtime.policy.estimator import Estimator
from jchameleon.runtime.policy.events import (
    AdapterPinned,
    AdapterRegistered,
    AdapterUnregistered,
    Arrival,
    Cancel,
    DeviceLost,
    Event,
    LoadDone,
    StepDone,
)
from jchameleon.runtime.policy.eviction import EvictionPolicy
from jchameleon.runtime.policy.forgetting import Forgetting
from jchameleon.runtime.policy.growth import grow_rows
from jchameleon.runtime.policy.invariants import check_planner
from jchameleon.runtime.policy.limits import PlannerConfig
from jchameleon.runtime.policy.line import PriorityLine
from jchameleon.runtime.policy.lost import start_over
from jchameleon.runtime.policy.pins import why_not_pin
from jchameleon.runtime.policy.plan import Books, LaneStats, Plan
from jchameleon.runtime.policy.pool import PagePool
from jchameleon.runtime.policy.predictor import LengthPredictor
from jchameleon.runtime.policy.prefetch import PrefetchPolicy
from jchameleon.runtime.policy.request import Request
from jchameleon.runtime.policy.residency import AdapterStats, Residency
from jchameleon.runtime.policy.rows import Row, lay_out, reusable_blocks
from jchameleon.runtime.policy.sharing import catch_up, keep_filled
from jchameleon.runtime.policy.space import Space
from jchameleon.runtime.policy.turn import Turn


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
        self._predictor = predictor
        self._prefetch = prefetch
        self._observe_prefetch = getattr(prefetch, "observe", None)
        self._timed = bool(getattr(prefetch, "timed", False))
        self._pool = PagePool(config.num_pages)
        self._residency = Residency(self._pool)
        self._space = Space(self._pool, self._residency, eviction)
        self._forgetting = Forgetting(
            {
                "admission": admission,
                "eviction": eviction,
                "predictor": predictor,
                "prefetch": prefetch,
            }
        )
        self._estimator = Estimator()
        self._waiting: PriorityLine[str, Row] = PriorityLine()
        self._running: dict[str, Row] = {}
        self._accepted = 0
        self._observed = 0
        self._bypasses = 0
        self._squashes = 0
        self._growth_squashes = 0
        self._grown_pages = 0
        self._stalls = 0
        # What the last plan laid out, which the next StepDone reports on.
        self._laid_out_tokens = (0, 0)
        self._prefilled: list[Row] = []
        self._seen_blocks = 0  # of the prefix cache, when rows looked last

    def plan(self, now_s: float, events: Sequence[Event]) -> Plan:
        """Apply `events` in order and return what the engine is to do next.

        Raises:
          ValueError: an event that contradicts the state: a request id that waits or
            runs already, an adapter that is not registered, one to be unregistered that
            requests name, a load that is not under way.
          PolicyError: a policy raised, or answered what its protocol rules out.
        """
        turn = Turn(self, now_s)
        self._residency.advance(now_s)
        for event in events:
            self._apply(event, turn)
        if turn.device_lost:
            start_over(self, turn)
        for uid in self._residency.leaving:
            turn.evicted += self._space.forget(uid)
        self._residency.candidates.load_line = self._estimator.load_line()
        turn.evicted += self._space.drop_expired()
        catch_up(self, turn)
        grow_rows(self, turn)
        turn.outgrown = [r for r in turn.outgrown if r.request_id in self._running]
        with blaming("admission", self._admission):
            self._admission.admit(turn)
            turn.settle_line()
        loads = self._space.start_loads(self.config.max_loads_in_flight, turn.evicted)
        loads += loads_ahead(self, turn)
        prefill, decode = lay_out(
            self._running.values(),
            budget_tokens=self.config.max_batch_tokens,
            tile_tokens=self.config.prefill_tile_tokens,
            block_tokens=self.config.block_tokens,
        )
        self._prefilled = [self._running[c.request_id] for c in prefill]
        self._laid_out_tokens = (sum(c.length for c in prefill), len(decode))
        for load in loads:
            self._space.note_load(load.uid, now_s)
        # Last, for policies have heard by now of the last requests that named them.
        forgotten = self._residency.forget_leaving()
        for adapter in forgotten:
            self._forgetting.forget(adapter)
        return Plan(
            failed=tuple(turn.failed),
            squashed=tuple(turn.squashed),
            evicted=tuple(turn.evicted),
            forgotten=tuple(adapter.uid for adapter in forgotten),
            admitted=tuple(turn.admitted),
            hits=tuple(turn.hits),
            kv_pages=tuple(turn.kv_pages),
            cached=tuple(turn.cached),
            lanes=tuple(turn.lanes),
            bypasses=tuple(turn.bypasses),
            swapped=tuple(turn.swapped),
            grown=tuple(turn.grown),
            loads=tuple(loads),
            prefill=prefill,
            decode=decode,
        )

    def can_ever_fit(
        self,
        prompt_tokens: int,
        max_tokens: int,
        adapter_pages: int,
        *,
        pinned: bool = False,
    ) -> str | None:
        """Return why a request can never run in this pool, or None if it can.

        Any thread may ask; the answer changes only when adapters are pinned.

        Args:
          adapter_pages: what its adapter takes; 0 for the base model.
          pinned: its adapter is pinned.
        """
        kv_pages = self.config.kv_pages(prompt_tokens, max_tokens)
        kept = self._residency.pinned_pages
        usable = self.config.usable_pages - kept
        if kv_pages + (0 if pinned else adapter_pages) <= usable:
            return None
        own = "" if pinned or not adapter_pages else f" and the adapter {adapter_pages}"
        beside, unpin = "", ""
        if kept:
            beside, unpin = f" beside {kept} pages of pinned adapters", ", unpin some"
        return (
            f"prompt of {prompt_tokens} and max_tokens={max_tokens} need {kv_pages} KV "
            f"pages{own}, the pool has {usable}{beside}: lower max_tokens{unpin} or "
            "enlarge pool_bytes"
        )

    def why_not_pin(self, uid: str, pins: Mapping[str, bool]) -> str | None:
        """Return why an adapter cannot be pinned now, or None if it can.

        Every accepted request must still be able to run beside all pinned adapters.

        Args:
          pins: uid -> pinned, what was decided since the last plan.

        Raises:
          ValueError: the adapter was never registered.
        """
        return why_not_pin(self, uid, pins)

    def is_pinned(self, uid: str) -> bool:
        """Return whether an adapter is registered and pinned; any thread may ask."""
        try:
            return self._residency.get(uid).pinned
        except ValueError:
            return False

    @property
    def watches_the_clock(self) -> bool:
        """Whether time alone may change the next plan, without any event."""
        return self._timed or bool(self._waiting)

    def books(self) -> Books:
        """Return page and event totals as of the last plan."""
        residency, prefix = self._residency, self._space.prefix
        return Books(
            free_pages=self._pool.free_pages,
            kv_pages=self._space.kv_pages,
            cached_pages=prefix.idle_pages,
            resident_pages=residency.resident_pages,
            loading_pages=residency.loading_pages,
            hits=residency.hits,
            misses=residency.misses,
            evictions=residency.evictions,
            loads=residency.loads,
            load_failures=residency.failures,
            waiting=len(self._waiting),
            running=len(self._running),
            bypasses=self._bypasses,
            squashes=self._squashes,
            growth_squashes=self._growth_squashes,
            grown_pages=self._grown_pages,
            stalls=self._stalls,
            lanes=self._lanes(),
            prefix_queried_tokens=prefix.queried_tokens,
            prefix_hit_tokens=prefix.hit_tokens,
            evicted_blocks=prefix.evicted_blocks,
        )

    def _lanes(self) -> tuple[LaneStats, ...]:
        lanes = getattr(self._admission, "lanes", None)
        if lanes is None:
            return ()
        with blaming("admission", self._admission) as blame:
            found = tuple(lanes())
            if not all(isinstance(lane, LaneStats) for lane in found):
                blame("answered lanes() with something else than LaneStats")
        return found

    def adapter_stats(self, uid: str) -> AdapterStats:
        """Return one adapter's state and counters; ValueError where there is none."""
        return self._residency.stats(uid)

    def knows(self, uid: str) -> bool:
        """Return whether an adapter is registered, or not forgotten yet."""
        return self._residency.knows(uid)

    def resident_pages(self, uid: str) -> tuple[int, ...] | None:
        """Return a resident adapter's pages in packed order, else None."""
        return self._residency.pages(uid)

    def check(self) -> None:
        """Assert that pool, adapter table, line and rows agree; for tests."""
        check_planner(self)

    @property
    def _capacity(self) -> Capacity:
        return Capacity(
            pages=self.config.usable_pages - self._residency.pinned_pages,
            block_tokens=self.config.block_tokens,
            max_running=self.config.max_running,
            max_rank=self._residency.max_rank,
        )

    def _apply(self, event: Event, turn: Turn) -> None:
        match event:
            case Arrival(request):
                self._arrive(request, turn)
            case Cancel(request_id):
                if self._end(request_id, turn) is None:
                    # It may have failed a moment ago: nobody waits for that any more.
                    turn.failed = [one for one in turn.failed if one[0] != request_id]
            case AdapterRegistered(uid, rank, num_pages):
                self._residency.register(uid, rank, num_pages)
            case AdapterUnregistered(uid):
                self._residency.leave(uid)
                self._space.want(uid, wanted=False)
            case AdapterPinned(uid, pinned):
                self._residency.pin(uid, pinned=pinned)
                self._space.want(uid, wanted=pinned)
            case LoadDone():
                self._load_done(event, turn)
            case StepDone():
                self._step_done(event, turn)
            case DeviceLost():
                turn.device_lost = True
                self._laid_out_tokens, self._prefilled = (0, 0), []

    def _arrive(self, request: Request, turn: Turn) -> None:
        request_id, uid = request.request_id, request.adapter_uid
        if request_id in self._waiting or request_id in self._running:
            raise ValueError(f"request_id={request_id!r} waits or runs already")
        adapter = None if uid is None else self._residency.registered(uid)
        reason = self.can_ever_fit(
            request.prompt_tokens,
            request.max_tokens,
            0 if adapter is None else adapter.num_pages,
            pinned=adapter is not None and adapter.pinned,
        )
        if reason is not None:  # it would block the line for ever
            turn.failed.append((request_id, reason, "capacity"))
            return
        if len(request.block_keys) * self.config.block_tokens > request.prompt_tokens:
            raise ValueError(f"request_id={request_id!r} has keys beyond its prompt")
        predicted = self._predict(request)
        row = Row(
            request,
            adapter,
            self._accepted,
            predicted,
            self._observed,
            request.block_keys,
        )
        self._waiting.add(request_id, row, request.priority)
        self._accepted += 1
        if adapter is not None:
            self._residency.add_queued(adapter.uid)
        turn.note_arrival(request)

    def _predict(self, request: Request) -> int:
        with blaming("predictor", self._predictor) as blame:
            tokens = self._predictor.predict(request)
            if not 1 <= tokens <= request.max_tokens or tokens != int(tokens):
                blame(
                    f"predicted {tokens!r} tokens, which must be 1 to max_tokens="
                    f"{request.max_tokens}"
                )
        return int(tokens)

    def _predict_again(self, row: Row) -> None:
        """Predict a request that has not run yet anew, if others have ended since."""
        if row.predicted_after != self._observed and row.produced_tokens == 0:
            row.predicted_tokens = self._predict(row.request)
            row.predicted_after = self._observed

    def _end(self, request_id: str, turn: Turn) -> Row | None:
        """Forget a request and return its pages; unknown ids are ignored."""
        row = self._waiting.pop(request_id)
        if row is not None:
            if row.adapter is not None:
                self._residency.drop_queued(row.adapter.uid)
        else:
            row = self._running.pop(request_id, None)
            if row is None:
                return None
            self._space.give_back(row, turn.now_s)
            row.kv_pages = 0
            turn.note_stop(request_id)
        turn.note_end(row.request)
        return row

    def _load_done(self, event: LoadDone, turn: Turn) -> None:
        uid, error = event.uid, event.error
        started_s = self._space.load_done(uid, turn.now_s)
        self._residency.finish_load(uid, failed=error is not None, now_s=turn.now_s)
        if error is None:
            self._estimator.observe_load(
                turn.now_s - started_s, num_pages=self._residency.get(uid).num_pages
            )
            return
        # A failed load is rare enough to walk the whole line.
        rows = [*self._running.values(), *self._waiting.values()]
        for row in rows:
            if row.request.adapter_uid == uid:
                self._end(row.request.request_id, turn)
                turn.failed.append((row.request.request_id, error, event.fault))

    def _step_done(self, event: StepDone, turn: Turn) -> None:
        prefill_tokens, decode_rows = self._laid_out_tokens
        if prefill_tokens or decode_rows:
            self._estimator.observe_step(
                event.duration_s, prefill_tokens=prefill_tokens, decode_rows=decode_rows
            )
            self._laid_out_tokens = (0, 0)
        keep_filled(self, event, turn)
        for request_id, tokens in event.produced:
            row = self._running.get(request_id)
            if row is not None and row.produce(tokens):
                turn.outgrown.append(row.request)
        for request_id in event.finished:
            row = self._end(request_id, turn)
            if row is not None:
                self._observed += 1
                with blaming("predictor", self._predictor):
                    self._predictor.observe(row.request, row.produced_tokens)

    def _may_grow(self, row: Row) -> bool:
        """Return whether a running row holds fewer pages than it may come to need."""
        request = row.request
        most = self.config.kv_pages(request.prompt_tokens, request.max_tokens)
        return row.kv_pages < most

    def _squash(self, row: Row, reason: str, turn: Turn) -> None:
        """Take a running request's pages and let it wait again."""
        request_id = row.request.request_id
        del self._running[request_id]
        turn.note_stop(request_id)
        self._space.give_back(row, turn.now_s)
        row.stop()
        self._squashes += 1
        if row.adapter is not None:
            self._residency.add_queued(row.adapter.uid)
        turn.squashed.append((request_id, reason))

    def _reserved_tokens(self, row: Row) -> int:
        """Return the output that a waiting request gets pages for at admission."""
        config, most = self.config, row.request.max_tokens
        if config.kv_reserve == "max_tokens" or row.squashes >= config.max_squashes:
            return most
        self._predict_again(row)
        return min(most, max(row.predicted_tokens, row.produced_tokens + 1))

    def _missing_pages(self, row: Row, without: Sequence[Row] = ()) -> tuple[int, int]:
        """Return (KV pages it needs, pages it lacks after evicting all idle).

        As if the running rows `without` were squashed.
        """
        kv_pages = self.config.kv_pages(
            row.request.prompt_tokens, self._reserved_tokens(row)
        )
        blocks = reusable_blocks(row, self.config.block_tokens)
        spare_pages = self._space.spare_pages(kv_pages, row, blocks, without)
        return kv_pages, max(0, -spare_pages)

    def _try_admit(self, row: Row, turn: Turn) -> bool:
        if len(self._running) >= self.config.max_running:
            return False
        kv_pages, missing = self._missing_pages(row)
        if missing:
            turn.lacking[row.request.adapter_uid] = None
            return False
        request_id, adapter = row.request.request_id, row.adapter
        # KV and adapter together: whoever is admitted holds its adapter to its end.
        if adapter is not None:
            self._residency.drop_queued(adapter.uid)
            if self._residency.acquire(adapter, turn.now_s):
                turn.hits.append(request_id)
        row.start(kv_pages)
        blocks = reusable_blocks(row, self.config.block_tokens)
        pages, evicted = self._space.place(row, blocks)
        turn.evicted += evicted
        turn.note_start(row)
        self._running[request_id] = row
        turn.admitted.append(request_id)
        turn.kv_pages.append((request_id, pages))
        return True
