"""Victims: order, ties, protection of queued adapters, and no more than needed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jchameleon.runtime.policy.eviction import Lru, choose_victims
from jchameleon.runtime.policy.residency import Adapter, Candidates


class ByRank:
    """Evict the lowest rank first."""

    def score(self, table):
        return table.rank


class Fixed:
    """Return whatever the test wants."""

    def __init__(self, scores):
        self.scores = scores

    def score(self, table):
        return self.scores


def table_of(rows):
    """Rows of (uid, num_pages, last_used_s, queued) as candidates."""
    table = Candidates()
    for order, (uid, num_pages, last_used_s, queued) in enumerate(rows):
        adapter = Adapter(uid, order, 8, num_pages, queued=queued)
        adapter.last_used_s = last_used_s
        table.add(adapter)
    return table


def uids(victims):
    return [victim.uid for victim in victims]


def test_lru_evicts_the_oldest_until_it_fits():
    table = table_of([("a", 2, 30.0, 0), ("b", 2, 10.0, 0), ("c", 2, 20.0, 0)])
    assert uids(choose_victims(Lru(), table, 1)) == ["b"]
    assert uids(choose_victims(Lru(), table, 2)) == ["b"]
    assert uids(choose_victims(Lru(), table, 3)) == ["b", "c"]
    assert uids(choose_victims(Lru(), table, 6)) == ["b", "c", "a"]


@pytest.mark.parametrize("short_pages", [0, -4])
def test_nothing_short_evicts_nothing(short_pages):
    assert choose_victims(Lru(), table_of([("a", 2, 0.0, 0)]), short_pages) == []


def test_queued_adapters_go_only_after_all_others():
    table = table_of([("old", 2, 1.0, 3), ("new", 2, 9.0, 0), ("mid", 2, 5.0, 1)])
    assert uids(choose_victims(Lru(), table, 2)) == ["new"]
    assert uids(choose_victims(Lru(), table, 3)) == ["new", "old"]
    assert uids(choose_victims(Lru(), table, 5)) == ["new", "old", "mid"]


def test_equal_scores_go_in_registration_order_whatever_the_rows():
    table = table_of([(f"a{i}", 1, 0.0, 0) for i in range(6)])
    table.remove(table.adapters[0])  # the last row moves to the front
    assert uids(choose_victims(Lru(), table, 3)) == ["a1", "a2", "a3"]


def test_score_decides_not_last_use():
    table = table_of([("a", 2, 1.0, 0), ("b", 2, 9.0, 0)])
    table.rank[:] = [64, 8]
    assert uids(choose_victims(ByRank(), table, 2)) == ["b"]


def test_infinite_scores_are_ordered_like_others():
    table = table_of([("a", 1, 0.0, 0), ("b", 1, 0.0, 0), ("c", 1, 0.0, 0)])
    policy = Fixed([np.inf, 0.0, -np.inf])
    assert uids(choose_victims(policy, table, 3)) == ["c", "b", "a"]


@pytest.mark.parametrize(
    "scores", [[1.0], [1.0, 2.0, 3.0], [[1.0, 2.0]], [1.0, np.nan]]
)
def test_scores_that_are_not_n_numbers_are_refused(scores):
    table = table_of([("a", 2, 0.0, 0), ("b", 2, 0.0, 0)])
    with pytest.raises(ValueError, match=r"Fixed\.score must return 2 numbers"):
        choose_victims(Fixed(scores), table, 1)


def naive_victims(rows, short_pages):
    """Sort everything, take from the front: the definition."""
    order = sorted(range(len(rows)), key=lambda i: (rows[i][3] > 0, rows[i][2], i))
    taken = []
    for i in order:
        if short_pages <= 0:
            break
        taken.append(rows[i][0])
        short_pages -= rows[i][1]
    return taken


@given(
    rows=st.lists(
        st.tuples(
            st.integers(1, 9),
            st.sampled_from([0.0, 1.0, 2.5, 7.0, 1e9]),
            st.integers(0, 2),
        ),
        min_size=1,
        max_size=40,
    ),
    share=st.floats(0.0, 1.0),
)
def test_victims_are_the_shortest_prefix_in_order(rows, share):
    rows = [(f"a{i}", *row) for i, row in enumerate(rows)]
    short_pages = int(share * sum(row[1] for row in rows))
    victims = choose_victims(Lru(), table_of(rows), short_pages)
    assert uids(victims) == naive_victims(rows, short_pages)
    freed = sum(victim.num_pages for victim in victims)
    assert freed >= short_pages
    if victims:
        assert freed - victims[-1].num_pages < short_pages, "one victim too many"


def test_candidate_columns_survive_growth_and_removal():
    table = Candidates()
    adapters = [Adapter(f"a{i}", i, i % 5, 1 + i % 3) for i in range(100)]
    for adapter in adapters:
        table.add(adapter)
    for adapter in adapters[::3]:
        table.remove(adapter)
        table.remove(adapter)
    left = [a for i, a in enumerate(adapters) if i % 3]
    assert sorted(table.order.tolist()) == [a.order for a in left]
    assert table.total_pages == sum(a.num_pages for a in left)
    for row, adapter in enumerate(table.adapters):
        assert adapter.row == row
        assert table.num_pages[row] == adapter.num_pages
        assert table.rank[row] == adapter.rank
