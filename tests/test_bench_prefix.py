"""The bench of the prefix cache, run whole on the tiny model."""

import math

import pytest
from tool_runs import run_bench, run_tool


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    return run_bench("bench_prefix", "--quick", folder=folder)


def test_report_counts_what_the_cache_spares(report):
    text, found = report
    system, question, count = 96, 8, 4
    spared = {
        "new": system + count * question,
        "again": count * question,
        "single": count * question,
    }
    assert [row["key"] for row in found["rows"]] == list(spared)
    for row in found["rows"]:
        assert row["label"] in text and row["same_outputs"] is True
        assert row["off"]["prefilled_tokens"] == [count * (system + question)] * 2
        assert row["on"]["prefilled_tokens"] == [spared[row["key"]]] * 2


def test_report_has_finite_figures_with_their_spread(report):
    _, found = report
    for row in found["rows"]:
        values = [row["speed_up"]]
        values += [
            row[name][field]
            for name in ("on", "off")
            for field in ("ttft_median_s", "ttft_last_s")
        ]
        for value in values:
            assert 0 < value["min"] <= value["median"] <= value["max"] < math.inf
    assert found["machine"]["cores_in_use"] <= found["settings"]["threads"]
    assert found["versions"]["jchameleon"]


def test_repeats_below_one_are_refused(tmp_path):
    done = run_tool("bench_prefix", "--quick", "--repeats", "0", folder=tmp_path)
    assert done.returncode == 2
    assert "--repeats=0 must be at least 1" in done.stderr
