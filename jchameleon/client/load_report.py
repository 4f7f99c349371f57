"""What a run of the load generator measured, under the keys that users compare.

The keys of vLLM's serving benchmark with its definitions, and after them what only a
server of many adapters has. Times of failed requests count nowhere.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jchameleon.client.chart import line_chart
from jchameleon.client.load import Progress, Sample
from jchameleon.errors import ConfigError

METRICS: dict[str, Callable[[Sample], list[float]]] = {
    "ttft": lambda sample: [sample.ttft_s],
    "tpot": lambda sample: [] if sample.tpot_s is None else [sample.tpot_s],
    "itl": lambda sample: sample.itls_s,
    "e2el": lambda sample: [sample.latency_s],
}
"""Time to first token, per further token, between pieces, to the last token."""

CLASS_PERCENTILES = (50, 99)


def parse_goodput(pairs: Iterable[str]) -> dict[str, float]:
    """Read limits such as "ttft_ms:500"; a good request keeps them all.

    Raises:
      ConfigError: one is something else.
    """
    limits = {}
    for pair in pairs:
        name, _, limit = pair.partition(":")
        try:
            if name in ("ttft_ms", "tpot_ms", "e2el_ms") and float(limit) > 0:
                limits[name] = float(limit)
                continue
        except ValueError:
            pass
        raise ConfigError(
            f"goodput={pair!r} must be ttft_ms:X, tpot_ms:X or e2el_ms:X, X above 0"
        )
    return limits


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value at `percent` of the sorted values, between two by proportion.

    Args:
      values: at least one, ascending.
    """
    place = (len(values) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (place - below) * (values[above] - values[below])


def build_report(
    samples: Sequence[Sample],
    progress: Progress,
    *,
    goodput: Mapping[str, float],
    percentiles: Sequence[float] = (50, 90, 99),
) -> dict[str, Any]:
    """Return the measured part of the report; lists are in the order of sending."""
    done = [sample for sample in samples if sample.error is None]
    duration_s = max((sample.ended_s for sample in samples), default=0.0)

    def rate(amount: float) -> float:
        return amount / duration_s if duration_s else 0.0

    inputs = sum(len(sample.planned.prompt) for sample in done)
    outputs = sum(sample.output_tokens for sample in done)
    good = sum(is_good(sample, goodput) for sample in done)
    report: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(done),
        "failed": len(samples) - len(done),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": rate(len(done)),
        "request_goodput": rate(good) if goodput else None,
        "output_throughput": rate(outputs),
        "total_token_throughput": rate(inputs + outputs),
        "concurrency": rate(sum(sample.latency_s for sample in done)),
        "max_concurrent_requests": progress.most_open,
    }
    for name in METRICS:
        report |= metric(name, done, percentiles)
    hits = [
        sample.timing.adapter_cache_hit
        for sample in done
        if sample.timing is not None and sample.timing.adapter_cache_hit is not None
    ]
    lags_ms = sorted(1e3 * (sample.sent_s - sample.planned.at_s) for sample in samples)
    report |= {
        "adapters": len({sample.planned.adapter for sample in samples} - {None}),
        "rank_mix": {
            name: len(group) / len(samples) for name, group in by_rank(samples).items()
        },
        "adapter_cache_hit_rate": sum(hits) / len(hits) if hits else None,
        "rank_classes": classes(by_rank(samples)),
        "queues": classes(by_lane(done)),
        "p99_send_lag_ms": percentile(lags_ms, 99) if lags_ms else None,
        "input_lens": [len(sample.planned.prompt) for sample in samples],
        "output_lens": [sample.output_tokens for sample in samples],
        "ttfts": [sample.ttft_s if sample.pieces else 0.0 for sample in samples],
        "itls": [sample.itls_s for sample in samples],
        "generated_texts": [sample.text for sample in samples],
        "errors": [sample.error or "" for sample in samples],
    }
    return report


def is_good(sample: Sample, limits: Mapping[str, float]) -> bool:
    """Return whether a request kept all limits; one token has no tpot to keep."""
    return all(
        1e3 * value <= limit
        for name, limit in limits.items()
        for value in METRICS[name.removesuffix("_ms")](sample)
    )


def metric(
    name: str, done: Iterable[Sample], percentiles: Sequence[float]
) -> dict[str, float | None]:
    """Return mean, median, standard deviation and percentiles, in milliseconds."""
    values = sorted(1e3 * value for one in done for value in METRICS[name](one))
    found: dict[str, float | None] = {
        f"mean_{name}_ms": statistics.fmean(values) if values else None,
        f"median_{name}_ms": percentile(values, 50) if values else None,
        f"std_{name}_ms": statistics.pstdev(values) if values else None,
    }
    for percent in percentiles:
        key = f"p{percent:g}_{name}_ms"
        found[key] = percentile(values, percent) if values else None
    return found


def by_rank(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """Return the samples of each adapter rank, "base" and "unknown" among them."""
    groups: dict[str, list[Sample]] = {}
    for sample in sorted(samples, key=lambda one: one.planned.rank or 0):
        planned = sample.planned
        name = "unknown" if planned.rank is None else str(planned.rank)
        groups.setdefault("base" if planned.adapter is None else name, []).append(
            sample
        )
    return groups


def by_lane(done: Iterable[Sample]) -> dict[str, list[Sample]]:
    """Return the samples of each of the scheduler's lanes; none without lanes."""
    groups: dict[int, list[Sample]] = {}
    for sample in done:
        if sample.timing is not None and sample.timing.lane is not None:
            groups.setdefault(sample.timing.lane, []).append(sample)
    return {str(lane): groups[lane] for lane in sorted(groups)}


def classes(groups: Mapping[str, Sequence[Sample]]) -> dict[str, dict[str, Any]]:
    """Return how each class of requests fared."""
    found: dict[str, dict[str, Any]] = {}
    for name, samples in groups.items():
        done = [sample for sample in samples if sample.error is None]
        found[name] = {"requests": len(samples), "completed": len(done)}
        for kind in METRICS:
            values = metric(kind, done, CLASS_PERCENTILES)
            found[name] |= {k: v for k, v in values.items() if k.startswith("p")}
    return found


PLOTTED_PERCENTILES = (*range(10, 100, 10), 95, 99)


def plot(title: str, samples: Sequence[Sample]) -> str:
    """Return an SVG of times to first token by rank, and of times per further token.

    Raises:
      ConfigError: no request was answered.
    """
    done = [sample for sample in samples if sample.error is None]
    if not done:
        raise ConfigError("there is nothing to plot: no request was answered")
    groups = {f"TTFT, {_class_name(k)}": v for k, v in by_rank(done).items()}
    lines = {name: _curve("ttft", group) for name, group in groups.items()}
    if len(groups) > 1:
        lines["TTFT, all"] = _curve("ttft", done)
    lines["TPOT, all"] = _curve("tpot", done)
    lines = {name: points for name, points in lines.items() if points}
    return line_chart(f"{title}: ms by percentile", lines, across="percentile")


def _class_name(rank: str) -> str:
    return f"rank {rank}" if rank.isdecimal() else rank


def _curve(name: str, samples: Iterable[Sample]) -> list[tuple[float, float]]:
    values = sorted(1e3 * value for one in samples for value in METRICS[name](one))
    points = [(p, percentile(values, p)) for p in PLOTTED_PERCENTILES if values]
    return [(p, value) for p, value in points if value > 0]  # the axis is logarithmic
