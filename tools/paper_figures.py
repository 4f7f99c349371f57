"""What a figure of the report is: which cells it needs, and what it makes of them."""

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from paper_cells import Cell, World, geometric
from paper_verdicts import judge

Report = Mapping[str, Any]
"""What `paper_cells.run_cell` returns."""

Take = Callable[[Report], float | None]
"""Takes one number out of a report."""

Changes = tuple[tuple[str, Any], ...]

VARIANTS = ("default", "m2", "m3w", "m4w")

RANKS = (8, 16, 32, 64, 128)

MAIN = ("s-lora", "chameleon-nocache", "chameleon-nosched", "chameleon")
"""Of figures 11 and 13: S-LoRA, NoCache, NoSched, Chameleon."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """How much of everything is run.

    Attributes:
      rates_rps: of the figures over load.
      scan_rps: rates at which the SLO may break, ascending; device_rps: on other GPUs.
      adapters: numbers of adapters of figure 20; mix_adapters: of "mix".
    """

    world: World
    seeds: int
    variants: tuple[str, ...] = VARIANTS
    rates_rps: tuple[float, ...] = (5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0)
    scan_rps: tuple[float, ...] = ()
    device_rps: tuple[float, ...] = ()
    adapters: tuple[int, ...] = (10, 50, 100, 150, 200)
    mix_adapters: tuple[int, ...] = (25, 50, 100, 200, 400, 800)

    def cells(
        self,
        policies: Iterable[str],
        rates: Iterable[float],
        changes: Iterable[Changes] = ((),),
        variants: Iterable[str] | None = None,
    ) -> list[Cell]:
        """Return one cell for every combination and seed."""
        chosen = self.variants if variants is None else variants
        return [
            Cell(variant=v, policy=p, rate_rps=float(r), changes=c, seed=s)
            for v, p, r, c, s in itertools.product(
                chosen, policies, rates, changes, range(self.seeds)
            )
        ]

    def scans(
        self,
        policies: Iterable[str],
        rates_rps: tuple[float, ...],
        changes: Iterable[Changes] = ((),),
        variants: Iterable[str] | None = None,
    ) -> list[Cell]:
        """Return one scan for the SLO for every combination and seed."""
        chosen = self.variants if variants is None else variants
        return [
            Cell(variant=v, policy=p, rates_rps=rates_rps, changes=c, seed=s)
            for v, p, c, s in itertools.product(
                chosen, policies, changes, range(self.seeds)
            )
        ]


def full(world: World) -> Scale:
    """Return what a whole run takes."""
    scan = tuple(4 + 0.25 * i for i in range(57))
    return Scale(
        world=world, seeds=10, scan_rps=scan, device_rps=geometric(2, 80, 1.04)
    )


def quick(world: World) -> Scale:
    """Return what `--quick` takes."""
    scan = tuple(4 + 0.5 * i for i in range(29))
    return Scale(world=world, seeds=3, scan_rps=scan, device_rps=geometric(2, 80, 1.12))


class Seen:
    """Results by what was asked."""

    def __init__(self, scale: Scale, results: Mapping[Cell, Report]) -> None:
        self.scale = scale
        self._results = results

    def reports(
        self, variant: str, policy: str, rate: float, changes: Changes = ()
    ) -> list[Report]:
        """Return the reports of all seeds, in their order."""
        cells = self.scale.cells([policy], [rate], [changes], [variant])
        return [self._results[cell] for cell in cells]

    def values(
        self,
        take: Take,
        variant: str,
        policy: str,
        rate: float,
        changes: Changes = (),
    ) -> list[float | None]:
        """Return one number of each seed."""
        return [take(one) for one in self.reports(variant, policy, rate, changes)]

    def mean(
        self,
        take: Take,
        variant: str,
        policy: str,
        rate: float,
        changes: Changes = (),
    ) -> float | None:
        """Return its mean over the seeds that have it."""
        return mean_of(self.values(take, variant, policy, rate, changes))

    def scans(
        self,
        variant: str,
        policy: str,
        rates_rps: tuple[float, ...],
        changes: Changes = (),
    ) -> list[Report]:
        """Return the scans of all seeds."""
        cells = self.scale.scans([policy], rates_rps, [changes], [variant])
        return [self._results[cell] for cell in cells]

    def loads(
        self,
        variant: str,
        policy: str,
        rates_rps: tuple[float, ...],
        changes: Changes = (),
    ) -> list[float | None]:
        """Return each seed's load at the SLO; None where the scan hit a limit."""
        found = self.scans(variant, policy, rates_rps, changes)
        return [
            None if one["scan"]["limit"] else one["scan"]["over_slo_rps"]
            for one in found
        ]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One figure of the paper, or one of ours.

    Attributes:
      number: the paper's, or a name.
      shows: what the paper plots, and what we chose where it says nothing.
      cells: that it needs.
      build: panels and checks of what was seen; see `panel` and `check`.
    """

    number: str
    title: str
    shows: str
    cells: Callable[[Scale], list[Cell]]
    build: Callable[[Seen], tuple[list[dict[str, Any]], list[dict[str, Any]]]]

    def result(self, seen: Seen) -> dict[str, Any]:
        """Return the figure's data."""
        panels, checks = self.build(seen)
        return {
            "figure": self.number,
            "title": self.title,
            "shows": self.shows,
            "panels": panels,
            "checks": checks,
        }


def panel(variant: str, settings: Mapping[str, Any], *charts: Any) -> dict[str, Any]:
    """Return the drawings of one cost model, with its settings."""
    return {"variant": variant, "settings": brief(settings), "charts": list(charts)}


def check(variant: str, claim: Any, values: Any, **options: Any) -> dict[str, Any]:
    """Return a judged claim under one cost model."""
    return {"variant": variant, **judge(claim, values, **options)}


def brief(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a ratio is to be read with, of a report's settings."""
    workload = settings["workload"]
    tokens = (settings["pool_pages"] - 2) * settings["block_tokens"]
    lengths = "trace" if settings["trace_requests"] else "synthetic (lognormal)"
    return {
        "profile": settings["profile"],
        "model": settings["model"],
        "cost": settings["cost_kind"],
        "stall": settings["link"]["stall"],
        "link_bytes_per_s": settings["link"]["bytes_per_s"],
        "pool_bytes": settings["pool_pages"] * settings["page_bytes"],
        "pool_tokens": tokens,
        "length_scale": workload["length_scale"],
        "lengths": lengths,
        "cache_at_start": settings["cache_at_start"],
        "adapters": settings["adapters"]["count"],
        "slo_s": settings["slo_s"],
        "duration_s": workload["duration_s"],
        "skip_s": settings["skip_s"],
    }


def mean_of(values: Sequence[float | None]) -> float | None:
    """Return the mean of those that are not None; None without any."""
    found = [value for value in values if value is not None]
    return statistics.fmean(found) if found else None


def ms(key: str, percent: int) -> Take:
    """Return what takes a percentile of "ttft", "tbt" or "e2e", in milliseconds."""

    def take(report: Report) -> float | None:
        value = report[f"{key}_s"][f"p{percent}"]
        return None if value is None else 1e3 * value

    return take


P50 = ms("ttft", 50)
P99 = ms("ttft", 99)
TBT = ms("tbt", 99)


def total(reports: Iterable[Report], *keys: str) -> int:
    """Return a counter, or one of the cache's, summed over reports."""
    summed = 0
    for report in reports:
        value: Any = report
        for key in keys:
            value = value[key]
        summed += value
    return summed


def without_evictions(reports: Sequence[Report]) -> str | None:
    """Return that nothing was evicted, if that is so."""
    return None if total(reports, "cache", "evictions") else "no eviction in any seed"


def same_times(ours: Sequence[Report], theirs: Sequence[Report]) -> str | None:
    """Return that two policies gave the same times in all seeds, if that is so."""
    keys = ("ttft_s", "tbt_s", "e2e_s")
    same = all(
        [a[key] for key in keys] == [b[key] for key in keys]
        for a, b in zip(ours, theirs, strict=True)
    )
    return "both policies gave the same times in every seed" if same else None


def over_load(
    seen: Seen,
    variant: str,
    title: str,
    take: Take,
    policies: Sequence[str],
    rates: Sequence[float],
    *,
    limit: bool = True,
) -> dict[str, Any]:
    """Return a chart of something in milliseconds over load."""
    chart: dict[str, Any] = {
        "kind": "log lines",
        "title": f"{title}, ms, {variant}",
        "across": "requests/s",
        "series": {
            policy: [[rate, seen.mean(take, variant, policy, rate)] for rate in rates]
            for policy in policies
        },
    }
    if limit:
        first = seen.reports(variant, policies[0], rates[0])[0]
        chart["limit"] = 1e3 * first["settings"]["slo_s"]
    return chart


def settings_of(seen: Seen, variant: str, policy: str, rate: float) -> Mapping:
    """Return the settings of a cell's first seed."""
    return seen.reports(variant, policy, rate)[0]["settings"]
