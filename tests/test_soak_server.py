"""A short form of the soak, and its own judgement of growth."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from serve_process import environment
from soak_server import Size, growth_problems

SOAK = Path(__file__).resolve().parent.parent / "tools" / "soak_server.py"
IDLE = Size(rss_bytes=400 << 20, threads=30, fds=15)


@pytest.mark.timeout(400)
def test_server_stays_as_it_was_under_random_use_and_misuse():
    done = subprocess.run(
        [sys.executable, str(SOAK), "--seconds", "60", "--clients", "8"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Every kind of use has come to its end.
    counts = json.loads(done.stdout)["counts"]
    assert {"whole", "cancel", "vanish", "nonsense", "administrate"} <= counts.keys()


@pytest.mark.parametrize(
    ("late", "after", "problem"),
    [
        (IDLE, IDLE, None),
        (Size(rss_bytes=460 << 20, threads=30, fds=15), IDLE, "memory grew"),
        (IDLE, Size(rss_bytes=400 << 20, threads=60, fds=15), "threads grew"),
        (IDLE, Size(rss_bytes=400 << 20, threads=30, fds=24), "descriptors grew"),
    ],
)
def test_growth_is_found(late, after, problem):
    found = growth_problems(IDLE, [IDLE] * 6 + [late] * 3, after)
    assert len(found) == (problem is not None)
    assert problem is None or problem in found[0]
