"""Nobody waits for ever under Chameleon: the idle engine, the bound on overtaking."""

import pytest
from admission_engine import (
    Engine,
    books,
    large,
    medium,
    request_of,
    small,
    three_lanes,
)

from jchameleon.runtime.policy.chameleon import Chameleon


def test_a_request_dearer_than_all_quotas_runs_on_an_idle_engine():
    policy = Chameleon()
    engine = Engine(pages=10)
    # Predicted to take more tokens than the pages hold, as rounding may make it.
    engine.predicted["big"] = 100
    assert engine.step(policy, small("s")) == ["s"]
    assert engine.step(policy, request_of("big", 1, 50), small("t")) == []
    assert engine.step(policy, end=["s"]) == ["big"]
    assert books(policy) == [(1, 1, 101)]
    assert engine.step(policy) == []  # t: nothing is left
    assert engine.step(policy, end=["big"]) == ["t"]


def test_a_request_dearer_than_its_lane_waits_for_an_idle_engine():
    policy, engine = three_lanes()
    engine.predicted["x"] = 85
    assert engine.step(policy, request_of("x", 90, 80), small("s1")) == ["s1"]
    assert engine.step(policy, small("s2"), end=["s1"]) == ["s2"]
    assert engine.step(policy, end=["s2"]) == ["x"]
    assert books(policy)[2] == (0, 1, 175)


def held_up(**options):
    """9 pages are free, but large2 and wide have no tokens, nor does the pot.

    Wide is of medium size and costs 100 with its adapter. It keeps the 30 tokens left
    of its lane from the pot, to which the small lane gives 40.
    """
    policy, engine = three_lanes(**options)
    engine.adapters["wide"] = (8, 8)
    wide = request_of("wide", 10, 10, "wide")
    arrivals = [small("s"), large("large1"), medium("medium"), large("large2"), wide]
    engine.step(policy, *arrivals)
    return policy, engine


def test_a_lane_with_waiting_requests_lends_nothing():
    policy, engine = held_up()
    assert engine.running_ids == ["s", "medium", "large1"]
    assert engine.step(policy) == []
    assert books(policy) == [(0, 1, 20), (1, 1, 30), (1, 1, 50)]
    assert engine.step(policy, end=["wide"]) == ["large2"]


@pytest.mark.parametrize("most", [0, 1, 7])
def test_the_oldest_is_overtaken_as_often_as_the_bound_allows_and_no_more(most):
    policy, engine = held_up(max_overtaken=most)
    for i in range(20):
        admitted = engine.step(policy, small(f"s{i}"))
        if f"s{i}" not in admitted:
            break
        assert admitted == [f"s{i}"] if i < most - 1 else [f"s{i}", "large2"]
        engine.step(policy, end=[f"s{i}"])
    assert i == engine.overtaken["large2"] == engine.overtaken["wide"] == most
    # It went beyond the quota of its lane; wide, overdue too, lacks pages.
    assert books(policy) == [(1, 1, 20), (1, 1, 30), (0, 2, 100)]


def test_nobody_starts_while_one_overdue_does_not_fit():
    policy, engine = held_up(max_overtaken=1)
    assert engine.step(policy, small("s1")) == ["s1", "large2"]
    # Wide has been overtaken once and lacks pages; s2 would fit.
    assert engine.step(policy, small("s2"), end=["s1"]) == []
    assert engine.step(policy, end=["large1"]) == []
    assert engine.step(policy, end=["medium"]) == ["wide", "s2"]
