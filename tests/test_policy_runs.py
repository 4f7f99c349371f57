"""Random runs under every preset: everyone ends, books balance, replay is identical."""

import collections
import dataclasses
import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from planner_driver import CONFIG, Driver

from jchameleon.runtime.policy.chameleon import Chameleon
from jchameleon.runtime.policy.planner import Planner
from jchameleon.runtime.policy.presets import build_policies, load_policy
from jchameleon.runtime.policy.request import Request

# uid -> pages; together far more than the pool's 48.
ADAPTERS = {"a": 4, "b": 8, "c": 16, "d": 24, "bad": 8}
LATER = {"e": 4, "f": 12}
SIZES = ADAPTERS | LATER
MOST_TOKENS = 16 * 20
MAX_OVERTAKEN = 12


def table_of(preset):
    """Return a preset with its time constants scaled to runs of a few seconds."""
    policy = load_policy(preset)
    table = {"preset": preset, "source": preset}
    if policy.admission.name == "chameleon":
        table["admission"] = {
            "refresh_s": 0.5,
            "first_refresh_s": 0.1,
            "min_samples": 4,
            "slo_s": 1.0,
            "max_overtaken": MAX_OVERTAKEN,
        }
        if preset == "gdsf":
            table["admission"] |= {"lanes": "elbow", "recharge": True}
    if policy.admission.name == "paced":
        table["admission"] = {"max_overtaken": MAX_OVERTAKEN}
    return table


def driver_of(preset):
    policy = load_policy(table_of(preset))
    config = dataclasses.replace(
        CONFIG,
        num_pages=50,
        max_loads_in_flight=2,
        kv_reserve=policy.kv_reserve,
        max_squashes=policy.max_squashes,
    )
    driver = Driver(Planner(config, **build_policies(policy)))
    driver.load_steps = lambda uid: SIZES[uid] // 4
    driver.fails = lambda uid: uid == "bad"
    for uid, pages in ADAPTERS.items():
        driver.register(uid, pages, rank=2 * pages)
    driver.tick()
    return driver


class Run(RuleBasedStateMachine):
    """What callers, loads and rows may do, in any order; `Driver` checks every plan."""

    preset = "chameleon"
    bounded = True

    @initialize()
    def start(self):
        self.driver = driver_of(self.preset)
        self.names = 0
        self.order = []
        self.overtaken = {}
        self.registered = set(ADAPTERS)

    @rule(
        prompt_tokens=st.integers(1, 150),
        max_tokens=st.integers(1, 150),
        uid=st.sampled_from([None, *SIZES]),
        share=st.floats(0.01, 1),
        count=st.integers(1, 4),
    )
    def arrive(self, prompt_tokens, max_tokens, uid, share, count):
        uid = uid if uid in self.registered else None
        for _ in range(count):
            request = Request(
                request_id=f"r{self.names}",
                prompt_tokens=prompt_tokens,
                max_tokens=max_tokens,
                adapter_uid=uid,
                arrival_s=self.driver.step * 0.01,
                expected_tokens=max(1, round(share * max_tokens)),
            )
            self.names += 1
            self.order.append(request.request_id)
            self.overtaken[request.request_id] = 0
            self.driver.arrive(request, length=request.expected_tokens)

    @precondition(lambda self: self.driver.requests)
    @rule(data=st.data())
    def cancel(self, data):
        self.driver.cancel(data.draw(st.sampled_from(self.order)))

    @rule(uid=st.sampled_from(sorted(SIZES)))
    def come_or_go(self, uid):
        """Register an adapter, or unregister it unless an open request names it."""
        if uid not in self.registered:
            self.registered.add(uid)
            self.driver.register(uid, SIZES[uid], rank=2 * SIZES[uid])
        elif not self.driver.is_named(uid):
            self.registered.discard(uid)
            self.driver.unregister(uid)

    @rule(count=st.integers(1, 8))
    def steps(self, count):
        for _ in range(count):
            self.tick()

    @rule()
    def lose_the_device(self):
        """In the next step, of which half is saved."""
        step = self.driver.step
        self.driver.breaks = lambda at: at == step
        self.tick()

    @rule(uid=st.sampled_from(["a", "b"]), pinned=st.booleans())
    def pin(self, uid, pinned):
        self.tick()
        if uid not in self.registered:
            return
        if not pinned or self.driver.planner.why_not_pin(uid, {}) is None:
            # Arrivals that the planner has not seen yet might not fit beside it.
            self.tick()
            if not pinned or self.driver.planner.why_not_pin(uid, {}) is None:
                self.driver.pin(uid, pinned)
                self.tick()

    def tick(self):
        waiting = set(self.waiting())
        plan = self.driver.tick()
        for request_id in plan.admitted:
            waiting.discard(request_id)
            age = self.order.index(request_id)
            for other in waiting:
                if self.order.index(other) < age:
                    self.overtaken[other] += 1

    def waiting(self):
        driver = self.driver
        return [
            name
            for name in self.order
            if name not in driver.outcome and name not in driver.admission_order
        ]

    @invariant()
    def nobody_is_overtaken_beyond_the_bound(self):
        if self.bounded and getattr(self, "overtaken", None):
            assert max(self.overtaken.values()) <= MAX_OVERTAKEN

    @invariant()
    def lanes_are_charged_what_runs(self):
        if not hasattr(self, "driver"):
            return
        policy = self.driver.planner._admission
        if not isinstance(policy, Chameleon):
            return
        planner, entries = self.driver.planner, policy._entries
        capacity = planner._capacity
        lanes = policy.lanes()
        total = max(0, capacity.pages) * capacity.block_tokens
        assert sum(lane.quota_tokens for lane in lanes) in (total, policy._total_tokens)
        for index, lane in enumerate(lanes):
            mine = [e for e in entries.values() if e.lane == index and e.running]
            assert lane.used_tokens == sum(e.cost_tokens for e in mine)
            assert lane.running == len(mine)
        running = {name for name, entry in entries.items() if entry.running}
        # Those that ended with the last step are still to be reported.
        assert running >= set(self.driver.admission_order)

    def teardown(self):
        if not hasattr(self, "driver"):
            return
        driver = self.driver
        for uid in sorted(driver.pinned):
            driver.pin(uid, pinned=False)
        for _ in range(30_000):
            if len(driver.outcome) == len(driver.requests):
                break
            self.tick()
        left = driver.requests.keys() - driver.outcome.keys()
        assert not left, f"{sorted(left)} never ended"
        self.nobody_is_overtaken_beyond_the_bound()
        for name, outcome in driver.outcome.items():
            if outcome == "finished":
                assert driver.produced[name] == driver.lengths[name]
        driver.tick()
        books = driver.planner.books()
        assert books.kv_pages == books.running == books.waiting == 0
        for lane in books.lanes:
            assert lane.used_tokens == lane.waiting == lane.running == 0
        replay(driver, self.preset)


def replay(driver, preset):
    planner = Planner(
        driver.planner.config, **build_policies(load_policy(table_of(preset)))
    )
    for step, (events, plan) in enumerate(zip(driver.log, driver.plans, strict=True)):
        assert planner.plan(step * 0.01, events) == plan, f"step {step} differs"


PRESETS = {
    "chameleon": True,
    "adaptive": True,
    "chameleon-nocache": True,
    "chameleon-nosched": True,
    "gdsf": True,
    "histogram": True,
    "s-lora": True,
    "sjf": False,
    "vtc": False,
}


@pytest.mark.parametrize("preset", PRESETS)
def test_any_run_ends_and_balances(preset):
    machine = type("Run", (Run,), {"preset": preset, "bounded": PRESETS[preset]})
    machine.TestCase.settings = settings(
        max_examples=15,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    machine.TestCase().runTest()


def crowded_run(preset, seed):
    """Return a driver after 400 steps of more than it can take, and the way out."""
    rng = random.Random(seed)
    driver = driver_of(preset)
    for step in range(400):
        if rng.random() < 0.35:
            max_tokens = rng.randint(1, 150)
            is_big = rng.random() < 0.3
            names = ["d", "c"] if is_big else [None, "a", "b", "a"]
            request = Request(
                request_id=f"r{step}",
                prompt_tokens=rng.randint(1, 150),
                max_tokens=max_tokens,
                adapter_uid=rng.choice(names),
                expected_tokens=rng.randint(1, max_tokens),
            )
            driver.arrive(request, length=request.expected_tokens)
        driver.tick()
    driver.drain(20_000)
    return driver


def test_crowded_runs_reach_every_mechanism_and_replay():
    totals = collections.Counter()
    for seed in range(4):
        driver = crowded_run("gdsf", seed)
        replay(driver, "gdsf")
        books = driver.planner.books()
        totals.update(dataclasses.asdict(books) | {"lanes": len(books.lanes) > 1})
        totals["bypass_squashes"] += books.squashes - books.growth_squashes
        assert books.bypasses == sum(len(plan.bypasses) for plan in driver.plans)
        assert books.squashes == sum(len(plan.squashed) for plan in driver.plans)
    for mechanism in ("bypasses", "bypass_squashes", "grown_pages", "lanes"):
        assert totals[mechanism] > 0, f"{mechanism} never happened"
    assert totals["evictions"] > 50 and totals["hits"] > 50 and totals["misses"] > 50
