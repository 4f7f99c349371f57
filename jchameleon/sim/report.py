"""What a run came to, in plain values."""

import dataclasses
from typing import Any

import numpy as np

from jchameleon import __version__
from jchameleon.config import EngineConfig
from jchameleon.runtime.policy.presets import load_policy
from jchameleon.sim.load import Load
from jchameleon.sim.profile import Profile
from jchameleon.sim.samples import Samples, percentile
from jchameleon.sim.simulator import SimResult

PERCENTS = (50, 90, 99)


def build_report(
    profile: Profile, engine: EngineConfig, load: Load, result: SimResult
) -> dict[str, Any]:
    """Return a report; every ratio of two is worth what their settings have in common.

    Times are those of requests that count; counters are of all. A request that was
    turned away misses the SLO. `not_exercised` names mechanisms that did nothing, of
    which the report says nothing either.
    """
    samples, books = result.samples, result.books
    counted = samples.ended + samples.failed
    span_s = samples.last_s - result.start_s - profile.skip_s
    ttft_s = samples.ttft_s
    admitted = books.hits + books.misses
    totals = {
        "evictions": books.evictions,
        "bypasses": books.bypasses,
        "squashes": books.squashes,
    }
    return {
        "requests": {
            "arrived": result.arrived,
            "finished": result.finished,
            "failed": result.failed,
            "counted": counted,
        },
        "ttft_s": _summary(ttft_s),
        "tbt_s": _summary(*samples.gaps),
        "e2e_s": _summary(samples.e2e_s),
        "throughput_rps": samples.ended / span_s if span_s > 0 else None,
        "slo_attainment": (
            int((ttft_s <= profile.slo_s).sum()) / counted if counted else None
        ),
        "cache": {
            "hits": books.hits,
            "misses": books.misses,
            "evictions": books.evictions,
            "loads": books.loads,
            "hit_rate": books.hits / admitted if admitted else None,
        },
        "bypasses": books.bypasses,
        "squashes": books.squashes,
        "growth_squashes": books.growth_squashes,
        "link_busy": result.link_busy_s / (result.end_s - result.start_s),
        "steps": result.steps,
        "simulated_s": result.end_s - result.start_s,
        "not_exercised": [name for name, count in totals.items() if not count],
        "by_rank": _by_rank(samples),
        "settings": settings(profile, engine, load),
    }


def settings(profile: Profile, engine: EngineConfig, load: Load) -> dict[str, Any]:
    """Return all that a report depends on, in plain values."""
    policy = load_policy(engine.policy)
    return {
        "version": __version__,
        "profile": profile.name,
        "model": profile.model.name,
        "policy": policy.to_dict(),
        "cost_kind": profile.cost_kind,
        "cost": dataclasses.asdict(profile.cost),
        "link": dataclasses.asdict(profile.link),
        "pool_pages": profile.num_pages,
        "page_bytes": profile.page_bytes,
        "block_tokens": engine.kv_block_tokens,
        "max_running": engine.max_running,
        "max_batch_tokens": engine.max_batch_tokens,
        "max_loads_in_flight": engine.max_loads_in_flight,
        "adapters": dataclasses.asdict(profile.adapters),
        "workload": dataclasses.asdict(profile.workload),
        "trace_requests": None if load.trace is None else len(load.trace.lengths),
        "max_tokens": profile.max_tokens,
        "slo_s": profile.slo_s,
        "skip_s": profile.skip_s,
        "cache_at_start": "warm" if profile.warm_cache else "cold",
    }


def _summary(
    values: np.ndarray,  # f64[n]
    counts: np.ndarray | None = None,  # i32[n]
) -> dict[str, float | None]:
    return {f"p{percent}": percentile(values, percent, counts) for percent in PERCENTS}


def _by_rank(samples: Samples) -> dict[str, dict[str, Any]]:
    """Return TTFTs of each rank, base model 0."""
    ttft_s, ranks = samples.ttft_s, samples.ranks
    table = {}
    for rank in np.unique(ranks).tolist():
        own_s = ttft_s[ranks == rank]
        table[str(rank)] = {"requests": len(own_s), "ttft_s": _summary(own_s)}
    return table
