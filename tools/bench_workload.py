"""The offline workload: who asks for what, what a run yields, and its floor."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jchameleon.config import ATTENTION_PROJECTIONS, PROJECTIONS, ModelConfig
from jchameleon.models.params import numpy_dtype


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """One run of the bench.

    Attributes:
      ranks: of the adapters, in turn.
      threads: cores that everything here is held to.
      peers: whether transformers + PEFT run beside us.
      engine: further fields of `EngineConfig`; its defaults otherwise.
      running, queued: requests of the engine's part, at once and behind them.
      gemm_width, read_bytes: of the calibration loop.
    """

    model: str = "smollm2-135m"
    dtype: str = "float32"
    num_requests: int = 16
    prompt_tokens: int = 128
    output_tokens: int = 32
    ranks: tuple[int, ...] = (8, 16, 32, 64)
    targets: tuple[str, ...] = ATTENTION_PROJECTIONS
    repeats: int = 3
    seed: int = 0
    threads: int = 2
    peers: bool = True
    engine: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    running: int = 64
    queued: int = 1_000
    gemm_width: int = 2048
    read_bytes: int = 512 << 20


QUICK: dict[str, Any] = {
    "model": "tiny",
    "prompt_tokens": 16,
    "output_tokens": 8,
    "engine": {"max_model_len": 64, "max_running": 16, "pool_bytes": 64 << 20},
    "repeats": 1,
    "running": 8,
    "queued": 40,
    "gemm_width": 256,
    "read_bytes": 8 << 20,
}
"""Settings with which every code path takes seconds; its figures mean nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One row of the table.

    Attributes:
      system: "plain" (our engine without LoRA), "ours" (our engine with all adapters
        registered) or "peers".
      adapters: name -> rank; requests take them in turn. None are the base model.
      cold: adapters are new to the device each time; else they are resident.
      output_tokens: fewer than the workload has, if given.
    """

    key: str
    label: str
    system: str
    adapters: Mapping[str, int]
    cold: bool = False
    output_tokens: int | None = None

    def names(self, num_requests: int) -> list[str | None]:
        """Return the adapter of each request."""
        names: list[str | None] = [*self.adapters] or [None]
        return [names[i % len(names)] for i in range(num_requests)]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One timed run of a case.

    Attributes:
      ttft_s: per request.
      decode_step_s: of the steps that ran no prompts, those with the most rows.
      prefill_s: of all steps that ran prompts.
      misses: requests that had to wait for their adapter.
      tokens: output of each request.
    """

    wall_s: float
    ttft_s: list[float]
    decode_step_s: list[float]
    prefill_s: float
    misses: int
    tokens: list[tuple[int, ...]]

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of all requests over the time until the last has ended."""
        return sum(map(len, self.tokens)) / self.wall_s


Samples = Mapping[str, Sequence[Sample]]
"""The timed runs of each case by its key, one per repeat."""


def make_cases(settings: Settings) -> list[Case]:
    """Return the rows of the table, in the order in which they are printed."""
    count, ranks = settings.num_requests, settings.ranks
    mixed = {f"mixed{i}": ranks[i % len(ranks)] for i in range(count)}
    few = dict(list(mixed.items())[: len(ranks)])
    low, high = min(ranks), max(ranks)
    lows = {f"low{i}": low for i in range(count)}
    highs = {f"high{i}": high for i in range(count)}
    rows: list[tuple[str, str, str, Mapping[str, int]]] = [
        ("plain", "base, LoRA disabled", "plain", {}),
        ("base", "base rows, adapters registered", "ours", {}),
        ("few", f"{len(few)} adapters", "ours", few),
        ("mixed", f"{count} adapters, ranks mixed", "ours", mixed),
        ("low", f"{count} adapters, all rank {low}", "ours", lows),
        ("high", f"{count} adapters, all rank {high}", "ours", highs),
        ("cold", f"{count} adapters, loads included", "ours", mixed),
    ]
    if settings.peers:
        rows += [
            ("peer_base", "transformers, base", "peers", {}),
            ("peer_few", f"PEFT, {len(few)} adapters", "peers", few),
            ("peer_mixed", f"PEFT, {count} adapters, ranks mixed", "peers", mixed),
        ]
    return [
        Case(key=key, label=label, system=system, adapters=names, cold=key == "cold")
        for key, label, system, names in rows
    ]


RATIOS = (
    ("ours / transformers, base", "base", "peer_base"),
    ("ours / PEFT, few adapters", "few", "peer_few"),
    ("ours / PEFT, ranks mixed", "mixed", "peer_mixed"),
    ("ranks mixed / base rows", "mixed", "base"),
    ("PEFT ranks mixed / transformers base", "peer_mixed", "peer_base"),
    ("lowest rank / base rows", "low", "base"),
    ("highest rank / base rows", "high", "base"),
    ("lowest rank / highest rank", "low", "high"),
    ("base rows / LoRA disabled", "base", "plain"),
    ("loads included / resident", "cold", "mixed"),
)
"""Name, numerator and denominator; of output tokens per second."""

BARS = {
    "ours / PEFT, ranks mixed": 1.8,
    "ranks mixed / base rows": 0.80,
    "base rows / LoRA disabled": 0.98,
    "lowest rank / highest rank": 1.0,
}
"""Least medians of ratios that a quiet machine must show for the default workload."""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, min and max; NaN where there are no values."""
    if not values:
        return dict.fromkeys(("median", "min", "max"), math.nan)
    median = statistics.median(values)
    return {"median": median, "min": min(values), "max": max(values)}


def paired_ratios(
    samples: Samples, ratios: Sequence[tuple[str, str, str]] = RATIOS
) -> dict[str, dict[str, float]]:
    """Return the spread of each ratio whose rows ran, pairing runs by repeat."""
    return {
        name: spread(
            [
                a.tokens_per_s / b.tokens_per_s
                for a, b in zip(samples[above], samples[below], strict=True)
            ]
        )
        for name, above, below in ratios
        if above in samples and below in samples
    }


def same_outputs(samples: Samples, first: str, second: str) -> float:
    """Return the share of requests whose tokens are all the same in two cases."""
    same = [
        x == y
        for a, b in zip(samples[first], samples[second], strict=True)
        for x, y in zip(a.tokens, b.tokens, strict=True)
    ]
    return sum(same) / len(same)


def floor(
    model: ModelConfig,
    settings: Settings,
    case: Case,
    *,
    gemm_gflops: float,
    read_gbps: float,
) -> dict[str, float]:
    """Return the seconds that a case takes at full arithmetic or memory speed.

    Prompts cost their multiplications; a decode step costs its multiplications or one
    read of weights, adapters and half-grown KV, whichever takes longer. Loads of
    adapters are not in it.
    """
    rows, prompt = settings.num_requests, settings.prompt_tokens
    shapes = {p: model.projection_shape(p) for p in PROJECTIONS}
    layers = model.num_layers * sum(d_in * d_out for d_in, d_out in shapes.values())
    head = model.vocab_size * model.hidden_size
    per_rank = model.num_layers * sum(sum(shapes[t]) for t in settings.targets)
    names = case.names(rows)
    row_ranks = sum(case.adapters[name] for name in names if name is not None)
    # Scores and weighted values: multiply-adds per token and token of its context.
    attention = 2 * model.num_layers * model.q_dim
    kv = 2 * model.num_layers * model.kv_dim
    context = prompt + settings.output_tokens // 2

    prefill_macs = rows * (prompt * layers + head) + prompt * per_rank * row_ranks
    prefill_macs += rows * attention * prompt * (prompt + 1) // 2  # causal
    step_macs = rows * (layers + head + attention * context) + per_rank * row_ranks
    step_elems = layers + head + rows * kv * context
    step_elems += per_rank * sum(case.adapters.values())
    step_bytes = step_elems * numpy_dtype(settings.dtype).itemsize

    prefill_s = 2 * prefill_macs / (gemm_gflops * 1e9)
    step_s = max(2 * step_macs / (gemm_gflops * 1e9), step_bytes / (read_gbps * 1e9))
    return {
        "prefill_s": prefill_s,
        "decode_step_s": step_s,
        "total_s": prefill_s + (settings.output_tokens - 1) * step_s,
    }


def random_prompts(settings: Settings, vocab_size: int, seed: int) -> list[list[int]]:
    """Return `num_requests` lists of `prompt_tokens` token ids."""
    shape = (settings.num_requests, settings.prompt_tokens)
    return np.random.default_rng(seed).integers(0, vocab_size, shape).tolist()
