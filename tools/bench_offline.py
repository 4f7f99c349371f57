"""Measure offline throughput with many adapters, ours and transformers + PEFT.

16 requests at once, 128 random prompt tokens, 32 output tokens, greedy,
end-of-sequence ignored; random adapters on q, k, v, o with ranks 8, 16, 32, 64 in
turn. All systems run in this process on the same dequantised weights, prompts and
adapter directories. Rows are run in turn, forwards and backwards, so that a machine
that drifts drifts for all of them: ratios within one run mean something, figures of
different runs do not compare. With the default model it takes 10 GB of memory.

    python tools/bench_offline.py --json out.json     # all of it
    python tools/bench_offline.py --no-peers --engine max_batch_tokens=2048
    python tools/bench_offline.py --quick             # a tiny model, in seconds
"""

import argparse
import dataclasses
import gc
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_engine import BARS as ENGINE_BARS
from bench_engine import measure_engine, print_engine
from bench_machine import (
    calibrate,
    describe_machine,
    hold_to_cores,
    unrest,
    versions,
)
from bench_ours import Ours, write_adapters
from bench_workload import (
    BARS,
    QUICK,
    Case,
    Sample,
    Settings,
    floor,
    make_cases,
    paired_ratios,
    random_prompts,
    same_outputs,
    spread,
)
from peer_peft import PACKAGES as PEER_PACKAGES
from peer_peft import Peers, missing_packages

from jchameleon import __version__
from jchameleon.config import ModelConfig
from jchameleon.models.loader import load_model

PACKAGES = ("numpy", "jax", "jaxlib", "flax", *PEER_PACKAGES)


def measure(
    settings: Settings, cases: Sequence[Case]
) -> tuple[ModelConfig, dict[str, list[Sample]]]:
    """Start all systems and play every case on them."""
    ranks = {name: rank for case in cases for name, rank in case.adapters.items()}
    of_peers = {n for c in cases if c.system == "peers" for n in c.adapters}
    loaded = load_model(settings.model, dtype="float32")
    model = loaded.config
    with tempfile.TemporaryDirectory(prefix="bench-adapters-") as work:
        folder = Path(work)
        paths = write_adapters(settings, model, ranks, folder, seed=settings.seed)
        systems: dict[str, Any] = {}
        if settings.peers:
            peer_paths = {name: paths[name] for name in paths if name in of_peers}
            systems["peers"] = Peers(settings, loaded, peer_paths)
        del loaded
        ours = Ours(settings, paths, folder)
        systems |= {"plain": ours, "ours": ours}
        try:
            return model, play(settings, cases, systems, model.vocab_size)
        finally:
            ours.close()


def play(
    settings: Settings,
    cases: Sequence[Case],
    systems: Mapping[str, Any],
    vocab_size: int,
) -> dict[str, list[Sample]]:
    """Run every case once, shortened, and then `repeats` times, all in turn.

    A system whose `run` returns None could not; that sample is left out.
    """
    samples: dict[str, list[Sample]] = {case.key: [] for case in cases}
    for repeat in range(settings.repeats + 1):
        # New prompts each time: none may profit from having seen them.
        prompts = random_prompts(settings, vocab_size, settings.seed + repeat)
        output_tokens = settings.output_tokens if repeat else 2
        for case in cases[:: -1 if repeat % 2 else 1]:
            gc.collect()
            system = systems[case.system]
            most = case.output_tokens or output_tokens
            sample = system.run(case, prompts, output_tokens=min(most, output_tokens))
            if repeat and sample is not None:  # the first warms up
                samples[case.key].append(sample)
        print(f"round {repeat} of {settings.repeats} done", file=sys.stderr)
    return samples


def summarise(case: Case, runs: Sequence[Sample], floor_s: dict) -> dict[str, Any]:
    """Return one row: medians and spreads over the repeats."""
    wall_s = statistics.median(run.wall_s for run in runs)
    steps_s = [run.decode_step_s for run in runs if run.decode_step_s]
    return {
        "key": case.key,
        "label": case.label,
        "system": case.system,
        "adapters": case.adapters,
        "out_tokens_per_s": spread([run.tokens_per_s for run in runs]),
        "wall_s": [run.wall_s for run in runs],
        "ttft_median_s": spread([statistics.median(run.ttft_s) for run in runs]),
        "ttft_last_s": spread([max(run.ttft_s) for run in runs]),
        "prefill_s": spread([run.prefill_s for run in runs]),
        "decode_step_ms": spread([1e3 * statistics.median(s) for s in steps_s]),
        "adapter_misses": sum(run.misses for run in runs),
        "floor": floor_s,
        "wall_over_floor": wall_s / floor_s["total_s"],
    }


def run_bench(settings: Settings, *, peers_note: str) -> dict[str, Any]:
    """Measure everything and return the report that is printed and kept as JSON."""
    calibration_sizes = {
        "threads": settings.threads,
        "gemm_width": settings.gemm_width,
        "read_bytes": settings.read_bytes,
    }
    cases = make_cases(settings)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    before = calibrate(**calibration_sizes)
    model, samples = measure(settings, cases)
    after = calibrate(**calibration_sizes)
    engine = measure_engine(
        settings.model,
        repeats=settings.repeats,
        running=settings.running,
        queued=settings.queued,
    )
    ratios = paired_ratios(samples)
    best = {name: max(before[name], after[name]) for name in before}
    return {
        "settings": dataclasses.asdict(settings),
        "machine": describe_machine(),
        "load_average": load,
        "versions": {"jchameleon": __version__, **versions(PACKAGES)},
        "peers": peers_note,
        "calibration": {"start": before, "end": after},
        "rows": [
            summarise(case, samples[case.key], floor(model, settings, case, **best))
            for case in cases
        ],
        "ratios": ratios,
        "engine": engine,
        "checks": checks(ratios, engine),
        "same_outputs": {
            f"{first} = {second}": same_outputs(samples, first, second)
            for first, second in (
                ("plain", "base"),
                ("base", "peer_base"),
                ("few", "peer_few"),
                ("mixed", "peer_mixed"),
                ("mixed", "base"),
            )
            if first in samples and second in samples
        },
    }


def checks(ratios: Mapping[str, Any], engine: Mapping[str, Any]) -> list[dict]:
    """Return every bar with its figure and whether it was kept."""
    found = [
        {"name": name, "figure": ratios[name]["median"], "bar": bar, "least": True}
        for name, bar in BARS.items()
        if name in ratios
    ]
    found += [
        {"name": name, "figure": engine[name], "bar": bar, "least": False}
        for name, bar in ENGINE_BARS.items()
    ]
    for row in found:
        distance = row["figure"] - row["bar"]
        row["ok"] = distance >= 0 if row["least"] else distance <= 0
    return found


def print_report(report: Mapping[str, Any]) -> None:
    """Print the report for people."""
    settings, machine = report["settings"], report["machine"]
    found = ", ".join(f"{k} {v}" for k, v in report["versions"].items() if v)
    print(
        f"{settings['model']} {settings['dtype']}: {settings['num_requests']} requests "
        f"at once, {settings['prompt_tokens']} prompt + {settings['output_tokens']} "
        f"output tokens, adapters on {','.join(settings['targets'])}; median "
        f"[min-max] of {settings['repeats']} interleaved runs"
    )
    print(f"engine: {settings['engine'] or 'defaults'}; peers: {report['peers']}")
    print(
        f"machine: {machine['cpu']}, {machine['cores_in_use']} of {machine['cores']} "
        f"cores, {machine['device']}\nversions: {found}"
    )
    for when, rates in report["calibration"].items():
        print(
            f"calibration at {when}: {rates['gemm_gflops']:.0f} GFLOP/s, "
            f"{rates['read_gbps']:.1f} GB/s"
        )
    if warning := unrest(
        report["calibration"], report["load_average"], threads=settings["threads"]
    ):
        print(warning)
    print(
        f"\n{'':36} {'output tok/s':>22} {'TTFT s':>7} {'last':>6} {'decode ms':>10} "
        f"{'floor s':>8} {'x floor':>8}"
    )
    for row in report["rows"]:
        owner = "" if row["system"] == "peers" else "ours: "
        print(
            f"{owner + row['label']:36} {shown(row['out_tokens_per_s'], 1):>22} "
            f"{row['ttft_median_s']['median']:7.2f} {row['ttft_last_s']['median']:6.2f}"
            f" {row['decode_step_ms']['median']:10.1f} {row['floor']['total_s']:8.2f} "
            f"{row['wall_over_floor']:8.2f}"
        )
        if row["adapter_misses"] and row["key"] != "cold":
            print(f"  {row['adapter_misses']} requests found their adapter gone")
    print("\nratios of output tok/s")
    for name, values in report["ratios"].items():
        print(f"{name:36} {shown(values, 2):>22}")
    print("\nrequests with the same tokens")
    for name, share in report["same_outputs"].items():
        print(f"{name:36} {share:22.0%}")
    print()
    print_engine(report["engine"])
    print(f"\n{'':36} {'figure':>10} {'bar':>12}")
    for row in report["checks"]:
        bar = f"{'>=' if row['least'] else '<='} {row['bar']:g}"
        verdict = "ok" if row["ok"] else "MISSED"
        print(f"{row['name']:36} {row['figure']:10.4g} {bar:>12} {verdict}")


def shown(values: Mapping[str, float], digits: int) -> str:
    """Return "median [min-max]"."""
    median, low, high = (f"{values[k]:.{digits}f}" for k in ("median", "min", "max"))
    return f"{median} [{low}-{high}]"


def option(text: str) -> tuple[str, Any]:
    """Parse NAME=VALUE; the value is JSON, or else a string."""
    name, found, value = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="preset, directory or GGUF file")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, help="timed runs of each row")
    parser.add_argument("--threads", type=int, help="cores to use")
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--engine",
        type=option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a field of EngineConfig; may be repeated",
    )
    parser.add_argument(
        "--peers",
        action=argparse.BooleanOptionalAction,
        help="run transformers + PEFT too (default: where installed and not --quick)",
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, no peers")
    parser.add_argument("--json", type=Path, help="write the report here")
    args = parser.parse_args()

    values = dict(QUICK) if args.quick else {}
    for name in ("model", "dtype", "repeats", "threads", "seed"):
        if getattr(args, name) is not None:
            values[name] = getattr(args, name)
    values["engine"] = {**values.get("engine", {}), **dict(args.engine)}
    peers = not args.quick if args.peers is None else args.peers
    note = "run" if peers else "not asked for"
    if peers and (missing := missing_packages()):
        peers, note = False, f"not run, {', '.join(missing)} not installed"
    settings = Settings(**values, peers=peers)
    if settings.repeats < 1 or settings.threads < 1:
        parser.error("--repeats and --threads must be at least 1")
    hold_to_cores(settings.threads)
    report = run_bench(settings, peers_note=note)
    print_report(report)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
