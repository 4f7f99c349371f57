"""Replays of plan logs: the same events must give the same plans."""

import dataclasses
from pathlib import Path
from typing import Any

from jchameleon.runtime.policy.log import encode, read_plan_log
from jchameleon.runtime.policy.plan import Load, Plan, PrefillChunk
from jchameleon.runtime.policy.planner import Planner
from jchameleon.runtime.policy.presets import build_policies


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReplayReport:
    """What a replay found, and totals of the plans that it compared.

    Attributes:
      policy: what the log calls its policies.
      iterations: calls of the planner, the one that differed included.
      events: given to it in these calls.
      admitted, failed: requests; one that was squashed counts each time it starts.
      hits: those of `admitted` whose adapter was resident.
      loads: adapter copies started.
      first_difference: iteration, counted from 1, and field where log and replay part,
        with both values; None where every plan is the same to the last bit.
      cut_off: the log ends early; the replay went as far as it is whole.
    """

    policy: str
    iterations: int
    events: int
    admitted: int
    failed: int
    hits: int
    loads: int
    evictions: int
    squashes: int
    bypasses: int
    first_difference: str | None
    cut_off: bool


# Totals of a report, and the fields of a plan that they count.
_TOTALS = {
    "admitted": "admitted",
    "failed": "failed",
    "hits": "hits",
    "loads": "loads",
    "evictions": "evicted",
    "squashes": "squashed",
    "bypasses": "bypasses",
}


def replay(path: str | Path) -> ReplayReport:
    """Feed a log's events to a new planner and compare each plan with the log's.

    Ends at the first difference, for the rest of the events follow from other plans.
    The totals are those of the log. Policies of your own are imported by the names
    that the log has.

    Raises:
      ConfigError: the log cannot be read, or its policies cannot be built.
    """
    log = read_plan_log(path)
    planner = Planner(log.planner, **build_policies(log.policy))
    totals = dict.fromkeys(_TOTALS, 0)
    iterations = num_events = 0
    difference = None
    for now_s, events, logged in log:
        iterations += 1
        num_events += len(events)
        for name, field in _TOTALS.items():
            totals[name] += len(getattr(logged, field))
        try:
            difference = _difference("plan", logged, planner.plan(now_s, events))
        except Exception as error:  # the planner that wrote the log went on from here
            difference = f"the replay raised {type(error).__name__}: {error}"
        if difference is not None:
            difference = f"iteration {iterations}: {difference}"
            break
    return ReplayReport(
        policy=log.policy.source,
        iterations=iterations,
        events=num_events,
        **totals,
        first_difference=difference,
        cut_off=log.cut_off,
    )


def _difference(name: str, logged: Any, replayed: Any) -> str | None:
    """Return where two values first differ, and how, or None."""
    if encode(logged) == encode(replayed):
        return None
    parts: list[tuple[str, Any, Any]] = []
    if isinstance(logged, Plan | Load | PrefillChunk):
        for field in dataclasses.fields(logged):
            values = (getattr(value, field.name) for value in (logged, replayed))
            parts.append((f"{name}.{field.name}", *values))
    elif isinstance(logged, tuple) and isinstance(replayed, tuple):
        pairs = zip(logged, replayed, strict=False)
        parts = [(f"{name}[{i}]", *pair) for i, pair in enumerate(pairs)]
    for part in parts:
        if found := _difference(*part):
            return found
    if isinstance(logged, tuple) and isinstance(replayed, tuple):
        at = len(parts)  # all that both have is the same, and one has more
        name, logged, replayed = f"{name}[{at}:]", logged[at:], replayed[at:]
    return f"{name}: the log has {logged!r:.200}, the replay {replayed!r:.200}"
