"""What the runs of an experiment say: tables of medians, spreads and paired ratios."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jchameleon.client.chart import line_chart

Run = Mapping[str, Any]
"""One run as `exp_policies` keeps it."""

BASELINE = "s-lora"
"""The preset that ratios compare with."""

QUIET_DRIFT = 1.25
"""Rates of a machine that does nothing else stay within this factor of each other."""


def of_times(key: str, percent: float) -> Callable[[Run], float]:
    """Return what takes a percentile of a run's times, in milliseconds."""
    return lambda run: 1e3 * float(np.percentile(run[key], percent))


def of_count(key: str) -> Callable[[Run], float]:
    """Return what takes a counter of a run."""
    return lambda run: run[key]


def hit_percent(run: Run) -> float:
    """Return the share of admissions whose adapter was resident, in percent."""
    total = run["hits"] + run["misses"]
    return 100 * run["hits"] / total if total else math.nan


P50_TTFT = of_times("ttft_s", 50)
P99_TTFT = of_times("ttft_s", 99)

LATENCIES: dict[str, Callable[[Run], float]] = {
    "TTFT P50": P50_TTFT,
    "TTFT P99": P99_TTFT,
    "TBT P50": lambda run: 1e3 * run["tbt_p50_s"],
    "TBT P99": lambda run: 1e3 * run["tbt_p99_s"],
    "E2E P50": of_times("e2e_s", 50),
    "E2E P99": of_times("e2e_s", 99),
    "wait P50": of_times("queue_s", 50),
    "load P99": of_times("load_s", 99),
}
"""Milliseconds of the counted requests of a run."""

COUNTS: dict[str, Callable[[Run], float]] = {
    "hit %": hit_percent,
    "hits": of_count("hits"),
    "misses": of_count("misses"),
    "loads": of_count("loads"),
    "evictions": of_count("evictions"),
    "bypasses": of_count("bypasses"),
    "squashes": of_count("squashes"),
    "of them by growth": of_count("growth_squashes"),
    "stalls": of_count("stalls"),
}
"""Counts of whole runs."""


def spread(values: Sequence[float]) -> str:
    """Return "median [min-max]" with three digits, or the value where all are one."""
    if not values:
        return "-"
    median, low, high = statistics.median(values), min(values), max(values)
    if digits(low) == digits(high):
        return digits(median)
    return f"{digits(median)} [{digits(low)}-{digits(high)}]"


def digits(value: float) -> str:
    """Return a number with three significant digits, without an exponent."""
    if math.isnan(value):
        return "nan"
    if abs(value) >= 100 or value == round(value):
        return f"{value:.0f}"
    return f"{value:.3g}"


def select(runs: Sequence[Run], preset: str, load: float) -> dict[int, Run]:
    """Return the runs of a preset at a load by seed."""
    return {
        run["seed"]: run
        for run in runs
        if run["preset"] == preset and run["load"] == load
    }


def paired_ratios(
    runs: Sequence[Run],
    preset: str,
    baseline: str,
    load: float,
    metric: Callable[[Run], float],
) -> list[float]:
    """Return metric over the baseline's metric for each seed that ran under both."""
    ours, theirs = select(runs, preset, load), select(runs, baseline, load)
    return [
        metric(ours[seed]) / metric(theirs[seed])
        for seed in sorted(ours.keys() & theirs.keys())
    ]


def shown_ratios(ratios: Sequence[float]) -> str:
    """Return their spread and how many are below 1."""
    if not ratios:
        return "-"
    return f"{spread(ratios)}, {sum(r < 1 for r in ratios)}/{len(ratios)}"


def mechanisms(policy: Mapping[str, Any]) -> dict[str, Callable[[Run], float]]:
    """Return what a policy can do beside admitting, and how often a run did it."""
    found = {"eviction": of_count("evictions")}
    admission = policy["admission"]
    if admission["name"] == "chameleon" and admission.get("bypass", True):
        found["bypass"] = of_count("bypasses")
        found["squash after a bypass"] = lambda r: r["squashes"] - r["growth_squashes"]
    if policy["kv"]["reserve"] == "predicted":
        found["growth"] = of_count("grown_pages")
        found["squash by growth"] = of_count("growth_squashes")
        found["stall"] = of_count("stalls")
    if admission["name"] == "chameleon":
        found["several lanes"] = lambda run: max(0, len(run["lanes"]) - 1)
    return found


def exercised(policies: Mapping[str, Any], runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return for each preset what its mechanisms did: in how many runs, and how often.

    One that did nothing in any run is named "not exercised": its runs say nothing
    about it.
    """
    lines: dict[str, list[str]] = {}
    for preset, policy in policies.items():
        mine = [run for run in runs if run["preset"] == preset]
        for name, count in mechanisms(policy).items() if mine else ():
            fired = [count(run) for run in mine if count(run) > 0]
            what = f"{sum(fired):g} in {len(fired)} of {len(mine)} runs"
            lines.setdefault(preset, []).append(
                f"{name}: {what if fired else 'not exercised'}"
            )
    return lines


def twins(policies: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return pairs of presets that are the same policies under two names."""
    plain = {
        name: {key: value for key, value in policy.items() if key != "source"}
        for name, policy in policies.items()
    }
    names = list(plain)
    return [
        (a, b)
        for index, a in enumerate(names)
        for b in names[index + 1 :]
        if plain[a] == plain[b]
    ]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def load_tables(state: Mapping[str, Any], load: float, slo_s: float) -> list[str]:
    """Return the section of one load."""
    runs = state["runs"]
    presets = [p for p in state["policies"] if select(runs, p, load)]
    rows, counts = [], []
    for preset in presets:
        mine = list(select(runs, preset, load).values())
        met = sum(P99_TTFT(run) <= 1e3 * slo_s for run in mine)
        pooled = np.concatenate([run["ttft_s"] for run in mine])
        rows.append(
            [preset]
            + [spread([metric(run) for run in mine]) for metric in LATENCIES.values()]
            + [digits(1e3 * float(np.percentile(pooled, 99)))]
            + [
                shown_ratios(paired_ratios(runs, preset, BASELINE, load, metric))
                for metric in (P50_TTFT, P99_TTFT)
            ]
            + [f"{met}/{len(mine)}"]
        )
        counts.append(
            [preset]
            + [spread([metric(run) for run in mine]) for metric in COUNTS.values()]
        )
    rates = sorted({run["rate_rps"] for run in runs if run["load"] == load})
    seeds = sorted({run["seed"] for run in runs if run["load"] == load})
    return [
        f"## Load {load:g}: {', '.join(digits(rate) for rate in rates)} requests/s, "
        f"seeds {', '.join(map(str, seeds))}",
        "",
        "Milliseconds: median over seeds [min-max]; ratios to the same seed under "
        f"{BASELINE}, and in how many seeds they are below 1.",
        "",
        *table(
            [
                "preset",
                *LATENCIES,
                "TTFT P99, seeds pooled",
                f"TTFT P50 / {BASELINE}",
                f"TTFT P99 / {BASELINE}",
                "SLO met",
            ],
            rows,
        ),
        "",
        "Counts of whole runs:",
        "",
        *table(["preset", *COUNTS], counts),
        "",
    ]


def set_up(state: Mapping[str, Any]) -> list[str]:
    """Return what all runs share, as a list."""
    settings, machine = state["settings"], state["machine"]
    found, workload = state["calibration"], state["workload"]
    slo_s = state["slo_s"]
    missed = ""
    if abs(found["load_share"] - state["load_share_wanted"]) > 0.01:
        missed = f": NOT THE {state['load_share_wanted']:.1%} WANTED"
    lines = [
        f"Machine: {machine['cpu']}, {machine['cores_in_use']} of {machine['cores']} "
        f"cores; " + ", ".join(f"{k} {v}" for k, v in state["versions"].items() if v),
        f"Model: {settings['model']}, {settings['dtype']}; at most "
        f"{settings['max_running']} running, {settings['max_batch_tokens']} tokens a "
        "step",
        f"Lengths: {workload['lengths']}; scaled by {settings['scale']:g}, "
        f"max_tokens={workload['max_tokens']} for all, context "
        f"{workload['max_model_len']}",
        f"Adapters: {settings['num_adapters']} of ranks 8 to 128 on q, k, v, o; pool "
        f"{workload['pool_bytes'] / 2**20:.1f} MiB, {settings['pool_share']:.0%} of "
        "all adapters' pages, KV cache included",
        f"Runs: {settings['num_requests']} requests, caches cold at the start, first "
        f"{settings['warm_share']:.0%} not counted",
        f"Emulated link: {found['link_bytes_per_s'] / 1e6:.4g} MB/s. A rank-128 load "
        f"({found['load_bytes'] / 2**20:.3g} MiB) is {found['load_share']:.1%} of the "
        f"isolated TTFT of {found['prompt_tokens']} tokens ("
        f"{1e3 * found['ttft_cold_s']:.4g} ms, resident "
        f"{1e3 * found['ttft_resident_s']:.4g} ms); without the link "
        f"{found['own_load_share']:.1%}; at the workload's median length "
        f"{found['median_load_share']:.1%}{missed}",
        f"Isolated request: {1e3 * found['isolated_s']:.4g} ms, so SLO "
        f"{1e3 * slo_s:.4g} ms; time constants of policies are "
        f"{found['isolated_s']:.3g} of the paper's",
        f"Saturation ({BASELINE}, all requests at once): "
        f"{found['saturation_rps']:.3g} requests/s",
    ]
    for name in ("gemm_gflops", "read_gbps"):
        rates = [run["machine"][name] for run in state["runs"]]
        drift = max(rates) / min(rates)
        quiet = "" if drift <= QUIET_DRIFT else ": THE MACHINE WAS NOT QUIET"
        lines.append(
            f"Calibration loop before each run, {name}: {spread(rates)}, "
            f"{drift:.2f}x{quiet}"
        )
    return lines


def correctness(state: Mapping[str, Any]) -> list[str]:
    """Return whether policies changed what came out, and whether all arrived in time.

    Recomputed in another batch, logits may round to another token where two are equal
    but for the last bits.
    """
    runs, num_requests = state["runs"], state["settings"]["num_requests"]
    total = len(runs) * num_requests
    mismatches = sum(run["mismatches"] for run in runs)
    failed = sum(run["failed"] for run in runs)
    lines = [
        f"Outputs that differ from the undisturbed run's: {mismatches} of {total}",
        f"Requests that failed: {failed} of {total}",
        f"Latest submission: {1e3 * max(r['late_max_s'] for r in runs):.3g} ms after "
        "its time (counted into TTFT)",
    ]
    for run in runs:
        where = f"{run['preset']}, load {run['load']:g}, seed {run['seed']}"
        for index, at in run["first_differences"]:
            lines.append(f"{where}: request {index} differs from token {at} on")
        if run["failed"]:
            lines.append(
                f"{where}: {run['failed']} failed, first: {run['first_error']}"
            )
    return lines


def noise(state: Mapping[str, Any], loads: Sequence[float]) -> list[str]:
    """Return how far presets differ that are the same policies."""
    return [
        f"{a} and {b} are the same policies; TTFT P99 of {b} / {a} at load {load:g}: "
        + shown_ratios(paired_ratios(state["runs"], b, a, load, P99_TTFT))
        for a, b in twins(state["policies"])
        for load in loads
    ]


def markdown(state: Mapping[str, Any]) -> str:
    """Return the whole report."""
    loads = sorted({run["load"] for run in state["runs"]})
    lines = ["# Set-up", "", *(f"* {line}" for line in set_up(state)), ""]
    lines += ["Commands:", "", *(f"    {line}" for line in state["commands"]), ""]
    lines += ["# Results", ""]
    for load in loads:
        lines += load_tables(state, load, state["slo_s"])
    lines += ["## What the mechanisms did", ""]
    lines += [
        f"* {preset}: " + "; ".join(found)
        for preset, found in exercised(state["policies"], state["runs"]).items()
    ]
    lines += ["", "## Noise and correctness", ""]
    lines += [f"* {line}" for line in (*noise(state, loads), *correctness(state))]
    return "\n".join(lines) + "\n"


def figure(state: Mapping[str, Any]) -> str:
    """Return a drawing of P99 TTFT over load, medians over seeds."""
    runs = state["runs"]
    lines = {
        preset: [
            (load, statistics.median(map(P99_TTFT, found.values())))
            for load in sorted({run["load"] for run in runs})
            if (found := select(runs, preset, load))
        ]
        for preset in state["policies"]
    }
    return line_chart(
        f"{state['settings']['model']}: P99 TTFT in ms, median over seeds",
        {preset: points for preset, points in lines.items() if points},
        across="load / saturation",
        limit=1e3 * state["slo_s"],
    )
