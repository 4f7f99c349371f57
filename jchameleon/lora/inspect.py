"""Describe an adapter in plain values, for people and for JSON."""

from typing import Any

from jchameleon.config import PROJECTIONS
from jchameleon.lora.adapter import HostAdapter


def describe_adapter(adapter: HostAdapter) -> dict[str, Any]:
    """Return what an adapter touches and how large it is; only JSON types.

    Keys: uid, source, rank (largest), ranks (sorted list per projection), targets (in
    the order of `PROJECTIONS`), layers (indices), num_modules, scales and dtypes
    (distinct, sorted), num_bytes.
    """
    ranks: dict[str, set[int]] = {}
    for (_, projection), pair in adapter.modules.items():
        ranks.setdefault(projection, set()).add(pair.rank)
    targets = [p for p in PROJECTIONS if p in adapter.targets]
    pairs = adapter.modules.values()
    return {
        "uid": adapter.uid,
        "source": adapter.source,
        "rank": adapter.rank,
        "ranks": {p: sorted(ranks[p]) for p in targets},
        "targets": targets,
        "layers": sorted({layer for layer, _ in adapter.modules}),
        "num_modules": len(adapter.modules),
        "scales": sorted({float(pair.scale) for pair in pairs}),
        "dtypes": sorted({x.dtype.name for pair in pairs for x in (pair.a, pair.b)}),
        "num_bytes": adapter.num_bytes,
    }
