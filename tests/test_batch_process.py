"""`jchameleon batch` as a process: exit codes, streams, signals, a full disk."""

import json
import os
import shlex
import signal
import subprocess
import sys

import pytest
from adapter_versions import write_version
from batch_rig import (
    ENGINE,
    by_id,
    check_row,
    command,
    count_rows,
    enveloped,
    plain,
    read_rows,
    run_command,
    sorted_rows,
    start_command,
    wait_for_rows,
    write_lines,
)
from serve_process import environment
from tool_runs import run_tool

from jchameleon.batch.manifest import manifest_path
from jchameleon.cli import main

LINES = [plain(f"id {i}", f"prompt {i}", max_tokens=24) for i in range(60)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The rows of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_command(write_lines(folder / "in", LINES), folder / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "batch: 60 ok, 0 failed, of 60 lines; " in done.stderr.splitlines()[-1]
    return sorted_rows(folder / "out")


def usage(*argv, capsys):
    """Return exit code and message of a command that must be refused in one line."""
    try:
        code = main(["batch", "--model", "tiny", *map(str, argv)])
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "Traceback" not in err
    return code, err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--retry-errors"], "retry_errors=True must come with resume=True"),
        (["--window", "0"], "window_lines=0"),
        (["--sync-rows", "0"], "sync_rows=0"),
        (["--max-line-bytes", "0"], "max_line_bytes=0"),
        (["--seed", "-1"], "seed=-1"),
        (["--temperature", "nan"], "temperature=nan"),
        (["--adapter", "a"], "'a' must be NAME=DIR"),
        (["--adapter", "a=x", "a=y"], "'a' is given twice"),
        (["--adapter", "a=/no/such"], "/no/such"),
        (["--adapters-dir", "/no/such"], "adapters-dir '/no/such' cannot be read"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--policy", "lur"], "policy='lur'"),
        (["--bogus"], "--bogus"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(options, message, tmp_path, capsys):
    source = write_lines(tmp_path / "in", [plain("a")])
    code, err = usage("-i", source, "-o", tmp_path / "out", *options, capsys=capsys)
    assert code == 2 and message in err
    assert not (tmp_path / "out").exists()


def test_input_or_output_that_cannot_be_used_is_exit_code_2(tmp_path, capsys):
    good = write_lines(tmp_path / "in", [plain("a")])
    twice = write_lines(tmp_path / "twice", [plain("a"), plain("b"), plain("a")])
    for source, out, message in (
        (tmp_path / "none", tmp_path / "out", "none' cannot be read"),
        (tmp_path, tmp_path / "out", "cannot be read: [Errno 21]"),
        ("a\0b", tmp_path / "out", "cannot be read"),
        (twice, tmp_path / "out", "'a' is on lines 1 and 3"),
        (good, tmp_path / "none" / "out", "its folder is not there"),
        (good, tmp_path, "it is a directory"),
        (good, good, "is there already and is never erased"),
        (good, "a\0b", "cannot be used"),
    ):
        code, err = usage("-i", source, "-o", out, capsys=capsys)
        assert code == 2 and message in err, err
    code, err = usage("-i", good, "-o", "-", "--resume", capsys=capsys)
    assert code == 2 and "no file that can be resumed" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "twice"]


def test_failed_rows_are_exit_code_3_and_rows_of_every_adapter_option(tmp_path):
    for number in range(3):
        write_version(tmp_path / "dir" / f"v{number}", number)
    (tmp_path / "dir" / ".hidden").mkdir()
    (tmp_path / "dir" / "README").write_text("no adapter")
    write_version(tmp_path / "single", 9)
    names = ["v0", "v1", "v2", "one", "tiny"]
    lines = [
        enveloped(name, prompt="x", model=name, return_token_ids=True) for name in names
    ]
    options = ["--adapters-dir", str(tmp_path / "dir")]
    options += ["--adapter", f"one={tmp_path / 'single'}", "--ordered"]
    source = write_lines(tmp_path / "in", [*lines, "junk"])
    out = tmp_path / "out"
    done = run_command(source, out, *options)
    assert done.returncode == 3
    assert "batch: 5 ok, 1 failed, of 6 lines; " in done.stderr
    rows = read_rows(out)
    assert [row["custom_id"] for row in rows] == [*names, "line-6"]
    choices = [row["response"]["body"]["choices"][0] for row in rows[:5]]
    assert len({tuple(choice["token_ids"]) for choice in choices}) == 5
    done = run_command(source, out, *options, "--resume")
    assert done.returncode == 3
    report = "0 ok, 0 failed, of 6 lines, 6 had rows before (1 of them failed); "
    assert report in done.stderr


def test_standard_streams_carry_requests_and_rows_and_nothing_else(whole):
    text = "".join(json.dumps(line) + "\n" for line in LINES)
    done = run_command("-", "-", "--ordered", input=text)
    assert done.returncode == 0, done.stderr
    rows = [check_row(json.loads(line)) for line in done.stdout.splitlines()]
    assert [row["custom_id"] for row in rows] == [line["custom_id"] for line in LINES]
    assert sorted(rows, key=lambda row: row["custom_id"]) == whole
    assert "batch: 60 ok" in done.stderr
    # Found before the start, though it is a stream.
    done = run_command("-", "-", input=text + text)
    assert done.returncode == 2 and done.stdout == ""
    assert "'id 0' is on lines 1 and 61" in done.stderr


def test_reader_that_goes_away_ends_it_without_a_traceback(tmp_path):
    source = write_lines(tmp_path / "in", LINES)
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        command(source, "-"),
        env=environment(),
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    os.close(write_end)
    assert done.returncode == 1 and "Traceback" not in done.stderr


def test_streams_that_are_closed_are_nobody_who_reads(tmp_path):
    source = write_lines(tmp_path / "in", LINES[:2])
    shell = f"{shlex.join(command(source, tmp_path / 'out'))} 2>&- >&-"
    done = subprocess.run(["bash", "-c", shell], env=environment())
    assert done.returncode == 0
    assert len(read_rows(tmp_path / "out")) == 2


def test_full_device_is_exit_code_1_and_says_so(tmp_path):
    source = write_lines(tmp_path / "in", LINES)
    done = run_command(source, "/dev/full")
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert "'/dev/full' cannot be written: [Errno 28] No space left" in line
    assert "nothing of it can be resumed" in line


def run_limited(source, out, most_bytes):
    """Run it with a limit on the size of files, as on a full disk.

    Numba and jax write to their caches too, and do without where they cannot.
    """
    # Not in a fork of this process, whose other threads may hold locks.
    limited = (
        "import os, resource, sys;"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({most_bytes}, {most_bytes}));"
        "os.execv(sys.executable, sys.argv[1:])"
    )
    return subprocess.run(
        [sys.executable, "-c", limited, *command(source, out)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_disk_that_is_full_at_the_start_leaves_nothing_and_says_so(tmp_path, whole):
    source, out = write_lines(tmp_path / "in", LINES), tmp_path / "out"
    done = run_limited(source, out, 100)  # less than a manifest
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "cannot be written: [Errno 27] File too large" in last
    assert last.endswith("nothing was written; give the same command again")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert run_command(source, out).returncode == 0
    assert sorted_rows(out) == whole


def test_full_disk_keeps_whole_rows_and_the_run_goes_on_when_there_is_room(
    tmp_path, whole
):
    source, out = write_lines(tmp_path / "in", LINES), tmp_path / "out"
    limit = 20_000  # ends in the middle of a row
    done = run_limited(source, out, limit)
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "cannot be written: [Errno 27] File too large" in last
    assert "give the same command with --resume" in last
    assert limit - 2000 < out.stat().st_size <= limit
    assert 10 < len(by_id(read_rows(out))) < 60
    done = run_command(source, out, "--resume")
    assert done.returncode == 0, done.stderr
    assert sorted_rows(out) == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_it_with_whole_rows_and_says_how_to_go_on(tmp_path, whole, number):
    source, out = write_lines(tmp_path / "in", LINES), tmp_path / "out"
    # A shell that runs tests in the background has children ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = start_command(source, out)
    finally:
        signal.signal(signal.SIGINT, before)
    wait_for_rows(out, 5, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    rows = read_rows(out)
    assert 5 <= len(by_id(rows)) < 60
    assert all(row["error"] is None for row in rows)
    last = err.splitlines()[-1]
    assert last.startswith(f"jchameleon: {number.name}: stopped after {len(rows)} rows")
    assert "give the same command with --resume to go on" in last
    # What is there is as it would be; the rest is as after a kill.
    expected = by_id(whole)
    assert all(row == expected[row["custom_id"]] for row in rows)
    if number == signal.SIGINT:
        done = run_command(source, out, "--resume")
        assert done.returncode == 0, done.stderr
        assert f"{60 - len(rows)} ok, 0 failed" in done.stderr
        assert sorted_rows(out) == whole


def test_other_sampling_seed_or_adapters_are_refused_on_resuming(tmp_path):
    write_version(tmp_path / "a", 1)
    source, out = write_lines(tmp_path / "in", LINES[:2]), tmp_path / "out"
    adapter = ["--adapter", f"a={tmp_path / 'a'}"]
    assert run_command(source, out, *adapter).returncode == 0
    write_version(tmp_path / "b", 2)
    for options, field in (
        ([*adapter, "--max-tokens", "7"], "sampling.max_tokens was 64 and is 7"),
        ([*adapter, "--seed", "7"], "seed was 0 and is 7"),
        (["--adapter", f"a={tmp_path / 'b'}"], "adapters.a was"),
    ):
        done = run_command(source, out, *options, "--resume")
        assert done.returncode == 2
        [line] = done.stderr.splitlines()
        assert f"cannot be resumed: {field}" in line
    assert count_rows(out) == 2


def test_tool_runs_the_same_command(tmp_path):
    write_lines(tmp_path / "in", LINES[:3])
    files = ["-i", "in", "-o", "out"]
    done = run_tool(
        "batch_generate", "--model", "tiny", *ENGINE, *files, folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert set(by_id(read_rows(tmp_path / "out"))) == {"id 0", "id 1", "id 2"}
    facts = json.loads(manifest_path(tmp_path / "out").read_text())
    assert facts["model"] == facts["model_name"] == "tiny"


def test_duplicate_is_found_before_jax_is_loaded(tmp_path):
    source = write_lines(tmp_path / "in", [plain("a"), plain("a")])
    code = (
        "import sys\n"
        "from jchameleon.cli import main\n"
        f"assert main(['batch', '-i', {str(source)!r}, '-o', 'x']) == 2\n"
        "assert 'jax' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
