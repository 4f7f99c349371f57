"""The load generator: what it plans, when it sends, what it reports."""

import asyncio
import itertools
import math
import random
import statistics
import time
import xml.etree.ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from server_harness import running_server

from jchameleon.client import AsyncClient, RetryPolicy
from jchameleon.client.load import Progress, Sample, run_load
from jchameleon.client.load_report import (
    build_report,
    parse_goodput,
    percentile,
    plot,
)
from jchameleon.client.values import Timing
from jchameleon.errors import ConfigError
from jchameleon.workload.arrivals import arrivals_s, read_trace
from jchameleon.workload.generator import Length, Planned, Popularity, Workload

RANKS = {"a": 8, "b": 8, "c": 8, "d": 64}


def first_arrivals(count, *args):
    return list(itertools.islice(arrivals_s(*args), count))


def test_poisson_arrivals_follow_the_exponential_law():
    times = np.array(first_arrivals(20_001, "poisson", 4.0, random.Random(7)))
    gaps = np.sort(np.diff(times))
    # Kolmogorov-Smirnov: the distance from the law's distribution function; 1.95 is
    # its bound at 0.1 %.
    steps = np.arange(len(gaps) + 1) / len(gaps)
    law = 1 - np.exp(-4.0 * gaps)
    distance = max((law - steps[:-1]).max(), (steps[1:] - law).max())
    assert distance * math.sqrt(len(gaps)) < 1.95
    # Gaps are independent of one another.
    gaps = np.diff(times)
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 4 / math.sqrt(len(gaps))


def test_fixed_and_immediate_arrivals():
    rng = random.Random(0)
    assert first_arrivals(4, "fixed", 2.0, rng) == [0.0, 0.5, 1.0, 1.5]
    assert first_arrivals(3, "fixed", math.inf, rng) == [0.0] * 3
    assert first_arrivals(3, "poisson", math.inf, rng) == [0.0] * 3


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:48.6805900,396,109\n"
        "2023-11-16 18:15:47.1805900,10,0\n"
    )
    return read_trace(path)


def test_trace_is_read_in_order_and_stretched_to_a_rate(trace):
    assert trace.at_s == pytest.approx((0.0, 0.5, 2.0))
    assert trace.lengths == ((374, 44), (10, 0), (396, 109))
    assert trace.rate_rps == pytest.approx(1.0)
    rng = random.Random(0)
    own = first_arrivals(5, "trace", None, rng, trace)
    assert own == pytest.approx([0.0, 0.5, 2.0, 3.0, 3.5])
    faster = first_arrivals(5, "trace", 4.0, rng, trace)
    assert faster == pytest.approx([at_s / 4 for at_s in own])
    assert first_arrivals(4, "trace", math.inf, rng, trace) == [0.0] * 4


@pytest.mark.parametrize(
    "text, problem",
    [
        ("TIMESTAMP,ContextTokens\n1,2\n", "must have columns"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "has no rows"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nnever,1,2\n", "must have columns"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nnan,1,2\n", "must be finite"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n1,-1,2\n", "must not be negative"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n1,x,2\n", "must have columns"),
    ],
)
def test_trace_that_is_none_is_refused(tmp_path, text, problem):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        read_trace(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_trace(tmp_path / "none.csv")


def test_popularity_laws_have_the_shares_they_say():
    ranks = list(RANKS.values())
    assert Popularity.parse("uniform").weights(ranks) == [0.25] * 4
    zipf = Popularity.parse("zipf:1").weights(ranks)
    assert zipf == pytest.approx(np.array([12, 6, 4, 3]) / 25)
    # Half of the requests for each rank, within rank 8 as 1, 1/2, 1/3.
    power = Popularity.parse("power:1").weights(ranks)
    assert power == pytest.approx([3 / 11, 3 / 22, 1 / 11, 1 / 2])
    for text in ("zipf", "zipf:x", "zipf:-1", "uniform:1", "pareto:1", "zipf:nan"):
        with pytest.raises(ConfigError, match="popularity="):
            Popularity.parse(text)


def test_plan_draws_adapters_by_their_shares_and_lengths_in_their_ranges(trace):
    workload = Workload(
        num_requests=4000,
        popularity=Popularity.parse("zipf:1"),
        input_len=Length.parse("5:9"),
        output_len=Length.parse("3"),
        vocab_size=50,
    )
    plan = workload.plan(RANKS)
    for (name, rank), share in zip(
        RANKS.items(), Popularity.parse("zipf:1").weights([1] * 4), strict=True
    ):
        mine = [one for one in plan if one.adapter == name]
        assert all(one.rank == rank for one in mine)
        # 4 standard deviations of a binomial share.
        margin = 4 * math.sqrt(share * (1 - share) / 4000)
        assert len(mine) / 4000 == pytest.approx(share, abs=margin)
    assert {len(one.prompt) for one in plan} == {5, 6, 7, 8, 9}
    assert {one.output_tokens for one in plan} == {3}
    assert {token for one in plan for token in one.prompt} == set(range(50))
    assert workload.plan(RANKS) == plan
    recorded = Workload(
        process="trace",
        rate_rps=None,
        num_requests=4,
        input_len=Length.parse("trace"),
        output_len=Length.parse("trace"),
        length_scale=0.5,
        max_model_len=100,
    ).plan({None: 0}, trace)
    # Halved, at least 1, and cut to the model's length.
    assert [one.output_tokens for one in recorded] == [22, 1, 54, 22]
    assert [len(one.prompt) for one in recorded] == [78, 5, 46, 78]


def test_duration_ends_the_arrivals():
    plan = Workload(process="fixed", rate_rps=10.0, num_requests=None, duration_s=2.0)
    assert len(plan.plan({None: 0})) == 20
    plan = Workload(process="fixed", rate_rps=10.0, num_requests=7, duration_s=2.0)
    assert len(plan.plan({None: 0})) == 7


@pytest.mark.parametrize(
    "fields",
    [
        {"rate_rps": 0.0},
        {"rate_rps": math.nan},
        {"rate_rps": None},
        {"num_requests": 0},
        {"num_requests": None},
        {"num_requests": None, "duration_s": 1.0, "rate_rps": math.inf},
        {"length_scale": -1.0},
        {"max_model_len": 1},
    ],
)
def test_workload_refuses_nonsense(fields):
    with pytest.raises(ConfigError):
        Workload(**fields)


def test_plan_needs_a_trace_and_adapters():
    with pytest.raises(ConfigError, match="need a trace"):
        Workload(input_len=Length.parse("trace")).plan(RANKS)
    with pytest.raises(ConfigError, match="no adapter"):
        Workload().plan({})
    for text in ("0", "9:5", "x", "1:", ":"):
        with pytest.raises(ConfigError, match="length="):
            Length.parse(text)


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40),
    st.floats(0, 100),
)
def test_percentiles_are_numpys(values, percent):
    expected = np.percentile(values, percent)
    assert percentile(sorted(values), percent) == pytest.approx(expected, abs=1e-6)


def sample(sent_s, pieces, *, adapter="a", error=None, lane=None, hit=None, at_s=0.0):
    timing = Timing(
        queue_s=0.0,
        adapter_load_s=0.0,
        ttft_s=0.0,
        total_s=0.0,
        lane=lane,
        adapter_cache_hit=hit,
        wrs=None,
        preemptions=0,
    )
    planned = Planned(
        at_s=at_s,
        adapter=adapter,
        rank=RANKS.get(adapter, 0),
        prompt=(1,) * 5,
        output_tokens=8,
    )
    ended_s = pieces[-1][0] if pieces else sent_s + 0.5
    return Sample(
        planned=planned,
        sent_s=sent_s,
        pieces=pieces,
        ended_s=ended_s,
        text="t",
        timing=timing,
        error=error,
    )


def test_report_has_the_keys_and_definitions_that_users_compare():
    samples = [
        sample(0.0, [(0.1, 1), (0.2, 1), (0.4, 2)], lane=0, hit=False),
        sample(0.5, [(0.7, 1)], adapter="d", lane=1, hit=True),
        sample(1.0, [(1.05, 2), (2.0, 3)], adapter=None),
        sample(1.5, [], error="UNAVAILABLE: gone", at_s=1.25),
    ]
    progress = Progress(planned=4, sent=4, completed=3, failed=1, most_open=2)
    report = build_report(samples, progress, goodput={"ttft_ms": 150.0})
    expected_keys = {
        "duration completed failed total_input_tokens total_output_tokens "
        "request_throughput request_goodput output_throughput total_token_throughput "
        "input_lens output_lens ttfts itls generated_texts errors concurrency "
        "max_concurrent_requests adapters rank_mix adapter_cache_hit_rate rank_classes "
        "queues p99_send_lag_ms"
    }.pop().split()
    statistic = ("mean", "median", "std", "p50", "p90", "p99")
    expected_keys += [
        f"{name}_{kind}_ms"
        for name in statistic
        for kind in ("ttft", "tpot", "itl", "e2el")
    ]
    assert set(report) == set(expected_keys)
    assert report["duration"] == 2.0
    assert (report["completed"], report["failed"]) == (3, 1)
    assert (report["total_input_tokens"], report["total_output_tokens"]) == (15, 10)
    assert report["request_throughput"] == 1.5
    assert report["output_throughput"] == 5.0
    assert report["total_token_throughput"] == 12.5
    assert report["request_goodput"] == 1.0  # two of the three within 2 s
    ttfts = [100.0, 200.0, 50.0]
    tpots = [100.0, 950 / 4]
    assert report["mean_ttft_ms"] == pytest.approx(statistics.fmean(ttfts))
    assert report["median_ttft_ms"] == pytest.approx(100.0)
    assert report["std_ttft_ms"] == pytest.approx(np.std(ttfts))
    assert report["p99_ttft_ms"] == pytest.approx(np.percentile(ttfts, 99))
    assert report["mean_tpot_ms"] == pytest.approx(statistics.fmean(tpots))
    assert report["mean_itl_ms"] == pytest.approx((100 + 200 + 950) / 3)
    assert report["mean_e2el_ms"] == pytest.approx((400 + 200 + 1000) / 3)
    assert report["rank_mix"] == {"base": 0.25, "8": 0.5, "64": 0.25}
    assert report["adapters"] == 2
    assert report["adapter_cache_hit_rate"] == 0.5
    assert report["rank_classes"]["8"]["requests"] == 2
    assert report["rank_classes"]["8"]["completed"] == 1
    assert report["rank_classes"]["64"]["p50_ttft_ms"] == pytest.approx(200.0)
    assert report["rank_classes"]["64"]["p50_tpot_ms"] is None
    assert list(report["queues"]) == ["0", "1"]
    assert report["errors"] == ["", "", "", "UNAVAILABLE: gone"]
    assert report["output_lens"] == [4, 1, 5, 0]
    assert report["ttfts"] == pytest.approx([0.1, 0.2, 0.05, 0.0])
    assert report["itls"][0] == pytest.approx([0.1, 0.2])
    lags = [0.0, 500.0, 1000.0, 250.0]
    assert report["p99_send_lag_ms"] == pytest.approx(np.percentile(lags, 99))
    without = build_report(samples, progress, goodput={})
    assert without["request_goodput"] is None


def test_report_of_nothing_but_failures_has_no_times():
    report = build_report(
        [sample(0.0, [], error="x")], Progress(planned=1), goodput={"ttft_ms": 1.0}
    )
    assert report["mean_ttft_ms"] is None and report["request_throughput"] == 0.0
    with pytest.raises(ConfigError, match="nothing to plot"):
        plot("x", [sample(0.0, [], error="x")])


def test_goodput_limits_are_read():
    limits = parse_goodput(["ttft_ms:500", "tpot_ms:50"])
    assert limits == {"ttft_ms": 500.0, "tpot_ms": 50.0}
    for text in ("ttft:5", "itl_ms:5", "ttft_ms:x", "ttft_ms:0", "ttft_ms"):
        with pytest.raises(ConfigError, match="goodput="):
            parse_goodput([text])


def test_plot_draws_each_rank_and_escapes_its_title():
    samples = [
        sample(0.0, [(0.1, 1), (0.2, 1)]),
        sample(0.0, [(0.1, 1)], adapter="d"),
        sample(0.0, [(0.3, 1)], adapter=None),
    ]
    root = xml.etree.ElementTree.fromstring(plot("<a&b>", samples))
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    names = ("base", "rank 8", "rank 64", "all")
    assert {f"TTFT, {name}" for name in names} | {"TPOT, all"} <= texts
    assert "<a&b>: ms by percentile" in texts


def planned(at_s, output_tokens=4):
    return Planned(
        at_s=at_s, adapter=None, rank=0, prompt=(5, 6), output_tokens=output_tokens
    )


def load(target, plan, **options):
    async def run():
        once = RetryPolicy(attempts=1)
        async with AsyncClient(target, retry=once) as client:
            return await run_load(client, plan, timeout_s=60.0, **options)

    return asyncio.run(run())


def test_sending_does_not_wait_for_answers():
    """One row at a time, so that answers take far longer than the gaps."""
    with running_server({"engine": {"max_running": 1}}) as server:
        plan = [planned(0.01 * index, 60) for index in range(20)]
        ticks = []
        samples, progress = load(
            server.target, plan, tick=lambda p, s: ticks.append(s), tick_s=0.05
        )
        # All were sent before the last third of them was done.
        ends = sorted(sample.ended_s for sample in samples)
        assert max(sample.sent_s for sample in samples) < ends[13]
        assert progress.most_open > 5 and progress.open == 0
        assert all(sample.sent_s >= sample.planned.at_s for sample in samples)
        assert [sample.output_tokens for sample in samples] == [60] * 20
        assert all(sample.timing.total_s > 0 for sample in samples)
        assert ticks == sorted(ticks) and ticks


def test_refusals_are_failures_and_the_rest_goes_on():
    table = {"limits": {"max_waiting_requests": 1}, "engine": {"max_running": 1}}
    with running_server(table) as server:
        started_s = time.monotonic()
        samples, progress = load(server.target, [planned(0.0, 100)] * 6)
        failed = [sample for sample in samples if sample.error is not None]
        assert progress.failed == len(failed) == 4
        assert all("QUEUE_FULL" in sample.error for sample in failed)
        done = [sample for sample in samples if sample.error is None]
        assert [sample.output_tokens for sample in done] == [100, 100]
        assert max(s.ended_s for s in samples) <= time.monotonic() - started_s
