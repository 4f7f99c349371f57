"""Quantiles of the latest values of a series."""

import bisect
import collections
import math


class SlidingQuantile:
    """The last `window` integers, kept sorted: quantiles without sorting.

    Adding costs two binary searches and two moves within a list of `window`; a
    quantile is one look-up.
    """

    def __init__(self, window: int) -> None:
        self._latest: collections.deque[int] = collections.deque(maxlen=window)
        self._sorted: list[int] = []

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, value: int) -> None:
        """Append `value`; the oldest leaves once there are more than `window`."""
        if len(self._latest) == self._latest.maxlen:
            del self._sorted[bisect.bisect_left(self._sorted, self._latest[0])]
        self._latest.append(value)
        bisect.insort(self._sorted, value)

    def at(self, quantile: float) -> int:
        """Return the smallest value that at least a share `quantile` does not exceed.

        Needs at least one value and 0 < `quantile` <= 1.
        """
        # 0.55 * 100 comes out just above 55: without the slack it would be rank 56.
        rank = math.ceil(quantile * len(self._sorted) - 1e-9)
        return self._sorted[max(rank, 1) - 1]
