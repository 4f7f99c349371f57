"""The engine's loop on a clock that only counts.

An iteration is the engine's: events of the last step, arrivals and copies that arrived
meanwhile go to the planner; the copies that its plan asks for start; the step takes as
long as the cost model says; then its tokens are there. Without anything to run the
clock goes on to the next arrival, copy or tick. Left out are the host's own time
between steps, which a fitted cost model has in it, and the engine's polling for copies.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from jchameleon.errors import ConfigError, SimulationError
from jchameleon.runtime.policy.events import (
    AdapterPinned,
    AdapterRegistered,
    Arrival,
    Event,
    LoadDone,
    StepDone,
)
from jchameleon.runtime.policy.limits import IDLE_TICK_S
from jchameleon.runtime.policy.plan import Books, Plan
from jchameleon.runtime.policy.planner import Planner
from jchameleon.runtime.policy.request import Request
from jchameleon.sim.cost import CostModel, work_of
from jchameleon.sim.link import Link, LinkConfig
from jchameleon.sim.samples import Samples
from jchameleon.workload.generator import Drawn

STUCK_S = 3600.0
"""A policy that leaves an engine idle for so long, with requests open, always will."""

Observer = Callable[[float, tuple[Event, ...], Plan], None]
"""Is told of every call of the planner: time, events, plan."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SimAdapter:
    """An adapter that requests may name.

    Attributes:
      num_pages: that it takes in the pool.
    """

    uid: str
    rank: int
    num_pages: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SimResult:
    """What one run came to.

    Attributes:
      samples: of the requests that count.
      books: the planner's totals; counters without the warm-up of the cache.
      start_s: when requests began to be due, after the warm-up of the cache.
      end_s: when the last one had left.
      link_busy_s: time in which the link carried anything between the two.
      steps: iterations that ran anything.
      arrived, finished, failed: requests, counted or not.
    """

    samples: Samples
    books: Books
    start_s: float
    end_s: float
    link_busy_s: float
    steps: int
    arrived: int
    finished: int
    failed: int


@dataclasses.dataclass(slots=True, eq=False)
class _Live:
    """A request from its arrival to its end.

    Attributes:
      context_tokens: of its prompt and its output so far.
      token_s: when its last token came.
    """

    arrival_s: float
    rank: int
    output_tokens: int
    context_tokens: int
    counts: bool
    produced: int = 0
    first_s: float = 0.0
    token_s: float = 0.0


class Simulator:
    """One engine, one run. Bounded by what waits and runs, and by its samples."""

    def __init__(
        self,
        planner: Planner,
        cost: CostModel,
        link: LinkConfig,
        adapters: Sequence[SimAdapter],
        *,
        page_bytes: int,
        observe: Observer | None = None,
    ) -> None:
        """Register the adapters with a new planner.

        Args:
          page_bytes: of a page in all layers, what the link carries for it.
        """
        self._planner = planner
        self._cost = cost
        self._link = Link(link)
        self._adapters = {adapter.uid: adapter for adapter in adapters}
        self._page_bytes = page_bytes
        self._observe = observe
        self._now_s = 0.0
        self._live: dict[str, _Live] = {}
        self._events: list[Event] = [
            AdapterRegistered(a.uid, a.rank, a.num_pages) for a in adapters
        ]
        self._samples = Samples()
        self._steps = 0
        self._finished = 0
        self._failed = 0

    def warm_up(self, num_pages: int) -> None:
        """Load adapters, in their order, while they take at most `num_pages` pages.

        What they are then is idle, so policies that keep nothing drop them at once.
        """
        chosen = []
        for adapter in self._adapters.values():
            num_pages -= adapter.num_pages
            if num_pages < 0:
                break
            chosen.append(adapter.uid)
        self._events += [AdapterPinned(uid, True) for uid in chosen]
        while True:
            self._start_loads(self._plan())
            if self._link.next_s is None:
                break
            self._now_s = self._link.next_s
            self._take_copies()
        self._events = [AdapterPinned(uid, False) for uid in chosen]

    def run(
        self,
        requests: Iterable[Drawn],
        *,
        max_tokens: int | None,
        skip_s: float = 0.0,
    ) -> SimResult:
        """Serve requests by arrival until the last has left.

        Args:
          max_tokens: limit that every request names; longer outputs end there. None:
            each names its own length.
          skip_s: requests that arrive earlier do not count.

        Raises:
          ConfigError: a request names an unknown adapter.
          SimulationError: the policy lets an idle engine wait for ever.
        """
        # Counters and times are from here on.
        before, busy_s = self._planner.books(), self._link.busy_s
        start_s = active_s = self._now_s
        coming = iter(requests)
        upcoming = next(coming, None)
        arrived = 0
        while True:
            while upcoming is not None and start_s + upcoming.at_s <= self._now_s:
                counts = upcoming.at_s >= skip_s
                self._arrive(str(arrived), upcoming, start_s, max_tokens, counts)
                arrived += 1
                upcoming = next(coming, None)
            self._take_copies()
            plan = self._plan()
            stall_s = self._start_loads(plan)
            if plan.prefill or plan.decode:
                self._step(plan, stall_s)
                active_s = self._now_s
            elif upcoming is None and not self._live:
                break
            elif stall_s:
                self._now_s += stall_s
            else:
                due_s = None if upcoming is None else start_s + upcoming.at_s
                self._now_s = self._next_moment(due_s)
                if self._live and self._now_s > active_s + STUCK_S:
                    raise SimulationError(
                        f"{len(self._live)} requests are open and nothing ran for "
                        f"{STUCK_S:g} s: the admission policy starts none of them"
                    )
            if not self._live:
                active_s = self._now_s
        return SimResult(
            samples=self._samples,
            books=_without(self._planner.books(), before),
            start_s=start_s,
            end_s=self._now_s,
            link_busy_s=self._link.busy_s - busy_s,
            steps=self._steps,
            arrived=arrived,
            finished=self._finished,
            failed=self._failed,
        )

    def _arrive(
        self,
        request_id: str,
        drawn: Drawn,
        start_s: float,
        max_tokens: int | None,
        counts: bool,
    ) -> None:
        uid = drawn.adapter
        if uid is not None and uid not in self._adapters:
            raise ConfigError(f"request {request_id} names the adapter {uid!r}")
        arrival_s = start_s + drawn.at_s
        limit = drawn.output_tokens if max_tokens is None else max_tokens
        output_tokens = min(drawn.output_tokens, limit)
        self._live[request_id] = _Live(
            arrival_s=arrival_s,
            rank=0 if uid is None else self._adapters[uid].rank,
            output_tokens=output_tokens,
            context_tokens=drawn.prompt_tokens,
            counts=counts,
        )
        request = Request(
            request_id=request_id,
            prompt_tokens=drawn.prompt_tokens,
            max_tokens=limit,
            adapter_uid=uid,
            arrival_s=arrival_s,
            expected_tokens=output_tokens,
        )
        self._events.append(Arrival(request))

    def _take_copies(self) -> None:
        self._events += [LoadDone(uid) for uid in self._link.arrived(self._now_s)]

    def _plan(self) -> Plan:
        events = tuple(self._events)
        self._events.clear()
        plan = self._planner.plan(self._now_s, events)
        if self._observe is not None:
            self._observe(self._now_s, events, plan)
        for request_id, *_ in plan.failed:
            self._failed += 1
            self._samples.failed += self._live.pop(request_id).counts
        return plan

    def _start_loads(self, plan: Plan) -> float:
        """Start copies; return for how long the engine stands still for them."""
        stall_s = 0.0
        for load in plan.loads:
            num_bytes = len(load.pages) * self._page_bytes
            stall_s += self._link.start(self._now_s, load.uid, num_bytes)
        return stall_s

    def _step(self, plan: Plan, stall_s: float) -> None:
        """Run what a plan lays out."""
        live = self._live
        duration_s = self._cost.step_s(work_of(plan, live)) + stall_s
        before_s = self._now_s
        now_s = self._now_s = before_s + duration_s
        self._steps += 1
        done = list(plan.decode)
        for chunk in plan.prefill:
            row = live[chunk.request_id]
            if chunk.start + chunk.length == row.context_tokens:
                done.append(chunk.request_id)
        finished = []
        steady = 0  # rows whose last token came with the last step
        for request_id in done:
            row = live[request_id]
            if not row.produced:
                row.first_s = now_s
            elif row.counts:
                if row.token_s == before_s:
                    steady += 1
                else:
                    self._samples.add_gaps(now_s - row.token_s, 1)
            row.produced += 1
            row.context_tokens += 1
            row.token_s = now_s
            if row.produced == row.output_tokens:
                finished.append(request_id)
        if steady:
            self._samples.add_gaps(now_s - before_s, steady)
        for request_id in finished:
            self._finish(live.pop(request_id))
        produced = tuple([(request_id, 1) for request_id in done])
        self._events.append(StepDone(duration_s, produced, tuple(finished)))

    def _finish(self, row: _Live) -> None:
        self._finished += 1
        if row.counts:
            self._samples.add(
                self._now_s,
                ttft_s=row.first_s - row.arrival_s,
                e2e_s=self._now_s - row.arrival_s,
                rank=row.rank,
            )

    def _next_moment(self, due_s: float | None) -> float:
        """Return when an engine without anything to run has to plan again."""
        moments = [s for s in (due_s, self._link.next_s) if s is not None]
        if self._planner.watches_the_clock:
            moments.append(self._now_s + IDLE_TICK_S)
        if not moments:
            raise SimulationError(
                f"{len(self._live)} requests run, but the planner neither runs nor "
                "loads anything for them"
            )
        return min(moments)


def _without(books: Books, before: Books) -> Books:
    """Return books with the counters of earlier ones taken off."""
    names = (
        "hits",
        "misses",
        "evictions",
        "loads",
        "load_failures",
        "bypasses",
        "squashes",
        "growth_squashes",
        "grown_pages",
        "stalls",
    )
    less = {name: getattr(books, name) - getattr(before, name) for name in names}
    return dataclasses.replace(books, **less)
