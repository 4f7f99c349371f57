"""`jchameleon simulate`, and a policy of one's own in it and on the engine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from random_adapters import write_random_adapter
from test_sim_profile import TINY

from jchameleon import LLM, SamplingParams
from jchameleon.cli import main
from jchameleon.config import ModelConfig

MINE = """
import numpy as np


class Smallest:
    def __init__(self, *, log):
        self._log = log

    def score(self, table):
        with open(self._log, "a") as file:
            print("asked", file=file)
        return table.num_pages.astype(np.float64)
"""


@pytest.fixture
def profile(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def test_report_is_printed_and_written(profile, tmp_path, capsys):
    out = tmp_path / "out.json"
    code = main(
        ["simulate", "--profile", str(profile), "--policy", "chameleon"]
        + ["--rate", "4", "--seed", "3", "--json", str(out)]
    )
    assert code == 0
    printed = capsys.readouterr().out
    assert "chameleon" in printed and "not exercised" in printed
    report = json.loads(out.read_text())
    assert report["settings"]["policy"]["source"] == "chameleon"
    assert report["settings"]["workload"]["seed"] == 3
    assert report["requests"]["finished"] > 40


def test_trace_and_variant_are_used(profile, tmp_path):
    trace, out = tmp_path / "trace.csv", tmp_path / "out.json"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n0,16,2\n1,16,2\n")
    main(
        ["simulate", "--profile", str(profile), "--variant", "warm", "--rate", "1"]
        + ["--trace", str(trace), "--duration", "30", "--json", str(out)]
    )
    report = json.loads(out.read_text())
    assert report["settings"]["trace_requests"] == 2
    assert report["settings"]["cache_at_start"] == "warm"
    assert report["settings"]["workload"]["duration_s"] == 30.0
    # One decode step each, of 30 ms in this variant, and now and then a prompt's 10.
    assert report["tbt_s"]["p50"] == pytest.approx(0.03)
    assert report["cache"]["misses"] == 0


def test_sweep_is_printed(profile, tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = ["simulate", "--profile", str(profile), "--seeds", "2"]
    assert main([*arguments, "--sweep", "1:2:1", "--json", str(out)]) == 0
    assert "the highest rate keeps the SLO" in capsys.readouterr().out
    assert json.loads(out.read_text())["rates_rps"] == [1.0, 2.0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "one of --rate and --sweep must be given"),
        (["--rate", "1", "--sweep", "1:2:1"], "one of --rate and --sweep"),
        (["--rate", "-1"], "rate=-1.0 must be a finite number above 0"),
        (["--rate", "1", "--policy", "chamelon"], "did you mean 'chameleon'"),
        (["--rate", "1", "--policy", "no.toml"], "cannot read config"),
        (["--rate", "1", "--trace", "no.csv"], "cannot read no.csv"),
        (["--rate", "1", "--json", "no/such/dir.json"], "cannot write"),
        (["--rate", "1", "--variant", "x"], "variant='x' is not in"),
    ],
)
def test_wrong_input_ends_with_one_line(profile, capsys, arguments, message):
    assert main(["simulate", "--profile", str(profile), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_same_seed_gives_the_same_bytes_and_loads_no_jax(profile, tmp_path):
    code = (
        "import sys\n"
        "from jchameleon.cli import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "assert not {'jax', 'jaxlib', 'flax'} & set(sys.modules)\n"
    )
    written = []
    for index, seed in enumerate((5, 5, 6)):
        out = tmp_path / f"{index}.json"
        arguments = ["simulate", "--profile", str(profile), "--rate", "8"]
        arguments += ["--policy", "chameleon", "--seed", str(seed), "--json", str(out)]
        environment = {**os.environ, "PYTHONHASHSEED": str(index)}
        subprocess.run(
            [sys.executable, "-c", code, *arguments],
            check=True,
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        written.append(out.read_bytes())
    assert written[0] == written[1] != written[2]


def test_a_policy_of_ones_own_runs_here_and_on_the_engine(
    profile, tmp_path, monkeypatch
):
    """The researcher's path: one file, unchanged, for both."""
    (tmp_path / "my_sim_policy.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    log = tmp_path / "asked.txt"
    policy = tmp_path / "mine.toml"
    policy.write_text(
        'preset = "chameleon-nosched"\n[eviction]\nname = "my_sim_policy:Smallest"\n'
        f"log = {json.dumps(str(log))}\n"
    )
    profile.write_text(TINY.replace("1_000_000", "240_000"))
    out = tmp_path / "out.json"
    arguments = ["simulate", "--profile", str(profile), "--policy", str(policy)]
    assert main([*arguments, "--rate", "30", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["cache"]["evictions"] > 0
    assert report["settings"]["policy"]["eviction"]["name"] == "my_sim_policy:Smallest"
    assert "asked" in log.read_text()

    log.unlink()

    paths: dict[str, str | Path] = {}
    for seed, name in enumerate(("one", "two", "three")):
        paths[name] = tmp_path / name
        write_random_adapter(
            paths[name],
            ModelConfig.preset("tiny"),
            rank=64,
            targets=["q", "k", "v", "o"],
            seed=seed,
        )
    limits = {"pool_bytes": 600 * 1024, "max_running": 1, "max_batch_tokens": 64}
    with LLM("tiny", adapters=paths, policy=str(policy), **limits) as llm:
        for name in ("one", "two", "three"):
            llm.generate("Hello", adapters=name, sampling=SamplingParams(max_tokens=2))
        assert sum(info.evictions for info in llm.list_adapters()) > 0
    assert "asked" in log.read_text()
