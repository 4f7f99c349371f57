"""Verdicts of the paper report: the rule, by cases made by hand."""

import math
import statistics

import pytest
from paper_verdicts import Claim, changes_percent, interval, judge, ratios

SPREAD = [-1.0, 0.0, 1.0]
"""Mean 0, standard deviation 1: the half width is 4.3027 / sqrt(3)."""

HALF = 4.302653 / math.sqrt(3)


def claim(paper, unit="%", kind="near"):
    return Claim(row="r", what="w", paper=paper, unit=unit, kind=kind)


def around(mean, half):
    """Return three seeds with this mean and half width."""
    return [mean + half / HALF * value for value in SPREAD]


def test_interval_is_students():
    mean, half = interval([4.0, 5.0, 6.0])
    assert (mean, half) == (5.0, pytest.approx(HALF, rel=1e-6))
    # From a table of Student's t: 2.2622 for 9 degrees of freedom.
    ten = [float(value) for value in range(10)]
    expected = 2.262157 * statistics.stdev(ten) / math.sqrt(10)
    assert interval(ten)[1] == pytest.approx(expected, rel=1e-6)
    assert interval([3.0]) == (3.0, None)


@pytest.mark.parametrize(
    "paper, unit, kind, values, verdict",
    [
        # 5 points of a percentage, whatever its size.
        (-14.7, "%", "near", [-10.0], "reproduces"),
        (-14.7, "%", "near", [-9.6], "does not"),
        (-80.7, "%", "near", [-75.8], "reproduces"),
        (-80.7, "%", "near", [-74.0], "does not"),
        # 10 % of anything else.
        (12.9, "requests/s", "near", [11.7], "reproduces"),
        (12.9, "requests/s", "near", [11.5], "does not"),
        (1.5, "x", "near", [1.64], "reproduces"),
        (1.5, "x", "near", [1.66], "does not"),
        # The interval holds it: only if it is not wide.
        (-20.0, "%", "near", around(-12.0, 9.0), "reproduces"),
        (-20.0, "%", "near", around(-12.0, 7.0), "does not"),
        (-20.0, "%", "near", around(-12.0, 11.0), "does not"),
        (-20.0, "%", "near", around(-17.0, 9.0), "reproduces"),
        (-20.0, "%", "near", around(-17.0, 11.0), "does not"),  # however near
        # Bounds: the mean.
        (150.0, "ms", "at most", [150.0], "reproduces"),
        (150.0, "ms", "at most", [150.1], "does not"),
        (150.0, "ms", "at most", around(140.0, 60.0), "reproduces"),
        # Sides: the whole interval.
        (0.0, "%", "below", around(-3.0, 2.9), "reproduces"),
        (0.0, "%", "below", around(-3.0, 3.1), "does not"),
        (0.0, "%", "below", around(3.0, 1.0), "does not"),
        (0.0, "%", "above", around(3.0, 2.9), "reproduces"),
        (0.0, "%", "above", around(-3.0, 2.9), "does not"),
        (0.0, "%", "above", [0.0], "does not"),
    ],
)
def test_rule(paper, unit, kind, values, verdict):
    found = judge(claim(paper, unit, kind), values)
    assert found["verdict"] == verdict
    assert found["ours"] == pytest.approx(statistics.fmean(values))
    assert found["seeds"] == len(values)


def test_reason_is_given_where_a_mean_alone_would_mislead():
    wide = judge(claim(-20.0), around(-12.0, 11.0))
    assert wide["why"] == "the interval is too wide to say so"
    assert judge(claim(-20.0), around(-12.0, 9.0))["why"] == "within the interval"
    unsure = judge(claim(0.0, kind="below"), around(-3.0, 3.1))
    assert unsure["why"] == "the interval holds 0"


def test_what_did_nothing_is_not_exercised_however_near():
    found = judge(claim(75.0), [75.0, 75.0], idle="no eviction in any seed")
    assert found["verdict"] == "not exercised"
    assert (found["ours"], found["why"]) == (75.0, "no eviction in any seed")


def test_a_seed_without_a_value_leaves_no_mean():
    found = judge(claim(12.9, "requests/s"), [12.9, None, 12.9])
    assert found["verdict"] == "not exercised" and found["ours"] is None
    assert found["why"] == "1 of 3 seeds have no value"
    assert judge(claim(1.0), [], idle="not modelled")["why"] == "not modelled"


def test_changes_and_ratios_are_of_the_same_seed():
    assert changes_percent([50.0, 30.0], [100.0, 20.0]) == [-50.0, 50.0]
    assert ratios([3.0, 3.0], [2.0, 1.0]) == [1.5, 3.0]
    assert ratios([3.0, None], [0.0, 1.0]) == [None, None]
    assert changes_percent([None, 1.0], [1.0, None]) == [None, None]
