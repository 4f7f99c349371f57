"""A figure of our own: the cache against ranks and the number of adapters."""

import itertools
from typing import Any

from paper_cells import Cell
from paper_figures import (
    P50,
    P99,
    RANKS,
    Changes,
    Figure,
    Report,
    Scale,
    Seen,
    panel,
)

RATE_RPS = 8.0
POLICIES = ("s-lora", "chameleon", "adaptive")
MIXES = {"rank 8": (8,), "ranks 8-128": RANKS, "rank 128": (128,)}


def _changes(ranks: tuple[int, ...], adapters: int) -> Changes:
    return (("ranks", ranks), ("adapters", adapters))


def _cells(scale: Scale) -> list[Cell]:
    changes = [
        _changes(ranks, count)
        for ranks, count in itertools.product(MIXES.values(), scale.mix_adapters)
    ]
    return scale.cells(POLICIES, [RATE_RPS], changes)


def _hits(report: Report) -> float:
    return 100.0 * report["cache"]["hit_rate"]


def _build(seen: Seen) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    counts = seen.scale.mix_adapters
    panels = []
    for variant in seen.scale.variants:
        charts = []
        for what, up, take in (
            ("Adapter cache hits", "%", _hits),
            ("P50 TTFT", "ms", P50),
            ("P99 TTFT", "ms", P99),
        ):
            series = {
                f"{policy}, {name}": [
                    [
                        count,
                        seen.mean(
                            take, variant, policy, RATE_RPS, _changes(ranks, count)
                        ),
                    ]
                    for count in counts
                ]
                for name, ranks in MIXES.items()
                for policy in POLICIES
            }
            charts.append(
                {
                    "kind": "lines" if up == "%" else "log lines",
                    "title": f"{what}, {up}, {RATE_RPS:g} RPS, {variant}",
                    "across": "adapters",
                    "up": up,
                    "series": series,
                }
            )
        first = seen.reports(
            variant, POLICIES[0], RATE_RPS, _changes(RANKS, counts[0])
        )[0]
        panels.append(panel(variant, first["settings"], *charts))
    return panels, []


FIGURES = (
    Figure(
        number="mix",
        title="Hits and TTFT against ranks and the number of adapters",
        shows="Not in the paper. All adapters of rank 8, all of rank 128, or equally "
        f"many of each rank, at {RATE_RPS:g} RPS; popularity as in the profile. The "
        "settings below are those of the fewest adapters.",
        cells=_cells,
        build=_build,
    ),
)
