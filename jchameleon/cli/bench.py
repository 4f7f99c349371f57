"""`jchameleon bench serve`: an open-loop load on a running server."""

import argparse
import asyncio
import dataclasses
import datetime
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jchameleon.cli.connection import add_server, connection
from jchameleon.cli.options import print_facts, write_report
from jchameleon.errors import ConfigError

if TYPE_CHECKING:
    from jchameleon.client import AsyncClient
    from jchameleon.client.load import Progress

T = TypeVar("T")

BASE = "base"
DEFAULT_REQUESTS = 100
DEFAULT_RATE_RPS = 1.0
PLAIN_PROGRESS_S = 5.0
"""Between lines of progress where they cannot be written over."""


def add_command(commands: Any) -> None:
    """Add `bench serve` to the subcommands of an argument parser."""
    bench = commands.add_parser("bench", help="measure a running server")
    actions = bench.add_subparsers(dest="action", required=True, metavar="ACTION")
    parser = actions.add_parser(
        "serve",
        help="send requests at given times and measure the answers",
        description="Open loop: send times never wait for answers. Prints a summary; "
        "--json has every request. Exit code 3: a request failed.",
    )
    parser.set_defaults(run=run)
    add_server(parser)
    load = parser.add_argument_group("load")
    load.add_argument(
        "--arrivals",
        default="poisson",
        metavar="PROCESS",
        help="poisson, fixed, trace, gamma:CV or bursty:FACTOR:ON_S:OFF_S (default: "
        "%(default)s)",
    )
    load.add_argument(
        "--rate",
        type=float,
        metavar="X",
        help="requests a second; inf sends all at once (default: 1, or the trace's)",
    )
    load.add_argument(
        "--num-requests", type=int, metavar="N", help="default: 100 without --duration"
    )
    load.add_argument(
        "--duration", type=float, metavar="S", help="send nothing later than this"
    )
    load.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="CSV with columns TIMESTAMP, ContextTokens, GeneratedTokens",
    )
    load.add_argument(
        "--input-len",
        default="128",
        metavar="L",
        help="prompt tokens: N, LOW:HIGH or trace (default: %(default)s)",
    )
    load.add_argument(
        "--output-len",
        default="32",
        metavar="L",
        help="likewise (default: %(default)s)",
    )
    load.add_argument(
        "--length-scale",
        type=float,
        default=1.0,
        metavar="X",
        help="what a trace's lengths are multiplied with",
    )
    load.add_argument("--seed", type=int, default=0, metavar="N")
    load.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="deadline of each request (default: %(default)g)",
    )
    load.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="prompts are random ids below it (default: what the server says)",
    )
    load.add_argument(
        "--max-model-len",
        type=int,
        metavar="N",
        help="cut lengths to this (default: what the server says)",
    )
    who = parser.add_argument_group("adapters")
    who.add_argument(
        "--adapters",
        nargs="+",
        metavar="NAME",
        help=f"most popular first; {BASE} is the base model (default: all, or {BASE} "
        "where there are none)",
    )
    who.add_argument(
        "--popularity",
        default="uniform",
        metavar="LAW",
        help="uniform; zipf:A over all; power:A within each rank, ranks alike, or "
        "power:A:B with ranks by B (default: %(default)s)",
    )
    out = parser.add_argument_group("report")
    out.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    out.add_argument("--plot", type=Path, metavar="FILE.svg", help="times as a drawing")
    out.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="limits of a good request, such as ttft_ms:500 tpot_ms:50",
    )
    out.add_argument(
        "--percentiles",
        nargs="+",
        type=float,
        default=[50.0, 90.0, 99.0],
        metavar="P",
        help="default: 50 90 99",
    )
    out.add_argument(
        "--metadata",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="kept in the JSON",
    )


def run(args: argparse.Namespace) -> int:
    """Measure a server; return 3 if a request failed."""
    from jchameleon.client.load_report import parse_goodput, plot

    goodput = parse_goodput(args.goodput)
    if not all(0 <= percent <= 100 for percent in args.percentiles):
        raise ConfigError(f"percentiles={args.percentiles} must be from 0 to 100")
    metadata = {}
    for pair in args.metadata:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"metadata={pair!r} must be KEY=VALUE")
        metadata[key] = value
    report, samples = asyncio.run(_measure(args, goodput))
    report["metadata"] = metadata
    if args.json is not None:
        write_report(args.json, report)
    if args.plot is not None and report["completed"]:
        args.plot.write_text(plot(args.server, samples), encoding="utf-8")
    _print_summary(report)
    return 3 if report["failed"] else 0


async def _measure(
    args: argparse.Namespace, goodput: dict[str, float]
) -> tuple[dict[str, Any], Any]:
    from jchameleon.client import AsyncClient, RetryPolicy
    from jchameleon.client.load import run_load
    from jchameleon.client.load_report import build_report
    from jchameleon.workload.arrivals import read_trace
    from jchameleon.workload.generator import Length, Popularity, Workload

    trace = None if args.trace is None else read_trace(args.trace)
    # What is refused counts as refused.
    once = RetryPolicy(attempts=1)
    async with AsyncClient(**connection(args), retry=once) as client:
        info = await _unless_closed(client.server_info())
        ranks = await _ranks(client, args.adapters)
        rate_rps, num_requests = args.rate, args.num_requests
        if rate_rps is None and args.arrivals != "trace":
            rate_rps = DEFAULT_RATE_RPS
        if num_requests is None and args.duration is None:
            num_requests = DEFAULT_REQUESTS
        limits = {
            field: value
            for field in ("vocab_size", "max_model_len")
            if (value := getattr(args, field) or getattr(info, field, None))
        }
        workload = Workload(
            process=args.arrivals,
            rate_rps=rate_rps,
            num_requests=num_requests,
            duration_s=args.duration,
            input_len=Length.parse(args.input_len),
            output_len=Length.parse(args.output_len),
            length_scale=args.length_scale,
            popularity=Popularity.parse(args.popularity),
            seed=args.seed,
            **limits,
        )
        plan = workload.plan(ranks, trace)
        tick = _Ticker()
        samples, progress = await run_load(
            client, plan, timeout_s=args.timeout, seed=args.seed, tick=tick
        )
    assert plan, "a workload has at least one request"
    tick(progress, max(sample.ended_s for sample in samples), last=True)
    report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "args": {
            name: _plain(value)
            for name, value in vars(args).items()
            if name not in ("run", "token_file")
        },
        "git_sha": _git_sha(),
        "server_info": None if info is None else dataclasses.asdict(info),
        "device": None if info is None else info.device,
        "arrival_process": args.arrivals,
        "request_rate": _plain(workload.rate_rps or (trace and trace.rate_rps)),
        "popularity": args.popularity,
        "seed": args.seed,
        **build_report(
            samples, progress, goodput=goodput, percentiles=args.percentiles
        ),
    }
    return report, samples


async def _unless_closed(call: Awaitable[T]) -> T | None:
    """Return the answer of an administrator's call; None where it is not for us."""
    from jchameleon.client import CallError

    try:
        return await call
    except CallError as error:
        if error.code.name in ("UNIMPLEMENTED", "PERMISSION_DENIED"):
            return None
        raise


async def _ranks(
    client: "AsyncClient", names: Sequence[str] | None
) -> dict[str | None, int | None]:
    """Return the ranks of the adapters to ask for; None is the base model, rank 0.

    Raises:
      ConfigError: one is not registered.
    """
    listed = await _unless_closed(client.list_adapters())
    known: dict[str, int | None] = {one.adapter_id: one.rank for one in listed or ()}
    ranks: dict[str | None, int | None] = {}
    for name in names if names is not None else list(known) or [BASE]:
        if name == BASE and name not in known:
            ranks[None] = 0
        elif listed is not None and name not in known:
            raise ConfigError(f"adapter {name!r} is not registered on the server")
        else:
            ranks[name] = known.get(name)
    return ranks


class _Ticker:
    """Shows progress on standard error: one line that changes, or plain lines."""

    def __init__(self) -> None:
        self._next_s = 0.0

    def __call__(self, progress: "Progress", now_s: float, *, last: bool = False):
        is_terminal = sys.stderr.isatty()
        if not (is_terminal or last or now_s >= self._next_s):
            return
        self._next_s = now_s + PLAIN_PROGRESS_S
        line = (
            f"{now_s:6.1f} s  sent {progress.sent}/{progress.planned}, open "
            f"{progress.open}, done {progress.completed}, failed {progress.failed}, "
            f"{progress.output_tokens / now_s:.0f} tokens/s"
        )
        end = "\n" if last or not is_terminal else ""
        start = "\r\x1b[K" if is_terminal else ""
        print(start + line, end=end, file=sys.stderr, flush=True)


def _plain(value: Any) -> Any:
    """Return a value that JSON has; it has neither paths nor infinity."""
    if isinstance(value, Path) or value == math.inf:
        return str(value)
    return value


def _git_sha() -> str | None:
    """Return the commit of the checkout that this package is in, if it is in one."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _print_summary(report: dict[str, Any]) -> None:
    """Print what people look at first."""
    facts = {
        "requests": f"{report['completed']} completed, {report['failed']} failed, "
        f"{report['max_concurrent_requests']} at once at the most",
        "duration": f"{report['duration']:.2f} s",
        "requests/s": report["request_throughput"],
        "good requests/s": report["request_goodput"],
        "output tokens/s": report["output_throughput"],
        "tokens/s": report["total_token_throughput"],
        "adapter cache hits": report["adapter_cache_hit_rate"],
        "sent late, P99": f"{report['p99_send_lag_ms']:.1f} ms",
    }
    print_facts({key: value for key, value in facts.items() if value is not None})
    for error, count in Counter(filter(None, report["errors"])).most_common(3):
        print(f"failed {count} times: {error[:200]}")
    if not report["completed"]:
        return
    columns = ["mean", *(f"p{percent:g}" for percent in report["args"]["percentiles"])]
    print(f"\n{'ms':12}" + "".join(f"{name:>10}" for name in columns))
    for name in ("ttft", "tpot", "itl", "e2el"):
        values = [report[f"{column}_{name}_ms"] for column in columns]
        print(f"{name.upper():12}" + "".join(map(_cell, values)))
    for title, key in (("rank", "rank_classes"), ("lane", "queues")):
        if len(report[key]) < 2:
            continue
        columns = ["p50_ttft_ms", "p99_ttft_ms", "p50_tpot_ms", "p99_tpot_ms"]
        heads = ["requests", *(c[:-3].replace("_", " ").upper() for c in columns)]
        print(f"\n{title:12}" + "".join(f"{head:>10}" for head in heads))
        for name, row in report[key].items():
            cells = "".join(_cell(row[column]) for column in columns)
            print(f"{name:12}{row['requests']:>10}{cells}")


def _cell(value: float | None) -> str:
    return f"{'-' if value is None else f'{value:.1f}':>10}"
