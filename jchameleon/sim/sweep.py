"""The load at which an SLO breaks: an upward scan over rates, for several seeds."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from jchameleon.errors import ConfigError
from jchameleon.sim.load import Load
from jchameleon.sim.profile import Profile
from jchameleon.sim.report import settings
from jchameleon.sim.run import run_once, settle
from jchameleon.sim.samples import percentile

MOST_RATES = 1000
PERCENT = 99
"""Of the times to first token, what the SLO bounds (Chameleon, section 5.1)."""


def parse_rates(text: str) -> tuple[float, ...]:
    """Read "LOW:HIGH:STEP", as "6:14:0.25".

    Raises:
      ConfigError: it is something else, or names more than 1,000 rates.
    """
    try:
        low, high, step = map(float, text.split(":"))
        if 0 < low <= high < math.inf and step > 0:
            count = math.floor((high - low) / step + 1e-9) + 1
            if count <= MOST_RATES:
                return tuple(round(low + step * i, 9) for i in range(count))
    except ValueError:
        pass
    raise ConfigError(
        f"sweep={text!r} must be LOW:HIGH:STEP with 0 < LOW <= HIGH, STEP above 0 and "
        f"at most {MOST_RATES} rates"
    )


def find_load(
    profile: Profile, load: Load, *, rates_rps: Sequence[float], num_seeds: int
) -> dict[str, Any]:
    """Return the lowest load whose P99 TTFT exceeds the SLO: mean and interval.

    For each seed rates go up until that happens. A scan, and no bisection: near its
    limit P99 need not grow with the load. A seed that exceeds the SLO at the first
    rate, or at none, hit a limit of the scan; then there is no mean, for it would say
    more of the limits than of the policy.

    Args:
      load: policy, trace, duration and the first seed; its rate is not used.
      rates_rps: to try, ascending.
      num_seeds: from the load's on.

    Raises:
      ConfigError: `num_seeds` is not positive; or as `simulate`.
    """
    if num_seeds < 1:
        raise ConfigError(f"seeds={num_seeds} must be at least 1")
    seeds = [
        scan(profile, dataclasses.replace(load, seed=seed), rates_rps)
        for seed in range(load.seed, load.seed + num_seeds)
    ]
    mean_rps = half_rps = None
    if not any(row["limit"] for row in seeds):
        mean_rps, half_rps = mean_and_half([row["over_slo_rps"] for row in seeds])
    first = dataclasses.replace(load, rate_rps=rates_rps[0])
    return {
        "rates_rps": list(rates_rps),
        "mean_rps": mean_rps,
        "half_width_95_rps": half_rps,
        "seeds": seeds,
        "settings": settings(*settle(profile, first), first),
    }


def mean_and_half(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and half its 95 % interval (Student), None of one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    # Here: it takes longer to import than a short simulation.
    from scipy.stats import t

    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, float(t.ppf(0.975, len(values) - 1)) * error


def ttft_at(profile: Profile, load: Load, percent: float = PERCENT) -> float | None:
    """Return a percentile of the times to first token under a load, in seconds.

    None where a request was turned away: it waited for ever.
    """
    samples = run_once(*settle(profile, load), load).samples
    return None if samples.failed else percentile(samples.ttft_s, percent)


def scan(
    profile: Profile, load: Load, rates_rps: Iterable[float], percent: float = PERCENT
) -> dict[str, Any]:
    """Return the first rate at which a percentile of TTFT exceeds the profile's SLO.

    Args:
      load: its rate is not used.
      rates_rps: to try, ascending.
    """
    tried: list[dict[str, float | None]] = []
    over_rps = limit = None
    for rate_rps in rates_rps:
        ttft_s = ttft_at(profile, dataclasses.replace(load, rate_rps=rate_rps), percent)
        tried.append({"rate_rps": rate_rps, f"ttft_p{percent:g}_s": ttft_s})
        if ttft_s is None or ttft_s > profile.slo_s:
            over_rps = rate_rps
            break
    if over_rps is None:
        limit = "the highest rate keeps the SLO"
    elif len(tried) == 1:
        limit = "the lowest rate exceeds the SLO"
    return {"seed": load.seed, "over_slo_rps": over_rps, "limit": limit, "runs": tried}
