"""Policies of tools/tried_policies.py: by hand, in a planner, compared by the tool."""

import math
import random
import sys

import numpy as np
import pytest
from sim_world import adapters_of, drawn, simulator_of
from test_policy_eviction import used_table
from tool_runs import ROOT, run_bench

from jchameleon.errors import ConfigError
from jchameleon.runtime.policy.invariants import check_planner

sys.path.insert(0, str(ROOT / "tools"))
import tried_policies as tried  # noqa: E402, a script's neighbour
from exp_tried import TURNS, FirstTokens  # noqa: E402

EVICTIONS = ("PerByte", "Elora", "TailSafe", "Ghosts", "Epochs")
NOW_S = 100.0


def random_rows(seed, count=12):
    rng = random.Random(seed)
    return [
        (rng.randint(0, 9), rng.uniform(0.0, NOW_S), rng.randint(1, 32))
        for _ in range(count)
    ]


def table_of(rows, load_line=(0.002, 0.001)):
    table = used_table(rows, now_s=NOW_S)
    table.load_line = load_line
    return table


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_plain_loops(seed):
    rows = random_rows(seed)
    reload_s = [0.002 + 0.001 * pages for *_, pages in rows]
    per_byte = [u * s / p for (u, _, p), s in zip(rows, reload_s, strict=True)]
    assert tried.PerByte().score(table_of(rows)) == pytest.approx(per_byte)
    elora = [
        s * u * (1 - 1 / (1 + math.exp(-(NOW_S - last) / 30.0)))
        for (u, last, _), s in zip(rows, reload_s, strict=True)
    ]
    assert tried.Elora(scale_s=30.0).score(table_of(rows)) == pytest.approx(elora)


def test_what_reloads_within_the_budget_goes_first_by_chameleons_score():
    rows = random_rows(1)
    scores = tried.TailSafe(budget_s=0.016).score(table_of(rows))
    plain = tried.ChameleonScore().score(table_of(rows))
    order = sorted(range(len(rows)), key=lambda i: (rows[i][2] > 14, plain[i]))
    assert np.argsort(scores).tolist() == order


def test_term_that_wanted_a_victim_gone_which_comes_back_loses_weight():
    policy = tried.Ghosts()
    # The most used one, small and long idle.
    table = table_of([(9, 10.0, 1), (1, 90.0, 32), (2, 60.0, 16)])
    policy.score(table)
    policy.evicted(0, 0.0)
    policy.used(1)  # was never evicted
    assert policy.weights.tolist() == [1 / 3] * 3
    policy.used(0)
    frequency, recency, size = policy.weights
    assert frequency > size > recency
    assert policy.weights.sum() == pytest.approx(1.0)
    for _ in range(500):
        policy.score(table)
        policy.evicted(0, 0.0)
        policy.used(0)
    assert policy.weights.min() > 0.005
    policy.evicted(0, 0.0)
    policy.forget(0)
    before = policy.weights
    policy.used(0)  # another adapter of that order
    assert policy.weights is before


def test_set_that_is_kept_changes_only_after_an_epoch():
    policy = tried.Epochs(epoch_uses=4, most_uses=8, share=0.5)
    table = table_of([(0, 10.0, 8), (0, 20.0, 8), (0, 30.0, 8), (0, 40.0, 8)])
    assert np.argsort(policy.score(table)).tolist() == [0, 1, 2, 3]
    for order in (0, 0, 1, 1):
        policy.used(order)
    assert np.argsort(policy.score(table)).tolist() == [2, 3, 0, 1]
    for order in (2, 2, 3):
        policy.used(order)
    assert np.argsort(policy.score(table)).tolist() == [2, 3, 0, 1]
    policy.used(3)
    assert np.argsort(policy.score(table)).tolist() == [0, 1, 2, 3]
    # The same set again: the next epoch is twice as long.
    for order in (2, 2, 3, 3):
        policy.used(order)
    policy.score(table)
    for order in (0, 0, 1, 1):
        policy.used(order)
    assert np.argsort(policy.score(table)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "policy, options, message",
    [
        (tried.Elora, {"scale_s": 0}, "scale_s=0 must be"),
        (tried.TailSafe, {"budget_s": math.inf}, "budget_s=inf must be"),
        (tried.Ghosts, {"rate": "x"}, "rate='x' must be"),
        (tried.Ghosts, {"remembered": 0}, "remembered=0 must be"),
        (tried.Epochs, {"share": 2}, "share=2 must be"),
        (tried.Epochs, {"epoch_uses": 0}, "epoch_uses=0 must be"),
    ],
)
def test_options_out_of_range_are_errors(policy, options, message):
    with pytest.raises(ConfigError, match=message):
        policy(**options)


@pytest.mark.parametrize(
    "policy",
    [
        *(
            {
                "preset": "chameleon-nosched",
                "eviction": {"name": f"tried_policies:{name}"},
            }
            for name in EVICTIONS
        ),
        TURNS,
    ],
    ids=[*EVICTIONS, "TurnLanes"],
)
@pytest.mark.parametrize("seed", [5, 6])
def test_everyone_ends_under_each_of_them(policy, seed):
    simulator, planner = simulator_of(
        adapters_of(a=8, b=16, c=32, d=64), policy=policy, num_pages=40
    )
    rng = random.Random(seed)
    at_s, requests = 0.0, []
    for _ in range(300):
        at_s += rng.expovariate(8.0)
        uid = rng.choice("abcd")
        requests.append(drawn(at_s, uid, rng.randint(1, 60), rng.randint(1, 20)))
    result = simulator.run(requests, max_tokens=20)
    assert (result.finished, result.failed) == (300, 0)
    assert result.books.evictions > 20
    check_planner(planner)


def test_turns_in_lanes_keep_who_asks_for_little_before_who_asks_for_much():
    """Same lanes, same requests: only the order within a lane differs."""

    def first_tokens(name):
        seen = FirstTokens()
        options = {"min_samples": 10_000}  # one lane
        simulator, planner = simulator_of(
            adapters_of(a=8, b=8),
            policy={"preset": "chameleon", "admission": {"name": name, **options}},
            num_pages=40,
            observe=seen,
        )
        requests = [drawn(0.001 * i, "a", 20, 20) for i in range(200)]
        requests += [drawn(1.0 + 0.5 * i, "b", 20, 20) for i in range(5)]
        result = simulator.run(requests, max_tokens=20)
        assert (result.finished, result.failed) == (205, 0)
        check_planner(planner)
        return {uid: max(values) for uid, values in seen.ttft_s.items()}

    turns = first_tokens("tried_policies:TurnLanes")
    lanes = first_tokens("chameleon")
    assert turns["b"] < 0.2 * lanes["b"]
    assert turns["a"] == pytest.approx(lanes["a"], rel=0.2)


def test_tool_compares_them(tmp_path):
    """With so few requests the figures say nothing; that they are there."""
    arguments = ["--quick", "--base", "chameleon"]
    text, report = run_bench("exp_tried", *arguments, folder=tmp_path)
    assert "instead of a part of `chameleon`" in text
    for rows in report["compared"].values():
        assert len(rows) == 9
        assert all(0 <= row["hit_rate"] <= 1 for row in rows.values())
    vtc = report["isolation"]["vtc"]
    assert vtc["with"]["hog_p99_s"] > 0 and vtc["without"]["others_p99_s"] > 0
