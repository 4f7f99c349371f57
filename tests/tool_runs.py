"""Scripts of tools/ run whole, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_tool(name, *arguments, folder):
    """Run tools/`name`.py on this checkout's package in `folder`."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, ROOT / "tools" / f"{name}.py", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def run_bench(name, *arguments, folder):
    """Return the text and the JSON report of a bench that must succeed."""
    path = folder / "report.json"
    done = run_tool(name, *arguments, "--json", path, folder=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text(encoding="utf-8"))
