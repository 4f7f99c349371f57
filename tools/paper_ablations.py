"""Figures 17 to 22: eviction, prefetch, prediction, adapters, lengths and lanes."""

from collections.abc import Sequence
from typing import Any

from paper_figures import (
    P99,
    RANKS,
    Changes,
    Figure,
    Report,
    Scale,
    Seen,
    check,
    over_load,
    panel,
    same_times,
    settings_of,
    total,
    without_evictions,
)
from paper_verdicts import Claim, changes_percent

Built = tuple[list[dict[str, Any]], list[dict[str, Any]]]

HIGH_RPS = 9.5
"""Of figures 20 and 21; where others say "high load", that is ours."""

EVICTIONS = ("s-lora", "lru", "fairshare", "chameleon")

PREDICTORS = ("accuracy 60%", "accuracy 80%", "accuracy 100%", "exact lengths")
LAWS = ("U-U", "U-P", "P-P")
BOTH = ("s-lora", "chameleon")
LENGTHS = (1.0, 0.75, 0.5)
LANES_RPS = (8.0, 9.0, 9.5, 12.0)


def _by_rank(rank: int) -> Any:
    def take(report: Report) -> float | None:
        row = report["by_rank"].get(str(rank))
        return None if row is None else 1e3 * row["ttft_s"]["p99"]

    return take


def _rank_bars(seen: Seen, variant: str, policies: Sequence[str]) -> dict[str, Any]:
    return {
        "kind": "bars",
        "title": f"P99 TTFT by rank, 8 RPS, ms, {variant}",
        "up": "ms",
        "groups": [f"rank {rank}" for rank in RANKS],
        "series": {
            policy: [seen.mean(_by_rank(r), variant, policy, 8.0) for r in RANKS]
            for policy in policies
        },
    }


def _cells_17(scale: Scale) -> list:
    return scale.cells(EVICTIONS, [8.0]) + scale.cells(["gdsf", "chameleon"], [9.5])


def _build_17(seen: Seen) -> Built:
    panels, checks = [], []
    row = "eviction at 8 RPS against S-LoRA, P99 TTFT"
    for variant in seen.scale.variants:
        chart = _rank_bars(seen, variant, EVICTIONS)
        panels.append(panel(variant, settings_of(seen, variant, "lru", 8.0), chart))
        base = seen.values(P99, variant, "s-lora", 8.0)
        for policy, paper in (("lru", -18), ("fairshare", -22), ("chameleon", -26)):
            claim = Claim(row=row, what=f"{policy}, 8 RPS", paper=paper, unit="%")
            reports = seen.reports(variant, policy, 8.0)
            values = changes_percent(seen.values(P99, variant, policy, 8.0), base)
            idle = without_evictions(reports)
            checks.append(check(variant, claim, values, idle=idle))
        claim = Claim(
            row=row,
            what="gdsf against chameleon, 9.5 RPS: worse",
            paper=0.0,
            unit="%",
            kind="above",
        )
        gdsf, ours = (seen.reports(variant, p, 9.5) for p in ("gdsf", "chameleon"))
        values = changes_percent([P99(r) for r in gdsf], [P99(r) for r in ours])
        idle = without_evictions(gdsf)
        checks.append(check(variant, claim, values, idle=idle))
    return panels, checks


def _build_18(seen: Seen) -> Built:
    panels, checks = [], []
    for variant in seen.scale.variants:
        policies = ("s-lora", "chameleon", "histogram")
        chart = _rank_bars(seen, variant, policies)
        settings = settings_of(seen, variant, "histogram", 8.0)
        panels.append(panel(variant, settings, chart))
        ours = seen.reports(variant, "histogram", 8.0)
        theirs = seen.reports(variant, "chameleon", 8.0)
        claim = Claim(
            row="histogram prefetch on top",
            what="histogram against chameleon, P99 TTFT, 8 RPS",
            paper=-8.8,
            unit="%",
        )
        values = changes_percent([P99(r) for r in ours], [P99(r) for r in theirs])
        idle = None
        if not total(theirs, "cache", "misses"):
            idle = "no miss to prefetch for in any seed"
        idle = idle or same_times(ours, theirs)
        checks.append(check(variant, claim, values, idle=idle))
    return panels, checks


def _build_19(seen: Seen) -> Built:
    panels, checks = [], []
    rates = (8.0, HIGH_RPS)
    for variant in seen.scale.variants:
        chart = {
            "kind": "bars",
            "title": f"P99 TTFT by predictor, ms, {variant}",
            "up": "ms",
            "groups": [f"{rps:g} RPS" for rps in rates],
            "series": {
                policy: [seen.mean(P99, variant, policy, rps) for rps in rates]
                for policy in PREDICTORS
            },
        }
        settings = settings_of(seen, variant, PREDICTORS[0], HIGH_RPS)
        panels.append(panel(variant, settings, chart))
        for policy in ("accuracy 80%", "accuracy 60%"):
            row = "predictor accuracy 80 % against 100 %"
            claim = Claim(
                row=row if policy == "accuracy 80%" else "",
                what=f"{policy} against 100%, P99 TTFT, {HIGH_RPS:g} RPS",
                paper=0.0,
                unit="%",
            )
            pair = [
                seen.reports(variant, name, HIGH_RPS)
                for name in (policy, "accuracy 100%")
            ]
            values = changes_percent(*([P99(r) for r in reports] for reports in pair))
            idle = same_times(*pair)
            checks.append(check(variant, claim, values, idle=idle))
    return panels, checks


def _adapters(count: int, law: str) -> Changes:
    return (("adapters", count), ("popularity", law))


def _cells_20(scale: Scale) -> list:
    changes = [_adapters(count, law) for law in LAWS for count in scale.adapters]
    return scale.cells(BOTH, [HIGH_RPS], changes)


def _most_adapters(seen: Seen, variant: str, policy: str, law: str) -> list[float]:
    """Return for each seed the most adapters, counting up, that keep the SLO; or 0."""
    most = [0.0] * seen.scale.seeds
    broken = [False] * seen.scale.seeds
    for count in seen.scale.adapters:
        reports = seen.reports(variant, policy, HIGH_RPS, _adapters(count, law))
        for seed, report in enumerate(reports):
            p99_s = report["ttft_s"]["p99"]
            if p99_s is None or p99_s > report["settings"]["slo_s"]:
                broken[seed] = True
            if not broken[seed]:
                most[seed] = float(count)
    return most


def _build_20(seen: Seen) -> Built:
    panels, checks = [], []
    counts = seen.scale.adapters
    for variant in seen.scale.variants:
        series = {
            f"{policy} {law}": [
                [n, seen.mean(P99, variant, policy, HIGH_RPS, _adapters(n, law))]
                for n in counts
            ]
            for policy in BOTH
            for law in LAWS
        }
        first = seen.reports(variant, BOTH[0], HIGH_RPS, _adapters(counts[-1], "U-P"))
        settings = first[0]["settings"]
        chart = {
            "kind": "log lines",
            "title": f"P99 TTFT, {HIGH_RPS} RPS, ms, {variant}",
            "across": "adapters",
            "series": series,
            "limit": 1e3 * settings["slo_s"],
        }
        panels.append(panel(variant, settings, chart))
        for policy, law, paper in (
            ("chameleon", "U-P", 100.0),
            ("chameleon", "P-P", 150.0),
            ("s-lora", "U-P", 10.0),
        ):
            what = f"{policy}, {law}, of at most {counts[-1]}"
            row = f"adapters within SLO at {HIGH_RPS} RPS"
            claim = Claim(row=row, what=what, paper=paper, unit="adapters")
            values = _most_adapters(seen, variant, policy, law)
            checks.append(check(variant, claim, values))
    return panels, checks


def _scaled(factor: float) -> Changes:
    return () if factor == 1 else (("length_scale", factor),)


def _build_21(seen: Seen) -> Built:
    panels = []
    for variant in seen.scale.variants:
        chart = {
            "kind": "bars",
            "title": f"P99 TTFT, {HIGH_RPS} RPS, ms, {variant}",
            "up": "ms",
            "groups": [f"lengths x {factor:g}" for factor in LENGTHS],
            "series": {
                policy: [
                    seen.mean(P99, variant, policy, HIGH_RPS, _scaled(f))
                    for f in LENGTHS
                ]
                for policy in BOTH
            },
        }
        settings = settings_of(seen, variant, "chameleon", HIGH_RPS)
        panels.append(panel(variant, settings, chart))
    return panels, []


def _build_22(seen: Seen) -> Built:
    panels, checks = [], []
    policies = ("static lanes", "chameleon")
    for variant in seen.scale.variants:
        chart = over_load(seen, variant, "P99 TTFT", P99, policies, LANES_RPS)
        settings = settings_of(seen, variant, "static lanes", HIGH_RPS)
        panels.append(panel(variant, settings, chart))
        for rps in (HIGH_RPS, 12.0):
            claim = Claim(
                row="dynamic against 4 static equal lanes, high load",
                what=f"P99 TTFT, {rps:g} RPS",
                paper=-10.0,
                unit="%",
            )
            ours = seen.reports(variant, "chameleon", rps)
            theirs = seen.reports(variant, "static lanes", rps)
            idle = None
            if max(report["lanes"] for report in ours) < 2:
                idle = "one lane in every seed"
            idle = idle or same_times(ours, theirs)
            values = changes_percent([P99(r) for r in ours], [P99(r) for r in theirs])
            checks.append(check(variant, claim, values, idle=idle))
    return panels, checks


FIGURES = (
    Figure(
        number="17",
        title="Eviction policies by rank",
        shows="lru, fairshare and gdsf are Chameleon's scheduler with that eviction.",
        cells=_cells_17,
        build=_build_17,
    ),
    Figure(
        number="18",
        title="Histogram prefetch",
        shows="As figure 17, and adapters loaded when they are due.",
        cells=lambda scale: scale.cells(["s-lora", "chameleon", "histogram"], [8.0]),
        build=_build_18,
    ),
    Figure(
        number="19",
        title="Predictor accuracy",
        shows="Share of output-length classes that are right; a prediction is the "
        "middle of its class, so 100 % is not exact. Sizes by predicted output alone "
        "are not shown: the scheduler has no such option.",
        cells=lambda scale: scale.cells(PREDICTORS, [8.0, HIGH_RPS]),
        build=_build_19,
    ),
    Figure(
        number="20",
        title="Adapters and popularity",
        shows="Popularity of ranks, and of adapters within a rank: uniform (U) or by a "
        "power law (P), exponent 1, the smallest rank most popular (ours).",
        cells=_cells_20,
        build=_build_20,
    ),
    Figure(
        number="21",
        title="Shorter requests",
        shows="The paper has two other traces; here all lengths are scaled down "
        "further. The text gives no number.",
        cells=lambda scale: scale.cells(
            BOTH, [HIGH_RPS], [_scaled(factor) for factor in LENGTHS]
        ),
        build=_build_21,
    ),
    Figure(
        number="22",
        title="Dynamic against static lanes",
        shows="K-means lanes against four equal intervals of sizes. Which load is high "
        "is not given: 9.5 and 12 RPS (ours).",
        cells=lambda scale: scale.cells(["static lanes", "chameleon"], LANES_RPS),
        build=_build_22,
    ),
)
