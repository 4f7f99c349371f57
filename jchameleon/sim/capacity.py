"""How many requests a second a GPU holds at an SLO, and why no more."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np

from jchameleon.config import (
    ATTENTION_PROJECTIONS,
    EngineConfig,
    ModelConfig,
    is_number,
)
from jchameleon.errors import ConfigError
from jchameleon.lora.layout import ChunkLayout
from jchameleon.sim.cost import StepWork
from jchameleon.sim.footprint import Footprint, pool_facts, split_memory
from jchameleon.sim.link import LinkConfig
from jchameleon.sim.load import Load
from jchameleon.sim.profile import AdapterMix, Profile
from jchameleon.sim.report import settings
from jchameleon.sim.roofline import SHARES, Gpu, load_gpu, roofline_cost
from jchameleon.sim.run import requests, settle
from jchameleon.sim.samples import percentile
from jchameleon.sim.saturation import find_saturated, metered
from jchameleon.sim.sweep import mean_and_half, scan, ttft_at
from jchameleon.workload.arrivals import Trace
from jchameleon.workload.generator import Length, Workload

LINK_LATENCY_S = 0.002
"""As in the shipped profile; ours."""

COUNTED_REQUESTS = 800
"""Of a run, about: P99 is then the eighth from the end."""

LEAST_SLOS = 20
"""A run takes at least so many SLOs: a queue that grows by a twentieth of the time
shows within it, so capacity is at most that much too high."""

SKIP_SHARE = 0.1
"""Of a run, in which requests do not count: it begins with an idle engine."""

STEP_SHARE = 0.04
"""Of the expected capacity: the step of a scan."""

SCAN_FROM = (0.85, 0.5, 0.0)
"""Of the expected capacity: where a scan begins; lower if the SLO breaks there."""

LOAD_SHARE = 0.8
"""Of the capacity, where times and hit rate are told."""

OVERLOAD = 1.15
"""Of the capacity, where what saturates is looked for: clear of chance."""

LEAST_SHARE = 1e-3
"""Of a first guess: a set-up that holds less than this holds nothing."""

ALONE_REQUESTS = 2000
"""Drawn for the times of requests that have the engine to themselves."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is to be planned.

    Attributes:
      gpu: of `configs/gpu/`.
      engine: its limits and policy; pool, link and largest rank are worked out here.
      workload: lengths, popularity and arrivals; rate, duration and seed are not used.
      max_tokens: limit that every request names; None is the longest output there is.
      slo_ttft_s: bound on the time to first token of `percent` of the requests.
      num_seeds: from `seed` on.
      duration_s: of arrivals in a run; None is what the capacity asks for.
    """

    gpu: str
    model: ModelConfig
    adapters: AdapterMix
    engine: EngineConfig
    workload: Workload
    slo_ttft_s: float
    percent: float = 99.0
    max_tokens: int | None = None
    trace: Trace | None = None
    num_seeds: int = 5
    seed: int = 0
    duration_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("slo_ttft_s", "duration_s"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and value > 0):
                raise ConfigError(f"{name}={value!r} must be a finite number above 0")
        if self.duration_s is not None and self.duration_s <= self.slo_ttft_s:
            raise ConfigError(
                f"duration={self.duration_s:g} must be above slo_ttft="
                f"{self.slo_ttft_s:g}: no queue breaks an SLO sooner"
            )
        if not (is_number(self.percent) and 0 < self.percent < 100):
            raise ConfigError(
                f"percentile={self.percent!r} must be above 0 and below 100"
            )
        if type(self.num_seeds) is not int or self.num_seeds < 1:
            raise ConfigError(f"seeds={self.num_seeds!r} must be at least 1")
        most, limit = self.model.max_exact_tokens, self.workload.max_model_len
        if limit > most:
            raise ConfigError(
                f"max_model_len={limit} must be at most {most}, the context of "
                f"{self.model.name}"
            )


def plan_capacity(question: Question) -> dict[str, Any]:
    """Return what a GPU holds, how its memory is split and what saturates first.

    The cost model is a guess, so all is worked out three times, for each of `SHARES`.
    The same question gives the same answer, to the last bit.

    Raises:
      ConfigError: the model, an adapter or a request does not fit the GPU, or the SLO
        cannot be kept by a request that has the GPU to itself.
    """
    gpu = load_gpu(question.gpu)
    profiles, footprint = _profiles(question, gpu)
    load = Load(rate_rps=1.0, seed=question.seed, trace=question.trace)
    nominal, percent = profiles["nominal"], question.percent
    alone = {name: _alone_s(one, load) for name, one in profiles.items()}
    least_s = _percentile(alone["nominal"], percent)
    if least_s > question.slo_ttft_s:
        raise ConfigError(
            f"slo_ttft={question.slo_ttft_s:g} must be at least {least_s:.4g} s, P"
            f"{percent:g} of the time to first token of requests that have the GPU to "
            "themselves and find their adapter there"
        )
    cases = {
        name: {
            "shares": dataclasses.asdict(SHARES[name]),
            "cost": dataclasses.asdict(profile.cost),
            "link_bytes_per_s": profile.link.bytes_per_s,
            "ttft_alone_s": {
                f"p{p:g}": _percentile(alone[name], p) for p in (50, percent)
            },
            **_case(question, profile, load, alone[name]),
        }
        for name, profile in profiles.items()
    }
    return {
        "gpu": question.gpu,
        "model": question.model.name,
        "slo_ttft_s": question.slo_ttft_s,
        "percentile": percent,
        "num_seeds": question.num_seeds,
        "capacity_rps": cases["nominal"]["capacity_rps"],
        "half_width_95_rps": cases["nominal"]["half_width_95_rps"],
        "range_rps": [
            cases["pessimistic"]["capacity_rps"],
            cases["optimistic"]["capacity_rps"],
        ],
        "memory": {**footprint.to_dict(), **pool_facts(nominal)},
        "cases": cases,
        "settings": _settings(nominal, load),
    }


def _settings(profile: Profile, load: Load) -> dict[str, Any]:
    """Return the settings that all cases and runs share."""
    found = settings(*settle(profile, load), load)
    for name in ("cost", "link", "skip_s"):
        found.pop(name)
    for name in ("rate_rps", "duration_s"):
        found["workload"].pop(name)
    return found


def _profiles(question: Question, gpu: Gpu) -> tuple[dict[str, Profile], Footprint]:
    """Return a profile for each of `SHARES`; they differ in cost and link alone."""
    model, workload = question.model, question.workload
    engine = dataclasses.replace(
        question.engine,
        max_model_len=workload.max_model_len,
        max_lora_rank=max(question.adapters.ranks),
    )
    targets = engine.lora_targets or ATTENTION_PROJECTIONS
    layout = ChunkLayout(model, targets, model.kv_elems * engine.kv_block_tokens)
    footprint = split_memory(model, question.gpu, gpu, engine, layout)
    engine = dataclasses.replace(engine, pool_bytes=footprint.pool_bytes)
    max_tokens = question.max_tokens
    if max_tokens is None:
        max_tokens = _longest_output(workload, question.trace)
    profiles = {}
    for name, shares in SHARES.items():
        profiles[name] = Profile(
            name=f"{model.name} on {question.gpu}",
            model=model,
            cost_kind="roofline",
            cost=roofline_cost(model, gpu, targets, shares),
            link=LinkConfig(
                bytes_per_s=shares.link * gpu.link_bytes_per_s, latency_s=LINK_LATENCY_S
            ),
            engine=engine,
            adapters=question.adapters,
            # Whole runs are given their durations later.
            workload=dataclasses.replace(
                workload, num_requests=None, duration_s=1e9, rate_rps=1.0
            ),
            max_tokens=max_tokens,
            slo_s=question.slo_ttft_s,
            warm_cache=True,
        )
    return profiles, footprint


def _longest_output(workload: Workload, trace: Trace | None) -> int:
    """Return the most tokens that an output has, in the model's length."""
    if trace is not None:
        length, of_trace = Length(of_trace=True), max(out for _, out in trace.lengths)
    else:
        length, of_trace = workload.output_len, 1
    if length.of_trace:
        longest = round(workload.length_scale * of_trace)
    elif length.sigma:
        longest = round(workload.length_scale * length.high)
    else:
        longest = length.high
    return max(1, min(longest, workload.max_model_len - 1))


def _alone_s(profile: Profile, load: Load) -> list[float]:
    """Return the TTFTs of requests that share the engine and the link with nobody.

    Their adapters are there. A prompt runs in chunks of the largest batch.
    """
    profile, engine = settle(profile, load)
    times_s = []
    drawn = requests(profile, load.trace)
    for one in itertools.islice(drawn, ALONE_REQUESTS):
        rank = one.rank or 0
        total_s, start = 0.0, 0
        while start < one.prompt_tokens:
            length = min(engine.max_batch_tokens, one.prompt_tokens - start)
            total_s += profile.cost.step_s(
                StepWork(
                    prefill_tokens=length,
                    prefill_lora_tokens=length if rank else 0,
                    prefill_token_ranks=length * rank,
                    prefill_pairs=length * start + length * (length + 1) // 2,
                )
            )
            start += length
        times_s.append(total_s)
    return times_s


def _percentile(values: list[float], percent: float) -> float:
    found = percentile(np.array(values), percent)
    assert found is not None, "requests were drawn"
    return found


def _case(
    question: Question, profile: Profile, load: Load, alone_s: list[float]
) -> dict[str, Any]:
    """Return the capacity under one cost model, and what is seen below and above it."""
    percent = question.percent
    guess_rps = None
    if _percentile(alone_s, percent) <= profile.slo_s:
        guess_rps = _bracket(question, profile, load, 1 / statistics.fmean(alone_s))
    if guess_rps is None:
        return {
            "capacity_rps": 0.0,
            "half_width_95_rps": None,
            "limit": f"P{percent:g} of TTFT exceeds the SLO at any load",
            "seeds": [],
            "at_load": None,
            "saturated": None,
        }
    duration_s = _duration_s(question, guess_rps)
    profile = _lasting(profile, duration_s)
    step_rps = _two_digits(STEP_SHARE * guess_rps)
    seeds = [
        _hold(
            profile, dataclasses.replace(load, seed=seed), guess_rps, step_rps, percent
        )
        for seed in range(question.seed, question.seed + question.num_seeds)
    ]
    mean_rps, half_rps = mean_and_half([row["held_rps"] for row in seeds])
    at_load = saturated = None
    if mean_rps:
        rate_rps = LOAD_SHARE * mean_rps
        at_load = _at_load(question, profile, load, rate_rps)
        over = dataclasses.replace(load, rate_rps=OVERLOAD * mean_rps)
        saturated = find_saturated(profile, over, percent)
    return {
        "capacity_rps": mean_rps,
        "half_width_95_rps": half_rps,
        "limit": None,
        "step_rps": step_rps,
        "duration_s": duration_s,
        "skip_s": profile.skip_s,
        "seeds": seeds,
        "at_load": at_load,
        "saturated": saturated,
    }


def _duration_s(question: Question, rate_rps: float) -> float:
    if question.duration_s is not None:
        return question.duration_s
    counted_s = COUNTED_REQUESTS / rate_rps / (1 - SKIP_SHARE)
    return _two_digits(max(LEAST_SLOS * question.slo_ttft_s, counted_s))


def _two_digits(value: float) -> float:
    return float(f"{value:.1e}")


def _lasting(profile: Profile, duration_s: float) -> Profile:
    workload = dataclasses.replace(profile.workload, duration_s=duration_s)
    return dataclasses.replace(
        profile, workload=workload, skip_s=SKIP_SHARE * duration_s
    )


def _bracket(
    question: Question, profile: Profile, load: Load, first_rps: float
) -> float | None:
    """Return about what a profile holds, with the first seed; None if nothing.

    By doubling and halving, so no more than where a scan is to begin.

    Args:
      first_rps: to try first.
    """

    def holds(rate_rps: float) -> bool:
        lasting = _lasting(profile, _duration_s(question, rate_rps))
        at_rate = dataclasses.replace(load, rate_rps=rate_rps)
        ttft_s = ttft_at(lasting, at_rate, question.percent)
        return ttft_s is not None and ttft_s <= profile.slo_s

    low = first_rps
    while not holds(low):
        low /= 2
        if low < LEAST_SHARE * first_rps:
            return None
    high = 2 * low
    if low == first_rps:
        while holds(high):
            low, high = high, 2 * high
    for _ in range(3):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _hold(
    profile: Profile, load: Load, guess_rps: float, step_rps: float, percent: float
) -> dict[str, Any]:
    """Scan upwards for one seed, from lower where the SLO breaks at once."""

    def rates(first: int) -> Iterator[float]:
        return (round(step_rps * k, 9) for k in itertools.count(first))

    for share in SCAN_FROM:
        first = max(1, math.floor(share * guess_rps / step_rps))
        row = scan(profile, load, rates(first), percent)
        if row["limit"] is None:
            break
    # At the lowest rate of all, nothing is held.
    held = row["runs"][-2]["rate_rps"] if row["limit"] is None else 0.0
    return {**row, "held_rps": held}


def _at_load(
    question: Question, profile: Profile, load: Load, rate_rps: float
) -> dict[str, Any]:
    """Return means over seeds of what reports say at a rate."""
    names = ("ttft_s", "tbt_s", "e2e_s", "throughput_rps", "slo_attainment", "cache")
    reports = []
    for seed in range(question.seed, question.seed + question.num_seeds):
        at_rate = dataclasses.replace(load, rate_rps=rate_rps, seed=seed)
        report = metered(profile, at_rate, question.percent)
        reports.append({name: report[name] for name in (*names, "link_busy", "usage")})
    return {"rate_rps": rate_rps, "share": LOAD_SHARE, **_mean(reports)}


def _mean(values: list[Any]) -> Any:
    """Return means of numbers that stand at the same places of tables."""
    if isinstance(values[0], dict):
        return {key: _mean([value[key] for value in values]) for key in values[0]}
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
