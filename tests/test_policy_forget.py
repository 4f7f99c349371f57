"""Policies that hear of adapters that are gone: they act as if those had never been."""

import dataclasses
import random

import numpy as np
import pytest
from planner_driver import Driver, planner_of, request_of

from jchameleon.errors import PolicyError
from jchameleon.runtime.policy.admission import Fifo
from jchameleon.runtime.policy.events import (
    AdapterRegistered,
    AdapterUnregistered,
    Arrival,
    LoadDone,
    StepDone,
)
from jchameleon.runtime.policy.eviction import Gdsf, Lru
from jchameleon.runtime.policy.histogram import Histogram
from jchameleon.runtime.policy.predictor import Quantile


def driver_of(**policies):
    return Driver(planner_of(**policies))


@pytest.mark.parametrize("seed", range(5))
def test_gdsf_scores_as_if_the_gone_had_never_been(seed):
    """Two policies see the same uses; only one has had predecessors on the orders."""
    rng = random.Random(seed)
    used, fresh = Gdsf(), Gdsf()
    table = dataclasses.make_dataclass(
        "Table", ["order", "largest_order", "load_line", "per_page"]
    )(np.arange(6), 5, (0.5, 0.25), 1 / np.array([1.0, 2, 3, 4, 5, 6]))
    for order in rng.choices(range(6), k=20):
        used.used(order)
    used.score(table)
    for order in range(6):
        used.forget(order)
    used.forget(99)  # it never heard of
    for _ in range(30):
        order = rng.randrange(6)
        for policy in (used, fresh):
            policy.used(order)
        np.testing.assert_array_equal(used.score(table), fresh.score(table))
        if rng.random() < 0.3:
            for policy in (used, fresh):
                policy.evicted(order, float(fresh.score(table)[order]))


def test_quantile_forgets_the_adapter_and_not_what_all_did():
    predictor = Quantile(min_samples=2)
    for tokens in (3, 4, 5):
        predictor.observe(request_of("r", adapter_uid="a", max_tokens=90), tokens)
    for _ in range(10):
        predictor.observe(request_of("r", adapter_uid="b", max_tokens=90), 50)
    ask = request_of("x", adapter_uid="a", max_tokens=90)
    assert predictor.predict(ask) == 5
    predictor.forget("a")
    predictor.forget("never seen")
    assert predictor.predict(ask) == 50, "as for an adapter without outputs"


def periodic_histogram():
    return Histogram(bin_s=0.05, bins=40, min_samples=3, min_cv=0.5)


def test_histogram_names_the_gone_no_more_and_starts_anew():
    planner = planner_of(prefetch=periodic_histogram())
    planner.plan(0.0, [AdapterRegistered("a", 8, 3)])
    now_s = 0.0

    def request(name):
        nonlocal now_s
        plan = planner.plan(now_s, [Arrival(request_of(name, 4, 1, "a"))])
        events = [LoadDone(load.uid) for load in plan.loads]
        events = events or [StepDone(0.01, ((name, 1),), (name,))]
        if not isinstance(events[0], StepDone):
            planner.plan(now_s + 0.01, events)
            events = [StepDone(0.01, ((name, 1),), (name,))]
        planner.plan(now_s + 0.02, events)
        now_s += 0.5

    for index in range(5):
        request(f"r{index}")
    policy = planner._prefetch
    planner.plan(now_s, [])
    assert [uid for _, _, uid in policy._open] == ["a"], "it is due about now"
    planner.plan(now_s, [AdapterUnregistered("a")])
    assert policy._open == [] and policy._adapters == {}
    for step in range(100):  # past windows come up and find nobody
        planner.plan(now_s + step * 0.1, [])
    now_s += 20
    planner.plan(now_s, [AdapterRegistered("a", 8, 3)])
    request("again")
    assert policy._adapters["a"].idle_times.in_bounds == 0


class Forgetful:
    """Counts what it hears, as any kind of policy that is not eviction."""

    heard: list

    def __init__(self):
        self.heard = []

    def forget(self, which):
        self.heard.append(which)


class Admits(Forgetful, Fifo):
    pass


class Evicts(Forgetful, Lru):
    pass


class Names(Forgetful):
    def candidates(self, view):
        del view
        return ("gone", "nonsense", "a")


def test_policies_with_the_method_hear_of_the_gone_and_others_need_none():
    policies = {"admission": Admits(), "eviction": Evicts(), "prefetch": Names()}
    driver = driver_of(**policies)
    driver.register("a", 2)
    driver.register("gone", 2)
    driver.tick()
    driver.tick()
    driver.unregister("gone")
    driver.tick()
    for _ in range(3):  # the prefetch policy goes on naming it
        driver.tick()
    heard = {kind: policy.heard for kind, policy in policies.items()}
    assert heard == {"admission": ["gone"], "eviction": [1], "prefetch": ["gone"]}


def test_policy_that_fails_to_forget_is_named():
    class Stubborn(Lru):
        def forget(self, order):
            raise LookupError("never")

    driver = driver_of(eviction=Stubborn())
    driver.register("a", 2)
    driver.tick()
    driver.unregister("a")
    with pytest.raises(PolicyError, match="Stubborn raised LookupError: never"):
        driver.tick()


def test_agenda_of_the_gone_is_cleared_when_it_is_the_majority():
    policy = Histogram(bin_s=0.05, bins=40, min_samples=1, min_cv=0.5)
    view = dataclasses.make_dataclass("View", ["now_s", "arrived", "ended"])
    now_s = 0.0
    for index in range(500):
        uid = f"uid-{index}"
        for wait_s in (0.0, 0.3):
            request = request_of("r", adapter_uid=uid)
            policy.observe(view(now_s + wait_s, [request], []))
            policy.observe(view(now_s + wait_s, [], [request]))
        if index % 2:  # half of them stay
            policy.forget(uid)
        now_s += 1e-6
    assert len(policy._agenda) <= 4 * 250 + 64
    known = {item[3] for item in policy._agenda} & policy._adapters.keys()
    assert len(known) == 250, "windows of those that stay are kept"
