"""How near the simulator must come to the engine, and whether it does."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

BARS = {"throughput_rps": 0.05, "ttft_s_p50": 0.10, "ttft_s_p99": 0.15}
"""How far the twin may be off, as a share of the engine's figure, or as far as the
engine's own repeats are apart where that is more."""

HITS_BAR = 0.02
"""The same of the hit rate, in itself."""


def cells_of(
    runs: Sequence[Mapping[str, Any]],
) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """Return the runs of each preset and traffic."""
    cells: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in runs:
        cells.setdefault((run["preset"], run["traffic"]), []).append(run)
    return cells


def hit_rate(books: Mapping[str, int]) -> float:
    """Return the share of admissions that found their adapter; 0 without any."""
    return books["hits"] / max(1, books["hits"] + books["misses"])


def judge(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return how each cell stands to the bars; see `BARS`."""
    checks = []
    for (preset, traffic), found in cells_of(runs).items():
        figures = {
            name: [[run[who][name] for run in found] for who in ("engine", "twin")]
            for name in BARS
        }
        figures["hit_rate"] = [
            [hit_rate(run[who]) for run in found]
            for who in ("engine_books", "twin_books")
        ]
        for name, (engine, twin) in figures.items():
            middle = statistics.median(engine)
            # Hit rates are compared as they are, all else by its share.
            unit = 1.0 if name == "hit_rate" else middle
            off = abs(statistics.median(twin) - middle) / unit
            apart = (max(engine) - min(engine)) / unit
            bar = BARS.get(name, HITS_BAR)
            checks.append(
                {
                    "preset": preset,
                    "traffic": traffic,
                    "figure": name,
                    "off": off,
                    "bar": bar,
                    "engine_apart": apart,
                    "ok": off <= max(bar, apart) + 1e-9,  # 0.02 of 50 is 1
                }
            )
    return checks
