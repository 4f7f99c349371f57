"""One-dimensional K-means against every assignment, and the rules that choose K."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jchameleon.runtime.policy.kmeans import cluster, elbow, least_wcss


def squares(values):
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values)


def wcss_of(labels, values):
    return sum(
        squares([v for v, own in zip(values, labels, strict=True) if own == label])
        for label in set(labels)
    )


def least_by_intervals(values, clusters):
    """The textbook recurrence, one sum at a time."""
    values = sorted(values)
    best = [squares(values[: j + 1]) for j in range(len(values))]
    for _ in range(1, clusters):
        best = [
            min(
                (best[i - 1] + squares(values[i : j + 1]) for i in range(1, j + 1)),
                default=0.0,
            )
            for j in range(len(values))
        ]
    return best[-1]


VALUES = st.lists(
    st.one_of(
        st.integers(0, 6).map(float),  # ties and duplicates
        st.integers(-(10**6), 10**6).map(lambda number: number / 1024),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60)
@given(VALUES)
def test_clusters_of_few_values_are_no_worse_than_any_assignment(values):
    found = cluster(np.array(values), 4)
    assert len(found) == min(4, len(set(values)))
    for clusters, clustering in enumerate(found, start=1):
        assignments = itertools.product(range(clusters), repeat=len(values))
        least = min(wcss_of(labels, values) for labels in assignments)
        assert clustering.wcss == pytest.approx(least, rel=1e-9, abs=1e-7)
        assert len(clustering.centroids) == clusters
        assert (np.diff(clustering.centroids) > 0).all()
        # The centroids are those of the partition that has this error.
        nearest = np.abs(np.array(values)[:, None] - clustering.centroids).argmin(1)
        assert wcss_of(nearest.tolist(), values) == pytest.approx(
            clustering.wcss, rel=1e-9, abs=1e-7
        )


@pytest.mark.parametrize("count", [63, 64, 65, 130])
def test_clusters_of_many_values_match_the_recurrence(count):
    rng = np.random.default_rng(count)
    values = rng.integers(0, 100, count) / 64 + 1000.0
    for clusters, clustering in enumerate(cluster(values, 3), start=1):
        least = least_by_intervals(values.tolist(), clusters)
        assert clustering.wcss == pytest.approx(least, rel=1e-9)


def test_clusters_do_not_depend_on_the_order_of_values():
    rng = np.random.default_rng(5)
    values = rng.integers(0, 9, 100) / 10
    shuffled = rng.permutation(values)
    for one, other in zip(cluster(values, 4), cluster(shuffled, 4), strict=True):
        assert one.wcss == other.wcss
        assert one.centroids.tolist() == other.centroids.tolist()


def test_two_pairs_give_worked_numbers():
    one, two, three, four = cluster(np.array([11.0, 1.0, 10.0, 2.0]), 4)
    assert (one.centroids.tolist(), one.wcss) == ([6.0], 82.0)
    assert (two.centroids.tolist(), two.wcss) == ([1.5, 10.5], 1.0)
    # A tie: the last cluster takes as many as it can.
    assert (three.centroids.tolist(), three.wcss) == ([1.0, 2.0, 10.5], 0.5)
    assert (four.centroids.tolist(), four.wcss) == ([1.0, 2.0, 10.0, 11.0], 0.0)
    assert one.cut_offs() == []
    assert two.cut_offs() == [6.0]
    assert three.cut_offs() == [1.5, 6.25]


def test_one_distinct_value_makes_one_cluster():
    (only,) = cluster(np.full(20, 0.3), 4)
    assert only.centroids == pytest.approx([0.3], abs=1e-15)
    assert only.wcss == 0.0
    assert least_wcss([only]) is elbow([only], 0.1) is only


def test_weights_of_duplicates_move_the_centroid():
    one, two = cluster(np.array([0.0, 0.0, 0.0, 4.0]), 4)
    assert (one.centroids.tolist(), one.wcss) == ([1.0], 12.0)
    assert (two.centroids.tolist(), two.wcss) == ([0.0, 4.0], 0.0)


def test_literal_rule_takes_the_most_clusters():
    found = cluster(np.arange(10.0), 4)
    assert least_wcss(found) is found[3]
    assert least_wcss(found).wcss == min(each.wcss for each in found)


def test_elbow_stops_where_one_more_cluster_gains_too_little():
    # Of 82, the second cluster removes 81, the third 0.5, the fourth 0.5.
    found = cluster(np.array([1.0, 2.0, 10.0, 11.0]), 4)
    assert elbow(found, 0.1) is found[1]
    assert elbow(found, 0.99) is found[0]
    assert elbow(found, 0.006) is found[3]
