"""Chameleon's lanes: their cuts, quotas, charges and refreshes, by worked examples."""

import math

import pytest
from admission_engine import (
    Engine,
    books,
    large,
    medium,
    quotas,
    request_of,
    small,
    three_lanes,
    time_of_prompt,
)

from jchameleon.errors import ConfigError
from jchameleon.runtime.policy.chameleon import Chameleon
from jchameleon.runtime.policy.registry import create_policy

# Figure 10: lanes, quotas, the pot.


def test_lanes_are_cut_between_the_sizes_and_share_the_tokens():
    policy, _ = three_lanes()
    # Sizes 0.25, 0.5 and 1: all of one rank.
    assert [lane.upper_wrs for lane in policy.lanes()] == [0.375, 0.75, math.inf]
    assert quotas(policy) == [60, 60, 50]


def test_a_size_on_a_cut_off_belongs_below_it():
    policy, engine = three_lanes()
    engine.step(policy, request_of("x", 15, 15))
    assert engine.lane_of["x"] == (1, 0.75)


def test_figure_10_a_every_lane_uses_its_own_quota():
    policy, engine = three_lanes()
    arrivals = [large("l1"), medium("m1"), medium("m2")]
    arrivals += [small(f"s{i}") for i in range(1, 5)]
    admitted = engine.step(policy, *arrivals)
    assert admitted == ["s1", "s2", "s3", "m1", "m2", "l1"]
    assert books(policy) == [(1, 3, 60), (0, 2, 60), (0, 1, 50)]
    assert engine.lane_of["s1"] == (0, 0.25)
    assert engine.lane_of["m2"] == (1, 0.5)
    assert engine.lane_of["l1"] == (2, 1.0)
    # What a medium one gives back is spare, for nobody of its lane waits.
    assert engine.step(policy, end=["m1"]) == ["s4"]


def lent(*others):
    """Figure 10 b: medium leaves 30 tokens, of which the fourth small one takes 20."""
    policy, engine = three_lanes()
    smalls = [small(f"s{i}") for i in range(1, 5)]
    admitted = engine.step(policy, large("l1"), *others, medium("m1"), *smalls)
    return policy, engine, admitted


def test_figure_10_b_what_a_lane_leaves_goes_to_small_then_not_to_large():
    policy, _, admitted = lent(large("l2"))
    # Phase 1 in each lane, then s4; the 10 left do not suffice for l2.
    assert admitted == ["s1", "s2", "s3", "m1", "l1", "s4"]
    assert books(policy) == [(0, 4, 80), (0, 1, 30), (1, 1, 50)]


def test_an_overdraft_lessens_the_pot_until_it_is_paid_back():
    policy, engine, _ = lent()
    assert engine.step(policy, small("s5")) == []  # needs 20 of 30 - 20
    assert books(policy)[0] == (1, 4, 80)
    # Medium leaves 60: two more, then 60 are lent.
    assert engine.step(policy, small("s6"), small("s7"), end=["m1"]) == ["s5", "s6"]
    assert books(policy) == [(1, 6, 120), (0, 0, 0), (0, 1, 50)]
    assert engine.step(policy, end=["s1"]) == ["s7"]
    # Large has 50 of its own again, and the pot nothing for a second one.
    assert engine.step(policy, large("l2"), large("l3"), end=["l1"]) == ["l2"]


def test_an_overdraft_lessens_what_other_lanes_may_borrow():
    policy, engine, _ = lent()
    engine.adapters["wide"] = (8, 3)
    # Costs 70: the 50 of its lane, and the pot has 30 less the 20 lent to small.
    wide = request_of("wide", 20, 20, "wide")
    assert engine.step(policy, small("s5"), wide, end=["l1"]) == []
    assert engine.step(policy, end=["s1"]) == ["s5"]
    assert engine.step(policy, end=["s2"]) == ["wide"]


def test_nobody_starts_beyond_the_rows():
    policy, engine = three_lanes()
    engine.max_running = 2
    assert engine.step(policy, large("l1"), small("s1"), small("s2")) == ["s1", "s2"]
    assert engine.step(policy, small("s3")) == []
    assert engine.step(policy, end=["s1"]) == ["s3"]


# Costs and quotas.


def test_an_adapter_is_charged_to_each_request_that_uses_it():
    policy = Chameleon()
    engine = Engine(adapters={"a": (16, 3)})
    engine.step(policy, request_of("x", 7, 4, "a"), request_of("y", 5, 2, "a"))
    assert books(policy) == [(0, 2, 11 + 30 + 7 + 30)]
    engine.step(policy, end=["x"])
    assert books(policy) == [(0, 1, 37)]
    engine.step(policy, end=["y"])
    assert books(policy) == [(0, 0, 0)]


def test_quotas_follow_worked_minima():
    policy = Chameleon(min_samples=1, first_refresh_s=3.0, slo_s=5.0, max_lanes=2)
    times = {5: 0.5, 6: 1.5, 20: 0.5}
    engine = Engine(pages=762, run_s=lambda prompt, *_: times[prompt])
    for second in range(3):
        arrivals = [small(f"s{second}"), large(f"l{second}")]
        arrivals.append(request_of(f"t{second}", 6, 5, "shared"))
        engine.step(policy, *arrivals, now_s=second)
    engine.step(policy, now_s=3.0)
    # 21 * 1.0 * (1/5 + 6/3) = 46.2 and 50 * 0.5 * (1/5 + 3/3) = 30.
    assert quotas(policy) == [4620, 3000]


def test_service_time_includes_the_load_of_the_adapter():
    policy = Chameleon(min_samples=1, first_refresh_s=1.0)
    engine = Engine(
        pages=60, adapters={"a": (8, 2)}, run_s=lambda prompt, output, load: 1.0 + load
    )
    engine.step(policy, request_of("x", 10, 10, "a"), small("y"))
    engine.step(policy, now_s=1.0)
    # 20 * 2 and 40 * 3, with the same arrivals.
    assert quotas(policy) == [150, 450]


def test_quotas_follow_the_pages_at_once():
    policy, engine = three_lanes()
    engine.pages = 34
    engine.step(policy)
    assert quotas(policy) == [120, 120, 100]


def test_a_static_lane_without_traffic_owns_nothing():
    policy = Chameleon(lanes="static", max_lanes=4, min_samples=3, first_refresh_s=1.0)
    engine = Engine(pages=126, adapters={"a": (32, 1)})
    engine.step(policy, small("s"), medium("m"), request_of("l", 20, 20, "a"))
    engine.step(policy, now_s=1.0)
    # Sizes 0.25 / 4, 0.5 / 4 and 1.
    assert [lane.upper_wrs for lane in policy.lanes()] == [0.25, 0.5, 0.75, math.inf]
    assert books(policy) == [(0, 2, 50), (0, 0, 0), (0, 0, 0), (0, 1, 50)]
    # 30 * 1 * (1/5 + 2) and 50 * 1 * (1/5 + 1).
    assert quotas(policy) == [660, 0, 0, 600]


def test_elbow_makes_one_lane_of_equal_requests_and_two_of_two_kinds():
    for prompts, lanes in (((50,), 1), ((50, 51), 2), ((5, 6, 50, 51), 2)):
        policy = Chameleon(lanes="elbow", first_refresh_s=1.0)
        engine = Engine(pages=1000)
        arrivals = [
            request_of(f"r{i}", prompts[i % len(prompts)], 9) for i in range(40)
        ]
        engine.step(policy, *arrivals)
        engine.step(policy, now_s=1.0)
        assert len(policy.lanes()) == lanes


# Refreshes.


def test_one_lane_owns_everything_until_there_are_samples():
    policy = Chameleon(min_samples=3, first_refresh_s=10.0)
    engine = Engine(pages=50)
    engine.step(policy, small("a"), large("b"), now_s=100.0)
    engine.step(policy, now_s=1000.0)
    assert quotas(policy) == [500]
    engine.step(policy, medium("c"))
    assert len(policy.lanes()) == 3


def test_lanes_are_cut_at_the_first_time_and_then_at_intervals():
    policy = Chameleon(min_samples=3, first_refresh_s=10.0, refresh_s=20.0)
    engine = Engine(pages=50)
    engine.step(policy, now_s=90.0)
    engine.step(policy, small("a"), large("b"), medium("c"), now_s=100.0)
    engine.step(policy, now_s=109.9)
    assert quotas(policy) == [500]
    engine.step(policy, now_s=110.0)
    assert len(policy.lanes()) == 3
    engine.step(policy, request_of("d", 15, 15), now_s=129.9)
    assert len(policy.lanes()) == 3
    engine.step(policy, now_s=130.0)
    assert len(policy.lanes()) == 4


def test_a_refresh_moves_waiting_requests_and_the_charges_of_running_ones():
    policy = Chameleon(min_samples=6, first_refresh_s=1.0, refresh_s=1000.0)
    engine = Engine(pages=17, run_s=time_of_prompt)
    arrivals = [small("s"), medium("m"), large("l"), large("l2"), large("l3")]
    assert engine.step(policy, *arrivals, small("s2")) == ["s", "m", "l", "l2"]
    assert books(policy) == [(2, 4, 150)]
    assert engine.step(policy, now_s=1.0) == ["s2"]
    assert books(policy) == [(0, 2, 40), (0, 1, 30), (1, 2, 100)]
    # 60 * 2.2, 60 * 1.2 and 50 * 3.2 of 364; 170 in all.
    assert quotas(policy) == [62, 33, 75]
    # 25 of its own, 22 and 3 of the others.
    assert engine.step(policy, end=["l"]) == ["l3"]
    engine.step(policy, end=["s", "m", "s2", "l2", "l3"])
    assert books(policy) == [(0, 0, 0)] * 3


def test_only_the_latest_requests_shape_the_lanes():
    policy = Chameleon(min_samples=3, window_requests=2, first_refresh_s=1.0)
    engine = Engine()
    engine.step(policy, small("a"))
    engine.step(policy, medium("b"), large("c"), now_s=1.0)
    # The small one runs still, and is charged where its size belongs.
    assert [lane.upper_wrs for lane in policy.lanes()] == [0.75, math.inf]
    assert books(policy) == [(0, 2, 50), (0, 1, 50)]


def test_sizes_are_measured_against_the_largest_of_today():
    policy = Chameleon(min_samples=1, first_refresh_s=1.0)
    engine = Engine(adapters={"a": (8, 1)})
    engine.step(policy, request_of("x", 10, 10, "a"))
    assert engine.lane_of["x"] == (0, 1.0)
    engine.adapters["b"] = (64, 8)  # registered later
    engine.step(policy, request_of("y", 20, 40, "b"), now_s=1.0)
    # x is now (0.4 * 10/20 + 0.6 * 10/40) * 8/64.
    assert policy.lanes()[0].upper_wrs == pytest.approx((0.35 / 8 + 1.0) / 2)


# Requests that leave their lane: ends, squashes, outgrown predictions.


def test_cancelled_requests_leave_line_and_charges():
    policy, engine = three_lanes()
    engine.step(policy, *[large(f"l{i}") for i in range(4)], small("s"))
    assert books(policy) == [(0, 1, 20), (0, 0, 0), (1, 3, 150)]
    assert engine.step(policy, end=["l3", "l2"]) == []
    assert books(policy) == [(0, 1, 20), (0, 0, 0), (0, 2, 100)]


def test_an_id_may_come_again_with_the_end_of_the_first():
    policy = Chameleon(max_overtaken=0)
    engine = Engine(pages=5)
    engine.step(policy, large("x"), small("y"))
    assert engine.step(policy, small("x"), end=["x"]) == ["y", "x"]
    assert books(policy) == [(0, 2, 40)]


def test_who_is_requeued_returns_its_charge_and_gets_its_place_back():
    policy, engine = three_lanes()
    smalls = [small(f"s{i}") for i in range(5)]
    engine.step(policy, *smalls, medium("m1"), medium("m2"), large("l1"))
    assert books(policy) == [(2, 3, 60), (0, 2, 60), (0, 1, 50)]
    engine.requeue("s1")
    assert engine.step(policy) == ["s1"]  # before s3
    assert books(policy)[0] == (2, 3, 60)
    engine.requeue("s2")
    engine.requeue("s0")
    assert engine.step(policy, end=["s1"]) == ["s0", "s2", "s3"]


def test_who_is_requeued_and_cancelled_is_gone():
    policy = Chameleon()
    engine = Engine()
    engine.step(policy, small("a"))
    engine.outgrow("a", 9)
    engine.requeue("a")
    engine.step(policy, end=["a"])
    assert books(policy) == [(0, 0, 0)]


def test_outgrown_prediction_moves_the_charge_up_only_if_asked():
    for recharge, after in (
        (False, [(0, 1, 20), (0, 0, 0), (0, 0, 0)]),
        (True, [(0, 0, 0), (0, 1, 25), (0, 0, 0)]),
    ):
        policy, engine = three_lanes(recharge=recharge)
        engine.step(policy, small("a"))
        engine.outgrow("a", 10)
        engine.step(policy)
        assert books(policy) == after
    for predicted in (20, 40):  # no lane is above the last
        engine.outgrow("a", predicted)
        engine.step(policy)
    assert books(policy) == [(0, 0, 0), (0, 0, 0), (0, 1, 55)]
    engine.step(policy, end=["a"])
    assert books(policy) == [(0, 0, 0)] * 3


# Options.


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("slo_s", 0, "slo_s=0 must be a finite number of seconds, above 1e-6"),
        ("slo_s", -1.0, "slo_s=-1.0 must be a finite number of seconds, above 1e-6"),
        ("slo_s", math.nan, "slo_s=nan must be a finite number of seconds, above 1e-6"),
        ("refresh_s", 0, "refresh_s=0 must be a finite number of seconds above 0"),
        (
            "first_refresh_s",
            -1,
            "first_refresh_s=-1 must be a finite number of seconds, 0 or more",
        ),
        ("min_samples", 0, "min_samples=0 must be a positive integer"),
        ("window_requests", 5000, "window_requests=5000 must be an integer, 1 to 1024"),
        ("max_lanes", 2.0, "max_lanes=2.0 must be an integer, 1 to 16"),
        ("lanes", "best", "lanes='best' must be 'kmeans', 'elbow' or 'static'"),
        ("elbow_gain", 1, "elbow_gain=1 must be between 0 and 1"),
        ("bypass", 1, "bypass=1 must be true or false"),
        ("max_overtaken", -1, "max_overtaken=-1 must be an integer, 0 or above"),
        ("recharge", "no", "recharge='no' must be true or false"),
    ],
)
def test_bad_option_raises_naming_value_and_rule(option, value, rule):
    with pytest.raises(ConfigError) as caught:
        create_policy("admission", "chameleon", {option: value})
    assert rule in str(caught.value)
