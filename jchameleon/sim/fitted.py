"""A cost model from an engine's own plan logs."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from jchameleon.errors import ConfigError
from jchameleon.runtime.policy.events import (
    AdapterRegistered,
    Arrival,
    Cancel,
    DeviceLost,
    Event,
    LoadDone,
    StepDone,
)
from jchameleon.runtime.policy.limits import PlannerConfig
from jchameleon.runtime.policy.plan import Plan
from jchameleon.runtime.shapes import decode_buckets, prefill_buckets
from jchameleon.sim.cost import StepWork, work_of
from jchameleon.sim.linear import LinearCost, features
from jchameleon.sim.programs import ProgramCost

LEAST_SAMPLES = 50
"""Fewer steps say too little of some twenty coefficients."""

MOST_RATIO = 5.0
"""A step that takes longer than so many times what is expected was held up by something
else, a compile or another process, and counts as if it had taken so long."""

LEAST_RUNS = 5
"""Of a program of one size, or its steps are left out: one that ran once, while
something else held it up, would be taken to be so slow."""

LEAST_LOADS = 10
"""Of fewer copies that an idle engine waited for, the median says little."""

_ROUNDS = 8

Iteration = tuple[float, Sequence[Event], Plan]
"""Time, events and plan: what a plan log holds of one call of the planner."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepSample:
    """One iteration of an engine that ran something.

    Attributes:
      programs: sizes of what it ran, padded prompt tokens and decode rows; 0 for none.
      period_s: from its plan to the next one: the step and the host's own time.
      load_pages: of adapter copies that it started, and of copies that it took in.
    """

    work: StepWork
    programs: tuple[int, int]
    period_s: float
    load_pages: tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """What samples amount to.

    Attributes:
      load_page_s: what a page of an adapter costs the engine itself, not the link.
      median_error, p90_error: of a step's duration, as a share of it, in the samples.
      samples: how many there were.
    """

    cost: ProgramCost
    load_page_s: float
    median_error: float
    p90_error: float
    samples: int


@dataclasses.dataclass(slots=True)
class _Tracked:
    rank: int
    context_tokens: int


def step_samples(
    iterations: Iterable[Iteration], limits: PlannerConfig
) -> Iterator[StepSample]:
    """Yield the steps of a plan log, in order.

    The engine plans again as soon as a step is done, so the time between two plans is
    what a step takes. The last of a log has no end and is left out.

    Args:
      limits: of its planner, which say what programs the engine has.
    """
    prefill_sizes = prefill_buckets(limits.max_batch_tokens)
    decode_sizes = decode_buckets(limits.max_running)
    ranks: dict[str, int] = {}
    rows: dict[str, _Tracked] = {}
    pages: dict[str, int] = {}  # of copies under way
    before: tuple[float, StepWork, int] | None = None
    for now_s, events, plan in iterations:
        arrived = sum(pages.pop(e.uid, 0) for e in events if isinstance(e, LoadDone))
        # Without its end a step's time is not known: the device was lost in it.
        ended = any(isinstance(event, StepDone) for event in events)
        if before is not None and ended:
            start_s, work, started = before
            yield StepSample(
                work=work,
                programs=(
                    _program(prefill_sizes, work.prefill_tile_tokens),
                    _program(decode_sizes, work.decode_rows),
                ),
                period_s=now_s - start_s,
                load_pages=(started, arrived),
            )
        _track(events, ranks, rows)
        for request_id, *_ in plan.failed:
            rows.pop(request_id, None)
        pages.update((load.uid, len(load.pages)) for load in plan.loads)
        before = None
        if plan.prefill or plan.decode:
            started = sum(len(load.pages) for load in plan.loads)
            before = (now_s, work_of(plan, rows), started)


def load_latency_s(logs: Iterable[Iterable[Iteration]], *, page_s: float) -> float:
    """Return how much later than the link lets them copies arrive, in seconds.

    The median of those that an idle engine waited for. All others are found when a step
    has ended, a wait that the simulator has as well: where there are few idle ones, the
    lower quartile of all. 0 where the logs have no copies.

    Args:
      page_s: that a page takes on the link.
    """
    idle: list[float] = []
    others: list[float] = []
    for iterations in logs:
        free_s = 0.0
        due_s: dict[str, float] = {}
        for now_s, events, plan in iterations:
            after_step = any(isinstance(event, StepDone) for event in events)
            for event in events:
                if isinstance(event, LoadDone) and event.uid in due_s:
                    late_s = max(0.0, now_s - due_s.pop(event.uid))
                    (others if after_step else idle).append(late_s)
            for load in plan.loads:
                free_s = max(now_s, free_s) + page_s * len(load.pages)
                due_s[load.uid] = free_s
    if len(idle) >= LEAST_LOADS:
        return float(np.median(idle))
    late = idle + others
    return float(np.percentile(late, 25)) if late else 0.0


def _program(sizes: Sequence[int], needed: int) -> int:
    """Return the smallest size that holds what is needed; 0 for nothing."""
    return next(size for size in sizes if size >= needed) if needed else 0


def _track(
    events: Sequence[Event], ranks: dict[str, int], rows: dict[str, _Tracked]
) -> None:
    """Follow who is there and how many tokens each has."""
    for event in events:
        match event:
            case AdapterRegistered():
                ranks[event.uid] = event.rank
            case Arrival(request):
                uid = request.adapter_uid
                rank = 0 if uid is None else ranks[uid]
                rows[request.request_id] = _Tracked(rank, request.prompt_tokens)
            case Cancel(request_id):
                rows.pop(request_id, None)
            case StepDone():
                for request_id, tokens in event.produced:
                    if request_id in rows:
                        rows[request_id].context_tokens += tokens
                for request_id in event.finished:
                    rows.pop(request_id, None)
            case DeviceLost() | LoadDone():
                pass


def fit_cost(samples: Iterable[StepSample]) -> Fit:
    """Return coefficients, none negative, with the least squares of relative errors.

    Relative to what is expected, so that short steps count as much as long ones and the
    mean over steps alike is met: what waits is decided by means. Expectations come from
    the round before.

    Raises:
      ConfigError: there are too few samples, or none with prompts or decode rows.
    """
    kept = _of_known_programs([one for one in samples if one.period_s > 0])
    if len(kept) < LEAST_SAMPLES:
        raise ConfigError(
            f"{len(kept)} steps are too few to fit, at least {LEAST_SAMPLES} are needed"
        )
    # Programs without samples have no column: a larger one is taken in their place.
    sizes = [sorted({one.programs[kind] for one in kept} - {0}) for kind in (0, 1)]
    for kind, name in enumerate(("prompts", "decode rows")):
        if not sizes[kind]:
            raise ConfigError(f"no step of {len(kept)} has {name}: nothing to fit")
    rows = np.array(
        [
            (
                *[one.programs[0] == size for size in sizes[0]],
                *[one.programs[1] == size for size in sizes[1]],
                *[value for _, value in _work_terms(one.work)],
                *one.load_pages,
            )
            for one in kept
        ],
        np.float64,
    )  # f64[n, programs + terms + 2]
    periods_s = np.array([one.period_s for one in kept])  # f64[n]
    expected_s = periods_s
    for _ in range(_ROUNDS):
        target = np.minimum(periods_s / expected_s, MOST_RATIO)
        found = non_negative_least_squares(rows / expected_s[:, None], target)
        expected_s = np.maximum(rows @ found, periods_s.min())
    errors = np.abs(rows @ found / periods_s - 1)
    values = iter(found.tolist())
    prefill_programs_s, decode_programs_s = (
        {size: next(values) for size in sizes[kind]} for kind in (0, 1)
    )
    terms = {name: next(values) for name, _ in _work_terms(kept[0].work)}
    cost = ProgramCost(
        work=LinearCost(**terms),
        prefill_programs_s=prefill_programs_s,
        decode_programs_s=decode_programs_s,
    )
    return Fit(
        cost=cost,
        load_page_s=sum(values),
        median_error=float(np.median(errors)),
        p90_error=float(np.percentile(errors, 90)),
        samples=len(kept),
    )


def _of_known_programs(samples: list[StepSample]) -> list[StepSample]:
    """Return samples without those whose programs hardly ever ran."""
    runs = [
        collections.Counter(one.programs[kind] for one in samples) for kind in (0, 1)
    ]
    return [
        one
        for one in samples
        if all(runs[kind][one.programs[kind]] >= LEAST_RUNS for kind in (0, 1))
    ]


def _work_terms(work: StepWork) -> list[tuple[str, float]]:
    """Return coefficients and their features, without those that programs stand for."""
    names = [field.name for field in dataclasses.fields(LinearCost)]
    return [
        (name, value)
        for name, value in zip(names, features(work), strict=True)
        if name not in ("prefill_s", "decode_s")
    ]


def non_negative_least_squares(
    matrix: np.ndarray,  # f64[n, k]
    target: np.ndarray,  # f64[n]
) -> np.ndarray:
    """Return x >= 0 with the least |matrix x - target|: f64[k].

    Columns are scaled to length 1 first; those that are all zero get 0.
    """
    # Here: it takes longer to import than a short simulation.
    from scipy.optimize import nnls

    lengths = np.linalg.norm(matrix, axis=0)
    used = lengths > 0
    result = np.zeros(matrix.shape[1])
    result[used] = nnls(matrix[:, used] / lengths[used], target)[0] / lengths[used]
    return result
