"""Whether what we see is what the paper says, by one rule for all of it."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any, Literal

REPRODUCES, DOES_NOT, NOT_EXERCISED = "reproduces", "does not", "not exercised"

POINTS = 5.0
"""Tolerance of a percentage, in points."""

SHARE = 0.10
"""Tolerance of anything else, as a share of the paper's figure."""

WIDEST = 2.0
"""An interval that is wider to each side than so many tolerances holds anything."""

RULE = f"""\
Ours is the mean over seeds; +- is its 95 % interval (Student's t). A figure reproduces
where ours is within {POINTS:g} points of a percentage or {SHARE:.0%} of any other
figure, or the interval holds the paper's figure; and where the interval is at most
{WIDEST:g} such tolerances wide to each side, or it would hold anything. A bound
reproduces where the mean keeps it. "Lower" or "higher" reproduces where the whole
interval of the paired differences is on that side of 0. "Not exercised" stands where
what the figure is about did nothing in any seed (no eviction, no squash, two policies
with the very same times), where no load was found because a seed hit a limit of the
scan, and where the simulator does not model it."""

Kind = Literal["near", "at most", "below", "above"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """One figure or statement of the paper.

    Attributes:
      row: of the paper's results that it belongs to; empty for other statements.
      what: is compared.
      paper: its figure; 0 for "below" and "above", which compare with nothing.
      unit: "%" is a percentage, of which differences are points.
    """

    row: str
    what: str
    paper: float
    unit: str
    kind: Kind = "near"

    @property
    def tolerance(self) -> float:
        """How far ours may be from the paper's."""
        return POINTS if self.unit == "%" else SHARE * abs(self.paper)


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the half width of its 95 % interval; None of one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    # Here: it takes longer to import than a short simulation.
    from scipy.stats import t

    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, float(t.ppf(0.975, len(values) - 1)) * error


def judge(
    claim: Claim,
    values: Sequence[float | None],
    *,
    idle: str | None = None,
) -> dict[str, Any]:
    """Return a claim with what we see, per seed, and the verdict (`RULE`).

    Args:
      values: of each seed; one of them None: nothing was found there.
      idle: why the claim was not exercised, if it was not.
    """
    found = [value for value in values if value is not None]
    mean = half = None
    if found and len(found) == len(values):
        mean, half = interval(found)
    elif idle is None:
        idle = f"{len(values) - len(found)} of {len(values)} seeds have no value"
    verdict, why = NOT_EXERCISED, idle or ""
    if idle is None and mean is not None:
        verdict, why = _verdict(claim, mean, half)
    return {
        **dataclasses.asdict(claim),
        "ours": mean,
        "half_width_95": half,
        "seeds": len(values),
        "verdict": verdict,
        "why": why,
    }


def _verdict(claim: Claim, mean: float, half: float | None) -> tuple[str, str]:
    spread = half or 0.0
    if claim.kind == "at most":
        held = mean <= claim.paper
        return (REPRODUCES if held else DOES_NOT), ""
    if claim.kind in ("below", "above"):
        up = mean if claim.kind == "above" else -mean
        if up - spread > 0:
            return REPRODUCES, ""
        return DOES_NOT, "the interval holds 0" if abs(mean) <= spread else ""
    off = abs(mean - claim.paper)
    if off > max(claim.tolerance, spread):
        return DOES_NOT, ""
    if spread > WIDEST * claim.tolerance:
        return DOES_NOT, "the interval is too wide to say so"
    return REPRODUCES, "" if off <= claim.tolerance else "within the interval"


def changes_percent(
    ours: Sequence[float | None], theirs: Sequence[float | None]
) -> list[float | None]:
    """Return 100 * (ours / theirs - 1) for each seed; None where one has no value."""
    return [
        None if a is None or not b else 100 * (a / b - 1)
        for a, b in zip(ours, theirs, strict=True)
    ]


def ratios(
    ours: Sequence[float | None], theirs: Sequence[float | None]
) -> list[float | None]:
    """Return ours / theirs for each seed; None where one has no value."""
    return [
        None if a is None or not b else a / b for a, b in zip(ours, theirs, strict=True)
    ]
