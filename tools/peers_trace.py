"""Hundreds of adapters on requests with the lengths of a conversation trace.

All requests of a part are there at once, so that throughput is what is measured; base
rows, few and many registered adapters run the same prompts and lengths in turn.
"""

import dataclasses
import gc
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_workload import spread
from exp_policies import write_adapters
from exp_workload import Lengths, Shape, Trace, make_trace

from jchameleon import LLM, SamplingParams
from jchameleon.config import (
    ATTENTION_PROJECTIONS,
    RESERVED_PAGES,
    EngineConfig,
    ModelConfig,
)
from jchameleon.lora.layout import ChunkLayout
from jchameleon.models.loader import LoadedModel
from jchameleon.models.params import numpy_dtype
from jchameleon.runtime.sizing import page_elems

POPULARITY_EXPONENT = 1.0
"""The k-th adapter of a rank is asked for in proportion to k to the power of minus
this: a power law within a rank, ranks equally popular (Chameleon, section 5.1)."""

BLOCK_TOKENS = 16
"""Contexts are whole KV blocks."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TraceSettings:
    """The workload.

    Attributes:
      trace: CSV with columns ContextTokens and GeneratedTokens; None draws lengths from
        a law fitted to the published percentiles of such a trace.
      max_model_len: context that the trace's lengths are scaled to fit.
      few, many: registered adapters, multiples of the five ranks 8 to 128; `many` may
        be 0, and takes 11 MB of disk an adapter of the default model.
      few_share, many_share: of their adapters that the pool holds beside the KV blocks
        of `max_running` mean requests.
      repeats: parts that the requests are cut into; each is one paired measurement.
    """

    trace: str | None = None
    num_requests: int = 2_000
    max_model_len: int = 512
    few: int = 100
    few_share: float = 0.25
    many: int = 1_000
    many_share: float = 0.10
    max_running: int = 32
    max_batch_tokens: int = 512
    repeats: int = 3
    seed: int = 0
    dtype: str = "float32"
    adapter_dtype: str = "bfloat16"


class TraceWorkload:
    """The requests of both numbers of adapters, and the engines' options."""

    def __init__(self, settings: TraceSettings, model: ModelConfig):
        """Draw all requests.

        Raises:
          ValueError: there are fewer requests than parts.
        """
        if settings.num_requests < settings.repeats:
            raise ValueError(
                f"num_requests={settings.num_requests} must be at least "
                f"repeats={settings.repeats}"
            )
        self._settings = settings
        self._model = model
        self._path = None if settings.trace is None else Path(settings.trace)
        self.lengths = Lengths(self._path)
        self.scale = fitting_scale(self.lengths, settings.max_model_len)
        counts = [count for count in (settings.few, settings.many) if count]
        self._shapes = {count: self._shape(count) for count in counts}

    def adapters(self, count: int) -> dict[str, int]:
        """Return name -> rank of `count` adapters; those of fewer are among them."""
        return self._shapes[count].adapters()

    def requests(self, count: int, *, warm_up: bool = False) -> Trace:
        """Return the requests for `count` adapters: for any, with the same lengths."""
        shape, seed = self._shapes[count], self._settings.seed
        if warm_up:
            seed += 1_000_003
            shape = dataclasses.replace(shape, num_requests=self._settings.max_running)
        return make_trace(shape, self.lengths, seed)

    def options(self, count: int, share: float) -> dict[str, Any]:
        """Return the engine's options for `count` adapters, pool included."""
        settings = self._settings
        options: dict[str, Any] = {
            "dtype": settings.dtype,
            "lora_targets": ATTENTION_PROJECTIONS,
            "max_lora_rank": max(self._shapes[count].ranks),
            "max_model_len": settings.max_model_len,
            "max_running": settings.max_running,
            "max_batch_tokens": settings.max_batch_tokens,
            # Base rows and adapters run the same prompts, one after the other.
            "prefix_cache": False,
        }
        config = EngineConfig.from_dict(options)
        elems = page_elems(config, self._model)
        layout = ChunkLayout(self._model, ATTENTION_PROJECTIONS, elems)
        ranks = self.adapters(count)
        lengths = [r.prompt_tokens + r.output_tokens for r in self.requests(count)]
        mean_blocks = -(-sum(lengths) // len(lengths) // config.kv_block_tokens) + 1
        pages = round(share * sum(map(layout.num_pages, ranks.values())))
        pages += settings.max_running * mean_blocks
        longest = -(-settings.max_model_len // config.kv_block_tokens)
        pages = max(pages, longest + layout.num_pages(max(ranks.values())))
        page_bytes = elems * numpy_dtype(config.dtype).itemsize * self._model.num_layers
        return {**options, "pool_bytes": (pages + RESERVED_PAGES) * page_bytes}

    def _shape(self, count: int) -> Shape:
        return Shape(
            num_requests=self._settings.num_requests,
            scale=self.scale,
            max_model_len=self._settings.max_model_len,
            num_adapters=count,
            zipf=POPULARITY_EXPONENT,
        )


def fitting_scale(lengths: Lengths, max_model_len: int) -> float:
    """Return the scale at which 99 of 100 prompts, and all outputs, fit a context."""
    room = max_model_len - BLOCK_TOKENS
    if room < 2:
        raise ValueError(f"{max_model_len=} must be at least {BLOCK_TOKENS + 2}")
    return min(1.0, room / (lengths.p99_prompt + lengths.most_output))


def serve(llm: LLM, part: Trace, *, base: bool) -> dict[str, Any]:
    """Run requests that are all there at once; return what they took.

    Raises:
      RuntimeError: a request failed or ended early.
    """
    vocab_size = llm.model_config.vocab_size
    prompts = [request.prompt(vocab_size) for request in part]
    names = [None if base else request.adapter for request in part]
    sampling = [
        SamplingParams(max_tokens=r.output_tokens, temperature=0.0, ignore_eos=True)
        for r in part
    ]
    gc.collect()
    start_s = time.monotonic()
    outs = llm.generate(prompts, adapters=names, sampling=sampling)
    wall_s = time.monotonic() - start_s
    for out, request in zip(outs, part, strict=True):
        if len(out.token_ids) != request.output_tokens:
            raise RuntimeError(f"{request.request_id}: {out.finish_reason} {out.error}")
    return {
        "wall_s": wall_s,
        "requests": len(part),
        "prompt_tokens": sum(map(len, prompts)),
        "output_tokens": sum(len(out.token_ids) for out in outs),
        "misses": sum(out.timing.adapter_cache_hit is False for out in outs),
    }


def measure_trace(
    settings: TraceSettings, loaded: LoadedModel, folder: Path
) -> dict[str, Any]:
    """Run every part on base rows, few and many adapters in turn.

    Args:
      folder: takes the adapters.
    """
    workload = TraceWorkload(settings, loaded.config)
    most = max(settings.few, settings.many)
    paths = write_adapters(
        folder, loaded.config, workload.adapters(most), settings.adapter_dtype
    )
    shares = {settings.few: settings.few_share}
    if settings.many:
        shares[settings.many] = settings.many_share
    options = {n: workload.options(n, share) for n, share in shares.items()}
    runs: dict[str, list[dict[str, Any]]] = {}
    # Base rows run where the few adapters are registered: one engine, one pool.
    order = [("base", settings.few), ("few", settings.few)]
    order += [("many", settings.many)] if settings.many else []
    engines: dict[int, LLM] = {}
    try:
        for count in shares:
            used = {name: paths[name] for name in workload.adapters(count)}
            engines[count] = LLM(loaded, adapters=used, **options[count])
        for repeat in range(settings.repeats + 1):
            for key, count in order[:: -1 if repeat % 2 else 1]:
                part = workload.requests(count, warm_up=not repeat)
                if repeat:
                    part = part[repeat - 1 :: settings.repeats]
                sample = serve(engines[count], part, base=key == "base")
                if repeat:
                    runs.setdefault(key, []).append(sample)
            print(f"part {repeat} of {settings.repeats} done", file=sys.stderr)
    finally:
        for llm in engines.values():
            llm.close()
    labels = {
        "base": f"base rows, {settings.few} adapters registered",
        "few": f"{settings.few} adapters, pool for {settings.few_share:.0%}",
        "many": f"{settings.many:,} adapters, pool for {settings.many_share:.0%}",
    }
    return {
        "lengths": workload.lengths.source,
        "scale": workload.scale,
        "rows": [
            trace_row(key, labels[key], runs[key], options[count]["pool_bytes"])
            for key, count in order
        ],
        "ratios": {
            f"{key} / base": paired(runs[key], runs["base"])
            for key in runs
            if key != "base"
        },
    }


def trace_row(
    key: str, label: str, samples: Sequence[Mapping[str, Any]], pool_bytes: int
) -> dict[str, Any]:
    """Return one row: totals, and the spread over parts."""
    totals = {
        name: sum(sample[name] for sample in samples)
        for name in ("requests", "prompt_tokens", "output_tokens", "misses")
    }
    return {
        "key": key,
        "label": label,
        "pool_bytes": pool_bytes,
        **totals,
        "wall_s": [sample["wall_s"] for sample in samples],
        "out_tokens_per_s": spread([s["output_tokens"] / s["wall_s"] for s in samples]),
    }


def paired(
    above: Sequence[Mapping[str, Any]], below: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Return the spread of ratios of throughput, part by part."""
    return spread(
        [
            (a["output_tokens"] / a["wall_s"]) / (b["output_tokens"] / b["wall_s"])
            for a, b in zip(above, below, strict=True)
        ]
    )
