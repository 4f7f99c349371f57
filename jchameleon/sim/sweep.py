"""The load at which an SLO breaks: an upward scan over rates, for several seeds."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
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
        _scan(profile, dataclasses.replace(load, seed=seed), rates_rps)
        for seed in range(load.seed, load.seed + num_seeds)
    ]
    mean_rps = half_rps = None
    if not any(row["limit"] for row in seeds):
        found = [row["over_slo_rps"] for row in seeds]
        mean_rps = statistics.fmean(found)
        if num_seeds > 1:
            # Here: it takes longer to import than a short simulation.
            from scipy.stats import t

            error = statistics.stdev(found) / math.sqrt(num_seeds)
            half_rps = float(t.ppf(0.975, num_seeds - 1)) * error
    first = dataclasses.replace(load, rate_rps=rates_rps[0])
    return {
        "rates_rps": list(rates_rps),
        "mean_rps": mean_rps,
        "half_width_95_rps": half_rps,
        "seeds": seeds,
        "settings": settings(*settle(profile, first), first),
    }


def _scan(profile: Profile, load: Load, rates_rps: Sequence[float]) -> dict[str, Any]:
    tried = []
    over_rps = limit = None
    for rate_rps in rates_rps:
        at_rate = dataclasses.replace(load, rate_rps=rate_rps)
        result = run_once(*settle(profile, at_rate), at_rate)
        p99_s = percentile(result.samples.ttft_s, PERCENT)
        if result.samples.failed or p99_s is None:
            p99_s = None  # what was turned away waited for ever
        tried.append({"rate_rps": rate_rps, "ttft_p99_s": p99_s})
        if p99_s is None or p99_s > profile.slo_s:
            over_rps = rate_rps
            break
    if over_rps is None:
        limit = "the highest rate keeps the SLO"
    elif over_rps == rates_rps[0]:
        limit = "the lowest rate exceeds the SLO"
    return {"seed": load.seed, "over_slo_rps": over_rps, "limit": limit, "runs": tried}
