"""How long steps, loads and whole requests take here, learnt from those that ran.

Both models are lines with coefficients that are never negative:

    step = base + per_prefill_token * prefill_tokens + per_decode_row * decode_rows
    load = base + per_page * pages

The form is our own choice: a step reads the weights once (base), computes each prompt
token, and reads each decode row's entries; a copy has a latency and a rate.
"""

import math
from typing import TypeAlias

STEP_PRIOR = (0.02, 1e-4, 1e-4)
"""Seconds per step, prompt token and decode row before anything ran.

A 7B model in bf16 on a GPU of 2 TB/s reads its weights in 7 ms, doubled for launches
and sampling and rounded up, and computes some 10,000 prompt tokens a second; a row's
cache of a few hundred tokens is 0.1 GB. Only orders of magnitude matter: the prior
weighs a millionth of an observation.
"""

LOAD_PRIOR = (1e-3, 4e-4)
"""Seconds per load and page: 8 MB (16 tokens of a 7B model) at 20 GB/s."""

_DRIFT = 4e-4  # relative variance of a coefficient from one observation to the next
_SURPRISE_DRIFT = 0.2
_MOST_RATIO = 2.0
_PRIOR_VARIANCE = 1e6  # that of one observation is 1
# Covariance of the coefficients before anything ran, its upper triangle by rows.
_UNKNOWN = (_PRIOR_VARIANCE, 0.0, 0.0, _PRIOR_VARIANCE, 0.0, _PRIOR_VARIANCE)
_LEAST_S = 1e-6  # expected durations are at least this, or ratios mean nothing
_LEAST_U = 1e-3  # what drifts of a coefficient that is smaller, even zero

_Three: TypeAlias = tuple[float, float, float]
_Six: TypeAlias = tuple[float, float, float, float, float, float]


class Estimator:
    """Run-time estimates from step and load durations; a few microseconds a call."""

    def __init__(self) -> None:
        self._step = _Line(STEP_PRIOR)
        self._load = _Line((*LOAD_PRIOR, 0.0))

    def observe_step(
        self, duration_s: float, *, prefill_tokens: int, decode_rows: int
    ) -> None:
        """Learn from one iteration; one that ran nothing teaches nothing.

        Raises:
          ValueError: the duration is negative or not finite, or a count is negative.
        """
        _check_count("prefill_tokens", prefill_tokens)
        _check_count("decode_rows", decode_rows)
        _check_duration(duration_s)
        if prefill_tokens or decode_rows:
            self._step.observe(duration_s, prefill_tokens, decode_rows)

    def observe_load(self, duration_s: float, *, num_pages: int) -> None:
        """Learn from one adapter load, timed from when the link was free for it.

        Raises:
          ValueError: the duration is negative or not finite, or `num_pages` < 0.
        """
        _check_count("num_pages", num_pages)
        _check_duration(duration_s)
        if num_pages:
            self._load.observe(duration_s, num_pages, 0)

    def step_s(self, *, prefill_tokens: int, decode_rows: int) -> float:
        """Return the duration of an iteration."""
        base_s, token_s, row_s = self._step.coefficients
        return base_s + token_s * prefill_tokens + row_s * decode_rows

    def load_s(self, num_pages: int) -> float:
        """Return the duration of a load; 0 for 0 pages."""
        if num_pages == 0:
            return 0.0
        base_s, page_s, _ = self._load.coefficients
        return base_s + page_s * num_pages

    def load_line(self) -> tuple[float, float]:
        """Return (base_s, s_per_page): a load takes base_s + s_per_page * pages."""
        base_s, page_s, _ = self._load.coefficients
        return base_s, page_s

    def run_s(
        self,
        *,
        prefill_tokens: int,
        output_tokens: int,
        load_pages: int = 0,
        decode_rows: int = 1,
    ) -> float:
        """Return the duration of a request in the company of `decode_rows` - 1.

        Load, then prefill in one step, which yields the first token, then one step per
        further token; nothing overlaps and all others decode throughout (our own
        choice). Without a prompt to run every output token takes a decode step.
        """
        decode_s = self.step_s(prefill_tokens=0, decode_rows=decode_rows)
        prefill_s = 0.0
        if prefill_tokens:
            prefill_s = self.step_s(
                prefill_tokens=prefill_tokens, decode_rows=decode_rows - 1
            )
            output_tokens -= 1
        return self.load_s(load_pages) + prefill_s + output_tokens * decode_s


class _Line:
    """y = u0*k0 + u1*k1*x1 + u2*k2*x2, where k is the prior and u >= 0 is learnt.

    Recursive least squares on relative errors: an observation and its terms are
    divided by what was expected, so that short steps count as much as long ones. Old
    observations fade because coefficients are taken to drift (Kalman filter of a random
    walk), by 2 % of themselves per observation in which they have a part: a thousand
    decode steps do not erase what prompts cost.

    An observation counts as at most twice and at least half of what was expected. One
    beyond that is a surprise: it moves the estimate but adds no confidence, and the
    coefficients are taken to have drifted by almost half. A single one (a first step
    that compiled) is nearly ignored, several in a row are believed (our own choice).
    """

    def __init__(self, prior: _Three) -> None:
        self._prior = prior
        self._u: _Three = (1.0, 1.0, 1.0)
        self._p: _Six = _UNKNOWN
        self.coefficients = prior

    def observe(self, y: float, x1: float, x2: float) -> None:
        """Learn one point in O(1)."""
        k0, k1, k2 = self._prior
        u0, u1, u2 = self._u
        f0, f1, f2 = k0, k1 * x1, k2 * x2
        expected = max(u0 * f0 + u1 * f1 + u2 * f2, _LEAST_S)
        f0, f1, f2 = f0 / expected, f1 / expected, f2 / expected
        error = y / expected - 1.0
        surprise = not 1.0 / _MOST_RATIO - 1.0 <= error <= _MOST_RATIO - 1.0
        error = min(max(error, 1.0 / _MOST_RATIO - 1.0), _MOST_RATIO - 1.0)

        p00, p01, p02, p11, p12, p22 = self._p
        g0 = p00 * f0 + p01 * f1 + p02 * f2
        g1 = p01 * f0 + p11 * f1 + p12 * f2
        g2 = p02 * f0 + p12 * f1 + p22 * f2
        variance = g0 * f0 + g1 * f1 + g2 * f2
        if variance < 0.0:  # rounding has eaten the matrix
            self._p = _UNKNOWN
            return
        c = 1.0 / (1.0 + variance)
        step = c * error
        u = (u0 + g0 * step, u1 + g1 * step, u2 + g2 * step)
        informed = (
            p00 - c * g0 * g0,
            p01 - c * g0 * g1,
            p02 - c * g0 * g2,
            p11 - c * g1 * g1,
            p12 - c * g1 * g2,
            p22 - c * g2 * g2,
        )
        if min(u) < 0.0:
            u = _non_negative(u, informed)
        drift = _SURPRISE_DRIFT
        if not surprise:
            drift = _DRIFT
            p00, p01, p02, p11, p12, p22 = informed
        if p00 < _PRIOR_VARIANCE:
            p00 += drift * max(u0, _LEAST_U) ** 2
        if x1 and p11 < _PRIOR_VARIANCE:
            p11 += drift * max(u1, _LEAST_U) ** 2
        if x2 and p22 < _PRIOR_VARIANCE:
            p22 += drift * max(u2, _LEAST_U) ** 2
        self._p = (p00, p01, p02, p11, p12, p22)
        self._u = u0, u1, u2 = u
        self.coefficients = (u0 * k0, u1 * k1, u2 * k2)


def _non_negative(u: _Three, p: _Six) -> _Three:
    """Return a fit near `u`, of covariance `p`, without negative coefficients.

    Where the data cannot tell two coefficients apart, what one gains the other must
    lose; so a coefficient goes to zero in the metric of the data and stays there.
    """
    p00, p01, p02, p11, p12, p22 = p
    rows = [[p00, p01, p02], [p01, p11, p12], [p02, p12, p22]]
    fit = list(u)
    for _ in range(3):
        least = min(fit)
        if least >= 0.0:
            break
        i = fit.index(least)
        row = rows[i]
        if row[i] > 0.0:
            fit = [v - p * least / row[i] for v, p in zip(fit, row, strict=True)]
            rows = [
                [a - other[i] * b / row[i] for a, b in zip(other, row, strict=True)]
                for other in rows
            ]
        fit[i] = 0.0
        for other in rows:
            other[i] = 0.0
    return max(fit[0], 0.0), max(fit[1], 0.0), max(fit[2], 0.0)


def _check_count(name: str, value: int) -> None:
    if value < 0:
        raise ValueError(f"{name}={value} must not be negative")


def _check_duration(duration_s: float) -> None:
    if not 0.0 <= duration_s < math.inf:
        raise ValueError(f"duration_s={duration_s} must be finite and not negative")
