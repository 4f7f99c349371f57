"""Pinned adapters: loaded when there is room, never evicted, never in anyone's way."""

import pytest
from planner_driver import CONFIG, Driver, planner_of, request_of

from jchameleon.errors import PolicyError
from jchameleon.runtime.policy.admission import Fifo


def pinning_driver(**adapters):
    driver = Driver(planner_of())
    for uid, num_pages in adapters.items():
        driver.register(uid, num_pages)
    return driver


def test_pinned_adapter_is_loaded_without_a_request_and_then_hit():
    driver = pinning_driver(a=4)
    driver.pin("a")
    assert [load.uid for load in driver.tick().loads] == ["a"]
    driver.tick()
    driver.arrive(request_of("r", adapter_uid="a"))
    assert driver.tick().hits == ("r",)
    assert driver.planner.adapter_stats("a").pinned


def test_pinned_adapter_survives_pressure_and_goes_first_when_unpinned():
    # 32 pages: "big" takes 26 of them, "bigger" 30.
    driver = pinning_driver(a=4, b=4)
    driver.pin("a")
    driver.arrive(request_of("uses-b", adapter_uid="b"))
    driver.drain(20)
    driver.arrive(request_of("big", 16 * 26, 1))
    driver.drain(60)
    assert "a" in driver.resident and "b" not in driver.resident
    driver.pin("a", pinned=False)
    driver.arrive(request_of("bigger", 16 * 30, 1))
    driver.drain(60)
    assert "a" not in driver.resident
    assert not driver.planner.adapter_stats("a").pinned


def test_pin_waits_for_pages_and_evicts_idle_adapters_for_its_own():
    driver = pinning_driver(a=6, idle=6)
    driver.arrive(request_of("warm", adapter_uid="idle"))
    driver.drain(20)
    driver.arrive(request_of("big", 16 * 24, 17))  # 25 of 32 pages
    driver.tick()
    driver.pin("a")
    plan = driver.tick()
    # "idle" (6) and one free page beside "big": enough once "idle" has gone.
    assert plan.evicted == ("idle",) and [load.uid for load in plan.loads] == ["a"]


def test_pin_that_does_not_fit_yet_is_loaded_when_pages_return():
    driver = pinning_driver(a=10)
    driver.arrive(request_of("big", 16 * 24, 17))
    driver.tick()
    driver.pin("a")
    assert not driver.tick().loads
    while "big" not in driver.outcome:
        assert not driver.tick().loads
    assert [load.uid for load in driver.tick().loads] == ["a"]


def test_failed_load_of_a_pinned_adapter_is_not_repeated_by_itself():
    driver = pinning_driver(a=4)
    driver.fails = lambda uid: True
    driver.pin("a")
    driver.tick()
    assert [driver.tick().loads for _ in range(5)] == [()] * 5
    driver.fails = lambda uid: False
    driver.arrive(request_of("r", adapter_uid="a"))
    driver.drain(20)
    assert driver.outcome == {"r": "finished"} and "a" in driver.resident


def test_request_that_cannot_fit_beside_pins_is_refused_with_their_pages():
    driver = pinning_driver(a=20, b=10)
    planner = driver.planner
    driver.pin("a")
    driver.tick()
    assert planner.can_ever_fit(16, 1, 10) is None
    reason = planner.can_ever_fit(16 * 3, 1, 10)
    assert "the pool has 12 beside 20 pages of pinned adapters" in reason
    # The pinned one's own pages are not counted twice.
    assert planner.can_ever_fit(16 * 12, 1, 20, pinned=True) is None
    driver.arrive(request_of("huge", 16 * 13, 1, "a"))
    assert [request_id for request_id, _ in driver.tick().failed] == ["huge"]


def test_pin_that_would_strand_an_accepted_request_is_refused_with_numbers():
    driver = pinning_driver(a=10, b=10)
    driver.arrive(request_of("big", 16 * 20, 17, "b"))  # 21 KV pages and 10
    driver.tick()
    reason = driver.planner.why_not_pin("a")
    assert "keep 10 pages from the pool of 32, and a request needs 31" in reason
    assert driver.planner.why_not_pin("b") is None, "its own adapter may be pinned"
    driver.drain(60)
    driver.tick()
    assert driver.planner.why_not_pin("a") is None
    assert not driver.planner.is_pinned("a")
    with pytest.raises(ValueError, match="never registered"):
        driver.planner.why_not_pin("c")
    assert not driver.planner.is_pinned("c")


class Broken:
    """Each method of each protocol raises."""

    def admit(self, view):
        raise RuntimeError("no idea")

    predict = observe = score = candidates = admit


@pytest.mark.parametrize("kind", ["admission", "predictor", "prefetch"])
def test_policy_that_raises_is_named(kind):
    driver = Driver(planner_of(**{kind: Broken()}))
    driver.arrive(request_of("r"))
    named = f"{kind} policy test_policy_pins:Broken raised"
    with pytest.raises(PolicyError, match=named):
        driver.tick()
        driver.drain(10)


class NotANumber:
    def score(self, table):
        return [float("nan")] * len(table)


class WrongMask:
    def score(self, table):
        return table.last_used_s

    def expired(self, table):
        return [1.0] * len(table)


@pytest.mark.parametrize("policy", [Broken, NotANumber, WrongMask])
def test_eviction_policy_that_raises_or_lies_is_named_not_the_admission(policy):
    driver = Driver(planner_of(CONFIG, eviction=policy(), admission=Fifo()))
    driver.register("a", 20)
    driver.arrive(request_of("r", adapter_uid="a"))
    with pytest.raises(PolicyError, match=f"eviction policy .*{policy.__name__}"):
        driver.drain(20)
        driver.arrive(request_of("big", 16 * 30, 1))
        driver.drain(20)
