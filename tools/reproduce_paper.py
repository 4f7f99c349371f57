"""Chameleon's figures by simulation: data, drawings and one page that says what holds.

Every figure of the paper that a simulator of one engine can give, with each cost model
of the profile, beside the paper's own numbers. What is finished is kept: an interrupted
run goes on where it was when it is called again.

    python tools/reproduce_paper.py --quick --out build/paper
    python tools/reproduce_paper.py --trace conversations.csv --out build/paper
    python tools/reproduce_paper.py --figure 11 --variants m4w --out build/paper
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import paper_ablations
import paper_examples
import paper_loads
import paper_machines
import paper_mix
import paper_waits
from paper_cells import Store, World, fingerprint, run_cells
from paper_figures import VARIANTS, Figure, Scale, Seen, full, quick
from paper_report import ours_text, paper_text, write_report

from jchameleon import __version__
from jchameleon.errors import ConfigError, JChameleonError
from jchameleon.resources import configs_dir
from jchameleon.sim import load_profile
from jchameleon.workload.arrivals import read_trace

FIGURES: dict[str, Figure] = {
    figure.number: figure
    for figure in (
        *sorted(
            (
                *paper_examples.FIGURES,
                *paper_loads.FIGURES,
                *paper_waits.FIGURES,
                *paper_ablations.FIGURES,
                *paper_machines.FIGURES,
            ),
            key=lambda figure: int(figure.number),
        ),
        *paper_mix.FIGURES,
    )
}

QUICK_S, FULL_S = 120.0, 400.0
"""Seconds of arrivals."""

LEAST_S = 10.0
"""Of arrivals that count: figures want some requests of each size."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; return 0, 2 for wrong input, 130 when interrupted."""
    args = _parse(arguments)
    try:
        _run(args)
    except JChameleonError as error:
        print(f"reproduce_paper: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"\nreproduce_paper: interrupted; what is finished is kept in {args.out}, "
            "call it again to go on",
            file=sys.stderr,
        )
        return 130
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="reproduce_paper.py", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--figure",
        action="append",
        metavar="N",
        help="only this one, or several (default: all)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="3 seeds of 120 s, coarser scans"
    )
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="CSV with columns TIMESTAMP, ContextTokens, GeneratedTokens to draw "
        "lengths from (default: the profile's own law)",
    )
    parser.add_argument("--profile", type=Path, metavar="FILE")
    parser.add_argument(
        "--variants",
        default=",".join(VARIANTS),
        metavar="A,B",
        help="cost models: variants of the profile, or default (%(default)s)",
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="from 0 on")
    parser.add_argument(
        "--duration", type=float, metavar="S", help="seconds of arrivals"
    )
    parser.add_argument(
        "--processes", type=int, default=2, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--render",
        type=Path,
        action="append",
        metavar="FILE",
        help="run nothing: draw the report of a paper.json, or of several, each with "
        "figures of its own",
    )
    return parser.parse_args(arguments)


def _run(args: argparse.Namespace) -> None:
    begin_s = time.monotonic()
    if args.render is not None:
        path = write_report(merged([_read(path) for path in args.render]), args.out)
        print(path)
        return
    figures, scale = _figures(args.figure), _scale(args)
    if args.processes < 1:
        raise ConfigError(f"processes={args.processes} must be at least 1")
    store = Store(args.out / "cells", scale.world)
    cells = [cell for figure in figures for cell in figure.cells(scale)]
    results = run_cells(store, cells, processes=args.processes)
    data = data_of(figures, Seen(scale, results), quick=args.quick)
    try:
        text = json.dumps(data, separators=(",", ":"))
        (args.out / "paper.json").write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {args.out}: {error.strerror}") from error
    path = write_report(data, args.out)
    for figure in data["figures"]:
        for one in figure["checks"]:
            print(
                f"figure {figure['figure']:>2}  {one['variant']:8}{one['verdict']:15}"
                f"{one['what']}: paper {paper_text(one)}, ours {ours_text(one)}"
            )
    print(f"{len(set(cells))} cells, {time.monotonic() - begin_s:.0f} s: {path}")


def data_of(figures: Sequence[Figure], seen: Seen, *, quick: bool) -> dict[str, Any]:
    """Return all that the report says, rounded to what it shows."""
    scale, world = seen.scale, seen.scale.world
    return {
        "run": {
            "mode": "quick run" if quick else "run",
            "seeds": scale.seeds,
            "duration_s": world.duration_s,
            "lengths": "synthetic" if world.trace is None else "of a trace",
            "scan_rps": list(scale.scan_rps),
            "device_rps": list(scale.device_rps),
            "version": __version__,
            "code": fingerprint(world),
        },
        "figures": [_rounded(figure.result(seen)) for figure in figures],
    }


def merged(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the first run with the figures of all; those of others say whose they are.

    Raises:
      ConfigError: two have the same figure.
    """
    found = {figure["figure"]: figure for figure in runs[0]["figures"]}
    for other in runs[1:]:
        for figure in other["figures"]:
            if figure["figure"] in found:
                raise ConfigError(f"figure {figure['figure']} is in two of the files")
            found[figure["figure"]] = {**figure, "run": other["run"]}
    order = list(FIGURES)
    return {
        "run": runs[0]["run"],
        "figures": sorted(found.values(), key=lambda one: order.index(one["figure"])),
    }


def _rounded(value: Any) -> Any:
    """Return plain values with floats in five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def _figures(numbers: Sequence[str] | None) -> list[Figure]:
    if numbers is None:
        return list(FIGURES.values())
    for number in numbers:
        if number not in FIGURES:
            raise ConfigError(
                f"figure={number!r} must be one of {', '.join(FIGURES)}; the others of "
                "the paper show no results"
            )
    return [FIGURES[number] for number in dict.fromkeys(numbers)]


def _scale(args: argparse.Namespace) -> Scale:
    profile = args.profile or configs_dir() / "paper" / "a40-llama-7b.toml"
    duration_s = args.duration
    if duration_s is None:
        duration_s = QUICK_S if args.quick else FULL_S
    variants = tuple(dict.fromkeys(args.variants.split(",")))
    for variant in variants:
        found = load_profile(profile, None if variant == "default" else variant)
        least_s = found.skip_s + LEAST_S
        if not least_s <= duration_s < float("inf"):
            raise ConfigError(
                f"duration={duration_s:g} must be finite and at least {least_s:g}: the "
                f"profile does not count the first {found.skip_s:g} s"
            )
    if args.trace is not None:
        read_trace(args.trace)
    world = World(profile=profile, trace=args.trace, duration_s=duration_s)
    scale = (quick if args.quick else full)(world)
    seeds = scale.seeds if args.seeds is None else args.seeds
    if seeds < 1:
        raise ConfigError(f"seeds={seeds} must be at least 1")
    return dataclasses.replace(scale, seeds=seeds, variants=variants)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
        if not {"run", "figures"} <= data.keys():
            raise ValueError("no run or figures")
        return data
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{path} must be a paper.json of this tool") from error


if __name__ == "__main__":
    sys.exit(main())
