"""Figures 4, 8 and 11 to 13: the link and latencies over load."""

from typing import Any

from paper_figures import (
    MAIN,
    P50,
    P99,
    TBT,
    Figure,
    Report,
    Scale,
    Seen,
    check,
    over_load,
    panel,
    settings_of,
    total,
)
from paper_records import MARKS
from paper_verdicts import Claim, changes_percent, ratios

Built = tuple[list[dict[str, Any]], list[dict[str, Any]]]

BANDWIDTH_RPS = (5.0, 6.0, 7.0, 8.0)
ONE_RANK = ("ranks", (32,))
COUNTS = (1, 50, 500)
MEDIUM_RPS, HIGH_RPS = 6.0, 9.0
"""Figure 8's loads; the paper gives no rates: ours."""

CHUNKS = (("max_batch_tokens", 288),)
"""Tokens of a step, decode included: the least that the profile's 256 rows allow."""
P99_PERCENT = {6.0: -14.7, 8.0: -24.6, 9.0: -80.7}
P50_PERCENT = {6.0: -13.9, 8.0: -20.9, 9.0: -48.1}


def _with(count: int, law: str) -> tuple[tuple[str, Any], ...]:
    return (ONE_RANK, ("adapters", count), ("popularity", law))


def _cells_4(scale: Scale) -> list:
    laws = [_with(count, "U-P") for count in COUNTS]
    alike = [_with(count, "U-U") for count in COUNTS]
    return scale.cells(["s-lora"], BANDWIDTH_RPS, laws) + scale.cells(
        ["s-lora"], [8.0], alike
    )


def _build_4(seen: Seen) -> Built:
    def gigabytes(report: Report) -> float:
        return 1e-9 * report["link_busy"] * report["settings"]["link"]["bytes_per_s"]

    panels, checks = [], []
    for variant in seen.scale.variants:
        series = {
            f"{count} adapters": [
                [rps, seen.mean(gigabytes, variant, "s-lora", rps, _with(count, "U-P"))]
                for rps in BANDWIDTH_RPS
            ]
            for count in COUNTS
        }
        chart = {
            "kind": "lines",
            "title": f"Link, mean GB/s, {variant}",
            "across": "requests/s",
            "up": "GB/s",
            "series": series,
        }
        first = seen.reports(variant, "s-lora", 8.0, _with(500, "U-P"))[0]
        panels.append(panel(variant, first["settings"], chart))
        for law in ("U-P", "U-U"):
            one = seen.values(P99, variant, "s-lora", 8.0, _with(1, law))
            for count, paper in ((50, 1.69), (500, 2.60)):
                many = seen.values(P99, variant, "s-lora", 8.0, _with(count, law))
                what = f"P99 TTFT at 8 RPS, {count} adapters ({law}) over one"
                claim = Claim(row="", what=what, paper=paper, unit="x")
                checks.append(check(variant, claim, ratios(many, one)))
    return panels, checks


def _cells_8(scale: Scale) -> list:
    rates = (MEDIUM_RPS, HIGH_RPS)
    return scale.cells(["s-lora", "sjf", "chameleon"], rates) + scale.cells(
        ["s-lora"], rates, [CHUNKS]
    )


def _build_8(seen: Seen) -> Built:
    kinds = {
        "FIFO": ("s-lora", ()),
        "FIFO, chunked": ("s-lora", CHUNKS),
        "SJF": ("sjf", ()),
        "Chameleon": ("chameleon", ()),
    }

    def at(mark: int):
        place = MARKS.index(mark)
        return lambda report: report["figures"]["slowdown"][place]

    panels, checks = [], []
    for variant in seen.scale.variants:
        charts = []
        for name, rps in (("medium", MEDIUM_RPS), ("high", HIGH_RPS)):
            series = {
                kind: [
                    [seen.mean(at(mark), variant, policy, rps, changes), mark]
                    for mark in MARKS[:-1]
                ]
                for kind, (policy, changes) in kinds.items()
            }
            charts.append(
                {
                    "kind": "lines",
                    "title": f"Slowdown, {name} load ({rps:g} RPS), {variant}",
                    "across": "times the isolated end-to-end time",
                    "up": "% of requests",
                    "series": series,
                }
            )
        settings = settings_of(seen, variant, "chameleon", HIGH_RPS)
        panels.append(panel(variant, settings, *charts))
        ours = seen.values(at(99), variant, "chameleon", HIGH_RPS)
        for kind in ("FIFO", "FIFO, chunked", "SJF"):
            policy, changes = kinds[kind]
            theirs = seen.values(at(99), variant, policy, HIGH_RPS, changes)
            what = f"P99 slowdown at high load against {kind}: lower (our reading)"
            claim = Claim(row="", what=what, paper=0.0, unit="%", kind="below")
            checks.append(check(variant, claim, changes_percent(ours, theirs)))
    return panels, checks


def _cells_11(scale: Scale) -> list:
    rates = sorted({*scale.rates_rps, *P99_PERCENT})
    return scale.cells(MAIN, rates) + scale.scans(MAIN, scale.scan_rps)


def _cuts(seen: Seen, variant: str, take: Any, name: str, papers: Any) -> list:
    found = []
    for rps, paper in papers.items():
        row = f"{name} TTFT against S-LoRA at 6 / 8 / 9 RPS"
        claim = Claim(row=row, what=f"{name} TTFT, {rps:g} RPS", paper=paper, unit="%")
        ours = seen.values(take, variant, "chameleon", rps)
        theirs = seen.values(take, variant, "s-lora", rps)
        found.append(check(variant, claim, changes_percent(ours, theirs)))
    return found


def _throughput(seen: Seen, variant: str) -> list:
    rates = seen.scale.scan_rps
    loads = {policy: seen.loads(variant, policy, rates) for policy in MAIN}
    row = "throughput at SLO"
    found = []
    for policy, paper in (("s-lora", 8.6), ("chameleon", 12.9)):
        claim = Claim(row=row, what=policy, paper=paper, unit="requests/s")
        found.append(check(variant, claim, loads[policy]))
    for policy, paper, name in (
        ("chameleon", 1.5, "Chameleon"),
        ("chameleon-nosched", 1.2, "cache only"),
        ("chameleon-nocache", 1.05, "scheduler only"),
    ):
        claim = Claim(row=row, what=f"{name} over S-LoRA", paper=paper, unit="x")
        found.append(check(variant, claim, ratios(loads[policy], loads["s-lora"])))
    return found


def _squashes(seen: Seen, variant: str) -> dict[str, Any]:
    reports = seen.reports(variant, "chameleon", 9.0)
    shares = [
        100 * (r["squashes"] - r["growth_squashes"]) / r["requests"]["arrived"]
        for r in reports
    ]
    claim = Claim(
        row="",
        what="requests squashed after a bypass, 9 RPS",
        paper=5.0,
        unit="%",
        kind="at most",
    )
    none = f"{total(reports, 'bypasses')} bypasses, 0 squashes after one"
    return check(variant, claim, shares, idle=None if any(shares) else none)


def _build_11(seen: Seen) -> Built:
    rates = sorted({*seen.scale.rates_rps, *P99_PERCENT})
    panels, checks = [], []
    for variant in seen.scale.variants:
        chart = over_load(seen, variant, "P99 TTFT", P99, MAIN, rates)
        panels.append(panel(variant, settings_of(seen, variant, MAIN[0], 6.0), chart))
        checks += _cuts(seen, variant, P99, "P99", P99_PERCENT)
        checks += _throughput(seen, variant)
        checks.append(_squashes(seen, variant))
    return panels, checks


def _cells_main(scale: Scale) -> list:
    return scale.cells(MAIN, sorted({*scale.rates_rps, *P50_PERCENT}))


def _build_13(seen: Seen) -> Built:
    rates = sorted({*seen.scale.rates_rps, *P50_PERCENT})
    panels, checks = [], []
    for variant in seen.scale.variants:
        chart = over_load(seen, variant, "P50 TTFT", P50, MAIN, rates)
        panels.append(panel(variant, settings_of(seen, variant, MAIN[0], 6.0), chart))
        checks += _cuts(seen, variant, P50, "P50", P50_PERCENT)
    return panels, checks


def _build_12(seen: Seen) -> Built:
    rates = sorted({*seen.scale.rates_rps, *P50_PERCENT})
    panels, checks = [], []
    for variant in seen.scale.variants:
        chart = over_load(seen, variant, "P99 TBT", TBT, MAIN, rates, limit=False)
        chart["series"]["150 ms"] = [[rates[0], 150.0], [rates[-1], 150.0]]
        panels.append(panel(variant, settings_of(seen, variant, MAIN[0], 6.0), chart))
        row = "P99 TBT"
        by_rate = {
            policy: [seen.values(TBT, variant, policy, rps) for rps in rates]
            for policy in ("s-lora", "chameleon")
        }
        kept = [i for i, rps in enumerate(rates) if rps <= 9]
        for policy, found in by_rate.items():
            what = f"{policy}, highest at 5 to 9 RPS"
            claim = Claim(row=row, what=what, paper=150.0, unit="ms", kind="at most")
            seeds = zip(*(found[i] for i in kept), strict=True)
            values = [max(v for v in seed if v is not None) for seed in seeds]
            checks.append(check(variant, claim, values))
        claim = Claim(
            row=row,
            what="Chameleon lower at every load: highest change against S-LoRA",
            paper=0.0,
            unit="%",
            kind="below",
        )
        changes = [
            changes_percent(ours, theirs)
            for ours, theirs in zip(
                by_rate["chameleon"], by_rate["s-lora"], strict=True
            )
        ]
        worst = [
            max(v for v in seed if v is not None) for seed in zip(*changes, strict=True)
        ]
        checks.append(check(variant, claim, worst))
    return panels, checks


FIGURES = (
    Figure(
        number="4",
        title="Link bandwidth, adapters of rank 32",
        shows="Preset s-lora, 1, 50 and 500 adapters of rank 32. Popularity within "
        "them is not given: U-P is a power law, U-U all alike.",
        cells=_cells_4,
        build=_build_4,
    ),
    Figure(
        number="8",
        title="Slowdown",
        shows="End-to-end time over that of the same request on an idle engine. Rates "
        "of medium and high load and the chunk are ours.",
        cells=_cells_8,
        build=_build_8,
    ),
    Figure(
        number="11",
        title="P99 TTFT over load",
        shows="NoCache is chameleon-nocache, NoSched chameleon-nosched. Loads at the "
        "SLO are upward scans: the lowest rate whose P99 TTFT exceeds it.",
        cells=_cells_11,
        build=_build_11,
    ),
    Figure(
        number="12",
        title="P99 TBT over load",
        shows="Time between tokens.",
        cells=_cells_main,
        build=_build_12,
    ),
    Figure(
        number="13",
        title="P50 TTFT over load",
        shows="As figure 11.",
        cells=_cells_main,
        build=_build_13,
    ),
)
