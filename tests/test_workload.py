"""Requests that are drawn: lengths by a law or a trace, one at a time."""

import itertools
import math
import statistics

import pytest

from jchameleon.errors import ConfigError
from jchameleon.workload.arrivals import Trace
from jchameleon.workload.generator import Length, Popularity, Workload

RANKS = {"a": 8, "b": 8, "c": 64}
TRACE = Trace(at_s=(0.0, 1.0, 2.0), lengths=((100, 10), (200, 20), (300, 30)))


def test_lognormal_lengths_have_the_quantiles_of_their_law():
    length = Length.parse("lognormal:1000:0.5:4000")
    workload = Workload(num_requests=20_000, input_len=length, max_model_len=100_000)
    drawn = sorted(one.prompt_tokens for one in workload.draw(RANKS))
    for share in (0.1, 0.5, 0.9, 0.99):
        z = statistics.NormalDist().inv_cdf(share)
        expected = 1000 * math.exp(0.5 * z)
        assert drawn[int(share * len(drawn))] == pytest.approx(expected, rel=0.04)
    assert drawn[-1] == 4000
    halves = Workload(
        num_requests=20_000, input_len=length, length_scale=0.5, max_model_len=100_000
    )
    assert max(one.prompt_tokens for one in halves.draw(RANKS)) == 2000


@pytest.mark.parametrize(
    "text",
    [
        "lognormal:0.5:1:10",
        "lognormal:10:0:10",
        "lognormal:10:1",
        "lognormal:inf:1:9",
        "lognormal:10:nan:9",
        "1:2:3",
    ],
)
def test_length_that_is_none_is_an_error(text):
    with pytest.raises(ConfigError, match="lognormal:MEDIAN:SIGMA:MOST"):
        Length.parse(text)


def test_pairs_of_a_trace_stay_together_and_are_drawn_evenly():
    of_trace = Length(of_trace=True)
    workload = Workload(
        num_requests=3000,
        input_len=of_trace,
        output_len=of_trace,
        trace_order="drawn",
    )
    pairs = [(d.prompt_tokens, d.output_tokens) for d in workload.draw(RANKS, TRACE)]
    assert set(pairs) == set(TRACE.lengths)
    for pair in TRACE.lengths:  # 5 standard deviations of a binomial
        assert abs(pairs.count(pair) - 1000) < 5 * math.sqrt(3000 * 2 / 9)
    assert pairs[:300] != list(TRACE.lengths) * 100


def test_draw_gives_what_plan_does_and_never_looks_ahead():
    workload = Workload(
        num_requests=None,
        duration_s=50.0,
        rate_rps=4.0,
        input_len=Length(low=1, high=40),
        popularity=Popularity.parse("power:1"),
        seed=3,
    )
    drawn = list(workload.draw(RANKS))
    planned = workload.plan(RANKS)
    assert 150 < len(drawn) == len(planned)
    for one, other in zip(drawn, planned, strict=True):
        assert one.at_s == other.at_s < 50.0
        assert (one.adapter, one.rank) == (other.adapter, other.rank)
        assert one.prompt_tokens == len(other.prompt)
        assert one.output_tokens == other.output_tokens
    endless = Workload(num_requests=10**12)  # a list of these would not fit
    assert len(list(itertools.islice(endless.draw(RANKS), 5))) == 5


def test_trace_order_that_is_unknown_is_an_error():
    with pytest.raises(ConfigError, match="trace_order='sorted' must be"):
        Workload(trace_order="sorted")
