"""When requests with a time limit must have ended. Engine thread only."""

import heapq
import itertools
import math
from collections.abc import Mapping

from jchameleon.runtime.live import LiveRequest

_FEW_ENTRIES = 64


class Deadlines:
    """Live requests by the time at which they must end."""

    def __init__(self, live: Mapping[str, LiveRequest]) -> None:
        """`live` holds, now and later, the requests that have not ended, by id."""
        self._live = live
        self._heap: list[tuple[float, int, LiveRequest]] = []
        self._added = itertools.count()  # breaks ties

    @property
    def next_s(self) -> float:
        """When `passed` may have something to return; infinite for never."""
        return self._heap[0][0] if self._heap else math.inf

    def add(self, live: LiveRequest) -> None:
        """Note when a request must end, if it has a limit."""
        submission = live.submission
        limit_s = submission.sampling.time_limit_s
        if limit_s is None:
            return
        # Those that ended early may have days left: they go when they are many.
        if len(self._heap) > 2 * len(self._live) + _FEW_ENTRIES:
            self._heap = [entry for entry in self._heap if self._is_open(entry[2])]
            heapq.heapify(self._heap)
        end_s = submission.arrival_s + limit_s
        heapq.heappush(self._heap, (end_s, next(self._added), live))

    def passed(self, now_s: float) -> list[str]:
        """Remove and return the ids of those that must end now, soonest first."""
        ids = []
        while self.next_s <= now_s:
            live = heapq.heappop(self._heap)[2]
            if self._is_open(live):
                ids.append(live.submission.request_id)
        return ids

    def _is_open(self, live: LiveRequest) -> bool:
        # An id may have come again after its request ended.
        return self._live.get(live.submission.request_id) is live
