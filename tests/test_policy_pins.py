"""Pinned adapters: loaded when there is room, never evicted, never in anyone's way."""

import dataclasses

import pytest
from planner_driver import CONFIG, Driver, planner_of, request_of

from jchameleon.errors import PolicyError
from jchameleon.runtime.policy.admission import Fifo
from jchameleon.runtime.policy.events import AdapterPinned, AdapterRegistered
from jchameleon.runtime.policy.predictor import MaxTokens


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
    assert [request_id for request_id, *_ in driver.tick().failed] == ["huge"]


def test_pages_of_a_pinned_adapter_are_held_back_from_later_admissions():
    driver = pinning_driver(a=20)
    for i in range(12):
        driver.arrive(request_of(f"r{i}", 40, 30))  # 5 pages each, 8 at once
    driver.tick()
    driver.pin("a")
    meanwhile = []
    while "a" not in driver.resident:
        meanwhile += driver.tick().admitted
    # When 27 pages came free at once, one could start beside its 20.
    assert len(meanwhile) <= 1 and len(driver.outcome) < 12
    driver.drain(200)


def test_row_that_outgrows_is_not_held_back_by_a_pin():
    config = dataclasses.replace(CONFIG, num_pages=12, kv_reserve="predicted")

    class One(MaxTokens):
        def predict(self, request):
            return 1

    driver = Driver(planner_of(config, predictor=One()))
    driver.register("a", 5)
    driver.arrive(request_of("r", 90, 60))  # 6 pages now, 10 in the end
    driver.tick()
    driver.pin("a")
    driver.drain(100)
    assert driver.outcome == {"r": "finished"}
    driver.tick()
    driver.tick()
    assert "a" in driver.resident


def test_decisions_since_the_last_plan_count_for_a_pin():
    planner = pinning_driver(a=20, b=20, c=20).planner
    planner.plan(0.0, [AdapterRegistered(uid, 8, 20) for uid in "abc"])
    assert planner.why_not_pin("b", {}) is None
    assert "keep 40 pages of the pool's 32" in planner.why_not_pin("b", {"a": True})
    planner.plan(0.1, [AdapterPinned("a", True)])
    assert planner.why_not_pin("b", {}) is not None
    assert planner.why_not_pin("b", {"a": False}) is None


def test_pin_that_would_strand_an_accepted_request_is_refused_with_numbers():
    driver = pinning_driver(a=10, b=10)
    driver.arrive(request_of("big", 16 * 20, 17, "b"))  # 21 KV pages and 10
    driver.tick()
    reason = driver.planner.why_not_pin("a", {})
    assert "keep 10 pages of the pool's 32, and a request needs 31" in reason
    assert driver.planner.why_not_pin("b", {}) is None, "its own adapter may be pinned"
    driver.drain(60)
    driver.tick()
    assert driver.planner.why_not_pin("a", {}) is None
    assert not driver.planner.is_pinned("a")
    with pytest.raises(ValueError, match="never registered"):
        driver.planner.why_not_pin("c", {})
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


class Chatty:
    """Do what the protocol rules out, one thing at a time."""

    def __init__(self, deed):
        self.deed = deed

    def admit(self, view):
        requests = list(view.waiting)
        if len(requests) == 2:
            self.deed(view, *requests)


def squash_and_reject(view, first, second):
    view.try_admit(first)
    view.reject(second, "no")
    view.try_admit(second)


DEEDS = {
    "was rejected": squash_and_reject,
    "cannot pass itself": lambda v, a, b: v.try_admit(a, passing=a),
    "does not wait": lambda v, a, b: v.try_admit(a) and v.try_admit(b, passing=a),
    "must both be there": lambda v, a, b: v.try_admit(a, lane=1),
    "lane 0 or above": lambda v, a, b: v.try_admit(a, lane=-1, wrs=0.5),
    "cannot be interpreted": lambda v, a, b: v.try_admit(a, lane=0.5, wrs=0.5),
    "must be a text": lambda v, a, b: v.reject(a, None),
}


@pytest.mark.parametrize("message", DEEDS)
def test_admission_that_does_what_is_ruled_out_is_named(message):
    driver = Driver(planner_of(admission=Chatty(DEEDS[message])))
    driver.arrive(request_of("a"))
    driver.arrive(request_of("b"))
    with pytest.raises(PolicyError, match=f"admission policy .*Chatty .*{message}"):
        driver.tick()


def test_request_squashed_and_rejected_in_one_call_names_the_policy():
    class Fickle:
        def admit(self, view):
            for request in view.running:
                assert view.squash(request, "on second thoughts")
                view.reject(request, "no")
            for request in view.waiting:
                view.try_admit(request)

    driver = Driver(planner_of(admission=Fickle()))
    driver.arrive(request_of("a"))
    driver.tick()
    with pytest.raises(PolicyError, match="was squashed just now"):
        driver.tick()


def test_admission_may_squash_while_it_looks_at_what_runs():
    class Restless(Fifo):
        def admit(self, view):
            if view.now_s == 0.03:
                assert [view.squash(r, "restless") for r in view.running] == [True] * 3
            super().admit(view)

    driver = Driver(planner_of(admission=Restless()))
    for name in "abc":
        driver.arrive(request_of(name))
    driver.drain(40)
    assert driver.squashes == {"a": 1, "b": 1, "c": 1}
    assert set(driver.outcome.values()) == {"finished"}


def test_lanes_that_are_none_name_the_policy():
    class Odd(Fifo):
        def lanes(self):
            return [1, 2]

    driver = Driver(planner_of())
    driver.planner._admission = Odd()
    with pytest.raises(PolicyError, match="Odd answered lanes"):
        driver.planner.books()


def test_error_of_a_policy_is_one_line():
    class Poet(Fifo):
        def admit(self, view):
            raise RuntimeError("line one\nline two")

    with pytest.raises(PolicyError, match="RuntimeError: line one line two$"):
        planner_of(admission=Poet()).plan(0.0, [])


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
