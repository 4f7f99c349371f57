"""Measure how long the planner thinks: one `plan()`, one refresh, one eviction.

A synthetic engine plays a steady state: 256 running requests, a line that stays as
long as it is, 10,000 registered adapters that are asked for equally often (the worst
case for a cache) and a pool that holds a few thousand of them, so that every iteration
has arrivals, ends, loads, admissions and, where adapters stay, evictions. Only the
call of `Planner.plan` is timed. Lines of different length run in turn, in one process
on one core, so that a machine that drifts drifts for all of them; a maximum may be a
garbage collection of everything that they hold together.

Bars are for wall time on an idle core; CPU time leaves out what others took from one
that is not. A fixed loop of Python and numpy timed in between says how fast the
machine was: figures in its units can be compared between runs with care, milliseconds
cannot.

    python tools/bench_planner.py --json out.json
    python tools/bench_planner.py --policy chameleon --policy sjf
    python tools/bench_planner.py --prefix-cache      # requests that begin alike
    python tools/bench_planner.py --quick             # a tiny case, in seconds
"""

import argparse
import dataclasses
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_machine import best_s, describe_machine, hold_to_cores, versions
from bench_planner_engine import (
    FullDevice,
    Settings,
    SteadyEngine,
    Stopwatch,
    time_histogram,
)

from jchameleon import __version__
from jchameleon.runtime.policy.registry import policy_names

BARS = {"median_s": 1e-3, "p99_s": 3e-3, "growth": 2.0, "eviction_s": 100e-6}
"""Most that a plan, its growth from the shortest line to the longest, and the eviction
of one victim may take on one idle core."""

QUIET_DRIFT = 1.25
"""The loop's times on a machine that does nothing else stay within this factor."""

QUICK: dict[str, Any] = {
    "policies": ("chameleon", "sjf"),
    "queued": (5, 10, 20),
    "bar_queued": 10,
    "running": 8,
    "adapters": 40,
    "resident": 16,
    "plans": 20,
    "rounds": 2,
    "warm_up_plans": 20,
    "refreshes": 2,
    "evictions": 5,
}


class Clock:
    """A fixed loop of Python and numpy, the unit that times are also given in."""

    def __init__(self) -> None:
        self._table = np.arange(10_000, dtype=np.float64)
        self.times_s: list[float] = []

    def tick(self) -> None:
        """Time the loop, best of a few."""
        self.times_s.append(best_s(self._loop))

    def _loop(self) -> None:
        counts: dict[int, int] = {}
        for i in range(5_000):
            counts[i % 97] = counts.get(i % 97, 0) + i
        for _ in range(20):
            int((self._table * 0.5 + 1.0).argmin())


def time_plans(policy: str, settings: Settings, clock: Clock) -> list[dict[str, Any]]:
    """Return one row for each length of the line; they take turns."""
    engines = [SteadyEngine(policy, queued, settings) for queued in settings.queued]
    rounds: list[list[list[Stopwatch]]] = [[] for _ in engines]
    per_round = -(-settings.plans // settings.rounds)
    for number in range(settings.rounds):
        clock.tick()
        order = list(zip(engines, rounds, strict=True))
        for engine, times in order[:: -1 if number % 2 else 1]:
            times.append([engine.step() for _ in range(per_round)])
    rows = []
    for engine, queued, times in zip(engines, settings.queued, rounds, strict=True):
        row = {
            "policy": policy,
            "queued": queued,
            "plan": summary(times),
            "state": engine.state(),
        }
        if engine.has_lanes:
            refreshes = []
            for _ in range(settings.refreshes):
                # Beyond any refresh_s; the steps between keep the state as it is.
                refreshes.append(engine.step(wait_s=1e4))
                for _ in range(5):
                    engine.step()
            row["refresh"] = summary([refreshes])
        rows.append(row)
    return rows


def summary(rounds: Sequence[Sequence[Stopwatch]]) -> dict[str, Any]:
    """Return wall and CPU times over all rounds, and the wall medians of each."""
    times = [one for part in rounds for one in part]
    wall_s = [one.wall_s for one in times]
    cpu_s = [one.cpu_s for one in times]
    return {
        "count": len(times),
        "median_s": statistics.median(wall_s),
        "p99_s": float(np.percentile(wall_s, 99)),
        "max_s": max(wall_s),
        "cpu_median_s": statistics.median(cpu_s),
        "cpu_p99_s": float(np.percentile(cpu_s, 99)),
        "cpu_max_s": max(cpu_s),
        "round_medians_s": [
            statistics.median(one.wall_s for one in part) for part in rounds
        ],
    }


def run_bench(settings: Settings) -> dict[str, Any]:
    """Measure everything and return the report that is printed and kept as JSON."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    clock = Clock()
    clock.tick()
    rows = []
    for policy in settings.policies:
        rows += time_plans(policy, settings, clock)
    evictions = []
    for name in policy_names("eviction"):
        clock.tick()
        device = FullDevice(name, settings)
        times = [device.evict() for _ in range(settings.evictions)]
        evictions.append({"policy": name, "evict": summary([times])})
    clock.tick()
    histogram = summary([time_histogram(settings)])
    clock.tick()
    return {
        "settings": dataclasses.asdict(settings),
        "machine": describe_machine(),
        "load_average": load,
        "versions": {"jchameleon": __version__, **versions(("numpy",))},
        "loop_s": clock.times_s,
        "plans": rows,
        "growth": [growth(policy, rows) for policy in settings.policies],
        "evictions": evictions,
        "histogram": histogram,
        "bars": BARS,
        "checks": checks(settings, rows, evictions),
    }


def growth(policy: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return how much longer a plan takes with the longest line than the shortest."""
    plans = [row["plan"] for row in rows if row["policy"] == policy]
    first, last = plans[0], plans[-1]
    by_round = [
        long / short
        for short, long in zip(
            first["round_medians_s"], last["round_medians_s"], strict=True
        )
    ]
    return {
        "policy": policy,
        "median": statistics.median(by_round),
        "by_round": by_round,
        "p99": last["p99_s"] / first["p99_s"],
    }


def checks(
    settings: Settings,
    rows: Sequence[Mapping[str, Any]],
    evictions: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Return every bar with its figure and whether it was kept."""
    found: list[tuple[str, float, float | None, float]] = []
    for row in rows:
        if row["queued"] == settings.bar_queued:
            for key in ("median_s", "p99_s"):
                name = f"plan {row['policy']} {key[:-2]}"
                plan = row["plan"]
                found.append((name, plan[key], plan[f"cpu_{key}"], BARS[key]))
    for policy in settings.policies:
        ratio = growth(policy, rows)["median"]
        found.append((f"growth {policy}", ratio, None, BARS["growth"]))
    for row in evictions:
        evict, name = row["evict"], f"evict {row['policy']} median"
        found.append(
            (name, evict["median_s"], evict["cpu_median_s"], BARS["eviction_s"])
        )
    return [
        {"name": name, "figure": figure, "cpu": cpu, "bar": bar, "ok": figure <= bar}
        for name, figure, cpu, bar in found
    ]


def print_report(report: Mapping[str, Any]) -> None:
    """Print the report for people."""
    settings, machine, loops = report["settings"], report["machine"], report["loop_s"]
    unit_s = statistics.median(loops)
    print(
        f"{settings['running']} running, {settings['adapters']} adapters, about "
        f"{settings['resident']} fit; {settings['plans']} plans each\n"
        f"machine: {machine['cpu']}, {machine['cores_in_use']} of {machine['cores']} "
        f"cores; versions: "
        + ", ".join(f"{k} {v}" for k, v in report["versions"].items() if v)
    )
    print(
        f"loop: median {1e3 * unit_s:.3f} ms "
        f"[{1e3 * min(loops):.3f}-{1e3 * max(loops):.3f}]"
    )
    drift = max(loops) / min(loops)
    if drift > QUIET_DRIFT or report["load_average"] > machine["cores"] / 2:
        print(
            f"THE MACHINE WAS NOT QUIET (the loop moved {drift:.2f}x, load "
            f"{report['load_average']:.1f} at the start): do not use these figures"
        )

    def times(values: Mapping[str, Any]) -> str:
        keys = ("median_s", "p99_s", "max_s", "cpu_p99_s", "cpu_max_s")
        cells = [f"{1e3 * values[key]:9.3f}" for key in keys]
        cells += [f"{values[key] / unit_s:8.2f}" for key in keys[:2]]
        return " ".join(cells)

    print(
        f"\n{'plan of':20} {'queued':>7} {'median ms':>9} {'P99 ms':>9} {'max ms':>9} "
        f"{'CPU P99':>9} {'CPU max':>9} {'/ loop':>8} {'P99':>8}   per plan: admitted, "
        "loads, evicted; resident, cached pages"
    )
    for row in report["plans"]:
        state = row["state"]
        print(
            f"{row['policy']:20} {row['queued']:7} {times(row['plan'])}   "
            f"{state['admitted_per_plan']:.1f}, {state['loads_per_plan']:.1f}, "
            f"{state['evicted_per_plan']:.1f}; {state['resident_pages']}, "
            f"{state['cached_pages']}"
        )
    for row in report["plans"]:
        if "refresh" in row:
            name = f"{row['policy']} refresh"
            print(f"{name:20} {row['queued']:7} {times(row['refresh'])}")
    print(f"\n{'one victim of':20} {settings['adapters']:7}")
    for row in report["evictions"]:
        print(f"{row['policy']:20} {'':7} {times(row['evict'])}")
    print(f"{'histogram prefetch':20} {'':7} {times(report['histogram'])}")
    print(f"\n{'':34} {'figure':>10} {'CPU':>10} {'bar':>10}")
    for check in report["checks"]:
        is_ratio = check["cpu"] is None
        scale, unit = (1.0, "x") if is_ratio else (1e3, "ms")
        cpu = "" if is_ratio else f"{scale * check['cpu']:8.3f}{unit:>2}"
        print(
            f"{check['name']:34} {scale * check['figure']:8.3f}{unit:>2} {cpu:>10} "
            f"{scale * check['bar']:8.3f}{unit:>2} {'ok' if check['ok'] else 'MISSED'}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--policy", action="append", help="a preset or .toml file; may be repeated"
    )
    parser.add_argument("--plans", type=int, help="timed plans of each row")
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--prefix-cache", action="store_true", help="requests share cached KV blocks"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny case")
    parser.add_argument("--json", type=Path, help="write the report here")
    args = parser.parse_args()

    values = dict(QUICK) if args.quick else {}
    if args.policy is not None:
        values["policies"] = tuple(args.policy)
    if args.prefix_cache:
        values["prefix_cache"] = True
    for name in ("plans", "seed"):
        if getattr(args, name) is not None:
            values[name] = getattr(args, name)
    settings = Settings(**values)
    if settings.plans < settings.rounds:
        parser.error(f"--plans must be at least {settings.rounds}")
    hold_to_cores(1)
    report = run_bench(settings)
    print_report(report)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
