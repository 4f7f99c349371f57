"""Exact 1-D K-means: where to cut the sizes of requests into lanes."""

import dataclasses
import itertools

import numpy as np

_BLOCK_ROWS = 64


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Clustering:
    """The best partition of some values into a given number of clusters.

    Attributes:
      centroids: means of the clusters, f64[K], increasing.
      wcss: sum of squared distances of all values to the mean of their cluster.
    """

    centroids: np.ndarray
    wcss: float

    def cut_offs(self) -> list[float]:
        """Return the midpoints of neighbouring centroids, K - 1 of them, increasing."""
        return ((self.centroids[1:] + self.centroids[:-1]) / 2).tolist()


def cluster(values: np.ndarray, max_clusters: int) -> list[Clustering]:
    """Return the optimal clusterings for K = 1, 2, ... in that order.

    K ends at `max_clusters` or at the number of distinct values. Optimal clusters of
    numbers are intervals of the sorted distinct values, so dynamic programming finds
    them: the best of values 0 .. j in k clusters is, over all i, the best of 0 .. i - 1
    in k - 1 clusters and i .. j in the last one. Takes O(K n^2) time and O(n^2) memory.
    Among equally good partitions the smallest i wins, so equal values, in whatever
    order, give equal clusters.

    Args:
      values: f64[n], finite, n >= 1.
      max_clusters: at least 1.
    """
    distinct, weights = np.unique(values, return_counts=True)
    n = distinct.size
    # Sums over values before i, f64[n + 1]; around a middle value, so that differences
    # of them keep their digits.
    origin = distinct[n // 2]
    count = _sums_before(weights)
    total = _sums_before(weights * (distinct - origin))
    squares = _sums_before(weights * (distinct - origin) ** 2)
    blocks = [
        _interval_costs(count, total, squares, first, min(first + _BLOCK_ROWS, n))
        for first in range(0, n, _BLOCK_ROWS)
    ]
    best = np.concatenate([block[:, 0] for block in blocks])  # of values 0 .. j
    wcss = [float(best[-1])]
    starts: list[np.ndarray] = []  # of the last cluster, for k = 2, 3, ...
    for _ in range(1, min(max_clusters, n)):
        before = np.concatenate([[np.inf], best[:-1]])  # of values 0 .. i - 1
        sums = [block + before[: block.shape[1]] for block in blocks]
        starts.append(np.concatenate([each.argmin(axis=1) for each in sums]))
        best = np.concatenate([each.min(axis=1) for each in sums])
        wcss.append(float(best[-1]))

    found = []
    for clusters, error in enumerate(wcss, start=1):
        edges = [n]
        for start in reversed(starts[: clusters - 1]):
            edges.append(int(start[edges[-1] - 1]))
        edges = [0, *reversed(edges)]
        means = [
            origin + (total[end] - total[start]) / (count[end] - count[start])
            for start, end in itertools.pairwise(edges)
        ]
        found.append(Clustering(centroids=np.array(means), wcss=error))
    return found


def least_wcss(clusterings: list[Clustering]) -> Clustering:
    """Return the clustering with the least WCSS, which is always the largest K.

    Chameleon, section 4.3, to the letter.
    """
    return clusterings[-1]


def elbow(clusterings: list[Clustering], least_gain: float) -> Clustering:
    """Return the smallest K after which one more cluster gains less than `least_gain`.

    The gain is what WCSS falls by, as a share of that of a single cluster: a share of
    WCSS(K) itself would hardly ever fall below a tenth (values spread evenly gain 1 -
    (K / (K + 1))^2, 36 % at K = 4). Our own choice.
    """
    for few, more in itertools.pairwise(clusterings):
        if few.wcss - more.wcss < least_gain * clusterings[0].wcss:
            return few
    return clusterings[-1]


def _sums_before(values: np.ndarray) -> np.ndarray:
    """Return f64[n + 1], the sums of the first 0, 1, .. n values."""
    return np.concatenate([[0.0], np.cumsum(values)])


def _interval_costs(
    count: np.ndarray, total: np.ndarray, squares: np.ndarray, first: int, end: int
) -> np.ndarray:
    """Return f64[end - first, end], the WCSS of values i .. j as one cluster.

    Rows are j = first .. end - 1, columns i = 0 .. end - 1; infinite for i > j. Blocks
    of rows spare the half above the diagonal and stay in the processor's cache.
    """
    rows = slice(first + 1, end + 1)
    counts = count[rows, None] - count[:end]
    # Within the block's last columns i may exceed j: any count but 0 will do there.
    np.maximum(counts, 1.0, out=counts)
    costs = total[rows, None] - total[:end]
    costs *= costs / counts
    costs = np.maximum(squares[rows, None] - squares[:end] - costs, 0.0)
    corner = costs[:, first:]  # [j - first, i - first]
    corner[np.triu_indices(end - first, 1)] = np.inf
    np.fill_diagonal(corner, 0.0)
    return costs
