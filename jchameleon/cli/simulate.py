"""`jchameleon simulate`: a policy under a load, on a clock that only counts."""

import argparse
import time
from pathlib import Path
from typing import Any

from jchameleon.cli.options import print_facts, write_report
from jchameleon.errors import ConfigError

DEFAULT_SEEDS = 10
"""Of a sweep: what an interval over seeds wants at the least."""


def add_command(commands: Any) -> None:
    """Add `simulate` to the subcommands of an argument parser."""
    parser = commands.add_parser(
        "simulate",
        help="run a policy under a load without a device",
        description="Drive the engine's own planner and policies with a virtual clock. "
        "The same arguments give the same JSON, byte for byte.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--profile", type=Path, required=True, metavar="FILE", help="what is simulated"
    )
    parser.add_argument(
        "--variant", metavar="NAME", help="a table below [variants] of the profile"
    )
    parser.add_argument(
        "--policy", metavar="P", help="preset or .toml file (default: the profile's)"
    )
    parser.add_argument("--rate", type=float, metavar="R", help="requests a second")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="CSV with columns TIMESTAMP, ContextTokens, GeneratedTokens to draw "
        "lengths from",
    )
    parser.add_argument(
        "--duration", type=float, metavar="S", help="seconds of arrivals"
    )
    parser.add_argument(
        "--arrivals",
        metavar="PROCESS",
        help="poisson, fixed, trace, gamma:CV or bursty:FACTOR:ON_S:OFF_S (default: "
        "the profile's)",
    )
    parser.add_argument(
        "--sweep",
        metavar="LOW:HIGH:STEP",
        help="in place of --rate: scan rates upwards for the first whose P99 TTFT "
        "exceeds the SLO",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=DEFAULT_SEEDS,
        metavar="N",
        help="of a sweep, from --seed on (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report")


def run(args: argparse.Namespace) -> int:
    """Simulate, and say what came of it."""
    from jchameleon.sim import Load, find_load, load_profile, parse_rates, simulate
    from jchameleon.workload.arrivals import read_trace

    if (args.rate is None) == (args.sweep is None):
        raise ConfigError("one of --rate and --sweep must be given")
    profile = load_profile(args.profile, args.variant)
    trace = None if args.trace is None else read_trace(args.trace)
    begin_s = time.perf_counter()
    load = Load(
        policy=args.policy,
        rate_rps=1.0 if args.rate is None else args.rate,
        seed=args.seed,
        trace=trace,
        duration_s=args.duration,
        process=args.arrivals,
    )
    if args.sweep is None:
        report = simulate(profile, load)
        _print_run(report, time.perf_counter() - begin_s)
    else:
        rates = parse_rates(args.sweep)
        report = find_load(profile, load, rates_rps=rates, num_seeds=args.seeds)
        _print_sweep(report)
    if args.json is not None:
        write_report(args.json, report)
    return 0


def _print_run(report: dict[str, Any], took_s: float) -> None:
    requests, cache = report["requests"], report["cache"]
    settings = report["settings"]
    print_facts(
        {
            "profile": settings["profile"],
            "policy": settings["policy"]["source"],
            "cost": f"{settings['cost_kind']}, stall {settings['link']['stall']:g}, "
            f"pool of {settings['pool_pages']} pages, "
            f"{settings['cache_at_start']} cache",
            "requests": f"{requests['finished']} finished, {requests['failed']} "
            f"failed, {requests['counted']} count",
            "requests/s": report["throughput_rps"],
            "within SLO": report["slo_attainment"],
            "cache": f"{cache['hits']} hits, {cache['misses']} misses, "
            f"{cache['evictions']} evictions, {cache['loads']} loads",
            "bypasses": report["bypasses"],
            "squashes": report["squashes"],
            "link busy": report["link_busy"],
            "simulated": f"{report['simulated_s']:.1f} s in {took_s:.1f} s, "
            f"{report['simulated_s'] / took_s:.0f} times as fast",
        }
    )
    if report["not_exercised"]:
        print("not exercised: " + ", ".join(report["not_exercised"]))
    percents = list(report["ttft_s"])
    print(f"\n{'ms':12}" + "".join(f"{name:>10}" for name in percents))
    rows = {name: report[f"{name}_s"] for name in ("ttft", "tbt", "e2e")}
    for rank, row in report["by_rank"].items():
        rows[f"ttft, r{rank}"] = row["ttft_s"]
    for name, row in rows.items():
        cells = ("-" if row[p] is None else f"{1e3 * row[p]:.1f}" for p in percents)
        print(f"{name:12}" + "".join(f"{cell:>10}" for cell in cells))


def _print_sweep(report: dict[str, Any]) -> None:
    settings = report["settings"]
    print_facts(
        {
            "profile": settings["profile"],
            "policy": settings["policy"]["source"],
            "cache": settings["cache_at_start"],
            "rates": report["rates_rps"],
        }
    )
    for row in report["seeds"]:
        found = row["over_slo_rps"]
        flag = f"  {row['limit']}" if row["limit"] else ""
        print(f"seed {row['seed']:<6} {'-' if found is None else f'{found:g}'}{flag}")
    mean, half = report["mean_rps"], report["half_width_95_rps"]
    if mean is None:
        print("no load: a seed hit a limit of the scan")
    else:
        spread = "" if half is None else f" +- {half:.2f} (95 %)"
        print(f"load at SLO: {mean:.2f}{spread} requests/s")
