"""What this machine is, and what it can do at this moment."""

import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

CALIBRATION_REPEATS = 5

LOOP_ROUNDS = 300_000

QUIET_DRIFT = 1.25
"""Rates of a machine that does nothing else stay within this factor of each other."""


def hold_to_cores(num_cores: int) -> None:
    """Restart this process on its first `num_cores` cores if it may use more.

    Thread pools of BLAS and XLA are sized by the cores they see when they load, so
    the limit must stand before the first import. Where a process cannot be held to
    cores nothing happens; `describe_machine` shows how many are in use.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) > num_cores:
        os.sched_setaffinity(0, allowed[:num_cores])
        sys.stdout.flush()
        os.execv(sys.executable, sys.orig_argv)


def describe_machine() -> dict[str, Any]:
    """Return the CPU's name, its cores and those in use, and jax's device."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    cores = os.cpu_count() or 1
    used = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    device = jax.devices()[0].device_kind
    return {"cpu": cpu, "cores": cores, "cores_in_use": used, "device": device}


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Return the versions of Python and of packages; None is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def calibrate(*, threads: int, gemm_width: int, read_bytes: int) -> dict[str, float]:
    """Return the f32 GEMM rate (numpy) and read bandwidth now, best of a few.

    Args:
      gemm_width: rows and columns of both factors.
      read_bytes: summed once by all threads together; far more than the caches hold.
    """
    a, b, out = (np.ones((gemm_width, gemm_width), np.float32) for _ in range(3))
    gemm_s = best_s(lambda: np.matmul(a, b, out=out))
    parts = np.array_split(np.ones(read_bytes // 4, np.float32), threads)
    with ThreadPoolExecutor(threads) as pool:
        read_s = best_s(lambda: list(pool.map(np.sum, parts)))
    return {
        "gemm_gflops": 2 * gemm_width**3 / gemm_s / 1e9,
        "read_gbps": sum(part.nbytes for part in parts) / read_s / 1e9,
    }


def interpreter_loop() -> float:
    """Return the seconds of a fixed piece of Python now, best of a few.

    A unit for times that go into the interpreter: another machine, or this one at
    another moment, differs by as much there.
    """

    def loop() -> None:
        counts: dict[int, int] = {}
        for i in range(LOOP_ROUNDS):
            key = i & 1023
            counts[key] = counts.get(key, 0) + len((i, key))

    return best_s(loop)


def unrest(
    calibration: Mapping[str, Mapping[str, float]],
    load_average: float,
    *,
    threads: int,
) -> str:
    """Return a warning if others used the machine during a run, else "".

    Args:
      calibration: rates by name, at "start" and "end".
      load_average: at the start.
      threads: cores that the run used.
    """
    start, end = calibration["start"], calibration["end"]
    drift = max(max(start[k] / end[k], end[k] / start[k]) for k in start)
    if drift <= QUIET_DRIFT and load_average <= threads / 2:
        return ""
    return (
        f"THE MACHINE WAS NOT QUIET (calibration moved {drift:.2f}x, load "
        f"{load_average:.1f} at the start): do not use these figures"
    )


def best_s(action: Callable[[], Any]) -> float:
    """Return the seconds of the fastest of `CALIBRATION_REPEATS` calls."""
    times = []
    for _ in range(CALIBRATION_REPEATS):
        start_s = time.perf_counter()
        action()
        times.append(time.perf_counter() - start_s)
    return min(times)
