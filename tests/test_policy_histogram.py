"""Histogram prefetch: idle times, when they tell a pattern, windows and their order."""

import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jchameleon.errors import ConfigError
from jchameleon.runtime.policy.histogram import Histogram, IdleTimes
from jchameleon.runtime.policy.request import Request


def request(uid, request_id="r"):
    return Request(
        request_id=request_id, prompt_tokens=1, max_tokens=1, adapter_uid=uid
    )


def tell(policy, now_s, *, arrived=(), ended=(), waiting=()):
    """Run one iteration with requests given by their adapters; return what is named."""
    view = types.SimpleNamespace(
        now_s=now_s,
        arrived=[request(uid) for uid in arrived],
        ended=[request(uid) for uid in ended],
        waiting=[request(uid) for uid in waiting],
        running=(),
    )
    policy.observe(view)
    return list(policy.candidates(view))


def visits(policy, uid, idle_times_s, *, from_s=0.0, run_s=1.0):
    """Let an adapter come once and then after each idle time; return its last end."""
    now_s = from_s
    for idle_s in (0.0, *idle_times_s):
        now_s += idle_s
        tell(policy, now_s, arrived=[uid])
        now_s += run_s
        tell(policy, now_s, ended=[uid])
    return now_s


def test_periodic_adapter_is_named_around_its_period():
    # Idle for 10 s: bin [10.0, 10.5), so named from 9.0 until 11.55 s after the end.
    policy = Histogram()
    end_s = visits(policy, "a", [10.0] * 8)
    named = {
        after_s: tell(policy, end_s + after_s) for after_s in (0, 8.9, 9.1, 11.5, 11.6)
    }
    assert named == {0: [], 8.9: [], 9.1: ["a"], 11.5: ["a"], 11.6: []}


def test_window_spans_the_percentiles_with_their_margins():
    # Of 100 idle times the 5th is in bin [4.0, 4.5) and the 99th in [20.0, 20.5): named
    # from 3.6 until 22.55 s.
    policy = Histogram()
    end_s = visits(policy, "a", [2.0] * 4 + [4.0] + [10.0] * 93 + [20.0, 40.0])
    named = {
        after_s: tell(policy, end_s + after_s) for after_s in (3.5, 3.7, 22.5, 22.6)
    }
    assert named == {3.5: [], 3.7: ["a"], 22.5: ["a"], 22.6: []}


def test_head_in_the_first_bin_opens_the_window_at_once():
    policy = Histogram()
    end_s = visits(policy, "a", [0.25] * 7)
    now_s = end_s + 0.25
    tell(policy, now_s, arrived=["a"])  # the eighth idle time
    assert tell(policy, now_s + 1, ended=["a"]) == ["a"]
    assert tell(policy, now_s + 1.54) == ["a"]
    assert tell(policy, now_s + 1.56) == []  # 1.1 * 0.5 s after the end


def test_arrival_closes_the_window_until_the_next_end():
    policy = Histogram()
    end_s = visits(policy, "a", [10.0] * 8)
    assert tell(policy, end_s + 10) == ["a"]
    assert tell(policy, end_s + 10.1, arrived=["a"], waiting=["a"]) == ["a"]
    assert tell(policy, end_s + 10.2) == []  # runs
    assert tell(policy, end_s + 11, ended=["a"]) == []
    assert tell(policy, end_s + 11.5) == []  # the old window would be open
    assert tell(policy, end_s + 21) == ["a"]


def test_requests_that_overlap_leave_no_idle_time():
    policy = Histogram(min_samples=1)
    tell(policy, 0, arrived=["a"], ended=["a"])
    tell(policy, 10, arrived=["a"])  # after 10 s, the only idle time
    tell(policy, 13, arrived=["a"])
    tell(policy, 14, ended=["a"])
    tell(policy, 17, arrived=["a"], ended=["a"])  # one comes when the last one ends
    assert tell(policy, 24) == []  # one still runs
    assert tell(policy, 30, ended=["a"]) == []
    named = {now_s: tell(policy, now_s) for now_s in (30.1, 38.9, 39.1, 41.5, 41.6)}
    assert named == {30.1: [], 38.9: [], 39.1: ["a"], 41.5: ["a"], 41.6: []}


def test_base_model_is_ignored():
    policy = Histogram(min_samples=1)
    visits(policy, None, [1.0] * 5)
    assert tell(policy, 11.0, waiting=[None]) == []


@pytest.mark.parametrize(("idle_times", "named"), [(7, []), (8, ["a"])])
def test_few_idle_times_tell_nothing(idle_times, named):
    policy = Histogram()
    end_s = visits(policy, "a", [10.0] * idle_times)
    assert tell(policy, end_s + 10) == named


@pytest.mark.parametrize(
    ("used_bins", "named"),
    [
        # 10 bins: n idle times in each of k give a CV of sqrt(10 / k - 1).
        (2, ["a"]),  # 2.0
        (3, []),  # 1.53
        (10, []),  # 0: flat
    ],
)
def test_flat_counts_tell_nothing(used_bins, named):
    policy = Histogram(bins=10)
    end_s = visits(policy, "a", [0.25 + 0.5 * b for b in range(used_bins)] * 12)
    assert tell(policy, end_s + 0.3) == named


@pytest.mark.parametrize(("beyond", "named"), [(8, ["a"]), (9, [])])
def test_mostly_out_of_bounds_tells_nothing(beyond, named):
    policy = Histogram()  # 240 bins of 0.5 s
    end_s = visits(policy, "a", [10.0] * 8 + [120.0] * beyond)
    assert tell(policy, end_s + 10) == named


def test_last_bin_is_within_bounds():
    policy = Histogram(min_samples=1, max_out_of_bounds=0.0)
    end_s = visits(policy, "a", [119.75])
    assert tell(policy, end_s + 119) == ["a"]


def test_queued_come_first_then_those_nearest_to_their_expected_time():
    policy = Histogram(min_samples=1)
    # One idle time each, of 40, 20 and 10 s; the next is expected after 40.25, 20.25
    # and 10.25 s and named from 0.9 times to 1.1 times that.
    for now_s, uid in (
        (2.5, "forty"),
        (42.0, "twenty"),
        (42.5, "forty"),  # expected at 82.75, named from 78.5 until 87.05
        (60.0, "ten"),
        (62.0, "twenty"),  # expected at 82.25, named from 80 until 84.55
        (70.0, "ten"),  # expected at 80.25, named from 79 until 81.55
    ):
        tell(policy, now_s, arrived=[uid], ended=[uid])
    assert tell(policy, 79.5) == ["ten", "forty"]
    assert tell(policy, 81.0) == ["ten", "twenty", "forty"]  # off by .75, 1.25, 1.75
    assert tell(policy, 81.5) == ["twenty", "forty", "ten"]  # .75, 1.25 to come, 1.25
    assert tell(policy, 82.4) == ["twenty", "forty"]  # .15, .35 to come
    assert tell(policy, 82.4, waiting=["q2", "q1"]) == ["q2", "q1", "twenty", "forty"]


def test_ties_go_by_who_fell_idle_first():
    for order in (["b", "a", "c"], ["c", "b", "a"]):
        policy = Histogram(min_samples=1)
        for now_s in (0, 10, 20):
            tell(policy, now_s, arrived=sorted(order), ended=order)
        assert tell(policy, 29.5) == order


def test_lookaheads_limit_what_is_named():
    policy = Histogram(min_samples=1, lookahead_requests=2, lookahead_adapters=3)
    uids = [f"a{number}" for number in range(9)]
    for now_s in (0, 10, 20):
        tell(policy, now_s, arrived=uids, ended=uids)
    named = tell(policy, 29.5, waiting=["q0", "q1", "q2"])
    assert named == ["q0", "q1", "a0", "a1", "a2"]


def test_windows_that_open_and_close_unseen_are_forgotten():
    policy = Histogram(min_samples=1)
    end_s = visits(policy, "a", [10.0])
    assert tell(policy, end_s + 1000) == []
    assert tell(policy, end_s + 1001) == []


@given(
    idle_bins=st.lists(st.integers(0, 30), min_size=1, max_size=60),
    percentiles=st.tuples(*[st.integers(0, 100)] * 3),
)
def test_percentiles_and_cv_match_numpy(idle_bins, percentiles):
    bins = 20
    idle_times = IdleTimes(bins)
    for index in idle_bins:
        idle_times.add(index)
    within = [index for index in idle_bins if index < bins]
    assert idle_times.in_bounds == len(within)
    assert idle_times.out_of_bounds == len(idle_bins) - len(within)
    if within:
        counts = np.bincount(within, minlength=bins)
        assert idle_times.cv() == pytest.approx(counts.std() / counts.mean(), abs=1e-7)
        expected = np.percentile(within, percentiles, method="inverted_cdf")
        assert idle_times.bins_at(*percentiles) == expected.tolist()


def due(history, now_s):
    """Return uids inside their windows and how far from now each is expected.

    Works on the raw times of each adapter's visits, (arrival, end) without overlap,
    with the options of the test below. All its times are exact in binary.
    """
    found = {}
    for uid, visited in history.items():
        idle_s = [b[0] - a[1] for a, b in zip(visited, visited[1:], strict=False)]
        within = [idle for idle in idle_s if idle < 12.0]
        if len(within) < 2 or len(idle_s) - len(within) > 0.5 * len(idle_s):
            continue
        counts = np.histogram(within, bins=24, range=(0.0, 12.0))[0]
        if counts.std() < 1.5 * counts.mean():
            continue
        head, median, tail = (
            np.percentile(within, p, method="inverted_cdf") // 0.5 * 0.5
            for p in (10, 50, 90)
        )
        after_s = now_s - visited[-1][1]
        if 0.75 * head <= after_s < 1.25 * (tail + 0.5):
            found[uid] = abs(median + 0.25 - after_s)
    return found


@given(
    steps=st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from([0, 1, 4, 5, 9, 30, 50])),
        max_size=60,
    )
)
def test_named_are_those_that_the_raw_times_make_due(steps):
    policy = Histogram(
        bins=24,
        head_percentile=10,
        tail_percentile=90,
        margin=0.25,
        min_cv=1.5,
        min_samples=2,
    )
    history, now_s = {}, 0.0
    for uid, quarters in steps:
        # The time passes in quarters of a second, then an adapter comes for 0.25 s.
        for _ in range(quarters):
            now_s += 0.25
            expected = due(history, now_s)
            named = tell(policy, now_s)
            assert sorted(named) == sorted(expected)
            assert [expected[one] for one in named] == sorted(expected.values())
        tell(policy, now_s, arrived=[uid])
        tell(policy, now_s + 0.25, ended=[uid])
        history.setdefault(uid, []).append((now_s, now_s + 0.25))
        now_s += 0.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bin_s": 0}, "bin_s=0 must be a positive number"),
        ({"bin_s": "1"}, "bin_s='1' must be"),
        ({"bin_s": float("inf")}, "bin_s=inf must be"),
        ({"bins": 0}, "bins=0 must be a positive integer"),
        ({"bins": 24.0}, "bins=24.0 must be"),
        ({"min_samples": 0}, "min_samples=0 must be"),
        ({"lookahead_adapters": 0}, "lookahead_adapters=0 must be"),
        ({"lookahead_requests": 0}, "lookahead_requests=0 must be"),
        ({"tail_percentile": 101}, "tail_percentile=101 must be above 0, at most 100"),
        ({"tail_percentile": 0}, "tail_percentile=0 must be"),
        ({"head_percentile": -1}, "head_percentile=-1 must be at least 0 and below"),
        ({"head_percentile": 99}, "head_percentile=99 must be .* tail_percentile=99"),
        ({"margin": 1.0}, "margin=1.0 must be at least 0 and below 1"),
        ({"margin": -0.1}, "margin=-0.1 must be"),
        ({"min_cv": -1}, "min_cv=-1 must be 0 to 15.5"),
        ({"bins": 4}, "min_cv=2.0 must be 0 to 1.73, the most that bins=4"),
        ({"min_cv": float("nan")}, "min_cv=nan must be"),
        ({"max_out_of_bounds": 1.5}, "max_out_of_bounds=1.5 must be 0 to 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Histogram(**options)
