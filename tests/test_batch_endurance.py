"""Batches that are killed again and again, and ones that are large.

`make batch-soak` runs both in full: 20 kills, 100,000 lines.
"""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from batch_rig import (
    count_rows,
    plain,
    run_command,
    sorted_rows,
    start_command,
    wait_for_rows,
    write_lines,
)
from serve_process import environment

from jchameleon.batch.manifest import manifest_path

KILLS = int(os.environ.get("BATCH_KILLS", "2"))
LINES = int(os.environ.get("BATCH_LINES", "6000"))
# The pool, jax and the C library grow for a while, whatever the number of lines.
SETTLED_AFTER = 0.25
MOST_GROWTH_BYTES = 3 << 20


@pytest.mark.timeout(180 + 30 * KILLS)
def test_run_that_is_killed_at_random_points_ends_as_one_that_is_not(tmp_path):
    lines = [
        plain(f"id {i}", f"prompt {i}", max_tokens=8 + i % 17)
        for i in range(max(100, 25 * KILLS))
    ]
    lines[5] = "junk"
    source = write_lines(tmp_path / "in", lines)
    done = run_command(source, tmp_path / "whole")
    assert done.returncode == 3, done.stderr
    # Rows that are written when a kill comes are chosen, so that the run gets on; the
    # moment after that is not.
    rng = random.Random(KILLS)
    points = sorted(rng.sample(range(len(lines) - 20), KILLS))
    points[0] = 0  # before there is any row, or a model
    out, killed = tmp_path / "out", 0
    for turn, point in enumerate(points):
        process = start_command(source, out, "--resume", "--sync-rows", "8")
        if turn:
            wait_for_rows(out, point, process)
        time.sleep(rng.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        killed += process.returncode == -signal.SIGKILL
        rows = count_rows(out)
        if turn % 3 == 2:  # what a power cut leaves besides
            with open(out, "ab") as file:
                file.write(b'{"id": "batch_req_')
        assert rows >= point or turn == 0
    assert killed == KILLS, "it ended before it was killed"
    done = run_command(source, out, "--resume")
    assert done.returncode == 3, done.stderr
    assert sorted_rows(out) == sorted_rows(tmp_path / "whole")
    manifests = [manifest_path(out), manifest_path(tmp_path / "whole")]
    assert len({path.read_text() for path in manifests}) == 1


MEMORY = """
import json, sys, time
sys.path[:0] = {tests!r}
from batch_rig import SMALL, rss_bytes
from jchameleon import LLM
from jchameleon.batch import BatchConfig, Progress, run_batch

total = {count}
samples = []

class Sampler(Progress):
    def show(self, summary, now_s):
        self._next_s = now_s + 0.02
        if summary.done >= total * len(samples) / 40:
            samples.append((summary.done, rss_bytes()))

engine = {{**SMALL, "max_running": 32, "max_batch_tokens": 256}}
with LLM("tiny", **engine) as llm:
    begin = rss_bytes()
    start = time.monotonic()
    sampler = Sampler(sys.stderr, start_s=0.0)
    summary = run_batch(llm, {source!r}, {output!r}, BatchConfig(), progress=sampler)
    wall = time.monotonic() - start
print(json.dumps(dict(
    samples=samples, begin=begin, end=rss_bytes(), ok=summary.ok, wall=wall
)))
"""


@pytest.mark.timeout(240 + LINES // 20)
def test_memory_does_not_grow_with_the_number_of_lines(tmp_path):
    """A line and its row have 3 kB each: rows that were held added 5 MB here."""
    texts = itertools.cycle(f"{i:03} " * 4 for i in range(250))
    source = tmp_path / "in"
    with open(source, "w") as file:
        for i in range(LINES):
            line = plain(f"id {i}" + "x" * 400, next(texts), max_tokens=2, logprobs=20)
            file.write(json.dumps(line | {"user": "u" * 3000}) + "\n")
    tests = Path(__file__).parent
    code = MEMORY.format(
        tests=[str(tests), str(tests.parent / "tools")],
        count=LINES,
        source=str(source),
        output=str(tmp_path / "out"),
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] == LINES
    settled = [b for n, b in report["samples"] if n >= SETTLED_AFTER * LINES]
    growth = max(settled) - settled[0]
    print(
        f"{LINES} lines in {report['wall']:.0f} s, RSS {report['begin'] >> 20} MiB "
        f"before, {settled[0] >> 20} MiB after {SETTLED_AFTER:.0%} of the lines, "
        f"{growth >> 10} KiB more at the most, {report['end'] >> 20} MiB in the end"
    )
    assert growth < MOST_GROWTH_BYTES
    assert count_rows(tmp_path / "out") == LINES
