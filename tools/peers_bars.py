"""The bars of bench_peers.py, and how figures are held to them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

PEFT_BAR, PEFT_STRETCH = 2.3, 3.0
"""Least output tokens/s of 16 adapters with mixed ranks, over PEFT's on the same batch;
and what is aimed at."""

VLLM_BAR = 1.2
"""Least output tokens/s of 16 adapters, over vLLM's of the base model alone: vLLM on a
CPU has no fast path for adapters, so its best is held against our usual."""

OWN_SHARE_BAR = 0.88
"""Least output tokens/s of 16 adapters as a share of base rows on the same engine;
published engines on GPUs keep 0.66 to 0.92."""

TRACE_BAR = 0.80
"""Least output tokens/s of 100 adapters on requests of a trace's lengths, as a share of
base rows on the same engine and requests, the pool holding a quarter of them."""

PREFILL_BAR, DECODE_BAR = 0.70, 0.60
"""Least shares of the machine's floor: of prompts of the base model alone, and of its
decode steps of 16 rows."""

START_BAR_S = 8.0
"""Most seconds of a `jchameleon generate` of one token with warm caches."""

MEMORY_BAR = 1.3
"""Most peak resident bytes of a process with one engine, over weights and pool."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """What a figure must reach.

    Attributes:
      limit: the least, or with `least` false the most, that it may be.
      stretch: what is aimed at; printed, never checked.
    """

    name: str
    limit: float
    least: bool = True
    stretch: float | None = None


PEFT_RATIO = "16 adapters, ours / PEFT"
VLLM_RATIO = "16 adapters, ours / vLLM base"
OWN_SHARE = "16 adapters / our base rows"
TRACE_SHARE = "trace, few adapters / base rows"
PREFILL_SHARE = "prefill, share of the floor"
DECODE_SHARE = "decode, share of the floor"
START_S = "warm start, s"
MEMORY_RATIO = "peak memory / (weights + pool)"

BARS = (
    Bar(name=PEFT_RATIO, limit=PEFT_BAR, stretch=PEFT_STRETCH),
    Bar(name=VLLM_RATIO, limit=VLLM_BAR),
    Bar(name=OWN_SHARE, limit=OWN_SHARE_BAR),
    Bar(name=TRACE_SHARE, limit=TRACE_BAR),
    Bar(name=PREFILL_SHARE, limit=PREFILL_BAR),
    Bar(name=DECODE_SHARE, limit=DECODE_BAR),
    Bar(name=START_S, limit=START_BAR_S, least=False),
    Bar(name=MEMORY_RATIO, limit=MEMORY_BAR, least=False),
)


def judge(figures: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """Return every bar with its figure and "ok", "MISSED" or "not run".

    Args:
      figures: by the name of the bar; None and what is absent was not measured.
    """
    rows = []
    for bar in BARS:
        figure = figures.get(bar.name)
        if figure is None:
            verdict = "not run"
        else:  # comparisons with NaN are false: what is no number has missed
            kept = figure >= bar.limit if bar.least else figure <= bar.limit
            verdict = "ok" if kept else "MISSED"
        rows.append({**dataclasses.asdict(bar), "figure": figure, "verdict": verdict})
    return rows
