"""Scores in worked examples; victims: order, ties, protection, and not one too many."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jchameleon.errors import ConfigError
from jchameleon.runtime.policy.candidates import Adapter, Candidates, State
from jchameleon.runtime.policy.eviction import (
    ChameleonScore,
    Drop,
    FairShare,
    Gdsf,
    Lru,
    choose_victims,
)
from jchameleon.runtime.policy.pool import PagePool
from jchameleon.runtime.policy.residency import Residency
from jchameleon.runtime.policy.window import UseWindow


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
    table = Candidates(UseWindow())
    for order, (uid, num_pages, last_used_s, queued) in enumerate(rows):
        adapter = Adapter(uid, order, 8, num_pages, queued=queued)
        adapter.last_used_s = last_used_s
        table.add(adapter)
    return table


def used_table(rows, *, now_s):
    """Rows of (uses, last_used_s, num_pages) as candidates."""
    window = UseWindow()
    window.grow(len(rows))
    table = Candidates(window)
    table.now_s = now_s
    for order, (uses, last_used_s, num_pages) in enumerate(rows):
        for _ in range(uses):
            window.note(order, now_s)
        adapter = Adapter(f"a{order}", order, 8, num_pages)
        adapter.last_used_s = last_used_s
        table.add(adapter)
    return table


def uids(victims):
    return [victim.uid for victim, _ in victims]


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
    table = Candidates(UseWindow())
    table.add(Adapter("a", 0, 64, 2, last_used_s=1.0))
    table.add(Adapter("b", 1, 8, 2, last_used_s=9.0))
    assert uids(choose_victims(ByRank(), table, 2)) == ["b"]


def test_columns_cannot_be_written_by_a_policy():
    table = table_of([("a", 2, 1.0, 0)])
    for name in ("order", "num_pages", "rank", "queued", "last_used_s", "unused"):
        column = getattr(table, name)
        with pytest.raises(ValueError, match="read-only"):
            column -= 1 if name != "unused" else True
    table.frequency[0] = 5  # these are copies
    table.load_s[0] = 5
    assert table.frequency[0] == 0


def test_infinite_scores_are_ordered_like_others():
    rows = [("a", 1, 0.0, 0), ("b", 1, 0.0, 0), ("c", 1, 0.0, 0)]
    policy = Fixed([np.inf, 0.0, -np.inf])
    assert uids(choose_victims(policy, table_of(rows), 3)) == ["c", "b", "a"]
    queued = table_of([("a", 1, 0.0, 0), ("b", 1, 0.0, 1), ("c", 1, 0.0, 1)])
    assert uids(choose_victims(policy, queued, 1)) == ["a"]
    assert uids(choose_victims(policy, queued, 3)) == ["a", "c", "b"]
    top = Fixed([np.inf, np.inf, np.inf])
    assert uids(choose_victims(top, queued, 1)) == ["a"]
    assert uids(choose_victims(top, queued, 3)) == ["a", "b", "c"]


def test_more_pages_than_all_candidates_hold_is_an_internal_error():
    table = table_of([("a", 2, 0.0, 0)])
    with pytest.raises(AssertionError, match="hold 2 of 3 pages"):
        choose_victims(Lru(), table, 3)


@pytest.mark.parametrize(
    "scores", [[1.0], [1.0, 2.0, 3.0], [[1.0, 2.0]], [1.0, np.nan]]
)
def test_scores_that_are_not_n_numbers_are_refused(scores):
    table = table_of([("a", 2, 0.0, 0), ("b", 2, 0.0, 0)])
    with pytest.raises(ValueError, match=r"Fixed\.score must return 2 numbers"):
        choose_victims(Fixed(scores), table, 1)


# (uses, last_used_s, num_pages) at 100 s: maxima are 4 uses, 40 s of age, 8 pages.
EXAMPLE = [(4, 90.0, 2), (1, 100.0, 8), (0, 60.0, 4)]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (ChameleonScore(frequency=1, recency=0, size=0), [1.0, 0.25, 0.0]),
        (ChameleonScore(frequency=0, recency=1, size=0), [0.75, 1.0, 0.0]),
        (ChameleonScore(frequency=0, recency=0, size=1), [0.25, 1.0, 0.5]),
        # 0.45 + 0.075 + 0.1125; 0.1125 + 0.1 + 0.45; 0 + 0 + 0.225
        (ChameleonScore(), [0.6375, 0.6625, 0.225]),
        (FairShare(), [2 / 3, 0.75, 1 / 6]),
        (Lru(), [90.0, 100.0, 60.0]),
        (Drop(), [90.0, 100.0, 60.0]),
    ],
)
def test_score_of_worked_example(policy, expected):
    table = used_table(EXAMPLE, now_s=100.0)
    assert policy.score(table).tolist() == pytest.approx(expected, abs=1e-12)


def test_chameleon_evicts_small_cold_old_first_and_lru_does_not():
    """The same table: a large adapter is kept by its size, a busy one by its uses."""
    rows = [(0, 10.0, 16), (9, 20.0, 1), (0, 90.0, 1), (1, 80.0, 1)]
    table = used_table(rows, now_s=100.0)
    assert uids(choose_victims(Lru(), table, 19)) == ["a0", "a1", "a3", "a2"]
    # 0.45; 0.45 + 0.1/9 + 0.45/16; 0.8/9 + 0.45/16; 0.05 + 0.7/9 + 0.45/16
    assert uids(choose_victims(ChameleonScore(), table, 19)) == ["a2", "a3", "a0", "a1"]


def test_chameleon_terms_without_uses_or_ages_are_zero_and_one():
    fresh = used_table([(0, 5.0, 4), (0, 5.0, 2)], now_s=5.0)
    assert ChameleonScore().score(fresh).tolist() == pytest.approx([0.55, 0.325])
    alone = used_table([(3, 5.0, 2)], now_s=6.0)
    assert ChameleonScore().score(alone).tolist() == pytest.approx([0.9])


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 5), st.floats(0.0, 1e6), st.integers(1, 1000)),
        min_size=1,
        max_size=20,
    ),
    weights=st.tuples(*[st.floats(0.0, 2.0)] * 3),
)
def test_chameleon_score_is_the_plain_formula(rows, weights):
    frequency, recency, size = weights
    table = used_table(rows, now_s=1e6)
    expected = []
    for uses, last_used_s, num_pages in rows:
        most, oldest_s = max(row[0] for row in rows), max(1e6 - row[1] for row in rows)
        score = frequency * uses / most if most else 0.0
        score += recency * (1 - (1e6 - last_used_s) / oldest_s if oldest_s else 1.0)
        score += size * num_pages / max(row[2] for row in rows)
        expected.append(score)
    policy = ChameleonScore(frequency=frequency, recency=recency, size=size)
    got = policy.score(table)
    assert got.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert (got >= 0).all() and (got <= sum(weights) + 1e-9).all()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("frequency", -0.1),
        ("recency", float("nan")),
        ("size", float("inf")),
        ("size", "0.45"),
        ("recency", True),
    ],
)
def test_chameleon_weight_out_of_range_is_refused(option, value):
    with pytest.raises(ConfigError, match=f"{option}=.* must be a finite number"):
        ChameleonScore(**{option: value})


def test_gdsf_clock_follows_evictions_and_stays_with_each_use():
    """Pages 2, 3, 6 and loads of 6 s + 1 s a page: 4, 3 and 2 s a page."""
    table = table_of([("a", 2, 0.0, 0), ("b", 3, 0.0, 0), ("c", 6, 0.0, 0)])
    table.load_line = (6.0, 1.0)
    policy = Gdsf()
    for order in (0, 1, 1, 2):
        policy.used(order)
    assert policy.score(table).tolist() == [4.0, 6.0, 2.0]
    assert choose_victims(policy, table, 1)[0][1] == 2.0
    policy.evicted(2, 2.0)
    policy.used(0)  # at clock 2, the second use: 2 + 2 x 4
    policy.used(2)  # back, at clock 2, counted afresh: 2 + 1 x 2
    assert policy.score(table).tolist() == [10.0, 6.0, 4.0]
    policy.evicted(2, 4.0)
    policy.evicted(1, 6.0)
    policy.used(1)  # 6 + 1 x 3
    policy.used(2)  # 6 + 1 x 2
    assert policy.score(table).tolist() == [10.0, 9.0, 8.0]
    # Queued adapters go last, so a lower score may leave after a higher one.
    policy.evicted(0, 10.0)
    policy.evicted(2, 8.0)
    policy.used(2)
    policy.used(0)
    assert policy.score(table).tolist() == [14.0, 9.0, 12.0]


def test_gdsf_adapter_loaded_ahead_stands_as_used_once_until_it_is():
    table = table_of([("a", 1, 0.0, 0), ("ahead", 1, 0.0, 0)])
    policy = Gdsf()
    policy.used(0)
    policy.evicted(0, 1.0)
    policy.used(0)
    assert policy.score(table).tolist() == [2.0, 2.0]
    policy.evicted(0, 5.0)
    policy.used(0)
    assert policy.score(table).tolist() == [6.0, 2.0], "its clock does not move on"
    policy.used(1)
    assert policy.score(table).tolist() == [6.0, 6.0], "used once, not twice"
    policy.used(1)
    assert policy.score(table).tolist() == [6.0, 7.0]


class TextbookGdsf:
    """The algorithm as published: H = clock + uses x cost / size, kept per access."""

    def __init__(self, cost, size, capacity):
        self.cost, self.size, self.free = cost, size, capacity
        self.clock = 0.0
        self.uses, self.value, self.ahead = {}, {}, set()

    def make_room(self, item):
        victims = []
        while self.free < self.size[item]:
            victim = min(self.value, key=lambda i: (self.value[i], i))
            self.clock = self.value.pop(victim)
            self.free += self.size[victim]
            self.ahead.discard(victim)
            victims.append((victim, self.clock))
        self.free -= self.size[item]
        self.uses[item] = 1
        return victims

    def access(self, item, *, ahead):
        """Use an item, or load it ahead of its use; return what had to leave."""
        victims = []
        if item not in self.value:
            victims = self.make_room(item)
        elif ahead:
            return []
        elif item not in self.ahead:
            self.uses[item] += 1
        (self.ahead.add if ahead else self.ahead.discard)(item)
        price = self.uses[item] * self.cost[item] / self.size[item]
        self.value[item] = self.clock + price
        return victims


@given(
    sizes=st.lists(st.sampled_from([1, 2, 4, 8]), min_size=2, max_size=8),
    capacity=st.integers(8, 24),
    accesses=st.lists(
        st.tuples(st.integers(0, 7), st.integers(0, 4)), min_size=20, max_size=80
    ),
)
def test_gdsf_evicts_what_the_textbook_evicts(sizes, capacity, accesses):
    """Sizes are powers of two, so no sum depends on the order of its terms."""
    residency = Residency(PagePool(capacity + 2))
    residency.candidates.load_line = (4.0, 0.5)
    for item, num_pages in enumerate(sizes):
        residency.register(f"a{item}", 8, num_pages)
    cost = [4.0 + 0.5 * num_pages for num_pages in sizes]
    textbook, policy = TextbookGdsf(cost, sizes, capacity), Gdsf()
    free = capacity
    for step, (item, kind) in enumerate(accesses):
        item, ahead = item % len(sizes), kind == 0
        adapter = residency.get(f"a{item}")
        if not ahead:
            residency.acquire(adapter, float(step))
        victims = []
        if adapter.state is State.ABSENT:
            victims = choose_victims(
                policy, residency.candidates, adapter.num_pages - free
            )
        for victim, score in victims:
            residency.evict(victim)
            policy.evicted(victim.order, score)
            free += victim.num_pages
        if not ahead:
            policy.used(item)
        if adapter.state is State.ABSENT:
            free -= adapter.num_pages
            residency.reserve(adapter)
            residency.start_next_load()
            residency.finish_load(adapter.uid, failed=False, now_s=float(step))
        if not ahead:
            residency.release(adapter, float(step))
        expected = textbook.access(item, ahead=ahead)
        assert [(victim.order, score) for victim, score in victims] == expected


def test_drop_expires_used_adapters_and_those_that_nobody_waits_for():
    residency = Residency(PagePool(32))
    for uid in ("used", "used-queued", "ahead", "ahead-queued"):
        residency.register(uid, 8, 2)
        adapter = residency.get(uid)
        if uid.startswith("used"):
            residency.acquire(adapter, 0.0)
        residency.reserve(adapter)
        residency.start_next_load()
        residency.finish_load(uid, failed=False, now_s=1.0)
        if uid.startswith("used"):
            residency.release(adapter, 2.0)
        if uid.endswith("queued"):
            residency.add_queued(uid)
    assert Drop().expired(residency.candidates).tolist() == [True, True, True, False]
    residency.acquire(residency.get("ahead-queued"), 3.0)
    residency.release(residency.get("ahead-queued"), 4.0)
    assert Drop().expired(residency.candidates).all()


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
    assert all(score == victim.last_used_s for victim, score in victims)
    pages = [victim.num_pages for victim, _ in victims]
    assert sum(pages) >= short_pages
    assert sum(pages[:-1]) < short_pages or not pages, "one victim too many"


def test_candidate_columns_survive_growth_and_removal():
    table = Candidates(UseWindow())
    adapters = [Adapter(f"a{i}", i, i % 5, 1 + i % 3) for i in range(100)]
    for adapter in adapters:
        adapter.unused = adapter.order % 7 == 0
        adapter.last_used_s = adapter.order / 4
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
        assert table.unused[row] == adapter.unused
        assert table.last_used_s[row] == adapter.last_used_s


def test_load_seconds_follow_the_line_of_the_table():
    table = table_of([("a", 2, 0.0, 0), ("b", 5, 0.0, 0)])
    assert table.load_s.tolist() == [2.0, 5.0], "by default, pages"
    table.load_line = (0.5, 0.25)
    assert table.load_s.tolist() == [1.0, 1.75]


def test_frequency_column_forgets_old_uses_without_touching_rows():
    window = UseWindow()
    window.grow(2)
    table = Candidates(window)
    for order in (1, 0):
        table.add(Adapter(f"a{order}", order, 8, 1))
    window.note(0, 10.0)
    window.note(1, 10.0)
    window.note(1, 200.0)
    assert table.frequency.tolist() == [2, 1]
    window.advance(400.0)
    assert table.frequency.tolist() == [1, 0]
