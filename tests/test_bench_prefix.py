"""The bench of the prefix cache, run whole on the tiny model."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run_tool(*arguments, folder):
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "bench_prefix.py", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    path = folder / "report.json"
    done = run_tool("--quick", "--json", path, folder=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text(encoding="utf-8"))


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
    done = run_tool("--quick", "--repeats", "0", folder=tmp_path)
    assert done.returncode == 2
    assert "--repeats=0 must be at least 1" in done.stderr
