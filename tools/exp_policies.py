"""Run the real engine under every policy preset, on a workload of many adapters.

100 adapters of ranks 8 to 128 on q, k, v, o in a pool that holds a quarter of them
beside the KV cache, lengths of a conversation trace scaled down, Poisson arrivals that
wait for nobody, and an emulated link on which a rank-128 load is 17.5 % of an isolated
TTFT (Chameleon, section 5.1). Every preset sees the same requests at the same times.
Each run has a new engine with an empty cache; the first 15 % of requests warm it up and
are not counted. docs/experiments.md explains the method and shows results.

    python tools/exp_policies.py --model tiny --trace conv.csv --json tiny.json
    python tools/exp_policies.py --model smollm2-135m --json smollm2.json
    python tools/exp_policies.py --quick                # a smoke run, in seconds

With --json every finished run is kept at once: the same command again goes on where
the last one stopped, and more presets, seeds or loads add to what is there.
"""

import argparse
import dataclasses
import functools
import itertools
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_machine import calibrate, hold_to_cores
from exp_calibration import (
    LOAD_SHARE,
    Calibration,
    Reference,
    calibrate_rig,
    references,
)
from exp_report import figure, markdown
from exp_results import Results, Settings, count_warm, figures, percentile, totals
from exp_rig import Rig
from exp_workload import Lengths, Shape, Trace, make_trace
from random_adapters import write_random_adapter

from jchameleon.config import ATTENTION_PROJECTIONS, EngineConfig, ModelConfig
from jchameleon.lora.layout import ChunkLayout
from jchameleon.models.embedded import home_dir
from jchameleon.models.params import numpy_dtype
from jchameleon.runtime.policy.presets import load_policy
from jchameleon.runtime.sizing import page_elems

PRESETS = (
    "chameleon",
    "adaptive",
    "chameleon-nocache",
    "chameleon-nosched",
    "s-lora",
    "sjf",
    "lru",
    "fairshare",
    "gdsf",
    "drop",
)

CALIBRATION_SEED = 1_000_003
"""Of the trace that calibrates; no run uses it."""

ADAPTER_SEED = 17
RATES = {"gemm_width": 1024, "read_bytes": 64 << 20}


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"scale": 0.25, "num_requests": 200, "loads": (0.7, 1.0, 1.3)},
    "smollm2-135m": {"scale": 0.05, "num_requests": 40, "loads": (0.7, 1.0)},
}
"""What 10 presets and 5 seeds take a quarter of an hour (tiny) or a half for on two
cores: the scale leaves a request some KV pages and the rate some requests a second."""

QUICK: dict[str, Any] = {
    "scale": 0.05,
    "num_requests": 20,
    "num_adapters": 40,
    "max_running": 8,
    "max_batch_tokens": 64,
}
"""Settings with which every code path takes seconds; its figures mean nothing."""


class Experiment:
    """The rig with its workload; it adds to the results whatever is missing."""

    def __init__(self, settings: Settings, results: Results, folder: Path):
        """Check that the workload fits.

        Args:
          folder: of the adapters.

        Raises:
          ValueError: the pool does not hold the longest request.
        """
        self._settings = settings
        self._results = results
        self._lengths = Lengths(
            None if settings.trace is None else Path(settings.trace)
        )
        model = ModelConfig.preset(settings.model)
        max_model_len = settings.max_model_len or self._lengths.context_tokens(
            settings.scale
        )
        self._shape = Shape(
            num_requests=settings.num_requests,
            scale=settings.scale,
            max_model_len=max_model_len,
            num_adapters=settings.num_adapters,
        )
        self._max_tokens = self._shape.max_tokens(self._lengths)
        options = {
            "dtype": settings.dtype,
            "max_model_len": max_model_len,
            "max_running": settings.max_running,
            "max_batch_tokens": settings.max_batch_tokens,
            "max_lora_rank": max(self._shape.ranks),
            "lora_targets": ATTENTION_PROJECTIONS,
            # What no job can find cached takes no page from adapters.
            "prefix_cache": False,
        }
        options["pool_bytes"] = self._pool_bytes(model, options)
        self._model = model
        self._options = options
        self._folder = folder
        results.state["workload"] = {
            "lengths": self._lengths.source,
            "max_tokens": self._max_tokens,
            "max_model_len": max_model_len,
            "pool_bytes": options["pool_bytes"],
        }

    @functools.cached_property
    def _rig(self) -> Rig:
        """Started when something has to run; adapters are written unless there."""
        ranks = self._shape.adapters()
        log(f"{len(ranks)} adapters in {self._folder}")
        self._results.note_command()
        start_s = time.monotonic()
        paths = write_adapters(
            self._folder, self._model, ranks, self._settings.adapter_dtype
        )
        rig = Rig(self._settings.model, paths, self._options)
        log(f"engine ready after {time.monotonic() - start_s:.0f} s")
        return rig

    def calibrate(self) -> Calibration:
        """Return the calibration, measured unless the results have one."""
        found = self._results.calibration
        if found is None:
            rig, ranks = self._rig, self._shape.adapters()
            log("calibrating")
            found = calibrate_rig(
                rig,
                self._trace(CALIBRATION_SEED),
                self._lengths,
                [name for name, rank in ranks.items() if rank == max(ranks.values())],
                scale=self._settings.scale,
                max_tokens=self._max_tokens,
                max_model_len=self._shape.max_model_len,
            )
            self._results.state["calibration"] = dataclasses.asdict(found)
            self._results.state["slo_s"] = found.slo_s
            self._results.state["load_share_wanted"] = LOAD_SHARE
            self._results.save()
        return found

    def run(self, runs: Sequence[tuple[int, float, str]]) -> None:
        """Do all (seed, load, preset) that are missing, in this order."""
        results, calibration = self._results, self.calibrate()
        pending = [run for run in runs if not results.done(run[2], run[1], run[0])]
        expected_s = [self._expected_s(load, calibration) for _, load, _ in pending]
        started_s = time.monotonic()
        for index, (seed, load, preset) in enumerate(pending):
            record = self._run(preset, load, seed, calibration)
            results.state["runs"].append(record)
            results.save()
            pace = (time.monotonic() - started_s) / sum(expected_s[: index + 1])
            log(
                f"[{index + 1}/{len(pending)}] {preset} at load {load:g}, seed {seed}: "
                f"P99 TTFT {1e3 * percentile(record['ttft_s'], 99):.4g} ms, "
                f"{record['mismatches']} outputs differ; "
                f"{pace * sum(expected_s[index + 1 :]) / 60:.1f} min to go"
            )

    def _run(
        self, preset: str, load: float, seed: int, calibration: Calibration
    ) -> dict[str, Any]:
        trace, found = self._trace(seed), self._references(seed)
        rate_rps = load * calibration.saturation_rps
        warm_requests = count_warm(len(trace), self._settings.warm_share)
        table = calibration.policy(preset, warm_requests=warm_requests)
        self._results.state["policies"][preset] = load_policy(table).to_dict()
        jobs = [
            one.job(
                request,
                self._rig,
                max_tokens=self._max_tokens,
                at_s=request.arrival_s(rate_rps),
            )
            for request, one in zip(trace, found, strict=True)
        ]
        rates = calibrate(threads=self._settings.threads, **RATES)
        start_s = time.monotonic()
        with self._rig.session(table, calibration.link_bytes_per_s) as session:
            outcomes = session.play(jobs)
            books = session.books()
        return {
            "preset": preset,
            "load": load,
            "seed": seed,
            "rate_rps": rate_rps,
            "wall_s": time.monotonic() - start_s,
            "machine": rates,
            **totals(books),
            **figures(outcomes, found, warm_share=self._settings.warm_share),
        }

    def _references(self, seed: int) -> list[Reference]:
        kept = self._results.state["references"]
        if str(seed) not in kept:
            found = references(
                self._rig, self._trace(seed), max_tokens=self._max_tokens
            )
            kept[str(seed)] = [list(one.tokens) for one in found]
            self._results.save()
        return [Reference(tokens=tuple(tokens)) for tokens in kept[str(seed)]]

    def _trace(self, seed: int) -> Trace:
        return make_trace(self._shape, self._lengths, seed)

    def _expected_s(self, load: float, calibration: Calibration) -> float:
        rate_rps = min(load, 1.0) * calibration.saturation_rps
        return self._settings.num_requests / rate_rps

    def _pool_bytes(self, model: ModelConfig, options: Mapping[str, Any]) -> int:
        """Return bytes of a pool with `pool_share` of all adapters' pages."""
        config = EngineConfig.from_dict(options)
        elems = page_elems(config, model)
        layout = ChunkLayout(model, ATTENTION_PROJECTIONS, elems)
        all_pages = sum(map(layout.num_pages, self._shape.adapters().values()))
        pages = round(self._settings.pool_share * all_pages)
        longest = -(-self._shape.max_model_len // config.kv_block_tokens)
        longest += layout.num_pages(max(self._shape.ranks))
        if pages < longest:
            raise ValueError(
                f"a pool of {pages} pages, pool_share={self._settings.pool_share} of "
                f"all adapters, must hold the {longest} of the longest request with "
                "the largest adapter: lower scale or raise pool_share"
            )
        page_bytes = elems * numpy_dtype(config.dtype).itemsize * model.num_layers
        return (pages + 2) * page_bytes


def write_adapters(
    folder: Path, model: ModelConfig, ranks: Mapping[str, int], dtype: str
) -> dict[str, Path]:
    """Write random adapters that are not there yet and return their directories."""
    paths = {}
    for index, (name, rank) in enumerate(ranks.items()):
        paths[name] = folder / f"{index}-{name}"
        if paths[name].is_dir():
            continue
        part = folder / f"{index}-{name}.part"  # one cut short must not be taken later
        write_random_adapter(
            part,
            model,
            rank=rank,
            targets=ATTENTION_PROJECTIONS,
            seed=ADAPTER_SEED + index,
            dtype=dtype,
        )
        os.replace(part, paths[name])
    return paths


def log(text: str) -> None:
    """Tell who waits how far it is."""
    print(text, file=sys.stderr, flush=True)


def plan_runs(
    presets: Sequence[str], loads: Sequence[float], seeds: Sequence[int]
) -> list[tuple[int, float, str]]:
    """Return (seed, load, preset): presets side by side, each first once in a while.

    A machine that drifts drifts for all presets of a seed and load together.
    """
    runs = []
    for turn, (seed, load) in enumerate(itertools.product(seeds, loads)):
        shift = turn % len(presets)
        order = [*presets[shift:], *presets[:shift]]
        runs += [(seed, load, preset) for preset in order]
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SIZES, default="tiny")
    parser.add_argument("--trace", help="CSV with ContextTokens and GeneratedTokens")
    parser.add_argument("--presets", nargs="+", default=PRESETS, metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2, 3, 4))
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument("--loads", type=float, nargs="+", help="shares of saturation")
    rates.add_argument("--rps", type=float, nargs="+", help="requests per second")
    parser.add_argument("--scale", type=float, help="of all lengths")
    parser.add_argument("--requests", type=int, help="of one run")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--threads", type=int, default=2, help="cores to use")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument("--work", type=Path, help="folder that keeps the adapters")
    parser.add_argument("--json", type=Path, help="keep results here, and go on")
    parser.add_argument("--svg", type=Path, help="draw P99 TTFT over load here")
    args = parser.parse_args()
    hold_to_cores(args.threads)

    sizes = {**SIZES[args.model], **(QUICK if args.quick else {})}
    loads = args.loads or sizes.pop("loads")
    sizes.pop("loads", None)
    given = {
        "scale": args.scale,
        "num_requests": args.requests,
        "max_model_len": args.max_model_len,
    }
    sizes |= {name: value for name, value in given.items() if value is not None}
    settings = Settings(
        model=args.model, trace=args.trace, threads=args.threads, **sizes
    )
    try:
        for preset in args.presets:
            load_policy(preset)
        results = Results(args.json, settings)
        work = args.work or home_dir() / "experiments"
        folder = work / f"{settings.model}-{settings.adapter_dtype}-{ADAPTER_SEED}"
        experiment = Experiment(settings, results, folder)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if args.rps:
        saturation_rps = experiment.calibrate().saturation_rps
        loads = [round(rps / saturation_rps, 4) for rps in args.rps]
    experiment.run(plan_runs(args.presets, loads, args.seeds))
    print(markdown(results.state))
    if args.svg is not None:
        args.svg.write_text(figure(results.state), encoding="utf-8")


if __name__ == "__main__":
    main()
