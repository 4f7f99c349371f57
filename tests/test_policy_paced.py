"""Paced admission: its turns, the room it keeps, and who may pass whom."""

import collections
import dataclasses

import pytest
from plan_traffic import CONFIG as TRAFFIC_CONFIG
from plan_traffic import LooseEngine
from planner_driver import CONFIG, Driver, planner_of, request_of
from sim_world import adapters_of, drawn, simulator_of

from jchameleon.errors import ConfigError
from jchameleon.runtime.policy.eviction import Gdsf
from jchameleon.runtime.policy.paced import Paced
from jchameleon.runtime.policy.predictor import Oracle, Quantile
from jchameleon.runtime.policy.prefetch import Queued

WIDE = dataclasses.replace(CONFIG, num_pages=402, max_running=64, max_batch_tokens=512)
"""400 pages of 16 tokens."""


def driver_of(config=WIDE, **options):
    return Driver(planner_of(config, admission=Paced(**options), predictor=Oracle()))


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("rows_per_step", 0, "1 or above"),
        ("rows_per_step", 2.0, "an integer"),
        ("max_admitted", 0, "1 or above"),
        ("window_requests", -3, "1 or above"),
        ("lookahead_requests", -1, "0 or above"),
        ("max_overtaken", True, "an integer"),
        ("adapter_share", 1, "0 to below 1"),
        ("adapter_share", -0.1, "0 to below 1"),
        ("adapter_share", "half", "0 to below 1"),
        ("adapter_share", float("nan"), "0 to below 1"),
    ],
)
def test_option_out_of_range_is_named_with_its_rule(name, value, rule):
    with pytest.raises(ConfigError) as caught:
        Paced(**{name: value})
    assert str(caught.value).startswith(f"{name}={value!r} must be")
    assert rule in str(caught.value)


def test_who_arrives_while_rows_decode_waits_for_the_next_turn():
    driver = driver_of(rows_per_step=2)
    for i in range(5):
        driver.arrive(request_of(f"early{i}", max_tokens=60))
    # Nobody decodes before the first plan, nor in it: no turn is to be waited for.
    assert len(driver.tick().admitted) == 5
    driver.arrive(request_of("while-prompts-run", max_tokens=60))
    starts = {}
    for step in range(1, 12):
        driver.arrive(request_of(f"late{step}", max_tokens=60))
        if admitted := driver.tick().admitted:
            starts[step] = admitted
    # 5 decode: every 1 + 5 // 2 = 3rd iteration, the first after the one at step 0.
    # Then 9 run, so the next is 1 + 9 // 2 = 5 later.
    assert starts == {
        3: ("while-prompts-run", "late1", "late2", "late3"),
        8: tuple(f"late{i}" for i in range(4, 9)),
    }


def test_no_more_start_at_once_than_the_limit():
    driver = driver_of(rows_per_step=64, max_admitted=3)
    for i in range(8):
        driver.arrive(request_of(f"r{i}", max_tokens=30))
    assert [len(driver.tick().admitted) for _ in range(4)] == [3, 3, 2, 0]


@pytest.mark.parametrize(("pages", "fit"), [(80, 16), (300, 10), (None, 20)])
def test_kv_entries_leave_room_for_the_adapters_in_use_up_to_the_share(pages, fit):
    """Each request takes 20 KV pages; half of 400 is kept, or what is named."""
    driver = driver_of(adapter_share=0.5, max_admitted=64)
    if pages is not None:
        driver.register("a", pages)
        driver.arrive(request_of("named", 20, 5, "a"))
        driver.drain(50)
    for i in range(30):
        driver.arrive(request_of(f"r{i}", 300, 21))
    assert len(driver.tick().admitted) == fit


def test_request_beyond_the_room_starts_when_nothing_else_runs():
    driver = driver_of(adapter_share=0.5)
    driver.register("a", 250)
    driver.arrive(request_of("named", 20, 5, "a"))
    driver.drain(50)
    driver.arrive(request_of("first", 20, 5))
    driver.arrive(request_of("large", 3500, 5))  # 219 pages of 400
    assert driver.tick().admitted == ("first",)
    for _ in range(2000):
        driver.tick()
    assert driver.outcome["large"] == "finished"


def test_forgotten_and_old_adapters_need_no_room():
    for how in ("forget", "window"):
        driver = driver_of(adapter_share=0.5, max_admitted=64, window_requests=30)
        driver.register("a", 300)
        driver.arrive(request_of("named", 20, 5, "a"))
        driver.drain(50)
        if how == "forget":
            driver.unregister("a")
            driver.tick()
        for i in range(30):
            driver.arrive(request_of(f"r{i}", 300, 21))
        # All 400 pages of KV, or, as 300 are named, half of it.
        assert len(driver.tick().admitted) == 20, how


def blocked(**options):
    """A row that uses 20 pages of adapter; the head's 16 do not fit into 32."""
    driver = driver_of(CONFIG, rows_per_step=64, **options)
    for uid, pages in (("held", 20), ("wide", 16), ("slim", 1)):
        driver.register(uid, pages)
    driver.arrive(request_of("runs", 20, 60, "held"))
    driver.tick()
    driver.arrive(request_of("head", 20, 5, "wide"))
    return driver


def test_request_whose_adapter_lacks_pages_is_passed_but_not_beyond_the_bound():
    driver = blocked(max_overtaken=3)
    order = []
    for i in range(5):
        driver.arrive(request_of(f"p{i}", 20, 5, "slim"))
    for _ in range(200):
        order += driver.tick().admitted
    assert order == ["p0", "p1", "p2", "head", "p3", "p4"]


def test_without_overtaking_everyone_waits():
    driver = blocked(max_overtaken=0)
    driver.arrive(request_of("p", 20, 5, "slim"))
    order = []
    for _ in range(200):
        order += driver.tick().admitted
    assert order == ["head", "p"]


def test_lookahead_bounds_how_many_are_passed():
    for lookahead, expected in ((1, ()), (2, ("p",))):
        driver = blocked(lookahead_requests=lookahead)
        driver.arrive(request_of("second", 20, 5, "wide"))
        driver.arrive(request_of("p", 20, 5, "slim"))
        assert driver.tick().admitted == expected


def test_request_that_waits_for_its_copy_holds_nobody_back():
    driver = driver_of(rows_per_step=64)
    driver.load_steps = lambda uid: 50
    driver.register("slow", 4)
    driver.arrive(request_of("cold", 20, 5, "slow"))
    driver.arrive(request_of("warm", 20, 5))
    assert driver.tick().admitted == ("cold", "warm")
    for _ in range(8):
        driver.tick()
    assert driver.outcome == {"warm": "finished"}


class Watched(Paced):
    """Compare every call with books of its own, kept from the view alone."""

    def __init__(self, **options):
        super().__init__(**options)
        self.options = options
        self.seq = {}
        self.named = collections.deque(maxlen=options["window_requests"])
        self.sizes = {}
        self.calls_since_start = 0
        self.times = collections.Counter()
        self.seen = collections.Counter()

    def forget(self, uid):
        super().forget(uid)
        kept = [name for name in self.named if name != uid]
        self.named = collections.deque(kept, self.named.maxlen)

    def admit(self, view):
        for request in view.arrived:
            self.seq[request.request_id] = len(self.seq)
            self.times[request.request_id] = 0
            self.named.append(request.adapter_uid)
            self.sizes[request.adapter_uid] = view.adapter_pages(request)
        self.calls_since_start += 1
        before = view.num_running
        decode = [r for r in view.running if view.produced_tokens(r)]
        waited = list(view.waiting)
        super().admit(view)
        running = list(view.running)
        admitted = running[before:]
        pages = [
            -(-(r.prompt_tokens + view.predicted_tokens(r) - 1) // 4) for r in running
        ]
        assert self._kv_pages == sum(pages)
        for request in admitted:
            for other in waited:
                younger = self.seq[other.request_id] < self.seq[request.request_id]
                if younger and other not in running:
                    urgent = other.priority <= request.priority
                    self.times[other.request_id] += urgent
        assert max(self.times.values(), default=0) <= self.options["max_overtaken"]
        if not admitted:
            return
        assert len(admitted) <= self.options["max_admitted"]
        if decode:
            gap = 1 + before // self.options["rows_per_step"]
            assert self.calls_since_start >= gap
            self.seen["turns"] += gap > 1
        self.calls_since_start = 0
        if len(running) > 1:
            capacity = view.capacity.pages
            kept = self.options["adapter_share"] * capacity
            kept = min(kept, sum(self.sizes[uid] for uid in set(self.named)))
            assert sum(pages) <= capacity - kept
            self.seen["room"] += sum(pages) > capacity - kept - 4
        self.seen["overtaken"] = sum(self.times.values())
        self.seen["most"] = max(self.times.values())


@pytest.mark.parametrize("priorities", [(0,), (-7, 0, 0, 3)])
@pytest.mark.parametrize("loses_device", [False, True])
def test_random_traffic_keeps_every_rule(priorities, loses_device):
    seen = collections.Counter()
    for seed in range(6):
        policy = Watched(
            rows_per_step=2,
            max_admitted=2,
            adapter_share=0.4,
            window_requests=8,
            lookahead_requests=4,
            max_overtaken=3,
        )
        planner = planner_of(
            dataclasses.replace(TRAFFIC_CONFIG, kv_reserve="predicted"),
            admission=policy,
            eviction=Gdsf(),
            predictor=Quantile(quantile=0.5),
            prefetch=Queued(),
        )
        engine = LooseEngine(planner, seed, priorities, loses_device=loses_device)
        for _ in range(400):
            engine.tick()
            planner.check()
        seen += policy.seen
    assert seen["turns"] > 20 and seen["room"] > 20 and seen["overtaken"] > 20
    assert seen["most"] >= 3  # of those that still ran or waited when a run ended


def test_simulator_keeps_adapters_that_first_come_first_served_evicts():
    """Adapters take 48 of 64 pages, a burst of 4 requests 16 KV pages each."""

    def loads(admission):
        policy = {"preset": "adaptive", "admission": admission}
        names = {f"a{i}": 32 for i in range(6)}
        simulator, planner = simulator_of(adapters_of(**names), policy=policy)
        uids = list(names)
        burst = [drawn(5.0 * k, uids[k % 6], 20, 8) for k in range(12)]
        crowd = [drawn(30.0 + 0.01 * i, None, 200, 40) for i in range(8)]
        again = [drawn(90.0 + 5.0 * k, uids[k % 6], 20, 8) for k in range(6)]
        result = simulator.run([*burst, *crowd, *again], max_tokens=64)
        planner.check()
        assert result.finished == len(burst) + len(crowd) + len(again)
        return result.books.loads

    assert loads({"name": "paced", "adapter_share": 0.75}) == 6
    assert loads({"name": "fifo"}) > 6
