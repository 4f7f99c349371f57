"""`jchameleon replay`: what it prints, and how it ends."""

import gzip
import json
import os
import subprocess
import sys

import pytest
from plan_traffic import record

from jchameleon.cli import main
from jchameleon.runtime.policy.presets import policy_preset_names


def tamper(path):
    """Let a log claim that its first admission was of another request."""
    text = gzip.decompress(path.read_bytes()).decode()
    text = text.replace('"admitted":["r', '"admitted":["x', 1)
    path.write_bytes(gzip.compress(text.encode()))


def test_identical_replay_prints_totals_and_ends_well(tmp_path, capsys):
    plans = [plan for _, _, plan in record(tmp_path / "log", "fifo-lru", seed=1)]
    loads = sum(len(plan.loads) for plan in plans)
    admitted = sum(len(plan.admitted) for plan in plans)
    assert loads > 10 and admitted > 10
    assert main(["replay", str(tmp_path / "log")]) == 0
    out, err = capsys.readouterr()
    *totals, verdict = out.splitlines()
    facts = dict(line.split() for line in totals)
    assert verdict == "identical" and err == ""
    assert facts["policy"] == "fifo-lru"
    assert facts["iterations"] == str(len(plans))
    assert (facts["loads"], facts["admitted"]) == (str(loads), str(admitted))
    assert "first_difference" not in facts and "cut_off" not in facts

    assert main(["replay", str(tmp_path / "log"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["identical"] is True and facts["first_difference"] is None
    assert (facts["loads"], facts["cut_off"]) == (loads, False)


def test_different_replay_names_the_difference_and_ends_with_3(tmp_path, capsys):
    plans = [plan for _, _, plan in record(tmp_path / "log", "fifo-lru", seed=1)]
    tamper(tmp_path / "log")
    first = next(i for i, plan in enumerate(plans, start=1) if plan.admitted)
    request_id = plans[first - 1].admitted[0]
    difference = (
        f"iteration {first}: plan.admitted[0]: the log has 'x{request_id[1:]}', "
        f"the replay '{request_id}'"
    )
    assert main(["replay", str(tmp_path / "log")]) == 3
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == f"different: {difference}" and err == ""
    assert main(["replay", "--json", str(tmp_path / "log")]) == 3
    facts = json.loads(capsys.readouterr().out)
    assert facts["identical"] is False and facts["first_difference"] == difference
    assert facts["iterations"] == first


def test_log_that_is_cut_off_is_replayed_and_says_so(tmp_path, capsys):
    record(tmp_path / "log", "fifo-lru", seed=1)
    content = (tmp_path / "log").read_bytes()
    (tmp_path / "log").write_bytes(content[: len(content) // 2])
    assert main(["replay", str(tmp_path / "log")]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "the log is cut off; what is whole of it was replayed",
        "identical",
    ]


@pytest.mark.parametrize(
    "content", [None, b"", b"text", gzip.compress(b"text\n", mtime=0)]
)
def test_unreadable_log_is_one_line_and_exit_code_2(content, tmp_path, capsys):
    path = tmp_path / "log"
    if content is not None:
        path.write_bytes(content)
    assert main(["replay", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("jchameleon: error: plan log ") and str(path) in err


def test_replay_is_identical_in_another_process(tmp_path):
    """Where strings hash differently, and nothing is left of the first run."""
    policies = [*policy_preset_names()]
    policies.append({"preset": "sjf", "predictor": {"name": "noisy-oracle"}})
    logs = [str(tmp_path / str(i)) for i in range(len(policies))]
    for log, policy in zip(logs, policies, strict=True):
        record(log, policy, seed=8)
    code = (
        "import sys\n"
        "from jchameleon.cli import main\n"
        "print([main(['replay', log, '--json']) for log in sys.argv[1:]])\n"
        "assert 'jax' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *logs],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str([0] * len(logs)), done.stdout
