"""Measure what the prefix cache spares: time to first token behind a shared prompt.

Requests begin with the same system prompt and end with a question of their own. They
come all at once, first behind a system prompt that nobody has seen, then behind the
same again, and then one by one. Two engines, with the cache and without it, run the
same requests in turn, forwards and backwards, so that a machine that drifts drifts for
both; their tokens are compared.

    python tools/bench_prefix.py --json out.json
    python tools/bench_prefix.py --quick              # a tiny model, in seconds
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
from bench_machine import describe_machine, hold_to_cores, versions
from bench_workload import spread

from jchameleon import LLM, SamplingParams, __version__

CASES = {
    "new": "at once, new prompt",
    "again": "at once, known prompt",
    "single": "one by one, known prompt",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """One run of the bench.

    Attributes:
      system_tokens: what all requests of a round begin with.
      question_tokens: what each goes on with.
      repeats: rounds; each has a system prompt of its own, and one more warms up.
      threads: cores that everything is held to.
      engine: further fields of `EngineConfig`.
    """

    model: str = "smollm2-135m"
    num_requests: int = 8
    system_tokens: int = 512
    question_tokens: int = 32
    output_tokens: int = 8
    repeats: int = 5
    seed: int = 0
    threads: int = 2
    engine: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {"max_model_len": 1024, "pool_bytes": 512 << 20}
    )


QUICK: dict[str, Any] = {
    "model": "tiny",
    "num_requests": 4,
    "system_tokens": 96,
    "question_tokens": 8,
    "output_tokens": 4,
    "repeats": 2,
    "engine": {"max_model_len": 128, "max_running": 8, "pool_bytes": 8 << 20},
}
"""Settings with which every code path takes seconds; its figures mean nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One timed run of a case.

    Attributes:
      ttft_s: of each request.
      prefilled_tokens: that the device ran for prompts.
      tokens: output of each request.
    """

    ttft_s: list[float]
    prefilled_tokens: int
    tokens: list[tuple[int, ...]]


def run_case(
    llm: LLM, case: str, prompts: Sequence[list[int]], settings: Settings
) -> Sample:
    """Run one case on one engine."""
    sampling = SamplingParams(
        max_tokens=settings.output_tokens, temperature=0.0, ignore_eos=True
    )
    calls = [[prompt] for prompt in prompts] if case == "single" else [list(prompts)]
    before = len(llm.step_records)
    outputs = [out for call in calls for out in llm.generate(call, sampling=sampling)]
    records = llm.step_records[before:]
    ttft_s = [out.timing.ttft_s for out in outputs if out.timing.ttft_s is not None]
    if len(ttft_s) != len(prompts):
        raise RuntimeError(f"{case}: {[out.error for out in outputs]}")
    return Sample(
        ttft_s=ttft_s,
        prefilled_tokens=sum(n for record in records for _, n in record.prefill),
        tokens=[out.token_ids for out in outputs],
    )


def measure(settings: Settings) -> dict[str, dict[str, list[Sample]]]:
    """Return samples by case, then by "on" and "off"."""
    samples: dict[str, dict[str, list[Sample]]] = {
        case: {"on": [], "off": []} for case in CASES
    }
    rng = np.random.default_rng(settings.seed)
    options = {"dtype": "float32", **settings.engine}
    with (
        LLM(settings.model, prefix_cache=True, **options) as on,
        LLM(settings.model, prefix_cache=False, **options) as off,
    ):
        engines = [("on", on), ("off", off)]
        vocab_size = on.model_config.vocab_size
        for repeat in range(settings.repeats + 1):
            system = rng.integers(0, vocab_size, settings.system_tokens).tolist()
            for case in CASES:
                prompts = [
                    system
                    + rng.integers(0, vocab_size, settings.question_tokens).tolist()
                    for _ in range(settings.num_requests)
                ]
                for name, llm in engines[:: -1 if repeat % 2 else 1]:
                    sample = run_case(llm, case, prompts, settings)
                    if repeat:  # the first warms up
                        samples[case][name].append(sample)
    return samples


def summarise(samples: Mapping[str, Mapping[str, Sequence[Sample]]]) -> list[dict]:
    """Return one row per case, with ratios paired by round."""
    rows = []
    for case, label in CASES.items():
        row: dict[str, Any] = {"key": case, "label": label}
        medians: dict[str, list[float]] = {}
        for name in ("on", "off"):
            runs = samples[case][name]
            medians[name] = [statistics.median(run.ttft_s) for run in runs]
            row[name] = {
                "ttft_median_s": spread(medians[name]),
                "ttft_last_s": spread([max(run.ttft_s) for run in runs]),
                "prefilled_tokens": [run.prefilled_tokens for run in runs],
            }
        pairs = zip(medians["off"], medians["on"], strict=True)
        row["speed_up"] = spread([off / on for off, on in pairs])
        both = zip(samples[case]["on"], samples[case]["off"], strict=True)
        row["same_outputs"] = all(on.tokens == off.tokens for on, off in both)
        rows.append(row)
    return rows


def run_bench(settings: Settings) -> dict[str, Any]:
    """Measure everything and return the report that is printed and kept as JSON."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    rows = summarise(measure(settings))
    return {
        "settings": dataclasses.asdict(settings),
        "machine": describe_machine(),
        "load_average": load,
        "versions": {"jchameleon": __version__, **versions(("numpy", "jax"))},
        "rows": rows,
    }


def print_report(report: Mapping[str, Any]) -> None:
    """Print the report for people."""
    settings, machine = report["settings"], report["machine"]
    print(
        f"{settings['model']}: {settings['num_requests']} requests, "
        f"{settings['system_tokens']} shared and {settings['question_tokens']} own "
        f"prompt tokens; medians of {settings['repeats']} rounds [spread]\n"
        f"machine: {machine['cpu']}, {machine['cores_in_use']} of {machine['cores']} "
        f"cores, load {report['load_average']:.1f} at the start; versions: "
        + ", ".join(f"{k} {v}" for k, v in report["versions"].items() if v)
    )

    def seconds(values: Mapping[str, float]) -> str:
        return (
            f"{1e3 * values['median']:7.0f} "
            f"[{1e3 * values['min']:.0f}-{1e3 * values['max']:.0f}]"
        )

    print(
        f"\n{'TTFT median, ms':26} {'without':>20} {'with':>20} {'gain':>18}   "
        "prompt tokens run: without, with; same tokens"
    )
    for row in report["rows"]:
        on, off, gain = row["on"], row["off"], row["speed_up"]
        print(
            f"{row['label']:26} {seconds(off['ttft_median_s']):>20} "
            f"{seconds(on['ttft_median_s']):>20} "
            f"{gain['median']:6.2f} [{gain['min']:.2f}-{gain['max']:.2f}]   "
            f"{off['prefilled_tokens'][0]}, {on['prefilled_tokens'][0]}; "
            f"{'yes' if row['same_outputs'] else 'NO'}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report")
    parser.add_argument("--quick", action="store_true", help="a tiny model, in seconds")
    parser.add_argument("--repeats", type=int, help="timed rounds")
    args = parser.parse_args()
    values = dict(QUICK) if args.quick else {}
    if args.repeats is not None:
        if args.repeats < 1:
            parser.error(f"--repeats={args.repeats} must be at least 1")
        values["repeats"] = args.repeats
    settings = Settings(**values)
    hold_to_cores(settings.threads)
    report = run_bench(settings)
    print_report(report)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
