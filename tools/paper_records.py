"""What the paper's figures show of a run and a report does not: by request, over time.

A `Records` watches a run from outside: it is told what the planner is told and what it
answers, and keeps books of its own.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jchameleon.config import RESERVED_PAGES
from jchameleon.runtime.policy.events import Arrival, Event, LoadDone, StepDone
from jchameleon.runtime.policy.plan import Plan
from jchameleon.sim.cost import StepWork
from jchameleon.sim.profile import Profile
from jchameleon.sim.samples import percentile

CLASSES = ("small", "medium", "large")
"""Thirds of the requests by their time on an idle engine; the paper names no cuts."""

MARKS = (*range(0, 100, 5), 99, 100)
"""Percents at which a distribution is kept."""

WINDOWS = 12
"""Parts of a run that figure 15 takes P99 of."""

MOMENTS = 100
"""Points of a timeline."""


@dataclasses.dataclass(slots=True)
class Request:
    """One request from its arrival to its end; times on the run's clock.

    Attributes:
      output_tokens: that it produced so far.
      admitted_s: when it first got its pages.
      load_wait_s: from then until the engine had its adapter, 0 for a hit.
      link_wait_s: from then until the link had carried it.
    """

    arrival_s: float
    prompt_tokens: int
    adapter: str | None
    output_tokens: int = 0
    admitted_s: float | None = None
    first_s: float | None = None
    end_s: float | None = None
    hit: bool = True
    load_wait_s: float = 0.0
    link_wait_s: float = 0.0


class Records:
    """An observer of one run (`jchameleon.sim.run.run_once`).

    Attributes:
      requests: by id, in order of arrival.
      ranks: of adapters, by uid.
      moments: (time, KV pages, adapter pages) after every plan.
    """

    def __init__(self, profile: Profile) -> None:
        self.requests: dict[str, Request] = {}
        self.ranks = {adapter.uid: adapter.rank for adapter in profile.sim_adapters()}
        self.moments: list[tuple[float, int, int]] = []
        self._profile = profile
        self._kv_pages: dict[str, int] = {}
        self._adapter_pages: dict[str, int] = {}
        self._carried_s: dict[str, float] = {}  # when the link is done with a copy
        self._link_free_s = 0.0
        self._waiting: dict[str, list[Request]] = {}  # for a copy, by adapter

    def __call__(self, now_s: float, events: tuple[Event, ...], plan: Plan) -> None:
        """Take in one call of the planner."""
        for event in events:
            match event:
                case Arrival(request):
                    self.requests[request.request_id] = Request(
                        request.arrival_s, request.prompt_tokens, request.adapter_uid
                    )
                case LoadDone(uid):
                    for waiting in self._waiting.pop(uid, ()):
                        waiting.load_wait_s = now_s - (waiting.admitted_s or 0.0)
                case StepDone():
                    self._step_done(event, now_s)
        for request_id, *_ in (*plan.failed, *plan.squashed):
            self._kv_pages.pop(request_id, None)
        for uid in plan.evicted:
            self._adapter_pages.pop(uid, None)
        for request_id, pages in (*plan.kv_pages, *plan.grown):
            self._kv_pages[request_id] = self._kv_pages.get(request_id, 0) + len(pages)
        self._admit(plan, now_s)
        self._start_loads(plan, now_s)
        kv_pages = sum(self._kv_pages.values())
        self.moments.append((now_s, kv_pages, sum(self._adapter_pages.values())))

    def _step_done(self, event: StepDone, now_s: float) -> None:
        for request_id, tokens in event.produced:
            request = self.requests[request_id]
            request.output_tokens += tokens
            if request.first_s is None:
                request.first_s = now_s
        for request_id in event.finished:
            self.requests[request_id].end_s = now_s
            self._kv_pages.pop(request_id, None)

    def _start_loads(self, plan: Plan, now_s: float) -> None:
        link = self._profile.link
        for load in plan.loads:
            num_bytes = len(load.pages) * self._profile.page_bytes
            # As `jchameleon.sim.link.Link` carries them: one after the other.
            free_s = max(now_s, self._link_free_s) + num_bytes / link.bytes_per_s
            self._link_free_s = free_s
            carried_s = self._carried_s[load.uid] = free_s + link.latency_s
            self._adapter_pages[load.uid] = len(load.pages)
            for waiting in self._waiting.get(load.uid, ()):
                waiting.link_wait_s = carried_s - (waiting.admitted_s or 0.0)

    def _admit(self, plan: Plan, now_s: float) -> None:
        hits = set(plan.hits)
        for request_id in plan.admitted:
            request = self.requests[request_id]
            if request.admitted_s is not None:
                continue  # it was squashed; what it waited for at first counts
            request.admitted_s = now_s
            if request.adapter is None or request_id in hits:
                continue
            request.hit = False
            self._waiting.setdefault(request.adapter, []).append(request)
            # Of a copy that is under way; the wait for another is known at its start.
            carried_s = self._carried_s.get(request.adapter, now_s)
            request.link_wait_s = max(0.0, carried_s - now_s)

    def figures(self, start_s: float) -> dict[str, Any]:
        """Return what the figures need, of requests that count and have ended.

        Args:
          start_s: when requests began to be due.
        """
        since_s = start_s + self._profile.skip_s
        ended = [
            one
            for one in self.requests.values()
            if one.end_s is not None and one.arrival_s >= since_s
        ]
        return {
            "slowdown": self._slowdown(ended),
            "classes": self._classes(ended),
            "windows": self._windows(ended, start_s),
            "load_wait_s": marks([one.load_wait_s for one in ended]),
            "link_wait_s": marks([one.link_wait_s for one in ended]),
            "miss_wait_max_s": max(
                (one.link_wait_s for one in ended if not one.hit), default=None
            ),
            "memory": self._memory(since_s),
        }

    def _alone_s(self, ended: Sequence[Request]) -> np.ndarray:
        """Return each request's time on an idle engine: f64[n]."""
        return np.array(
            [
                isolated_s(
                    self._profile,
                    prompt_tokens=one.prompt_tokens,
                    output_tokens=one.output_tokens,
                    rank=0 if one.adapter is None else self.ranks[one.adapter],
                )
                for one in ended
            ]
        )

    def _slowdown(self, ended: Sequence[Request]) -> list[float]:
        took_s = np.array([(one.end_s or 0.0) - one.arrival_s for one in ended])
        return marks(took_s / self._alone_s(ended)) if ended else []

    def _classes(self, ended: Sequence[Request]) -> dict[str, dict[str, float]]:
        """Return mean queueing and end-to-end seconds of each size class."""
        order = np.argsort(self._alone_s(ended), kind="stable")
        table = {}
        for name, places in zip(CLASSES, np.array_split(order, 3), strict=True):
            mine = [ended[place] for place in places]
            if mine:
                queue = [(one.admitted_s or 0.0) - one.arrival_s for one in mine]
                took = [(one.end_s or 0.0) - one.arrival_s for one in mine]
                table[name] = {
                    "queue_s": float(np.mean(queue)),
                    "e2e_s": float(np.mean(took)),
                }
        return table

    def _windows(
        self, ended: Sequence[Request], start_s: float
    ) -> list[tuple[float, float]]:
        """Return (middle, P99 TTFT) of equal parts of the time of arrivals."""
        duration_s = self._profile.workload.duration_s
        assert duration_s is not None
        skip_s = self._profile.skip_s
        each_s = (duration_s - skip_s) / WINDOWS
        table = []
        for index in range(WINDOWS):
            low_s = skip_s + index * each_s
            mine = [
                (one.first_s or 0.0) - one.arrival_s
                for one in ended
                if low_s <= one.arrival_s - start_s < low_s + each_s
            ]
            if mine:
                p99_s = percentile(np.array(mine), 99)
                table.append((round(low_s + each_s / 2, 3), float(p99_s or 0.0)))
        return table

    def _memory(self, since_s: float) -> dict[str, Any]:
        """Return shares of the pool over time, and of time by idle share."""
        usable = self._profile.num_pages - RESERVED_PAGES
        times, kv, adapters = np.array(self.moments, np.float64).T
        kept = times >= since_s
        times, kv, adapters = times[kept], kv[kept] / usable, adapters[kept] / usable
        if len(times) < 2:
            return {"timeline": [], "idle_median": None, "idle_least": None}
        idle = 1 - kv - adapters
        # Each holds until the next plan.
        order = np.argsort(idle[:-1])
        weight = np.cumsum(np.diff(times)[order])
        middle = order[int(np.searchsorted(weight, weight[-1] / 2))]
        grid = np.linspace(times[0], times[-1], MOMENTS)
        places = np.searchsorted(times, grid, side="right") - 1
        rows = np.stack([grid - since_s, kv[places], adapters[places]], axis=1)
        return {
            "timeline": [[round(value, 4) for value in row] for row in rows.tolist()],
            "idle_median": float(idle[middle]),
            # Shares of a full pool may sum to a last bit above 1.
            "idle_least": max(0.0, float(idle.min())),
        }


def marks(values: Any) -> list[float]:
    """Return a distribution at `MARKS`, in five digits; empty without values."""
    if not len(values):
        return []
    return [float(f"{v:.5g}") for v in np.percentile(np.asarray(values), MARKS)]


def isolated_s(
    profile: Profile, *, prompt_tokens: int, output_tokens: int, rank: int
) -> float:
    """Return how long a request takes on an idle engine without its adapter.

    Its copy, during which an engine that stalls stands still, one step for its prompt
    and one for each further token. Costs are sums of terms, so the steps of decode are
    as many as their mean.
    """
    cost = profile.cost
    adapted = int(rank > 0)
    prefill = StepWork(
        prefill_tokens=prompt_tokens,
        prefill_lora_tokens=prompt_tokens * adapted,
        prefill_token_ranks=prompt_tokens * rank,
        prefill_pairs=prompt_tokens * (prompt_tokens + 1) // 2,
    )
    total_s = cost.step_s(prefill)
    steps = output_tokens - 1
    if steps > 0:
        # As many times the mean of the first and the last.
        both = [
            cost.step_s(
                StepWork(
                    decode_rows=1,
                    decode_lora_rows=adapted,
                    decode_kv_tokens=prompt_tokens + at,
                    decode_ranks=rank,
                )
            )
            for at in (1, steps)
        ]
        total_s += steps * sum(both) / 2
    if rank:
        num_bytes = profile.layout.num_pages(rank) * profile.page_bytes
        total_s += max(1.0, profile.link.stall) * profile.link.copy_s(num_bytes)
    return total_s
