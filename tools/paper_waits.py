"""Figures 6 and 14 to 16: memory, and what requests wait for, in one load each."""

from typing import Any

from paper_cells import weight_bytes
from paper_figures import (
    Figure,
    Seen,
    check,
    mean_of,
    panel,
    settings_of,
    without_evictions,
)
from paper_records import CLASSES, MARKS
from paper_verdicts import Claim, ratios

from jchameleon.config import ModelConfig

Built = tuple[list[dict[str, Any]], list[dict[str, Any]]]

SCHEDULERS = ("s-lora", "sjf", "chameleon-nocache", "chameleon")
"""Of figures 15 and 16: FIFO, SJF, scheduler only, both."""


def _build_6(seen: Seen) -> Built:
    panels, checks = [], []
    for variant in seen.scale.variants:
        reports = seen.reports(variant, "chameleon", 8.0)
        settings = reports[0]["settings"]
        pool = 1e-9 * settings["pool_pages"] * settings["page_bytes"]
        base = 1e-9 * weight_bytes(ModelConfig.preset(settings["model"]))
        series: dict[str, list] = {
            name: [] for name in ("base", "+ KV", "+ adapters", "base and pool")
        }
        for at_s, kv, adapters in reports[0]["figures"]["memory"]["timeline"]:
            tops = (0.0, kv, kv + adapters, 1.0)
            for points, share in zip(series.values(), tops, strict=True):
                points.append([at_s, base + pool * share])
        chart = {
            "kind": "lines",
            "title": f"Memory at 8 RPS, seed 0, GB, {variant}",
            "across": "seconds",
            "up": "GB",
            "series": series,
        }
        panels.append(panel(variant, settings, chart))
        memory = [report["figures"]["memory"] for report in reports]
        half = Claim(
            row="",
            what="most of the time much is idle: median idle share less 50 (our cut)",
            paper=0.0,
            unit="%",
            kind="above",
        )
        median = [100 * one["idle_median"] - 50 for one in memory]
        checks.append(check(variant, half, median))
        burst = Claim(
            row="",
            what="idle memory vanishes in bursts: least idle share (our cut)",
            paper=5.0,
            unit="%",
            kind="at most",
        )
        checks.append(
            check(variant, burst, [100 * one["idle_least"] for one in memory])
        )
    return panels, checks


def _build_14(seen: Seen) -> Built:
    panels, checks = [], []
    for variant in seen.scale.variants:
        series = {}
        for policy in ("s-lora", "chameleon"):
            for name, key in (("link", "link_wait_s"), ("engine", "load_wait_s")):
                series[f"{policy}, {name}"] = [
                    [
                        seen.mean(
                            lambda r, k=key, i=i: 1e3 * r["figures"][k][i],
                            variant,
                            policy,
                            8.0,
                        ),
                        mark,
                    ]
                    for i, mark in enumerate(MARKS[:-1])
                ]
        chart = {
            "kind": "lines",
            "title": f"Wait for the adapter after admission, 8 RPS, {variant}",
            "across": "ms",
            "up": "% of requests",
            "series": series,
        }
        reports = seen.reports(variant, "chameleon", 8.0)
        panels.append(panel(variant, reports[0]["settings"], chart))
        row = "cache hits on the critical path"
        idle = without_evictions(reports)
        claim = Claim(row=row, what="hits at 8 RPS", paper=75.0, unit="%")
        hits = [100 * report["cache"]["hit_rate"] for report in reports]
        checks.append(check(variant, claim, hits, idle=idle))
        for policy, paper in (("chameleon", 6.0), ("s-lora", 30.0)):
            what = f"longest wait for the link, {policy}, 8 RPS"
            claim = Claim(row=row, what=what, paper=paper, unit="ms", kind="at most")
            found = [
                None if longest is None else 1e3 * longest
                for report in seen.reports(variant, policy, 8.0)
                for longest in [report["figures"]["miss_wait_max_s"]]
            ]
            missing = None if None not in found else "a seed without a miss"
            checks.append(check(variant, claim, found, idle=missing))
    return panels, checks


def _build_15(seen: Seen) -> Built:
    panels = []
    for variant in seen.scale.variants:
        series = {}
        for policy in SCHEDULERS:
            parts: dict[float, list[float | None]] = {}
            for report in seen.reports(variant, policy, 9.0):
                for at_s, p99_s in report["figures"]["windows"]:
                    parts.setdefault(at_s, []).append(1e3 * p99_s)
            series[policy] = [[at_s, mean_of(parts[at_s])] for at_s in sorted(parts)]
        chart = {
            "kind": "lines",
            "title": f"P99 TTFT by time of arrival, 9 RPS, {variant}",
            "across": "seconds",
            "up": "ms",
            "series": series,
        }
        settings = settings_of(seen, variant, "chameleon", 9.0)
        panels.append(panel(variant, settings, chart))
    return panels, []


def _build_16(seen: Seen) -> Built:
    def share(name: str):
        return lambda r: (
            100
            * r["figures"]["classes"][name]["queue_s"]
            / r["figures"]["classes"][name]["e2e_s"]
        )

    panels, checks = [], []
    for variant in seen.scale.variants:
        chart = {
            "kind": "bars",
            "title": f"Queueing, % of end-to-end time, 9 RPS, {variant}",
            "up": "%",
            "groups": list(CLASSES),
            "series": {
                policy: [seen.mean(share(n), variant, policy, 9.0) for n in CLASSES]
                for policy in SCHEDULERS
            },
        }
        settings = settings_of(seen, variant, "chameleon", 9.0)
        panels.append(panel(variant, settings, chart))
        row = "queueing delay, share of E2E"
        for name in CLASSES:
            what = f"Chameleon, {name}, 9 RPS"
            claim = Claim(row=row, what=what, paper=8.0, unit="%", kind="at most")
            values = seen.values(share(name), variant, "chameleon", 9.0)
            checks.append(check(variant, claim, values))
        claim = Claim(row=row, what="FIFO, small, 9 RPS", paper=28.6, unit="%")
        values = seen.values(share("small"), variant, "s-lora", 9.0)
        checks.append(check(variant, claim, values))
        what = "SJF starves: mean wait of large over small, 9 RPS"
        claim = Claim(row="", what=what, paper=5.15 / 1.5, unit="x")
        waits = [
            [r["figures"]["classes"][name]["queue_s"] for r in reports]
            for reports in [seen.reports(variant, "sjf", 9.0)]
            for name in ("large", "small")
        ]
        checks.append(check(variant, claim, ratios(*waits)))
    return panels, checks


FIGURES = (
    Figure(
        number="6",
        title="Memory over time",
        shows="Base, KV, adapters and what is idle, preset chameleon at 8 RPS.",
        cells=lambda scale: scale.cells(["chameleon"], [8.0]),
        build=_build_6,
    ),
    Figure(
        number="14",
        title="Load latency on the critical path",
        shows="From admission until the adapter is there, 0 for a hit: until the link "
        "has carried it, and until the engine, between two steps, takes it in. At 8 "
        "RPS (ours).",
        cells=lambda scale: scale.cells(["s-lora", "chameleon"], [8.0]),
        build=_build_14,
    ),
    Figure(
        number="15",
        title="P99 TTFT over time",
        shows="FIFO is s-lora, scheduler only chameleon-nocache. Of equal parts of the "
        "time of arrivals, mean over seeds. The text gives no number.",
        cells=lambda scale: scale.cells(SCHEDULERS, [9.0]),
        build=_build_15,
    ),
    Figure(
        number="16",
        title="Queueing delay by size",
        shows="Small, medium and large are thirds by isolated time (ours).",
        cells=lambda scale: scale.cells(SCHEDULERS, [9.0]),
        build=_build_16,
    ),
)
