"""What the planner's bench plays: an engine in a steady state, and a full device."""

import collections
import dataclasses
import random
import time
from collections.abc import Sequence

from jchameleon.config import RESERVED_PAGES
from jchameleon.runtime.policy.estimator import LOAD_PRIOR
from jchameleon.runtime.policy.events import (
    AdapterPinned,
    AdapterRegistered,
    Arrival,
    Event,
    LoadDone,
    StepDone,
)
from jchameleon.runtime.policy.histogram import Histogram
from jchameleon.runtime.policy.limits import PlannerConfig
from jchameleon.runtime.policy.plan import Plan
from jchameleon.runtime.policy.planner import Planner
from jchameleon.runtime.policy.pool import PagePool
from jchameleon.runtime.policy.presets import build_policies, load_policy
from jchameleon.runtime.policy.registry import create_policy
from jchameleon.runtime.policy.request import Request
from jchameleon.runtime.policy.residency import Residency
from jchameleon.runtime.policy.space import Space

STEP_S = 0.03
BLOCK_TOKENS = 16
MEAN_PROMPT_TOKENS = 256
MEAN_OUTPUT_TOKENS = 128
RANKS = (8, 16, 32, 64, 128)
PAGES_PER_CHUNK = 2  # rank 8 on q, k, v, o of a 7B model
MEAN_ADAPTER_PAGES = PAGES_PER_CHUNK * sum(RANKS) // 8 // len(RANKS)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is run; `queued` is in increasing order.

    Attributes:
      queued: lengths of the line; the bars hold for `bar_queued`, growth is from the
        first to the last.
      resident: adapters that fit the pool beside the running requests, about.
      plans: timed calls of each policy and line, in `rounds` parts that take turns.
      refreshes, evictions: timed ones.
      prefix_cache: requests have keys for it; half of what an adapter is asked begins
        alike, and what they leave fills the pool.
    """

    policies: tuple[str, ...] = (
        "chameleon",
        "adaptive",
        "chameleon-nosched",
        "s-lora",
        "sjf",
        "vtc",
        "fifo-lru",
        "histogram",
    )
    queued: tuple[int, ...] = (1_000, 10_000, 100_000)
    bar_queued: int = 10_000
    running: int = 256
    adapters: int = 10_000
    resident: int = 4_000
    plans: int = 2_000
    rounds: int = 10
    warm_up_plans: int = 400
    refreshes: int = 20
    evictions: int = 1_000
    seed: int = 0
    prefix_cache: bool = False


class Stopwatch:
    """Times its `with` block: wall time, and time that this thread had a core.

    The second leaves out what others took from a machine that is not idle.
    """

    __slots__ = ("wall_s", "cpu_s")

    def __enter__(self) -> "Stopwatch":
        self.cpu_s = -time.thread_time()
        self.wall_s = -time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.wall_s += time.perf_counter()
        self.cpu_s += time.thread_time()


class SteadyEngine:
    """Plays an engine whose line never gets shorter, and times its planner."""

    def __init__(self, policy: str, queued: int, settings: Settings) -> None:
        """Fill pool, rows and line; the first refresh of lanes is behind it then."""
        config = load_policy(policy)
        policies = build_policies(config)
        kv_pages = settings.running * (MEAN_PROMPT_TOKENS + 2 * MEAN_OUTPUT_TOKENS)
        self._planner = Planner(
            PlannerConfig(
                num_pages=RESERVED_PAGES
                + kv_pages // BLOCK_TOKENS
                + settings.resident * MEAN_ADAPTER_PAGES,
                block_tokens=BLOCK_TOKENS,
                max_running=settings.running,
                max_batch_tokens=2_048 + settings.running,
                max_loads_in_flight=4,
                prefill_tile_tokens=64,
                kv_reserve=config.kv_reserve,
                max_squashes=config.max_squashes,
            ),
            **policies,
        )
        self.has_lanes = hasattr(policies["admission"], "lanes")
        self._settings = settings
        self._queued = queued
        self._rng = random.Random(settings.seed)
        self._now_s = 0.0
        self._events: list[Event] = []
        self._waiting = 0
        self._num_arrived = 0
        self._lengths: dict[str, int] = {}
        self._prompts: dict[str, int] = {}
        self._produced: dict[str, int] = {}
        self._keyed: dict[str, int] = {}  # tokens whose blocks have keys
        self.totals: collections.Counter[str] = collections.Counter()
        self._load_adapters()
        for _ in range(settings.warm_up_plans):
            self.step()
        self.step(wait_s=60.0)  # lanes are cut for the first time
        for _ in range(settings.warm_up_plans):
            self.step()
        self.totals.clear()

    def step(self, *, wait_s: float = STEP_S) -> Stopwatch:
        """Run one iteration and return what its plan took."""
        arrivals = self._queued - self._waiting
        self._events += [Arrival(self._new_request()) for _ in range(arrivals)]
        events, self._events = tuple(self._events), []
        self._now_s += wait_s
        with Stopwatch() as took:
            plan = self._planner.plan(self._now_s, events)
        self._waiting += arrivals + len(plan.squashed)
        self._waiting -= len(plan.admitted) + len(plan.failed)
        self.totals.update(
            plans=1,
            arrivals=arrivals,
            admitted=len(plan.admitted),
            evicted=len(plan.evicted),
            loads=len(plan.loads),
            decoded=len(plan.decode),
        )
        self._execute(plan)
        return took

    def state(self) -> dict[str, float]:
        """Return how full everything is, and the events per plan since the warm-up."""
        books = self._planner.books()
        self._planner.check()
        plans = max(self.totals["plans"], 1)
        return {
            "waiting": books.waiting,
            "running": books.running,
            "free_pages": books.free_pages,
            "resident_pages": books.resident_pages,
            "cached_pages": books.cached_pages,
            **{f"{k}_per_plan": n / plans for k, n in self.totals.items()},
        }

    def _load_adapters(self) -> None:
        """Register all and make as many resident as the pool is laid out for."""
        settings = self._settings
        ranks = [self._rng.choice(RANKS) for _ in range(settings.adapters)]
        self._events = [
            AdapterRegistered(f"adapter-{i}", rank, PAGES_PER_CHUNK * rank // 8)
            for i, rank in enumerate(ranks)
        ]
        uids = [f"adapter-{i}" for i in range(settings.resident * 9 // 10)]
        self._events += [AdapterPinned(uid, True) for uid in uids]
        queued, self._queued = self._queued, 0
        while not self.totals["plans"] or self._events:
            self.step()
        self._events = [AdapterPinned(uid, False) for uid in uids]
        self._queued = queued

    def _new_request(self) -> Request:
        rng = self._rng
        request_id = f"request-{self._num_arrived}"
        self._num_arrived += 1
        uid = f"adapter-{rng.randrange(self._settings.adapters)}"
        prompt_tokens = rng.randint(16, 2 * MEAN_PROMPT_TOKENS - 16)
        length = rng.randint(1, 2 * MEAN_OUTPUT_TOKENS - 1)
        self._prompts[request_id] = prompt_tokens
        self._lengths[request_id] = length
        self._produced[request_id] = 0
        self._keyed[request_id] = prompt_tokens
        return Request(
            request_id=request_id,
            prompt_tokens=prompt_tokens,
            max_tokens=2 * MEAN_OUTPUT_TOKENS,
            adapter_uid=uid,
            arrival_s=self._now_s,
            expected_tokens=length,
            block_keys=self._block_keys(request_id, uid, prompt_tokens),
        )

    def _block_keys(
        self, request_id: str, uid: str, prompt_tokens: int
    ) -> tuple[str, ...]:
        if not self._settings.prefix_cache:
            return ()
        shared = MEAN_PROMPT_TOKENS // 2 // BLOCK_TOKENS
        return tuple(
            f"{uid if block < shared else request_id}/{block}"
            for block in range(prompt_tokens // BLOCK_TOKENS)
        )

    def _filled_keys(self, done: Sequence[str]) -> tuple[tuple[str, str], ...]:
        """Return keys of the blocks that a step filled with output."""
        if not self._settings.prefix_cache:
            return ()
        keys = []
        for request_id in done:
            tokens = self._prompts[request_id] + self._produced[request_id]
            # A request that was squashed fills some of its blocks again.
            if tokens % BLOCK_TOKENS == 0 and tokens > self._keyed[request_id]:
                self._keyed[request_id] = tokens
                keys.append((request_id, f"{request_id}/{tokens}"))
        return tuple(keys)

    def _execute(self, plan: Plan) -> None:
        self._events += [LoadDone(load.uid) for load in plan.loads]
        for request_id, *_ in plan.failed:
            self._forget(request_id)
        done = list(plan.decode)
        for chunk in plan.prefill:
            tokens = self._prompts[chunk.request_id] + self._produced[chunk.request_id]
            if chunk.start + chunk.length == tokens:
                done.append(chunk.request_id)
        keys = self._filled_keys(done)
        finished = []
        for request_id in done:
            self._produced[request_id] += 1
            if self._produced[request_id] == self._lengths[request_id]:
                finished.append(request_id)
                self._forget(request_id)
        if done or plan.prefill:
            produced = tuple((request_id, 1) for request_id in done)
            step_s = STEP_S * self._rng.uniform(0.9, 1.1)
            self._events.append(StepDone(step_s, produced, tuple(finished), keys))

    def _forget(self, request_id: str) -> None:
        for table in (self._prompts, self._lengths, self._produced, self._keyed):
            del table[request_id]


class FullDevice:
    """All adapters resident and idle in a full pool; one victim at a time."""

    def __init__(self, eviction: str, settings: Settings) -> None:
        rng = random.Random(settings.seed)
        ranks = [rng.choice(RANKS) for _ in range(settings.adapters)]
        pages = [PAGES_PER_CHUNK * rank // 8 for rank in ranks]
        pool = PagePool(RESERVED_PAGES + sum(pages))
        self._residency = Residency(pool)
        policy = create_policy("eviction", eviction)
        self._used = getattr(policy, "used", None)
        self._space = Space(pool, self._residency, policy)
        self._residency.candidates.load_line = LOAD_PRIOR
        self._rng = rng
        self._now_s = 0.0
        for i, (rank, num_pages) in enumerate(zip(ranks, pages, strict=True)):
            self._residency.register(f"adapter-{i}", rank, num_pages)
            self._load(f"adapter-{i}")
        for i in range(0, settings.adapters, 10):  # some are wanted, and go last
            self._residency.add_queued(f"adapter-{i}")
        self._uids = self._residency.uids()
        for _ in range(2 * settings.adapters):
            self._use(rng.choice(self._uids))

    def evict(self) -> Stopwatch:
        """Return what it takes to free one page; load the victim again."""
        for _ in range(3):
            self._use(self._rng.choice(self._uids))
        self._now_s += STEP_S
        self._residency.advance(self._now_s)
        with Stopwatch() as took:
            gone = self._space.free(1)
        (victim,) = gone
        self._load(victim)
        self._use(victim)
        return took

    def _load(self, uid: str) -> None:
        self._residency.pin(uid, pinned=True)
        self._residency.reserve(self._residency.get(uid))
        self._residency.start_next_load()
        self._residency.finish_load(uid, failed=False, now_s=self._now_s)
        self._residency.pin(uid, pinned=False)

    def _use(self, uid: str) -> None:
        adapter = self._residency.get(uid)
        self._residency.acquire(adapter, self._now_s)
        if self._used is not None:
            self._used(adapter.order)
        self._residency.release(adapter, self._now_s)


@dataclasses.dataclass(kw_only=True, slots=True)
class PeriodicView:
    """What the histogram sees of adapters that come back every ten seconds."""

    now_s: float = 0.0
    waiting: Sequence[Request] = ()
    running: Sequence[Request] = ()
    arrived: Sequence[Request] = ()
    ended: Sequence[Request] = ()


def time_histogram(settings: Settings) -> list[Stopwatch]:
    """Return what `observe` and all `candidates` take with every window open."""
    policy, view = Histogram(), PeriodicView()
    rng = random.Random(settings.seed)
    requests = [
        Request(
            request_id=f"request-{i}",
            prompt_tokens=1,
            max_tokens=1,
            adapter_uid=f"adapter-{i}",
        )
        for i in range(settings.adapters)
    ]
    for _ in range(12):
        view.arrived, view.ended = requests, ()
        policy.observe(view)
        view.arrived, view.ended = (), requests
        policy.observe(view)
        view.now_s += 10.0
    view.arrived, view.ended = (), ()
    policy.observe(view)  # opens all windows
    times = []
    coming: list[Request] = []
    for _ in range(settings.evictions):
        view.ended, view.arrived = coming, rng.sample(requests, 2)
        coming = list(view.arrived)
        with Stopwatch() as took:
            policy.observe(view)
            for _ in policy.candidates(view):
                pass
        times.append(took)
        view.now_s += 1e-3
    return times
