"""The page pool against a naive model, over more than 10^5 random operations."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jchameleon.config import NULL_PAGE, RESERVED_PAGES, TRASH_PAGE
from jchameleon.runtime.policy.pool import (
    PagePool,
    PoolExhausted,
)


class NaivePool:
    """The same books as sets: slow, and too simple to be wrong."""

    def __init__(self, num_pages):
        self.free = set(range(2, num_pages))
        self.owned = {}
        self.shelved = set()

    def took(self, owner, pages, count):
        assert len(pages) == len(set(pages)) == count
        assert set(pages) <= self.free, "a page that was not free"
        self.free -= set(pages)
        self.owned[owner] = tuple(pages)

    def agrees(self, pool):
        assert pool.free_pages == len(self.free)
        assert set(pool.owners()) == self.owned.keys()
        for owner, pages in self.owned.items():
            assert pool.pages_of(owner) == pages
        owned = [page for pages in self.owned.values() for page in pages]
        assert NULL_PAGE not in owned and TRASH_PAGE not in owned
        assert pool.shelved_pages == len(self.shelved)
        total = len(owned) + len(self.shelved) + pool.free_pages + RESERVED_PAGES
        assert total == pool.num_pages


def test_pool_random_operations_match_naive_model():
    """50 pools of 2 to 60 usable pages, 2,100 operations each: 105,000."""
    for seed in range(50):
        rng = random.Random(seed)
        num_pages = rng.randint(4, 62)
        pool, naive = PagePool(num_pages), NaivePool(num_pages)
        for step in range(2_100):
            owners = list(naive.owned)
            action = rng.random()
            if action < 0.5 or not owners:
                count = rng.randint(1, max(2, num_pages // 4))
                if count > len(naive.free):
                    with pytest.raises(PoolExhausted):
                        pool.reserve(step, count)
                else:
                    naive.took(step, pool.reserve(step, count), count)
            elif action < 0.85:
                owner = rng.choice(owners)
                pages = naive.owned.pop(owner)
                assert pool.free(owner) == len(pages)
                naive.free |= set(pages)
            else:
                owner = rng.choice(owners)
                pool.commit(owner, ("resident", step))
                naive.owned[("resident", step)] = naive.owned.pop(owner)
            pool.check()
            naive.agrees(pool)


class PoolMachine(RuleBasedStateMachine):
    """The same model under hypothesis, which shrinks what it finds."""

    def __init__(self):
        super().__init__()
        self.pool, self.naive = PagePool(24), NaivePool(24)

    @rule(owner=st.integers(0, 9), count=st.integers(-1, 24))
    def reserve(self, owner, count):
        if owner in self.naive.owned or count < 1:
            with pytest.raises(ValueError, match="owner|count"):
                self.pool.reserve(owner, count)
        elif count > len(self.naive.free):
            with pytest.raises(PoolExhausted, match=f"needs {count} pages"):
                self.pool.reserve(owner, count)
        else:
            self.naive.took(owner, self.pool.reserve(owner, count), count)

    @rule(owner=st.integers(0, 9))
    def free(self, owner):
        if owner not in self.naive.owned:
            with pytest.raises(KeyError):
                self.pool.free(owner)
        else:
            pages = self.naive.owned.pop(owner)
            assert self.pool.free(owner) == len(pages)
            self.naive.free |= set(pages)

    @precondition(lambda self: self.naive.owned)
    @rule(data=st.data(), new_owner=st.integers(0, 9))
    def commit(self, data, new_owner):
        owner = data.draw(st.sampled_from(list(self.naive.owned)))
        if new_owner in self.naive.owned:
            with pytest.raises(ValueError, match="owns pages already"):
                self.pool.commit(owner, new_owner)
        else:
            self.pool.commit(owner, new_owner)
            self.naive.owned[new_owner] = self.naive.owned.pop(owner)

    @precondition(lambda self: self.naive.owned)
    @rule(data=st.data(), count=st.integers(-1, 8), keep=st.booleans())
    def split(self, data, count, keep):
        owner = data.draw(st.sampled_from(list(self.naive.owned)))
        pages = self.naive.owned[owner]
        move = self.pool.shelve if keep else self.pool.trim
        if not 0 <= count <= len(pages):
            with pytest.raises(ValueError, match=f"owns {len(pages)} pages"):
                move(owner, count)
            return
        assert move(owner, count) in (None, pages[:count])
        self.naive.owned[owner] = pages[count:]
        left = self.naive.shelved if keep else self.naive.free
        left |= set(pages[:count])

    @rule(page=st.integers(0, 23))
    def unshelve(self, page):
        if page not in self.naive.shelved:
            with pytest.raises(KeyError):
                self.pool.unshelve(page)
        else:
            self.pool.unshelve(page)
            self.naive.shelved.remove(page)
            self.naive.free.add(page)

    @invariant()
    def books_agree(self):
        self.pool.check()
        self.naive.agrees(self.pool)


def test_pool_state_machine_matches_naive_model():
    PoolMachine.TestCase.settings = settings(
        max_examples=60, stateful_step_count=40, deadline=None
    )
    PoolMachine.TestCase().runTest()


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8))
def test_pool_drained_and_freed_hands_out_every_page_again(counts):
    pool = PagePool(RESERVED_PAGES + sum(counts))
    for _ in range(2):
        pages = [p for i, n in enumerate(counts) for p in pool.reserve(i, n)]
        assert sorted(pages) == list(range(RESERVED_PAGES, pool.num_pages))
        assert pool.free_pages == 0
        for owner in range(len(counts)):
            pool.free(owner)


def test_pool_commit_keeps_page_order():
    pool = PagePool(12)
    pool.reserve("gap", 3)
    first = pool.reserve("load", 4)
    pool.free("gap")
    pool.commit("load", "resident")
    assert pool.pages_of("resident") == first
    assert pool.owners() == ("resident",)


def test_pool_commit_of_unknown_owner_raises():
    with pytest.raises(KeyError):
        PagePool(4).commit("nobody", "somebody")


@pytest.mark.parametrize("num_pages", [-1, 0, 2])
def test_pool_without_usable_page_refused(num_pages):
    with pytest.raises(ValueError, match=f"num_pages={num_pages} must be above 2"):
        PagePool(num_pages)


def test_pool_check_sees_a_page_that_two_own():
    pool = PagePool(8)
    pages = pool.reserve("a", 2)
    pool._owned["b"] = pages
    with pytest.raises(AssertionError, match="pages lost, doubled"):
        pool.check()
