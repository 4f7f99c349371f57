"""Uses within a sliding window: worked example, brute force, bad values."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jchameleon.errors import ConfigError
from jchameleon.runtime.policy.window import UseWindow


def test_uses_are_forgotten_bucket_by_bucket():
    """Ten seconds in two buckets: 0-5, 5-10, 10-15, ..."""
    window = UseWindow(10.0, 2)
    for now_s in (1.0, 4.9, 5.0):
        window.note(0, now_s)
    window.note(1, 9.0)
    assert window.counts[:2].tolist() == [3, 1]
    window.advance(9.99)
    assert window.counts[:2].tolist() == [3, 1]
    window.advance(10.0)  # 0-5 leaves
    assert window.counts[:2].tolist() == [1, 1]
    window.note(0, 10.0)
    window.advance(15.0)  # 5-10 leaves
    assert window.counts[:2].tolist() == [1, 0]
    window.advance(1e9)
    assert window.counts.sum() == 0


def test_default_window_is_five_minutes():
    window = UseWindow()
    window.note(0, 0.0)
    window.advance(299.0)
    assert window.counts[0] == 1
    window.advance(300.0)
    assert window.counts[0] == 0


def test_time_that_goes_back_counts_as_newest_and_forgets_nothing():
    window = UseWindow(10.0, 2)
    window.note(0, 12.0)
    window.advance(3.0)
    window.note(0, 3.0)
    assert window.counts[0] == 2
    window.advance(19.0)
    assert window.counts[0] == 2, "both lie in the bucket 10-15"
    window.advance(20.0)
    assert window.counts[0] == 0


def test_growth_keeps_counts_and_covers_every_order():
    window = UseWindow(10.0, 2)
    window.note(3, 0.0)
    window.grow(1000)
    assert window.counts.size >= 1000
    window.note(5000, 6.0)
    assert window.counts[[3, 999, 5000]].tolist() == [1, 0, 1]
    window.advance(10.0)
    assert window.counts[[3, 5000]].tolist() == [0, 1]


@given(
    bucket_s=st.integers(1, 7),
    buckets=st.integers(1, 6),
    steps=st.lists(
        st.tuples(st.integers(0, 20), st.sampled_from([None, 0, 1, 40])), max_size=60
    ),
)
def test_counts_are_those_of_brute_force(bucket_s, buckets, steps):
    """Every step waits, then notes one order or (None) only advances."""
    window_s = bucket_s * buckets
    window = UseWindow(float(window_s), buckets)
    uses, now_s = [], 0
    for wait_s, order in steps:
        now_s += wait_s
        if order is None:
            window.advance(float(now_s))
        else:
            window.note(order, float(now_s))
            uses.append((order, now_s))
        window.grow(41)
        for order in (0, 1, 40):
            times = [time_s for used, time_s in uses if used == order]
            buckets_back = [now_s // bucket_s - time_s // bucket_s for time_s in times]
            assert window.counts[order] == sum(back < buckets for back in buckets_back)
            # What the docstring promises, whatever the buckets.
            sure = sum(now_s - time_s <= window_s - bucket_s for time_s in times)
            possible = sum(now_s - time_s < window_s for time_s in times)
            assert sure <= window.counts[order] <= possible


@pytest.mark.parametrize(
    ("window_s", "buckets", "message"),
    [
        (0.0, 10, "window_s=0.0 must be a positive number"),
        (-1.0, 10, "window_s=-1.0 must be a positive number"),
        (float("inf"), 10, "window_s=inf must be a positive number"),
        (float("nan"), 10, "window_s=nan must be a positive number"),
        (300.0, 0, "buckets=0 must be a positive integer"),
        (300.0, 2.5, "buckets=2.5 must be a positive integer"),
    ],
)
def test_window_of_bad_shape_is_refused(window_s, buckets, message):
    with pytest.raises(ConfigError, match=message):
        UseWindow(window_s, buckets)
