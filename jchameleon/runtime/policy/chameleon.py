"""Chameleon's scheduler: lanes by size with token quotas of their own."""

import bisect
import math
from typing import Literal

import numpy as np

from jchameleon.config import is_number
from jchameleon.errors import ConfigError
from jchameleon.runtime.policy.admission import AdmissionView
from jchameleon.runtime.policy.lanes import Entry, Lane, Tally, split_tokens
from jchameleon.runtime.policy.plan import LaneStats
from jchameleon.runtime.policy.request import Request
from jchameleon.runtime.policy.traffic import Traffic
from jchameleon.runtime.policy.wrs import rank_chunks

_BYPASS_SCAN = 8  # requests behind a head that are looked at


class Chameleon:
    """Admit from several lanes at once, each within its quota (Chameleon, section 4.3).

    A request waits in the lane of its weighted size and costs its prompt, its predicted
    output and its adapter, in tokens, for as long as it runs; an adapter that several
    share is charged to each (our own choice). From time to time lanes and quotas are
    derived anew from recent requests; until the first time one lane has everything.

    Every iteration (Algorithm 1) spends each lane's own tokens, smallest lane first,
    then what lanes without waiting requests leave over, again smallest lane first. Who
    borrows is charged in its own lane, and that overdraft lessens what is left over
    until it is paid back. A head whose pages are not to be had ends its lane's turn,
    but if it is the adapter that does not fit, younger requests of the lane may pass if
    they are expected to end before the head could start. As soon as it could run if
    they did not, they are squashed, the youngest first.

    Priorities are ours: within a lane lower ones come first, whatever their age. The
    first request is the oldest of the most urgent that wait.

    Two rules are ours too. When nothing runs, the first request starts whatever it
    costs. And once `max_overtaken` requests have overtaken it, nobody else starts
    before it, and no quota holds it back. So, while no more urgent one waits, nobody
    is overtaken more often: of the requests of one priority, let f(r) be how often
    any joined the line (arrived or came back) after r arrived, less those younger than
    r that wait, and how often a less urgent request started in that time. Each time r
    is overtaken, a less urgent request starts, or a younger one's wait ends that began
    after r arrived, so r was overtaken at most f(r) times. If q is older than r, f(q)
    >= f(r): all who arrived after q and up to r are joins that f(q) counts and f(r)
    does not, and those among them who wait are all that it takes off beyond f(r). A
    request other than the first, o, is admitted only while f(o) < max_overtaken, and
    then f(r) <= f(o) < max_overtaken for all of its priority who wait.
    f is an upper bound: it also counts younger requests that were cancelled, and for
    one that was squashed those that started while it ran.

    Options:
      slo_s: time to first token that quotas aim at.
      refresh_s: between two derivations of lanes and quotas.
      first_refresh_s: from the first arrival to the first of them, which also waits
        for `min_samples` requests.
      window_requests: latest requests that a derivation looks at.
      max_lanes: most lanes.
      lanes: "kmeans" takes the clusters with the least error, always `max_lanes` of
        them, as published; "elbow" as few as `elbow_gain` asks for; "static" cuts the
        range of sizes, 0 to 1, into `max_lanes` equal intervals.
      elbow_gain: share of the error of a single cluster that one more must remove.
      bypass: whether requests may pass a head whose adapter does not fit.
      max_overtaken: the bound above; 0 admits strictly in order.
      recharge: whether a request that outgrows its prediction moves to the next larger
        lane at the cost of its new prediction.

    Raises:
      ConfigError: an option is out of its range.
    """

    def __init__(
        self,
        *,
        slo_s: float = 5.0,
        refresh_s: float = 300.0,
        first_refresh_s: float = 30.0,
        min_samples: int = 32,
        window_requests: int = 512,
        max_lanes: int = 4,
        lanes: Literal["kmeans", "elbow", "static"] = "kmeans",
        elbow_gain: float = 0.1,
        bypass: bool = True,
        max_overtaken: int = 256,
        recharge: bool = False,
    ) -> None:
        if not is_number(refresh_s) or refresh_s <= 0:
            raise ConfigError(
                f"refresh_s={refresh_s!r} must be a finite number of seconds above 0"
            )
        if not is_number(first_refresh_s) or first_refresh_s < 0:
            raise ConfigError(
                f"first_refresh_s={first_refresh_s!r} must be a finite number of "
                "seconds, 0 or more"
            )
        if type(min_samples) is not int or min_samples < 1:
            raise ConfigError(f"min_samples={min_samples!r} must be a positive integer")
        if type(max_overtaken) is not int or max_overtaken < 0:
            raise ConfigError(
                f"max_overtaken={max_overtaken!r} must be an integer, 0 or above"
            )
        for name, switch in (("bypass", bypass), ("recharge", recharge)):
            if type(switch) is not bool:
                raise ConfigError(f"{name}={switch!r} must be true or false")
        self._refresh_s = refresh_s
        self._first_refresh_s = first_refresh_s
        self._min_samples = min_samples
        self._bypasses = bypass
        self._max_overtaken = max_overtaken
        self._recharges = recharge
        self._traffic = Traffic(
            window_requests=window_requests,
            max_lanes=max_lanes,
            lanes=lanes,
            elbow_gain=elbow_gain,
            slo_s=slo_s,
        )
        self._refresh_at_s = math.inf
        self._total_tokens = 0
        self._block_tokens = 1
        self._max_running = 0
        self._cut_offs: list[float] = []
        self._lanes = [Lane(upper_wrs=math.inf, least_tokens=0.0)]
        self._entries: dict[str, Entry] = {}  # in order of arrival
        self._tallies: dict[int, Tally] = {}  # by priority
        self._arrived = 0

    def admit(self, view: AdmissionView) -> None:
        """Take in what happened, refresh lanes if it is time, and admit."""
        capacity = view.capacity
        self._block_tokens = capacity.block_tokens
        self._max_running = capacity.max_running
        self._traffic.largest.chunks = rank_chunks(capacity.max_rank)
        self._take_in(view)
        self._refresh(view, max(0, capacity.pages) * capacity.block_tokens)
        if not self._admit_overdue(view):
            return
        stuck: list[Lane] = []
        for borrow in (False, True):
            for lane in self._lanes:
                while len(lane) and lane not in stuck:
                    if not self._admit_from(view, lane, borrow, stuck):
                        break
                    if not self._admit_overdue(view):
                        return
        first = self._first()
        if first is not None and view.num_running == 0:
            self._start(view, first)

    def lanes(self) -> tuple[LaneStats, ...]:
        """Return the lanes as they are, smallest first."""
        return tuple(
            LaneStats(
                upper_wrs=lane.upper_wrs,
                quota_tokens=lane.quota_tokens,
                used_tokens=lane.used_tokens,
                waiting=len(lane),
                running=lane.running,
            )
            for lane in self._lanes
        )

    def _take_in(self, view: AdmissionView) -> None:
        # Arrivals last: an id that ended may come again.
        for request in view.ended:
            self._end(request)
        for request in view.requeued:
            entry = self._entries.get(request.request_id)
            if entry is not None:
                self._requeue(view, entry)
        for request in view.outgrown if self._recharges else ():
            entry = self._entries.get(request.request_id)
            if entry is not None and entry.running:
                self._lanes[entry.lane].refund(entry)
                self._predict(view, entry)
                entry.lane = min(entry.lane + 1, len(self._lanes) - 1)
                self._lanes[entry.lane].charge(entry)
        for request in view.arrived:
            self._arrive(view, request)

    def _arrive(self, view: AdmissionView, request: Request) -> None:
        if not self._arrived:
            self._refresh_at_s = view.now_s + self._first_refresh_s
        self._arrived += 1
        chunks = rank_chunks(view.adapter_rank(request))
        entry = Entry(request, self._arrived, chunks, view.adapter_pages(request))
        tally = self._tallies.setdefault(request.priority, Tally())
        tally.members += 1
        tally.waiting += 1
        tally.joins += 1
        entry.joined_at, entry.passed_at = tally.joins, tally.passed
        self._predict(view, entry)
        self._traffic.largest.see(prompt_tokens=request.prompt_tokens)
        entry.wrs = self._traffic.largest.wrs(
            request.prompt_tokens, entry.predicted_tokens, chunks
        )
        # The first lane whose upper end is not below.
        entry.lane = bisect.bisect_left(self._cut_offs, entry.wrs)
        self._lanes[entry.lane].add(entry)
        self._entries[request.request_id] = entry
        self._traffic.add(view.now_s, entry)

    def _end(self, request: Request) -> None:
        entry = self._entries.pop(request.request_id, None)
        if entry is None:
            return
        entry.unlink()
        lane = self._lanes[entry.lane]
        tally = self._tallies[request.priority]
        if entry.running:
            lane.refund(entry)
        else:
            lane.remove(entry)
            tally.waiting -= 1
        tally.members -= 1
        if not tally.members:
            del self._tallies[request.priority]

    def _requeue(self, view: AdmissionView, entry: Entry) -> None:
        """Let a running entry wait again, at its place in the order of arrival."""
        entry.unlink()
        entry.running = False
        self._lanes[entry.lane].refund(entry)
        self._predict(view, entry)
        self._lanes[entry.lane].add(entry)
        tally = self._tallies[entry.request.priority]
        tally.joins += 1
        tally.waiting += 1

    def _predict(self, view: AdmissionView, entry: Entry) -> None:
        """Set the predicted output of an entry, and the cost that follows from it."""
        entry.predicted_tokens = view.predicted_tokens(entry.request)
        entry.cost_tokens = (
            entry.request.prompt_tokens
            + entry.predicted_tokens
            + entry.adapter_pages * self._block_tokens
        )
        self._traffic.largest.see(predicted_tokens=entry.predicted_tokens)

    def _refresh(self, view: AdmissionView, total_tokens: int) -> None:
        """Derive lanes anew if it is time; share out the tokens if anything changed."""
        if self._arrived >= self._min_samples and view.now_s >= self._refresh_at_s:
            self._refresh_at_s = view.now_s + self._refresh_s
            self._regroup(view)
        elif total_tokens == self._total_tokens:
            return
        self._total_tokens = total_tokens
        quotas = split_tokens(total_tokens, [lane.least_tokens for lane in self._lanes])
        for lane, quota in zip(self._lanes, quotas, strict=True):
            lane.quota_tokens = quota

    def _regroup(self, view: AdmissionView) -> None:
        """Cut new lanes and move every request into its own, charges included."""
        self._lanes = self._traffic.cut_lanes(
            view.now_s, block_tokens=self._block_tokens, estimator=view.estimator
        )
        self._cut_offs = [lane.upper_wrs for lane in self._lanes[:-1]]
        entries = list(self._entries.values())
        facts = [
            (e.request.prompt_tokens, e.predicted_tokens, e.chunks) for e in entries
        ]
        columns = np.array(facts, np.float64).reshape(-1, 3).T
        sizes = self._traffic.largest.wrs(*columns)
        indices = np.searchsorted(self._cut_offs, sizes)
        for entry, wrs, index in zip(
            entries, sizes.tolist(), indices.tolist(), strict=True
        ):
            entry.wrs, entry.lane = wrs, index
            if entry.running:
                self._lanes[index].charge(entry)
            else:
                self._lanes[index].add(entry)

    def _first(self) -> Entry | None:
        """Return the oldest of the most urgent entries that wait."""
        heads = (lane.head() for lane in self._lanes if len(lane))
        return min(heads, key=lambda e: (e.request.priority, e.seq), default=None)

    def _overdue(self) -> Entry | None:
        """Return the first waiting entry if it was overtaken too often."""
        first = self._first()
        if first is None:
            return None
        tally = self._tallies[first.request.priority]
        overtaken = tally.joins - first.joined_at - (tally.waiting - 1)
        overtaken += tally.passed - first.passed_at
        return first if overtaken >= self._max_overtaken else None

    def _admit_overdue(self, view: AdmissionView) -> bool:
        """Admit whoever was overtaken too often; return whether others may start."""
        while view.num_running < self._max_running:
            overdue = self._overdue()
            if overdue is None:
                return True
            if not self._start(view, overdue) and not self._squash_for(view, overdue):
                return False
        return False

    def _admit_from(
        self, view: AdmissionView, lane: Lane, borrow: bool, stuck: list[Lane]
    ) -> bool:
        """Admit the head of a lane, or who may pass it; return whether anyone started.

        Adds the lane to `stuck` when its head has the tokens but not the pages.
        """
        head = lane.head()
        self._predict(view, head)  # more may be known than when it arrived
        has_tokens = head.cost_tokens <= self._tokens(lane, borrow)
        if has_tokens and self._start(view, head):
            return True
        if self._squash_for(view, head, borrow):
            return True
        if not has_tokens:
            return False
        stuck.append(lane)
        return self._bypasses and self._pass_head(view, lane, head, borrow)

    def _tokens(self, lane: Lane, borrow: bool, returned: int = 0) -> int:
        """Return what a lane with waiting requests may spend.

        Args:
          borrow: count what lanes without any leave over, less all overdrafts.
          returned: tokens of the lane to take as unused.
        """
        own = lane.left_tokens + returned
        if not borrow:
            return own
        pot = min(own, 0)
        for other in self._lanes:
            if other is not lane and (other.left_tokens < 0 or not len(other)):
                pot += other.left_tokens
        return max(own, 0) + max(pot, 0)

    def _start(
        self, view: AdmissionView, entry: Entry, passed: Entry | None = None
    ) -> bool:
        """Admit a waiting entry if its pages and a row are to be had."""
        if not view.try_admit(
            entry.request,
            lane=entry.lane,
            wrs=entry.wrs,
            passing=None if passed is None else passed.request,
        ):
            return False
        first = self._first()
        assert first is not None, "the entry itself waits"
        if first.request.priority < entry.request.priority:
            self._tallies[first.request.priority].passed += 1
        lane = self._lanes[entry.lane]
        lane.remove(entry)
        lane.charge(entry)
        entry.running = True
        self._tallies[entry.request.priority].waiting -= 1
        if passed is not None:
            entry.passed = passed
            passed.passers[entry.seq] = entry
        return True

    def _pass_head(
        self, view: AdmissionView, lane: Lane, head: Entry, borrow: bool
    ) -> bool:
        """Admit requests behind a head whose adapter does not fit; return if any.

        Each must be expected to end before the head's pages are free, and nobody
        passes who was squashed before, so that squashes stay rare.
        """
        if not view.adapter_absent(head.request):
            return False
        missing_pages = view.missing_pages(head.request)
        wait_s: float | None = None
        anyone = False
        for entry in lane.behind_head(_BYPASS_SCAN):
            if missing_pages == 0 or self._overdue() is not None:
                break
            self._predict(view, entry)
            has_tokens = entry.cost_tokens <= self._tokens(lane, borrow)
            if not has_tokens or view.squashes(entry.request):
                continue
            if wait_s is None:
                wait_s = view.wait_for_pages_s(missing_pages)
            absent = view.adapter_absent(entry.request)
            run_s = view.estimator.run_s(
                prefill_tokens=entry.request.prompt_tokens,
                output_tokens=entry.predicted_tokens,
                load_pages=entry.adapter_pages if absent else 0,
                decode_rows=view.num_running + 1,
            )
            if run_s < wait_s and self._start(view, entry, head):
                anyone = True
                missing_pages = view.missing_pages(head.request)
                wait_s = None
        return anyone

    def _squash_for(
        self, view: AdmissionView, head: Entry, borrow: bool | None = None
    ) -> bool:
        """Admit a head in place of requests that passed it, if that is enough.

        As few as needed are squashed, the least urgent and youngest first. `borrow` as
        in `_tokens`; None asks for no tokens.
        """
        if not head.passers:
            return False
        lane = self._lanes[head.lane]
        passers = [e for e in head.passers.values() if view.can_squash(e.request)]
        passers.sort(key=lambda e: (e.request.priority, e.seq), reverse=True)
        if view.missing_pages(head.request, [entry.request for entry in passers]):
            return False
        returned = 0
        for count, entry in enumerate(passers, start=1):
            returned += entry.cost_tokens if entry.lane == head.lane else 0
            requests = [entry.request for entry in passers[:count]]
            if (
                borrow is None
                or head.cost_tokens <= self._tokens(lane, borrow, returned)
            ) and not view.missing_pages(head.request, requests):
                break
        else:
            return False
        for entry in passers[:count]:
            view.squash(entry.request, "bypass")
            self._requeue(view, entry)
        return self._start(view, head)
