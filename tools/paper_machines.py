"""Figures 23 to 25: other GPUs and models."""

from typing import Any

from paper_cells import Cell
from paper_figures import (
    Changes,
    Figure,
    Scale,
    Seen,
    check,
    mean_of,
    panel,
)
from paper_verdicts import NOT_EXERCISED, Claim, judge, ratios

Built = tuple[list[dict[str, Any]], list[dict[str, Any]]]

MODELS = {
    "7B": ("llama-7b", 500, 1.86),
    "13B": ("llama-13b", 100, 1.41),
    "30B": ("llama-30b", 10, 1.67),
}
MEMORIES = {"24 GB": (24e9, 1.4), "48 GB": (48e9, 1.6), "80 GB": (80e9, 1.9)}
MEMORY_ADAPTERS = 100
PAIR = ("s-lora", "chameleon")


def _device(model: str, memory_bytes: float, adapters: int) -> Changes:
    return (("device", ("a100", model, memory_bytes)), ("adapters", adapters))


def _models() -> dict[str, Changes]:
    return {n: _device(m, 80e9, count) for n, (m, count, _) in MODELS.items()}


def _memories() -> dict[str, Changes]:
    return {
        name: _device("llama-7b", size, MEMORY_ADAPTERS)
        for name, (size, _) in MEMORIES.items()
    }


def _stalls(scale: Scale) -> tuple[str, ...]:
    """Return variants that differ in what a device leaves as it is, the stall."""
    kept = tuple(v for v in scale.variants if v in ("default", "m2"))
    return kept or ("default",)


def _scans(changes: dict[str, Changes]) -> Any:
    def cells(scale: Scale) -> list[Cell]:
        return scale.scans(PAIR, scale.device_rps, changes.values(), _stalls(scale))

    return cells


def _throughputs(row: str, papers: dict[str, float], changes: dict[str, Changes]):
    def build(seen: Seen) -> Built:
        panels, checks = [], []
        rates = seen.scale.device_rps
        for variant in _stalls(seen.scale):
            loads = {
                (name, policy): seen.loads(variant, policy, rates, changes[name])
                for name in papers
                for policy in PAIR
            }
            bars = {
                "kind": "bars",
                "title": f"Load at SLO, requests/s, {variant}",
                "up": "requests/s",
                "groups": list(papers),
                "series": {
                    policy: [mean_of(loads[name, policy]) for name in papers]
                    for policy in PAIR
                },
            }
            first = seen.scans(variant, PAIR[0], rates, changes[next(iter(papers))])
            charts = [bars, _over_load(seen, variant, changes)]
            panels.append(panel(variant, first[0]["settings"], *charts))
            for name, paper in papers.items():
                claim = Claim(
                    row=row, what=f"{name}, over S-LoRA", paper=paper, unit="x"
                )
                values = ratios(loads[name, "chameleon"], loads[name, "s-lora"])
                checks.append(check(variant, claim, values))
        return panels, checks

    return build


def _over_load(seen: Seen, variant: str, changes: dict[str, Changes]) -> dict[str, Any]:
    """Return a chart of P99 TTFT over load, as far as every seed was scanned."""
    series = {}
    rates = seen.scale.device_rps
    for name, change in changes.items():
        for policy in PAIR:
            scans = seen.scans(variant, policy, rates, change)
            runs = [one["scan"]["runs"] for one in scans]
            series[f"{policy} {name}"] = [
                [at[0]["rate_rps"], mean_of([_ms(run["ttft_p99_s"]) for run in at])]
                for at in zip(*runs, strict=False)
            ]
    return {
        "kind": "lines",
        "title": f"P99 TTFT, ms, {variant}",
        "across": "requests/s",
        "up": "ms",
        "series": series,
    }


def _ms(value: float | None) -> float | None:
    return None if value is None else 1e3 * value


def _build_25(seen: Seen) -> Built:
    claim = Claim(
        row="TP4, high load, P99 TTFT against S-LoRA",
        what="P99 TTFT, four devices",
        paper=-95.8,
        unit="%",
    )
    idle = "the simulator has one device"
    found = {"variant": "-", **judge(claim, [], idle=idle)}
    assert found["verdict"] == NOT_EXERCISED
    return [], [found]


FIGURES = (
    Figure(
        number="23",
        title="Llama 7B, 13B, 30B on an A100 of 80 GB",
        shows="500, 100 and 10 adapters. Costs are a roofline model, a guess; the SLO "
        "is five times the mean isolated request there.",
        cells=_scans(_models()),
        build=_throughputs(
            "throughput on an A100 of 80 GB",
            {name: paper for name, (_, _, paper) in MODELS.items()},
            _models(),
        ),
    ),
    Figure(
        number="24",
        title="Llama 7B with 24, 48 and 80 GB",
        shows=f"{MEMORY_ADAPTERS} adapters (ours), an A100 with less memory; as 23.",
        cells=_scans(_memories()),
        build=_throughputs(
            "7B on 24 / 48 / 80 GB",
            {name: paper for name, (_, paper) in MEMORIES.items()},
            _memories(),
        ),
    ),
    Figure(
        number="25",
        title="Tensor parallel",
        shows="Not modelled: the simulator has one device.",
        cells=lambda scale: [],
        build=_build_25,
    ),
)
