"""Compare policies from the literature with ours, in the simulator.

Each stands in for one part of a preset, everything else as it is: on seeds that nothing
was chosen on, the load at the SLO, and hits and times at one rate. A policy is better
where its load is 3 % higher on at least 8 of 10 seeds.

    python tools/exp_tried.py --trace conv.csv --json out.json    # a quarter of an hour
    python tools/exp_tried.py --quick                             # one seed, seconds

The isolation of adapters from one that asks for far too much is measured apart: the
times of all others beside it.
"""

import argparse
import dataclasses
import json
import math
import multiprocessing
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jchameleon.resources import configs_dir
from jchameleon.runtime.policy.events import Arrival, StepDone
from jchameleon.runtime.policy.plan import Plan
from jchameleon.sim import Load, load_profile, parse_rates, simulate
from jchameleon.sim.profile import Profile
from jchameleon.sim.run import requests, run_once, settle
from jchameleon.sim.samples import percentile
from jchameleon.sim.sweep import mean_and_half, scan
from jchameleon.workload.arrivals import Trace, read_trace
from jchameleon.workload.generator import Drawn

PROFILE = configs_dir() / "paper" / "a40-llama-7b.toml"
VARIANT = "m4w"
"""Where adapters and KV entries do not both fit, so that something is evicted."""

FIRST_SEED = 300
RATE_RPS = 9.0
WIN = 1.03


def eviction(base: str, name: str, **options: float) -> dict[str, Any]:
    """Return a preset with another eviction policy."""
    return {
        "preset": base,
        "source": f"{base}, {name}" + "".join(f" {k}={v}" for k, v in options.items()),
        "eviction": {"name": f"tried_policies:{name}", **options},
    }


TURNS = {
    "preset": "chameleon",
    "source": "chameleon, turns in lanes",
    "admission": {"name": "tried_policies:TurnLanes"},
}

BASES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    base: (
        rates,
        [
            eviction(base, "PerByte"),
            eviction(base, "Elora"),
            eviction(base, "Elora", scale_s=10.0),
            eviction(base, "TailSafe"),
            eviction(base, "TailSafe", budget_s=0.02),
            eviction(base, "Ghosts"),
            eviction(base, "Epochs"),
            *others,
        ],
    )
    for base, rates, others in (
        ("chameleon", "7.5:13:0.25", [TURNS]),
        ("adaptive", "8.5:13:0.25", []),
    )
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is run.

    Attributes:
      duration_s: of arrivals; None is the profile's own.
    """

    trace: Trace | None
    num_seeds: int = 10
    duration_s: float | None = None

    def load(self, policy: Any, seed: int, rate_rps: float = RATE_RPS) -> Load:
        """Return the load of one run."""
        return Load(
            policy=policy,
            rate_rps=rate_rps,
            seed=seed,
            trace=self.trace,
            duration_s=self.duration_s,
        )

    def profile(self) -> Profile:
        """Return what is simulated."""
        profile = load_profile(PROFILE, VARIANT)
        if self.duration_s is not None:
            profile = dataclasses.replace(profile, skip_s=0.15 * self.duration_s)
        return profile


def run_cell(job: tuple[Settings, Any, str, int]) -> dict[str, Any]:
    """Return what one policy does with one seed."""
    settings, policy, rates, seed = job
    load = settings.load(policy, seed)
    profile = settings.profile()
    found = scan(profile, load, parse_rates(rates))
    report = simulate(profile, load)
    return {
        "seed": seed,
        "over_slo_rps": found["over_slo_rps"],
        "limit": found["limit"],
        "ttft_p50_s": report["ttft_s"]["p50"],
        "ttft_p99_s": report["ttft_s"]["p99"],
        "hit_rate": report["cache"]["hit_rate"],
        "evictions": report["cache"]["evictions"],
    }


def compare(own: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means over seeds, and the gain in load over the base, seed by seed.

    A seed on which either hit a limit of the scan says nothing of the gain.
    """
    gains = [
        a["over_slo_rps"] / b["over_slo_rps"]
        for a, b in zip(own, base, strict=True)
        if a["limit"] is None and b["limit"] is None
    ]
    mean, half = mean_and_half(gains) if gains else (math.nan, None)
    fields = ("ttft_p50_s", "ttft_p99_s", "hit_rate", "evictions")
    return {
        "gain": mean,
        "gain_half_95": half,
        "wins": sum(gain >= WIN for gain in gains),
        "losses": sum(gain <= 1 / WIN for gain in gains),
        "seeds": len(gains),
        **{name: statistics.fmean(row[name] for row in own) for name in fields},
    }


HOG_SHARE = 0.5
"""Of all requests, those that one adapter asks for on top of everybody else's."""

HOG_BURST = 20
"""Requests of it that come at once."""


def with_hog(drawn: list[Drawn], hog: str, rank: int) -> list[Drawn]:
    """Return requests with those of one adapter in bursts among them.

    Lengths are those of requests that are there, so that only their number is too much.
    """
    extra: list[Drawn] = []
    wanted = round(HOG_SHARE / (1 - HOG_SHARE) * len(drawn))
    gap = max(1, len(drawn) * HOG_BURST // max(1, wanted))
    for start in range(0, len(drawn), gap):
        one = drawn[start]
        burst = drawn[start : start + HOG_BURST]
        extra += [
            dataclasses.replace(r, at_s=one.at_s, adapter=hog, rank=rank) for r in burst
        ]
    return sorted([*drawn, *extra], key=lambda request: request.at_s)


class FirstTokens:
    """Keeps times to first token by adapter; an `Observer`."""

    def __init__(self, from_s: float = 0.0) -> None:
        """Count requests that arrive from `from_s` on."""
        self._from_s = from_s
        self._arrived: dict[str, tuple[str | None, float]] = {}
        self.ttft_s: dict[str | None, list[float]] = {}

    def __call__(self, now_s: float, events: tuple[Any, ...], plan: Plan) -> None:
        del plan
        for event in events:
            if isinstance(event, Arrival):
                request = event.request
                if request.arrival_s < self._from_s:
                    continue
                self._arrived[request.request_id] = (
                    request.adapter_uid,
                    request.arrival_s,
                )
            elif isinstance(event, StepDone):
                for request_id, _ in event.produced:
                    if request_id in self._arrived:
                        uid, arrival_s = self._arrived.pop(request_id)
                        self.ttft_s.setdefault(uid, []).append(now_s - arrival_s)


def isolation(job: tuple[Settings, Any, int, bool]) -> dict[str, float]:
    """Return times to first token of all but the hog, and of the hog."""
    settings, policy, seed, hogged = job
    load = settings.load(policy, seed, rate_rps=6.0)
    profile, engine = settle(settings.profile(), load)
    hog = profile.sim_adapters()[0]
    drawn = list(requests(profile, load.trace))
    if hogged:
        drawn = with_hog(drawn, hog.uid, hog.rank)
    # Loads before the first request move its clock by less than a second.
    seen = FirstTokens(profile.skip_s)
    run_once(profile, engine, load, seen, drawn=drawn)
    own_s = np.array(seen.ttft_s.pop(hog.uid, []))
    others_s = np.array([value for values in seen.ttft_s.values() for value in values])
    return {
        f"{who}_p{percent}_s": percentile(values, percent) or math.nan
        for who, values in (("others", others_s), ("hog", own_s))
        for percent in (50, 99)
    }


ADMISSIONS: dict[str, Any] = {
    "fifo, as in `chameleon-nosched`": "chameleon-nosched",
    "chameleon": "chameleon",
    "chameleon, turns in lanes": TURNS,
    "adaptive": "adaptive",
    "vtc": "vtc",
}


def run(settings: Settings, *, bases: list[str], processes: int) -> dict[str, Any]:
    """Run everything, side by side in processes."""
    seeds = range(FIRST_SEED, FIRST_SEED + settings.num_seeds)
    jobs: list[tuple[str, str, tuple[Any, ...]]] = []
    for base in bases:
        rates, policies = BASES[base]
        for policy in (base, *policies):
            name = policy if isinstance(policy, str) else policy["source"]
            jobs += [(base, name, (settings, policy, rates, seed)) for seed in seeds]
    fair = [
        (name, hogged, (settings, policy, seed, hogged))
        for name, policy in ADMISSIONS.items()
        for hogged in (False, True)
        for seed in seeds
    ]
    with multiprocessing.Pool(processes) as pool:
        cells = pool.map(run_cell, [job for *_, job in jobs], chunksize=1)
        times = pool.map(isolation, [job for *_, job in fair], chunksize=1)
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for (base, name, _), cell in zip(jobs, cells, strict=True):
        found.setdefault(base, {}).setdefault(name, []).append(cell)
    shared: dict[str, dict[str, list[dict[str, float]]]] = {}
    for (name, hogged, _), one in zip(fair, times, strict=True):
        key = "with" if hogged else "without"
        shared.setdefault(name, {}).setdefault(key, []).append(one)
    return {
        "variant": VARIANT,
        "seeds": list(seeds),
        "rate_rps": RATE_RPS,
        "cells": found,
        "compared": {
            base: {name: compare(rows, names[base]) for name, rows in names.items()}
            for base, names in found.items()
        },
        "isolation": {
            name: {
                key: {
                    field: statistics.fmean(row[field] for row in rows)
                    for field in rows[0]
                }
                for key, rows in both.items()
            }
            for name, both in shared.items()
        },
    }


def print_report(report: Mapping[str, Any]) -> None:
    """Print tables for docs/experiments.md."""
    rate = f"{report['rate_rps']:g} requests/s"
    for base, rows in report["compared"].items():
        print(
            f"\n| instead of a part of `{base}` | load at the SLO / its | wins, "
            f"losses, of | hits, {rate} | evictions | TTFT P50, ms | P99 |"
            "\n|---|---|---|---|---|---|---|"
        )
        for name, row in rows.items():
            half = row["gain_half_95"]
            gain = f"{row['gain']:.3f}" + ("" if half is None else f" +- {half:.3f}")
            print(
                f"| {name} | {gain} | {row['wins']}, {row['losses']}, {row['seeds']} | "
                f"{row['hit_rate']:.0%} | {row['evictions']:.0f} | "
                f"{1e3 * row['ttft_p50_s']:.0f} | {1e3 * row['ttft_p99_s']:.0f} |"
            )
    print(
        "\n| admission | all others alone, P50 / P99 ms | beside the hog | the hog |"
        "\n|---|---|---|---|"
    )
    for name, both in report["isolation"].items():
        alone, beside = both["without"], both["with"]
        texts = [
            f"{1e3 * row[f'{who}_p50_s']:.0f} / {1e3 * row[f'{who}_p99_s']:.0f}"
            for row, who in ((alone, "others"), (beside, "others"), (beside, "hog"))
        ]
        print(f"| {name} | " + " | ".join(texts) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", type=Path, help="CSV to draw lengths from")
    parser.add_argument("--base", action="append", choices=tuple(BASES))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one seed, seconds")
    parser.add_argument("--json", type=Path, help="write the report here")
    args = parser.parse_args()
    if args.seeds < 1 or args.processes < 1:
        parser.error("--seeds and --processes must be at least 1")
    settings = Settings(
        trace=None if args.trace is None else read_trace(args.trace),
        num_seeds=1 if args.quick else args.seeds,
        duration_s=20.0 if args.quick else None,
    )
    report = run(settings, bases=args.base or list(BASES), processes=args.processes)
    print_report(report)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
