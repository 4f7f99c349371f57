"""When requests are sent: at random, in bursts, evenly, or as a trace has them."""

import csv
import dataclasses
import datetime
import itertools
import math
import random
from collections.abc import Iterator
from pathlib import Path

from jchameleon.errors import ConfigError

CV_RANGE = (0.01, 100.0)
"""Beyond, gamma gaps are all alike, or all but a few are 0, in floating point."""

LEAST_BURST_S = 1e-3
"""Shorter bursts are single requests, and cost more than those to draw."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """How requests come, whatever their mean rate.

    Attributes:
      law: "poisson"; "fixed", evenly; "trace", as recorded; "gamma", independent gaps
        by a gamma law, the first request at 0; "bursty", a Poisson process whose rate
        is that of a burst or that between two (a Markov-modulated one of two states,
        which last exponential times).
      cv: of "gamma": standard deviation of the gaps over their mean. 1 is Poisson, less
        is more even, more comes in clumps. The law has shape 1 / cv**2 (as the
        benchmark of S-LoRA, Sheng et al., MLSys 2024).
      factor: of "bursty": rate in a burst over the mean rate. The rate between bursts
        keeps the mean; it is 0 where the factor is (on_s + off_s) / on_s.
      on_s, off_s: of "bursty": mean times of a burst and between two, in seconds
        whatever the rate. It starts in a burst as often as it is in one.
    """

    law: str = "poisson"
    cv: float = 1.0
    factor: float = 1.0
    on_s: float = 1.0
    off_s: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Process":
        """Read "poisson", "fixed", "trace", "gamma:2.5" or "bursty:4:10:40".

        Raises:
          ConfigError: it is something else.
        """
        law, *texts = text.split(":") if isinstance(text, str) else ("",)
        try:
            values = [float(value) for value in texts]
        except ValueError:
            values = [0.0]
        if all(0 < value < math.inf for value in values):
            if law in ("poisson", "fixed", "trace") and not values:
                return cls(law=law)
            if law == "gamma" and len(values) == 1:
                if CV_RANGE[0] <= values[0] <= CV_RANGE[1]:
                    return cls(law=law, cv=values[0])
            if law == "bursty" and len(values) == 3:
                factor, on_s, off_s = values
                # A little more is rounding, as of 3.3333333333333335.
                most = (on_s + off_s) / on_s * (1 + 1e-9)
                if 1 <= factor <= most and min(on_s, off_s) >= LEAST_BURST_S:
                    return cls(law=law, factor=factor, on_s=on_s, off_s=off_s)
        raise ConfigError(
            f"process={text!r} must be poisson, fixed, trace, gamma:CV or "
            f"bursty:FACTOR:ON_S:OFF_S, with CV from {CV_RANGE[0]:g} to "
            f"{CV_RANGE[1]:g}, times of at least {LEAST_BURST_S:g} s and FACTOR from 1 "
            "to (ON_S + OFF_S) / ON_S, which keeps the mean rate"
        )

    @property
    def burst_share(self) -> float:
        """Share of the requests of "bursty" that come in bursts, in the long run."""
        return min(1.0, self.factor * self.on_s / (self.on_s + self.off_s))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """Requests of a recorded trace.

    Attributes:
      at_s: arrivals from the first one on, ascending.
      lengths: prompt and output tokens of each.
    """

    at_s: tuple[float, ...]
    lengths: tuple[tuple[int, int], ...]

    @property
    def rate_rps(self) -> float:
        """Mean arrivals a second."""
        span_s = self.at_s[-1]
        return (len(self.at_s) - 1) / span_s if span_s else math.inf


def read_trace(path: Path) -> Trace:
    """Read a CSV file with columns TIMESTAMP, ContextTokens and GeneratedTokens.

    The columns of the Azure LLM inference traces (Patel et al., "Splitwise", ISCA
    2024). A timestamp is an ISO date and time, or a number of seconds.

    Raises:
      ConfigError: it cannot be read, has no such columns or no rows.
    """
    rows = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                lengths = int(row["ContextTokens"]), int(row["GeneratedTokens"])
                if min(lengths) < 0:
                    raise ValueError(f"{lengths} must not be negative")
                rows.append((_seconds(row["TIMESTAMP"]), lengths))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} must have columns TIMESTAMP, ContextTokens and GeneratedTokens "
            f"with a time and numbers: {error!r:.100}"
        ) from error
    if not rows:
        raise ConfigError(f"{path} has no rows")
    rows.sort(key=lambda row: row[0])
    first_s = rows[0][0]
    return Trace(
        at_s=tuple(at_s - first_s for at_s, _ in rows),
        lengths=tuple(lengths for _, lengths in rows),
    )


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return datetime.datetime.fromisoformat(text.strip()).timestamp()
    if not math.isfinite(value):
        raise ValueError(f"{text!r} must be finite")
    return value


def arrivals_s(
    process: str,
    rate_rps: float | None,
    rng: random.Random,
    trace: Trace | None = None,
) -> Iterator[float]:
    """Yield when requests are sent, in seconds from the start, without end.

    Args:
      process: as `Process.parse` reads it.
      rate_rps: mean arrivals a second in the long run; infinity sends all at once. None
        is the trace's own.
      trace: for process "trace"; after its end it begins again.

    Raises:
      ConfigError: there is no such process.
    """
    parsed = Process.parse(process)
    if parsed.law == "trace":
        assert trace is not None
        return _laps(trace, rate_rps or trace.rate_rps)
    assert rate_rps is not None
    if rate_rps == math.inf:
        return itertools.repeat(0.0)
    if parsed.law == "fixed":
        return (index / rate_rps for index in itertools.count())
    if parsed.law == "bursty":
        return _bursts(parsed, rate_rps, rng)
    return _renewals(parsed, rate_rps, rng)


def _renewals(process: Process, rate_rps: float, rng: random.Random) -> Iterator[float]:
    """Yield arrivals with independent gaps of one law, the first at 0."""
    shape = process.cv**-2
    now_s = 0.0
    while True:
        yield now_s
        if process.law == "gamma":
            now_s += rng.gammavariate(shape, 1 / shape) / rate_rps
        else:
            now_s += rng.expovariate(1.0) / rate_rps


def _bursts(process: Process, rate_rps: float, rng: random.Random) -> Iterator[float]:
    """Yield arrivals of a process that changes between two rates."""
    cycle_s = process.on_s + process.off_s
    off_rps = rate_rps * (1 - process.burst_share) * cycle_s / process.off_s
    states = {
        True: (process.on_s, rate_rps * process.burst_share * cycle_s / process.on_s),
        False: (process.off_s, off_rps),
    }
    now_s = end_s = 0.0
    is_burst = rng.random() * cycle_s >= process.on_s  # changes before the first
    while True:
        is_burst = not is_burst
        mean_s, state_rps = states[is_burst]
        end_s += rng.expovariate(1.0) * mean_s
        # What is left of a gap when the rate changes is drawn anew: exponential times
        # have no memory.
        while state_rps:
            at_s = now_s + rng.expovariate(1.0) / state_rps
            if at_s >= end_s:
                break
            now_s = at_s
            yield now_s
        now_s = end_s


def _laps(trace: Trace, rate_rps: float) -> Iterator[float]:
    """Yield the trace's arrivals, stretched to a rate, again and again."""
    if math.inf in (rate_rps, trace.rate_rps):  # all of them at one time
        yield from itertools.repeat(0.0)
    stretch = trace.rate_rps / rate_rps
    # A gap of mean length stands between the last and the first.
    lap_s = trace.at_s[-1] + 1 / trace.rate_rps
    for lap in itertools.count():
        for at_s in trace.at_s:
            yield stretch * (lap * lap_s + at_s)
