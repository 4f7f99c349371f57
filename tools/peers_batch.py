"""One batch on every system in turn: ours, transformers + PEFT, vLLM."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_offline import play
from bench_ours import Ours, write_adapters
from bench_workload import (
    Case,
    Sample,
    Samples,
    Settings,
    floor,
    make_cases,
    paired_ratios,
    random_prompts,
    same_outputs,
    spread,
)
from peer_peft import Peers
from peer_vllm import TRY_LIMIT_S, Vllm, VllmError
from peers_bars import OWN_SHARE, PEFT_RATIO, VLLM_RATIO

from jchameleon.config import ModelConfig
from jchameleon.models.export import save_model
from jchameleon.models.loader import LoadedModel

OURS = ("base", "few", "mixed")
PEFT = ("peer_base", "peer_few", "peer_mixed")

RATIOS = (
    (PEFT_RATIO, "mixed", "peer_mixed"),
    (VLLM_RATIO, "mixed", "vllm_base"),
    (OWN_SHARE, "mixed", "base"),
    ("base rows, ours / transformers", "base", "peer_base"),
    ("base rows, ours / vLLM", "base", "vllm_base"),
    ("few adapters, ours / PEFT", "few", "peer_few"),
    ("few adapters, ours / vLLM", "few", "vllm_few"),
)
"""Name, numerator and denominator; of output tokens per second."""

SAME = (
    ("base", "peer_base"),
    ("few", "peer_few"),
    ("mixed", "peer_mixed"),
    ("base", "vllm_base"),
    ("few", "vllm_few"),
)
"""Rows that should have the same tokens."""


def batch_cases(settings: Settings, *, vllm: bool) -> list[Case]:
    """Return the rows of the table; vLLM's are there if it is installed."""
    known = {case.key: case for case in make_cases(settings)}
    found = [known[key] for key in OURS]
    found.append(
        Case(
            key="prefill",
            label="prompts alone, base rows",
            system="ours",
            adapters={},
            output_tokens=1,
        )
    )
    found += [known[key] for key in PEFT if key in known]
    if vllm:
        few = known["few"].adapters
        found += [
            Case(key="vllm_base", label="vLLM, base", system="vllm", adapters={}),
            Case(
                key="vllm_few",
                label=f"vLLM, {len(few)} adapters",
                system="vllm_lora",
                adapters=few,
            ),
        ]
    return found


def measure_batch(
    settings: Settings,
    loaded: LoadedModel,
    folder: Path,
    *,
    vllm_python: Path | None,
) -> tuple[dict[str, list[Sample]], dict[str, str], dict[str, Path]]:
    """Start all systems, and run every case on its system in turn.

    Returns:
      Samples by key; why cases of vLLM have none, by key; the adapters.
    """
    cases = batch_cases(settings, vllm=vllm_python is not None)
    ranks = {name: rank for case in cases for name, rank in case.adapters.items()}
    paths = write_adapters(settings, loaded.config, ranks, folder, seed=settings.seed)
    systems: dict[str, Any] = {}
    notes: dict[str, str] = {}
    try:
        if vllm_python is not None:
            started, notes = start_vllm(
                settings, loaded, folder, cases, paths, vllm_python
            )
            systems |= started
            cases = [case for case in cases if case.key not in notes]
        if settings.peers:
            systems["peers"] = Peers(settings, loaded, paths)
        systems["ours"] = Ours(settings, paths, folder, plain=False)
        samples = play(settings, cases, systems, loaded.config.vocab_size)
    finally:
        for system in systems.values():
            if not isinstance(system, Peers):
                system.close()
    for key in [key for key, runs in samples.items() if len(runs) < settings.repeats]:
        # Only vLLM's: whatever else fails raises.
        notes[key] = f"failed after {len(samples.pop(key))} runs"
    return samples, notes, paths


def start_vllm(
    settings: Settings,
    loaded: LoadedModel,
    folder: Path,
    cases: Sequence[Case],
    paths: Mapping[str, Path],
    python: Path,
) -> tuple[dict[str, Vllm], dict[str, str]]:
    """Start vLLM for the base model, and with LoRA where one batch ends in time.

    Returns:
      Engines by system; why others are not there, by key of their case.
    """
    model = folder / "hf"
    save_model(loaded, model, form="hf")
    prompts = random_prompts(settings, loaded.config.vocab_size, settings.seed)
    engines: dict[str, Vllm] = {}
    notes: dict[str, str] = {}
    for case in cases:
        if not case.system.startswith("vllm"):
            continue
        used = {name: paths[name] for name in case.adapters}
        log = folder / f"{case.key}.log"
        try:
            engine = Vllm(python, settings, model, used, case.adapters, log=log)
            engines[case.system] = engine
            if used:
                engine.try_batch(case, prompts, settings.output_tokens, TRY_LIMIT_S)
        except VllmError as error:
            engines.pop(case.system, None)
            notes[case.key] = str(error)
    return engines, notes


def batch_row(
    case: Case,
    runs: Sequence[Sample],
    settings: Settings,
    floor_s: Mapping[str, float],
) -> dict[str, Any]:
    """Return one row; shares of the floor where its parts were measured."""
    row: dict[str, Any] = {
        "key": case.key,
        "label": case.label,
        "system": case.system,
        "adapters": len(case.adapters),
        "prompt_tokens": settings.num_requests * settings.prompt_tokens,
        "output_tokens": sum(map(len, runs[0].tokens)),
        "out_tokens_per_s": spread([run.tokens_per_s for run in runs]),
        "wall_s": [run.wall_s for run in runs],
        "adapter_misses": sum(run.misses for run in runs),
        "floor": dict(floor_s),
        "floor_share": None,
    }
    if case.key == "prefill":
        shares = [floor_s["prefill_s"] / run.wall_s for run in runs]
        row["floor_share"] = spread(shares)
    elif case.system == "ours":
        steps_s = [statistics.median(run.decode_step_s) for run in runs]
        row["floor_share"] = spread([floor_s["decode_step_s"] / s for s in steps_s])
    return row


def batch_report(
    settings: Settings,
    model: ModelConfig,
    samples: Samples,
    notes: Mapping[str, str],
    rates: Mapping[str, float],
    *,
    vllm: bool,
) -> dict[str, Any]:
    """Return rows, ratios and which rows had the same tokens.

    Args:
      rates: "gemm_gflops" and "read_gbps" of this machine in this run.
    """
    return {
        "rows": [
            batch_row(
                case, samples[case.key], settings, floor(model, settings, case, **rates)
            )
            for case in batch_cases(settings, vllm=vllm)
            if case.key in samples
        ],
        "missing": dict(notes),
        "ratios": paired_ratios(samples, RATIOS),
        "same_outputs": {
            f"{first} = {second}": same_outputs(samples, first, second)
            for first, second in SAME
            if first in samples and second in samples
        },
    }
