"""What a simulation measures, in a few bytes a request."""

from array import array

import numpy as np


class Samples:
    """Times of the requests that count, and of the steps between their tokens.

    Gaps between tokens are kept by value and count: all rows that decode in two steps
    running have the same one.

    Attributes:
      ended, failed: requests that count; only those that ended have times.
      last_s: when the last of them ended.
    """

    def __init__(self) -> None:
        self.ended = 0
        self.failed = 0
        self.last_s = 0.0
        self._ttft_s = array("d")
        self._e2e_s = array("d")
        self._ranks = array("i")
        self._gaps_s = array("d")
        self._gap_counts = array("i")

    def add(self, now_s: float, *, ttft_s: float, e2e_s: float, rank: int) -> None:
        """Take in a request that ended at `now_s`."""
        self.ended += 1
        self.last_s = now_s
        self._ttft_s.append(ttft_s)
        self._e2e_s.append(e2e_s)
        self._ranks.append(rank)

    def add_gaps(self, gap_s: float, count: int) -> None:
        """Take in tokens that came `gap_s` after the one before."""
        self._gaps_s.append(gap_s)
        self._gap_counts.append(count)

    @property
    def ttft_s(self) -> np.ndarray:
        """Time to first token of each request: f64[ended]."""
        return np.frombuffer(self._ttft_s, np.float64)

    @property
    def e2e_s(self) -> np.ndarray:
        """Time to last token of each request: f64[ended]."""
        return np.frombuffer(self._e2e_s, np.float64)

    @property
    def ranks(self) -> np.ndarray:
        """Rank of each request's adapter: i32[ended]."""
        return np.frombuffer(self._ranks, np.int32)

    @property
    def gaps(self) -> tuple[np.ndarray, np.ndarray]:
        """Times between tokens and how often each came: f64[n], i32[n]."""
        return (
            np.frombuffer(self._gaps_s, np.float64),
            np.frombuffer(self._gap_counts, np.int32),
        )


def percentile(
    values: np.ndarray,  # f64[n]
    percent: float,
    counts: np.ndarray | None = None,  # i32[n]
) -> float | None:
    """Return the least value that `percent` of all do not exceed; None without any.

    Args:
      counts: how often each value came; once where it is None.
    """
    if not len(values):
        return None
    order = np.argsort(values, kind="stable")
    counts = np.ones(len(values), np.int64) if counts is None else counts
    total = np.cumsum(counts[order], dtype=np.int64)
    # Rounded, or 99 % of 100 would be a little more than 99.
    place = np.searchsorted(total, round(percent / 100 * int(total[-1]), 6))
    return float(values[order[min(int(place), len(values) - 1)]])
