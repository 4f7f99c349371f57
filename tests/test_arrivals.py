"""Arrivals that come in clumps, against the closed forms of their processes."""

import itertools
import json
import math
import random

import numpy as np
import pytest
from scipy import stats
from test_sim_profile import TINY

from jchameleon.cli import main
from jchameleon.errors import ConfigError
from jchameleon.sim import Load, load_profile, simulate
from jchameleon.workload.arrivals import Process, Trace, arrivals_s
from jchameleon.workload.generator import Popularity, Workload


def arrivals(process, rate_rps, *, count, seed=0):
    """Return the first arrivals: f64[count]."""
    drawn = arrivals_s(process, rate_rps, random.Random(seed))
    return np.fromiter(itertools.islice(drawn, count), float, count)


@pytest.mark.parametrize("cv", [0.3, 1.0, 2.5])
def test_gamma_gaps_follow_their_law_and_keep_the_mean_rate(cv):
    count = 20_000
    gaps = np.diff(arrivals(f"gamma:{cv}", 4.0, count=count + 1, seed=7))
    # Five standard errors of a mean.
    assert gaps.mean() == pytest.approx(0.25, rel=5 * cv / math.sqrt(count))
    # The kurtosis of a gamma law is 3 + 6 cv**2.
    error = math.sqrt((2 + 6 * cv**2) / count) / 2
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=6 * error)
    law = stats.gamma(1 / cv**2, scale=cv**2 / 4.0)
    assert stats.kstest(gaps, law.cdf).pvalue > 1e-3
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 5 / math.sqrt(count)


def test_gamma_of_cv_one_is_poisson_and_others_are_not():
    def worst(process):
        gaps = np.diff(arrivals(process, 1.0, count=5001, seed=3))
        return stats.kstest(gaps, "expon").pvalue

    assert worst("gamma:1") > 1e-3 and worst("poisson") > 1e-3
    assert worst("gamma:1.2") < 1e-6


# Factor, burst and pause in seconds, mean rate: bursts alone, and with a rate between.
BURSTS = [(5.0, 10.0, 40.0, 2.0), (3.0, 4.0, 12.0, 5.0), (1.0, 4.0, 12.0, 5.0)]


@pytest.mark.parametrize("factor, on_s, off_s, rate_rps", BURSTS)
def test_bursts_have_the_mean_rate_and_dispersion_of_their_process(
    factor, on_s, off_s, rate_rps
):
    """Counts in windows far longer than a cycle, over many of them."""
    process = f"bursty:{factor}:{on_s}:{off_s}"
    window_s = 30 * (on_s + off_s)
    windows = 400
    count = int(1.2 * windows * window_s * rate_rps)
    times = arrivals(process, rate_rps, count=count, seed=11)
    assert times[-1] > windows * window_s
    edges = np.arange(windows + 1) * window_s
    counts, _ = np.histogram(times, edges)
    # Fischer and Meier-Hellstern, "The Markov-modulated Poisson process cookbook",
    # 1993: variance over mean of counts, 1 + 2 (l1 - l2)^2 a b / ((a + b)^2 (l1 b +
    # l2 a)), less what a window of finite length has less.
    a, b = 1 / on_s, 1 / off_s
    high = factor * rate_rps
    low = (rate_rps * (on_s + off_s) - high * on_s) / off_s
    spread = 2 * (high - low) ** 2 * a * b / ((a + b) ** 2 * (high * b + low * a))
    finite = 1 - (1 - math.exp(-(a + b) * window_s)) / ((a + b) * window_s)
    dispersion = 1 + spread * finite
    mean = rate_rps * window_s
    margin = 5 * math.sqrt(dispersion / mean / windows)
    assert counts.mean() / mean == pytest.approx(1, abs=margin)
    assert counts.var() / counts.mean() == pytest.approx(dispersion, rel=0.4)


def test_gaps_of_bursts_with_nothing_between_are_hyperexponential():
    """An interrupted Poisson process is a renewal process of two exponential laws.

    Kuczura, "The interrupted Poisson process as an overflow process", 1973.
    """
    factor, on_s, off_s, rate_rps = BURSTS[0]
    a, b, rate = 1 / on_s, 1 / off_s, factor * rate_rps
    root = math.sqrt((rate + b + a) ** 2 - 4 * rate * b)
    fast, slow = (rate + b + a + root) / 2, (rate + b + a - root) / 2
    share = (rate - slow) / (fast - slow)

    def law(gap_s):
        slower = (1 - share) * np.exp(-slow * gap_s)
        return 1 - share * np.exp(-fast * gap_s) - slower

    gaps = np.diff(arrivals(f"bursty:{factor}:{on_s}:{off_s}", 2.0, count=20_001))
    assert stats.kstest(gaps, law).pvalue > 1e-3
    cv2 = 1 + 2 * rate * a / (a + b) ** 2
    assert (gaps.std() / gaps.mean()) ** 2 == pytest.approx(cv2, rel=0.2)


def test_share_of_requests_in_bursts_is_what_the_factor_says():
    """Long pauses and a low rate in them: bursts show in the times themselves."""
    process = Process.parse("bursty:4.5:50:200")
    assert process.burst_share == pytest.approx(0.9)
    assert Process.parse("bursty:5:50:200").burst_share == 1.0
    times = arrivals("bursty:4.5:50:200", 20.0, count=400_000, seed=5)
    # 90/s in bursts and 2.5/s between: one second tells which.
    counts = np.bincount(times.astype(int))
    in_bursts = counts[counts > 30].sum() / counts.sum()
    cycles = times[-1] / 250
    # Burst lengths are exponential, so shares scatter as those of as many cycles.
    assert in_bursts == pytest.approx(0.9, abs=5 * 0.9 * 0.1 * 2 / math.sqrt(cycles))
    assert (counts > 30).mean() == pytest.approx(0.2, abs=5 * 0.32 / math.sqrt(cycles))


def test_first_state_is_as_likely_as_its_time():
    """So the first seconds of many runs have the mean rate as well."""
    first = [
        sum(1 for _ in itertools.takewhile(lambda at_s: at_s < 2.0, drawn))
        for drawn in (
            arrivals_s("bursty:5:10:40", 3.0, random.Random(seed))
            for seed in range(3000)
        )
    ]
    # Of a mean of 6 each: in one of five runs 30, or about.
    assert np.mean(first) == pytest.approx(6.0, abs=5 * np.std(first) / 3000**0.5)
    assert np.mean([count > 8 for count in first]) == pytest.approx(0.2, abs=0.08)


@pytest.mark.parametrize("process", ["gamma:2.5", "bursty:4:10:40"])
def test_same_seed_gives_the_same_times_and_lengths_stay(process):
    workload = Workload(process=process, rate_rps=5.0, num_requests=300, seed=4)
    ranks = {"a": 8, "b": 16}
    drawn = list(workload.draw(ranks))
    assert drawn == list(workload.draw(ranks))
    poisson = list(Workload(rate_rps=5.0, num_requests=300, seed=4).draw(ranks))
    assert [one.adapter for one in drawn] == [one.adapter for one in poisson]
    assert [one.at_s for one in drawn] != [one.at_s for one in poisson]
    assert all(a.at_s <= b.at_s for a, b in itertools.pairwise(drawn))
    faster = arrivals(process, math.inf, count=5)
    assert faster.tolist() == [0.0] * 5


@pytest.mark.parametrize(
    "text",
    ["pareto", "", "poisson:1", "gamma", "gamma:0", "gamma:nan", "gamma:1000"]
    + ["gamma:1:2", "bursty:2", "bursty:0.5:1:1", "bursty:2.1:1:1", "bursty:2:0:1"]
    + ["bursty:1:1e-9:1", "bursty:x:1:1", "bursty:inf:1:1", 3],
)
def test_process_that_is_none_is_an_error(text):
    with pytest.raises(ConfigError, match=r"process=.* must be poisson, fixed, trace"):
        Workload(process=text)


def test_simulator_takes_processes_from_profile_and_command(tmp_path):
    path, out = tmp_path / "tiny.toml", tmp_path / "out.json"
    path.write_text(TINY.replace("[workload]", '[workload]\nprocess = "gamma:4"'))
    profile = load_profile(path)
    assert profile.workload.process == "gamma:4"
    clumped = simulate(profile, Load(rate_rps=8.0))
    even = simulate(profile, Load(rate_rps=8.0, process="fixed"))
    assert clumped["ttft_s"]["p99"] > 2 * even["ttft_s"]["p99"]
    arguments = ["simulate", "--profile", str(path), "--rate", "8", "--json", str(out)]
    assert main([*arguments, "--arrivals", "bursty:4:2:6"]) == 0
    report = json.loads(out.read_text())
    assert report["settings"]["workload"]["process"] == "bursty:4:2:6"
    assert main([*arguments, "--arrivals", "bursty:4:2"]) == 2


def test_arrivals_of_a_trace_stretch_to_the_rate_of_a_run(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    trace = Trace(at_s=(0.0, 1.0, 4.0), lengths=((16, 2),) * 3)
    load = Load(rate_rps=3.0, trace=trace, process="trace")
    report = simulate(load_profile(path), load)
    # 20 s at the rate, to within a lap of three.
    assert abs(report["requests"]["arrived"] - 60) <= 3


def test_ranks_by_a_power_law_keep_the_law_within_each():
    ranks = [8, 64, 8, 64, 8, 128]
    zeta = 1 + 2**-0.5 + 3**-0.5
    weights = Popularity.parse("power:1:0.5").weights(ranks)
    by_rank = {rank: [] for rank in ranks}
    for rank, weight in zip(ranks, weights, strict=True):
        by_rank[rank].append(weight)
    for place, (rank, law) in enumerate(
        {8: [6 / 11, 3 / 11, 2 / 11], 64: [2 / 3, 1 / 3], 128: [1.0]}.items(), 1
    ):
        share = place**-0.5 / zeta
        assert by_rank[rank] == pytest.approx([share * part for part in law])
    assert sum(weights) == pytest.approx(1.0)
    alike = Popularity.parse("power:1").weights(ranks)
    assert alike == Popularity.parse("power:1:0").weights(ranks)
    for text in ("power", "power:1:2:3", "zipf:1:2", "power:1:-1", "power:1:inf"):
        with pytest.raises(ConfigError, match="popularity="):
            Popularity.parse(text)
