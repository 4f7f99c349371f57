"""Prefetch from histograms of how long each adapter stays idle."""

import bisect
import dataclasses
import heapq
import math
from collections.abc import Iterator

import numpy as np

from jchameleon.config import is_number
from jchameleon.errors import ConfigError
from jchameleon.runtime.policy.prefetch import PrefetchView, Queued

_FEW_WINDOWS = 64


class IdleTimes:
    """A histogram of idle times, in whole bins."""

    def __init__(self, bins: int) -> None:
        self._counts = np.zeros(bins, np.int32)
        self._squares = 0  # sum of the squared counts
        self.in_bounds = 0
        self.out_of_bounds = 0

    def add(self, bin_index: int) -> None:
        """Count one idle time; beyond the last bin it is out of bounds."""
        if bin_index >= self._counts.size:
            self.out_of_bounds += 1
            return
        self._squares += 2 * int(self._counts[bin_index]) + 1
        self._counts[bin_index] += 1
        self.in_bounds += 1

    def cv(self) -> float:
        """Return the bin counts' standard deviation over their mean.

        0 is flat; sqrt(bins - 1) is all in one bin. Needs a count within bounds.
        """
        # Var / mean^2 with mean = n / bins and var = sum(c^2) / bins - mean^2.
        ratio = self._counts.size * self._squares / self.in_bounds**2
        return math.sqrt(max(ratio - 1.0, 0.0))

    def bins_at(self, *percentiles: float) -> list[int]:
        """Return the bins that hold these percentiles of the counts within bounds."""
        ranks = [
            max(math.ceil(percentile * self.in_bounds / 100), 1)
            for percentile in percentiles
        ]
        return np.searchsorted(np.cumsum(self._counts), ranks).tolist()


@dataclasses.dataclass(slots=True, eq=False)
class _Adapter:
    """What is known of one adapter's coming and going.

    Attributes:
      in_flight: requests that wait or run.
      idle_since_s: when the last of them ended; None before the first.
      period: number of its latest idle period.
      expected_s: when the next request is expected; set with a window.
      is_open: whether it is inside its window.
    """

    idle_times: IdleTimes
    in_flight: int = 0
    idle_since_s: float | None = None
    period: int = 0
    expected_s: float = 0.0
    is_open: bool = False


class Histogram:
    """Load queued adapters, then idle ones that past idle times say are due.

    The hybrid histogram policy of Shahrad et al., "Serverless in the Wild" (USENIX ATC
    '20), per adapter. An idle time runs from the end of its last request in flight to
    the next arrival. When an adapter falls idle, its window opens after
    (1 - margin) * head and closes after (1 + margin) * tail: head is the lower edge of
    the bin at `head_percentile`, tail the upper edge of that at `tail_percentile`. Head
    bin 0 opens it at once. Inside their windows adapters are named in the order of how
    near their median idle time (middle of its bin) is, past or to come: our choice. By
    the windows' ends, those would come first that most likely left for good.

    Where the paper falls back on keeping everything for the whole range (too few idle
    times, or counts too flat to tell a pattern), nothing is named: keeping what was
    used lately is what eviction does anyway. Its ARIMA model for adapters that are
    mostly out of bounds is left out, they are not named either. Bins last seconds
    rather than minutes because a load does.

    An iteration that nothing happens in costs O(1), one that opens or closes windows
    O(log n) and a move within a list for each.

    Options:
      bin_s, bins: width and number of the bins; beyond bin_s * bins is out of bounds.
      head_percentile, tail_percentile: 0 to 100, head below tail.
      margin: 0 <= margin < 1.
      min_cv: least coefficient of variation of the bin counts.
      max_out_of_bounds: largest share of idle times out of bounds.
      min_samples: least number of idle times within bounds; our addition, since one
        alone is as concentrated as can be.
      lookahead_requests: see `Queued`.
      lookahead_adapters: idle adapters named in one iteration, so that one in which
        thousands are due is no longer than others.

    Raises:
      ConfigError: an option is out of its range.
    """

    timed = True

    def __init__(
        self,
        *,
        bin_s: float = 0.5,
        bins: int = 240,
        head_percentile: float = 5,
        tail_percentile: float = 99,
        margin: float = 0.10,
        min_cv: float = 2.0,
        max_out_of_bounds: float = 0.5,
        min_samples: int = 8,
        lookahead_requests: int = 64,
        lookahead_adapters: int = 256,
    ) -> None:
        for name, count in (
            ("bins", bins),
            ("min_samples", min_samples),
            ("lookahead_adapters", lookahead_adapters),
        ):
            if type(count) is not int or count < 1:
                raise ConfigError(f"{name}={count!r} must be a positive integer")
        if not is_number(bin_s) or bin_s <= 0:
            raise ConfigError(f"bin_s={bin_s!r} must be a positive number")
        if not is_number(tail_percentile) or not 0 < tail_percentile <= 100:
            raise ConfigError(
                f"tail_percentile={tail_percentile!r} must be above 0, at most 100"
            )
        if not is_number(head_percentile) or not 0 <= head_percentile < tail_percentile:
            raise ConfigError(
                f"head_percentile={head_percentile!r} must be at least 0 and below "
                f"tail_percentile={tail_percentile}"
            )
        if not is_number(margin) or not 0 <= margin < 1:
            raise ConfigError(f"margin={margin!r} must be at least 0 and below 1")
        if not is_number(min_cv) or not 0 <= min_cv <= math.sqrt(bins - 1):
            raise ConfigError(
                f"min_cv={min_cv!r} must be 0 to {math.sqrt(bins - 1):.3g}, the most "
                f"that bins={bins} can reach"
            )
        if not is_number(max_out_of_bounds) or not 0 <= max_out_of_bounds <= 1:
            raise ConfigError(f"max_out_of_bounds={max_out_of_bounds!r} must be 0 to 1")
        self._queued = Queued(lookahead_requests=lookahead_requests)
        self._bin_s = bin_s
        self._bins = bins
        self._percentiles = (head_percentile, 50, tail_percentile)
        self._margin = margin
        self._min_cv = min_cv
        self._max_out_of_bounds = max_out_of_bounds
        self._min_samples = min_samples
        self._lookahead_adapters = lookahead_adapters
        self._adapters: dict[str, _Adapter] = {}
        self._periods = 0
        # Windows to open and to close: (time, period, whether to close, uid). Those of
        # past periods stay until their time and are then skipped.
        self._agenda: list[tuple[float, int, bool, str]] = []
        # Open windows: (expected time, period, uid), sorted. Periods are numbered in
        # the order in which adapters fell idle, so they break ties.
        self._open: list[tuple[float, int, str]] = []

    def observe(self, view: PrefetchView) -> None:
        """Learn who came and went, and open and close the windows that are due.

        Arrivals count before ends: within one iteration the order is not known, and an
        adapter that is asked for while in use was never idle.
        """
        for request in view.arrived:
            if request.adapter_uid is not None:
                self._arrive(request.adapter_uid, view.now_s)
        for request in view.ended:
            if request.adapter_uid is not None:
                self._end(request.adapter_uid, view.now_s)
        while self._agenda and self._agenda[0][0] <= view.now_s:
            _, period, closes, uid = heapq.heappop(self._agenda)
            adapter = self._adapters.get(uid)
            if adapter is None or adapter.period != period or adapter.in_flight:
                continue
            if closes:
                self._close(uid, adapter)
            else:
                bisect.insort(self._open, (adapter.expected_s, period, uid))
                adapter.is_open = True

    def forget(self, uid: str) -> None:
        """Forget an adapter's idle times and its window."""
        adapter = self._adapters.pop(uid, None)
        if adapter is None:
            return
        assert not adapter.in_flight, f"adapter {uid} was unregistered in use"
        self._close(uid, adapter)
        # Its windows stay on the agenda until their time, or until those of the past
        # are the majority: each adapter has two.
        if len(self._agenda) > 4 * len(self._adapters) + _FEW_WINDOWS:
            self._agenda = [
                item
                for item in self._agenda
                if (known := self._adapters.get(item[3])) and known.period == item[1]
            ]
            heapq.heapify(self._agenda)

    def candidates(self, view: PrefetchView) -> Iterator[str]:
        """Yield adapters of waiting requests, then idle ones inside their windows."""
        yield from self._queued.candidates(view)
        windows, now_s = self._open, view.now_s
        # Outwards from now: `ahead` is still expected, `behind` is overdue.
        ahead = bisect.bisect_left(windows, (now_s,))
        behind = ahead - 1
        for _ in range(min(len(windows), self._lookahead_adapters)):
            if behind < 0 or (
                ahead < len(windows)
                and windows[ahead][0] - now_s <= now_s - windows[behind][0]
            ):
                yield windows[ahead][2]
                ahead += 1
            else:
                yield windows[behind][2]
                behind -= 1

    def _arrive(self, uid: str, now_s: float) -> None:
        adapter = self._adapters.get(uid)
        if adapter is None:
            adapter = self._adapters[uid] = _Adapter(IdleTimes(self._bins))
        adapter.in_flight += 1
        if adapter.in_flight > 1:
            return
        self._close(uid, adapter)
        if adapter.idle_since_s is not None:
            adapter.idle_times.add(int((now_s - adapter.idle_since_s) / self._bin_s))

    def _end(self, uid: str, now_s: float) -> None:
        adapter = self._adapters[uid]
        assert adapter.in_flight > 0, f"adapter {uid}: more requests ended than came"
        adapter.in_flight -= 1
        if adapter.in_flight:
            return
        self._periods += 1
        adapter.period = self._periods
        adapter.idle_since_s = now_s
        if not self._is_representative(adapter.idle_times):
            return
        head, median, tail = adapter.idle_times.bins_at(*self._percentiles)
        adapter.expected_s = now_s + (median + 0.5) * self._bin_s
        opens_s = now_s + (1 - self._margin) * head * self._bin_s
        closes_s = now_s + (1 + self._margin) * (tail + 1) * self._bin_s
        heapq.heappush(self._agenda, (opens_s, adapter.period, False, uid))
        heapq.heappush(self._agenda, (closes_s, adapter.period, True, uid))

    def _is_representative(self, idle_times: IdleTimes) -> bool:
        """Return whether the counts say when the adapter comes back."""
        within, beyond = idle_times.in_bounds, idle_times.out_of_bounds
        return (
            within >= self._min_samples
            and beyond <= self._max_out_of_bounds * (within + beyond)
            and idle_times.cv() >= self._min_cv
        )

    def _close(self, uid: str, adapter: _Adapter) -> None:
        """Drop an adapter's open window, if it has one."""
        if adapter.is_open:
            entry = (adapter.expected_s, adapter.period, uid)
            del self._open[bisect.bisect_left(self._open, entry)]
            adapter.is_open = False
