import collections
import math

import exp_workload
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st


@pytest.fixture
def trace_file(tmp_path):
    """Return a function that writes rows of (input, output) as a trace."""

    def write(rows, header="TIMESTAMP,ContextTokens,GeneratedTokens"):
        path = tmp_path / "trace.csv"
        lines = [header, *(f"2023-11-16 18:15:46.68,{a},{b}" for a, b in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


def make(seed=0, *, num_requests=500, path=None, **values):
    shape = exp_workload.Shape(
        num_requests=num_requests, **{"scale": 0.1, "max_model_len": 600, **values}
    )
    return exp_workload.make_trace(shape, exp_workload.Lengths(path), seed)


def test_trace_same_seed_is_the_same():
    assert make(3) == make(3)
    assert make(3) != make(4)
    first, second = make(3), make(4)
    assert not {r.seed for r in first} & {r.seed for r in second}
    assert not {r.request_id for r in first} & {r.request_id for r in second}


def test_prompt_seed_decides_the_tokens():
    one, other = make()[:2]
    assert one.prompt(259) == one.prompt(259)
    assert len(one.prompt(259)) == one.prompt_tokens
    assert one.prompt(1000)[:5] != other.prompt(1000)[:5]
    assert set(one.prompt(2)) <= {0, 1}


def test_arrivals_gaps_are_exponential_with_mean_one():
    trace = make(num_requests=20_000)
    gaps = np.diff([0.0, *(request.arrival for request in trace)])
    assert gaps.min() > 0
    assert gaps.mean() == pytest.approx(1, abs=0.03)
    # Of an exponential law 1 - 1/e is below the mean and 1/e^2 above twice the mean.
    assert np.mean(gaps < 1) == pytest.approx(1 - math.exp(-1), abs=0.015)
    assert np.mean(gaps > 2) == pytest.approx(math.exp(-2), abs=0.015)


def test_arrival_rate_scales_times_and_nothing_else():
    request = make()[9]
    assert request.arrival_s(1.0) == request.arrival
    assert request.arrival_s(40.0) == pytest.approx(request.arrival / 40)


def test_adapters_popularity_is_uniform_over_ranks_and_zipf_within():
    trace = make(num_requests=40_000)
    adapters = exp_workload.Shape(
        num_requests=1, scale=0.1, max_model_len=600
    ).adapters()
    assert len(adapters) == 100
    assert collections.Counter(adapters.values()) == dict.fromkeys(
        (8, 16, 32, 64, 128), 20
    )
    assert all(adapters[request.adapter] == request.rank for request in trace)
    by_rank = collections.Counter(request.rank for request in trace)
    harmonic = sum(1 / k for k in range(1, 21))
    for rank in (8, 16, 32, 64, 128):
        assert by_rank[rank] / 40_000 == pytest.approx(0.2, abs=0.01)
        mine = collections.Counter(r.adapter for r in trace if r.rank == rank)
        for place, name in enumerate((n for n in adapters if adapters[n] == rank), 1):
            share = mine[name] / by_rank[rank]
            assert share == pytest.approx(1 / place / harmonic, abs=0.02)


def test_adapters_uniform_zipf_zero_is_uniform():
    trace = make(num_requests=20_000, num_adapters=10, zipf=0.0)
    counts = collections.Counter(request.adapter for request in trace)
    assert len(counts) == 10
    assert min(counts.values()) > 0.8 * max(counts.values())


@pytest.mark.parametrize(
    ("law", "median", "p90", "p99"),
    [("SYNTHETIC_INPUT", 1020, 2734, 4142), ("SYNTHETIC_OUTPUT", 129, 424, 601)],
)
def test_synthetic_laws_are_least_squares_fits(law, median, p90, p99):
    law = getattr(exp_workload, law)
    assert law.median == median
    quantiles = np.array([[1.2815515655], [2.3263478740]])
    logs = np.log(np.array([p90, p99]) / median)
    (sigma,), *_ = np.linalg.lstsq(quantiles, logs)
    assert law.sigma == pytest.approx(sigma, abs=5e-4)
    draws = law.draw(np.random.default_rng(0), 200_000)
    for percent in (50, 99):
        assert np.percentile(draws, percent) == pytest.approx(
            law.percentile(percent), rel=0.02
        )
    assert draws.max() == law.most


def test_lengths_synthetic_are_scaled_and_cut():
    trace = make(num_requests=20_000, scale=0.1, max_model_len=300)
    prompts = np.array([request.prompt_tokens for request in trace])
    outputs = np.array([request.output_tokens for request in trace])
    assert np.median(prompts) == pytest.approx(102, abs=2)
    assert np.median(outputs) == pytest.approx(12.9, abs=1)
    assert prompts.max() == 300 - 100  # the longest output keeps its room
    assert outputs.max() == 100
    assert prompts.min() >= 1 and outputs.min() >= 1


def test_lengths_file_rows_are_drawn_as_pairs(trace_file):
    path = trace_file([(100, 10), (200, 20), (4000, 40)])
    trace = make(path=path, scale=0.5, max_model_len=1000)
    pairs = {(request.prompt_tokens, request.output_tokens) for request in trace}
    # max_tokens is 20, so prompts end at 980.
    assert pairs == {(50, 5), (100, 10), (980, 20)}
    lengths = exp_workload.Lengths(path)
    assert (lengths.most_output, lengths.median_prompt) == (40, 200)


def test_lengths_tiny_scale_leaves_one_token(trace_file):
    trace = make(path=trace_file([(3, 2)]), scale=0.01, max_model_len=16)
    assert {(r.prompt_tokens, r.output_tokens) for r in trace} == {(1, 1)}


def test_context_holds_most_prompts_and_every_output(trace_file):
    rows = [(100, 10)] * 99 + [(200, 50)]
    # The 99th percentile of 100 values: 100 + 0.01 * (200 - 100) by interpolation.
    lengths = exp_workload.Lengths(trace_file(rows))
    assert lengths.context_tokens(1.0) == 160  # 101 + 50, to the next 16
    assert lengths.context_tokens(0.5) == 80  # 50 + 25


@pytest.mark.parametrize(
    ("header", "rows", "problem"),
    [
        ("TIMESTAMP,Input,Output", [(1, 2)], "ContextTokens"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens", [("x", 2)], "numbers"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens", [], "no rows"),
    ],
)
def test_lengths_bad_file_is_refused(trace_file, header, rows, problem):
    with pytest.raises(ValueError, match=problem):
        exp_workload.Lengths(trace_file(rows, header))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"scale": 0.0}, "scale=0.0"),
        ({"scale": math.inf}, "scale=inf"),
        ({"num_requests": 0}, "num_requests=0"),
        ({"num_adapters": 7}, "multiple of 5"),
        ({"scale": 1.0, "max_model_len": 1000}, "no room for a prompt"),
    ],
)
def test_shape_impossible_values_are_refused(values, problem):
    with pytest.raises(ValueError, match=problem):
        make(**values)


@pytest.mark.parametrize(
    ("tokens", "length", "expected"),
    [
        ([5, 6, 7], 3, 3),  # 7 is new where the output shall end
        ([5, 6, 7], 2, 2),
        ([5, 6, 5], 3, 2),  # 5 would have ended it at once
        ([5, 6, 5, 7], 3, 4),  # 2 and 4 are equally near: the longer
        ([5, 5, 5, 6, 5], 3, 4),
        ([5, 5, 5, 5, 9], 2, 1),
        ([5, 5, 5, 5], 4, 1),
        ([5], 1, 1),
    ],
)
def test_stop_hand_worked_outputs_end_nearest(tokens, length, expected):
    assert exp_workload.choose_stop(tokens, length) == expected


@hypothesis.given(
    st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(1, 30)
)
def test_stop_any_output_ends_at_a_first_occurrence(tokens, length):
    length = min(length, len(tokens))
    possible = [
        n for n in range(1, len(tokens) + 1) if tokens.index(tokens[n - 1]) == n - 1
    ]
    nearest = min(abs(n - length) for n in possible)
    assert exp_workload.choose_stop(tokens, length) == max(
        n for n in possible if abs(n - length) == nearest
    )
