"""Which resource ends the capacity: seen in a run, and by giving more of each."""

import dataclasses
import math
import sys
from typing import Any

from jchameleon.config import PREFILL_TILE_TOKENS
from jchameleon.runtime.policy.build import build_planner
from jchameleon.runtime.policy.events import Event
from jchameleon.runtime.policy.plan import Plan
from jchameleon.runtime.policy.planner import Planner
from jchameleon.sim.cost import CostModel, StepWork
from jchameleon.sim.load import Load
from jchameleon.sim.profile import Profile
from jchameleon.sim.report import build_report
from jchameleon.sim.run import run_once, settle
from jchameleon.sim.samples import percentile
from jchameleon.sim.sweep import ttft_at

RELIEF = 2.0
"""How much more of a resource each other run has."""

RAISE = 1.1
RAISES = 5
"""Of the rate, where a seed happens to keep the SLO."""

SAMPLE_STEPS = 8
"""Books of the planner are read once in so many steps."""


class Meter:
    """Where the time of a run goes, and what fills its pool and its rows."""

    def __init__(self, cost: CostModel, planner: Planner) -> None:
        """Watch a run of this planner at this cost."""
        self._cost = cost
        self._planner = planner
        self._steps = 0
        self._sums = {"kv": 0, "adapters": 0, "free": 0, "rows": 0, "waiting": 0}
        self._full = 0
        self._samples = 0
        self.prefill_s = 0.0
        self.decode_s = 0.0

    def step_s(self, work: StepWork) -> float:
        """Return what the cost says, and keep how it falls into prompts and decode."""
        total_s = self._cost.step_s(work)
        decode_s = 0.0
        if work.decode_rows:
            decode_s = total_s
            if work.prefill_tokens:
                decode_s = self._cost.step_s(
                    StepWork(
                        decode_rows=work.decode_rows,
                        decode_lora_rows=work.decode_lora_rows,
                        decode_kv_tokens=work.decode_kv_tokens,
                        decode_ranks=work.decode_ranks,
                    )
                )
        self.decode_s += decode_s
        self.prefill_s += total_s - decode_s
        return total_s

    def observe(self, now_s: float, events: tuple[Event, ...], plan: Plan) -> None:
        """Read the books now and then; an `Observer`."""
        del now_s, events
        if not (plan.prefill or plan.decode):
            return
        self._steps += 1
        if self._steps % SAMPLE_STEPS:
            return
        books = self._planner.books()
        self._samples += 1
        self._sums["kv"] += books.kv_pages
        self._sums["adapters"] += books.resident_pages + books.loading_pages
        self._sums["free"] += books.free_pages + books.cached_pages
        self._sums["rows"] += books.running
        self._sums["waiting"] += books.waiting
        self._full += books.running >= self._planner.config.max_running

    def facts(self, span_s: float) -> dict[str, float | None]:
        """Return shares of the time `span_s`, and means over steps."""
        count, usable = self._samples, self._planner.config.usable_pages
        means = {
            name: value / count if count else None for name, value in self._sums.items()
        }

        def share(name: str) -> float | None:
            value = means[name]
            return None if value is None else value / usable

        return {
            "prefill_busy": self.prefill_s / span_s,
            "decode_busy": self.decode_s / span_s,
            "pool_kv": share("kv"),
            "pool_adapters": share("adapters"),
            "pool_free": share("free"),
            "running_mean": means["rows"],
            "waiting_mean": means["waiting"],
            "rows_full": self._full / count if count else None,
        }


def metered(profile: Profile, load: Load, percent: float) -> dict[str, Any]:
    """Return the report of `simulate`, what the meter saw as its `usage`, and `late_s`.

    `late_s` is the percentile of TTFT that an SLO bounds; None where a request was
    turned away.
    """
    profile, engine = settle(profile, load)
    planner = build_planner(engine, profile.num_pages)
    meter = Meter(profile.cost, planner)
    result = run_once(profile, engine, load, meter.observe, planner=planner, cost=meter)
    samples = result.samples
    return {
        **build_report(profile, engine, load, result),
        "usage": meter.facts(result.end_s - result.start_s),
        "late_s": None if samples.failed else percentile(samples.ttft_s, percent),
    }


def find_saturated(profile: Profile, load: Load, percent: float) -> dict[str, Any]:
    """Return the resource whose want breaks the SLO under a load.

    The same requests run again with twice of each: steps in half the time, a pool of
    twice the bytes, twice the rows, a link of twice the bandwidth. A resource other
    than compute saturates if more of it alone takes away at least half of what the
    percentile of TTFT exceeds the SLO by; the one that takes away most, if there are
    several. Faster steps help in any case, for whoever ends sooner frees memory and
    rows, so compute is named where nothing else does.

    Args:
      load: above what the profile holds; its rate is raised while the SLO is kept.
    """
    for _ in range(RAISES):
        report = metered(profile, load, percent)
        if _excess_s(profile, report["late_s"]) > 0:
            break
        load = dataclasses.replace(load, rate_rps=RAISE * load.rate_rps)
    late_s = {
        name: ttft_at(relieved, load, percent)
        for name, relieved in _relieved(profile).items()
    }
    excess_s = {name: _excess_s(profile, value) for name, value in late_s.items()}
    most_s = min(_excess_s(profile, report["late_s"]) / 2, sys.float_info.max)
    binding = [n for n in excess_s if n != "compute" and excess_s[n] <= most_s]
    usage = report["usage"]
    prefills = usage["prefill_busy"] >= usage["decode_busy"]
    return {
        "resource": min(binding, key=excess_s.__getitem__) if binding else "compute",
        "most_time": "prefill" if prefills else "decode",
        "rate_rps": load.rate_rps,
        "relief": RELIEF,
        f"ttft_p{percent:g}_s": {"as_it_is": report["late_s"], **late_s},
        "usage": usage,
        "link_busy": report["link_busy"],
        "cache": report["cache"],
    }


def _excess_s(profile: Profile, late_s: float | None) -> float:
    """Return by how much a time exceeds the SLO; None is for ever."""
    return math.inf if late_s is None else max(0.0, late_s - profile.slo_s)


def _relieved(profile: Profile) -> dict[str, Profile]:
    """Return profiles with more of one resource each."""
    cost, engine, link = profile.cost, profile.engine, profile.link
    assert engine.pool_bytes is not None
    rows = int(RELIEF * engine.max_running)
    return {
        "compute": dataclasses.replace(profile, cost=cost.scaled(1 / RELIEF)),
        "memory": _with_engine(profile, pool_bytes=int(RELIEF * engine.pool_bytes)),
        "rows": _with_engine(
            profile,
            max_running=rows,
            max_batch_tokens=max(engine.max_batch_tokens, rows + PREFILL_TILE_TOKENS),
        ),
        "link": dataclasses.replace(
            profile,
            link=dataclasses.replace(link, bytes_per_s=RELIEF * link.bytes_per_s),
        ),
    }


def _with_engine(profile: Profile, **fields: int) -> Profile:
    changes: dict[str, Any] = dict(fields)
    engine = dataclasses.replace(profile.engine, **changes)
    return dataclasses.replace(profile, engine=engine)
