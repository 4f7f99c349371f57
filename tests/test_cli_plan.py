"""`jchameleon plan`: a table of what its JSON says."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jchameleon.cli import main, plan

QUICK = ["plan", "--gpu", "a40", "--model", "llama-7b", "--slo-ttft", "1"]
QUICK += ["--adapters", "20", "--ranks", "8,64", "--input-len", "100:300"]
QUICK += ["--output-len", "10:40", "--seeds", "2", "--duration", "3"]
CASES = ("pessimistic", "nominal", "optimistic")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of the same arguments, whose hashes differ: text and JSON of each."""
    folder = tmp_path_factory.mktemp("plan")
    code = (
        "import sys\n"
        "from jchameleon.cli import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "assert not {'jax', 'jaxlib', 'flax'} & set(sys.modules)\n"
    )
    found = []
    for index in range(2):
        out = folder / f"{index}.json"
        done = subprocess.run(
            [sys.executable, "-c", code, *QUICK, "--json", str(out)],
            check=True,
            env={**os.environ, "PYTHONHASHSEED": str(index)},
            capture_output=True,
            text=True,
        )
        found.append((done.stdout, out.read_bytes()))
    return found


def test_same_arguments_give_the_same_bytes_and_load_no_jax(runs):
    assert runs[0] == runs[1]


def test_table_has_the_numbers_of_the_json(runs):
    text, raw = runs[0]
    report = json.loads(raw)
    cases = [report["cases"][name] for name in CASES]

    def row(title):
        line = next(line for line in text.splitlines() if line.startswith(title))
        return [float(cell) for cell in line[len(title) :].split()]

    def equals(title, values):
        assert row(title) == pytest.approx(values, rel=0.006), title

    equals("requests/s", [case["capacity_rps"] for case in cases])
    equals("  95 % over seeds, +-", [case["half_width_95_rps"] for case in cases])
    equals("  step of the scan", [case["step_rps"] for case in cases])
    equals("  seconds of a run", [3.0] * 3)
    at_load = [case["at_load"] for case in cases]
    equals("at 80% of that, requests/s", [0.8 * c["capacity_rps"] for c in cases])
    for kind in ("ttft", "tbt"):
        for point in ("p50", "p99"):
            values = [1e3 * one[f"{kind}_s"][point] for one in at_load]
            equals(f"  {kind.upper()} {point}, ms", values)
    equals("  adapter hit rate", [one["cache"]["hit_rate"] for one in at_load])
    equals("  link busy", [one["link_busy"] for one in at_load])
    saturated = [case["saturated"] for case in cases]
    equals(
        "  with twice the memory, s", [one["ttft_p99_s"]["memory"] for one in saturated]
    )
    named = next(x for x in text.splitlines() if x.startswith("saturates first"))
    assert named.split()[2:] == [one["resource"] for one in saturated]
    memory = report["memory"]
    for title, value in (("weights", "weights_bytes"), ("pool  ", "pool_bytes")):
        equals(title, [memory[value] / 1e9])
    assert f"{memory['kv_tokens']} KV tokens" in text
    last = text.splitlines()[-1]
    numbers = [float(n) for n in re.findall(r"\d+(?:\.\d+)?(?:e[+-]\d+)?", last)]
    assert numbers[0] == pytest.approx(report["capacity_rps"], rel=0.006)
    assert numbers[1] == pytest.approx(report["half_width_95_rps"], rel=0.006)
    assert numbers[3:5] == pytest.approx(report["range_rps"], rel=0.006)


def test_json_says_what_was_asked(runs):
    report = json.loads(runs[0][1])
    assert (report["gpu"], report["model"]) == ("a40", "llama-7b")
    assert report["capacity_rps"] == report["cases"]["nominal"]["capacity_rps"]
    settings = report["settings"]
    assert settings["adapters"] == {"count": 20, "ranks": [8, 64]}
    assert settings["workload"]["output_len"]["high"] == settings["max_tokens"] == 40
    assert settings["slo_s"] == report["slo_ttft_s"] == 1.0
    assert settings["policy"]["source"] == "chameleon-nosched"


def test_page_names_the_keys_of_the_json_and_options_that_there_are(runs):
    report = json.loads(runs[0][1])
    page = (Path(__file__).parent.parent / "docs" / "capacity.md").read_text("utf-8")
    case = report["cases"]["nominal"]
    known = report | case | case["at_load"] | case["saturated"]
    table = page[page.index("| key |") :].splitlines()[2:]
    keys = [key for line in table for key in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert set(keys) <= set(known) and set(report) | set(case) <= set(keys)
    for parent, inner in (("memory", report), ("usage", case["at_load"])):
        row = next(line for line in table if line.startswith(f"| `{parent}` "))
        assert set(inner[parent]) == set(re.findall(r"`(\w+)`", row)) - {parent}
    options = set(re.findall(r"(?<=[`( ])--[a-z-]+", page)) - {"--sweep"}
    text = inspect.getsource(plan)
    assert all(f'"{option}"' in text for option in options)


def test_options_reach_the_plan(tmp_path):
    trace, out = tmp_path / "trace.csv", tmp_path / "out.json"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n0,400,20\n1,200,60\n")
    options = ["--trace", str(trace), "--length-scale", "0.5", "--policy", "s-lora"]
    options += ["--percentile", "90", "--popularity", "zipf:1", "--seeds", "1"]
    options += ["--arrivals", "gamma:2", "--json", str(out)]
    assert main([*QUICK, *options]) == 0
    report = json.loads(out.read_text())
    settings = report["settings"]
    assert settings["trace_requests"] == 2 and settings["max_tokens"] == 30
    assert settings["policy"]["source"] == "s-lora"
    assert settings["workload"]["process"] == "gamma:2"
    assert settings["workload"]["popularity"]["law"] == "zipf"
    runs = report["cases"]["nominal"]["seeds"][0]["runs"]
    assert all(set(run) == {"rate_rps", "ttft_p90_s"} for run in runs)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--gpu", "a41"], "gpu='a41' is unknown"),
        (["--model", "llama-30b"], "model='llama-30b' has"),
        (["--ranks", "8,x"], "ranks='8,x' must be integers with commas"),
        (["--ranks", "8,,16"], "ranks='8,,16' must be integers"),
        (["--slo-ttft", "0.01"], "slo_ttft=0.01 must be at least"),
        (["--adapters", "7"], "adapters.count=7 must be a multiple"),
        (["--max-model-len", "0"], "max_model_len=0"),
        (["--trace", "no.csv"], "cannot read no.csv"),
        (["--json", "no/such/dir.json"], "cannot write no/such/dir.json"),
        (["--model", "nothing"], "unknown model 'nothing'"),
    ],
)
def test_wrong_input_ends_with_one_line_and_code_2(capsys, options, message):
    assert main([*QUICK, *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
