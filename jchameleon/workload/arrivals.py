"""When requests are sent: Poisson, evenly, at once, or as a trace has them."""

import csv
import dataclasses
import datetime
import itertools
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from jchameleon.errors import ConfigError

Process = Literal["poisson", "fixed", "trace"]


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
    process: Process,
    rate_rps: float | None,
    rng: random.Random,
    trace: Trace | None = None,
) -> Iterator[float]:
    """Yield when requests are sent, in seconds from the start, without end.

    Args:
      rate_rps: mean arrivals a second; infinity sends all at once. None is the trace's
        own.
      trace: for process "trace"; after its end it begins again.
    """
    if process == "trace":
        assert trace is not None
        yield from _laps(trace, rate_rps or trace.rate_rps)
    assert rate_rps is not None
    now_s = 0.0
    for index in itertools.count():
        yield index / rate_rps if process == "fixed" else now_s
        now_s += rng.expovariate(1.0) / rate_rps


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
