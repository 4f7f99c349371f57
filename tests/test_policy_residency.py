"""The adapter table: transitions, references, counters and candidate columns."""

import random

import pytest

from jchameleon.runtime.policy.pool import PagePool, PoolExhausted
from jchameleon.runtime.policy.residency import Residency, State


def resident(residency, uid, *, pages=2, rank=8, used_s=0.0):
    """Register, use once, load and release: an idle resident adapter."""
    residency.register(uid, rank, pages)
    adapter = residency.get(uid)
    residency.acquire(adapter)
    residency.reserve(adapter)
    while adapter.state is not State.LOADING:
        assert residency.start_next_load() is not None
    residency.finish_load(uid, failed=False)
    residency.release(adapter, used_s)
    return adapter


def test_register_twice_keeps_the_first():
    residency = Residency(PagePool(16))
    residency.register("a", 8, 2)
    residency.register("a", 64, 9)
    assert (residency.get("a").rank, residency.get("a").num_pages) == (8, 2)
    assert residency.uids() == ("a",)


def test_unknown_uid_raises():
    with pytest.raises(ValueError, match="uid='x' was never registered"):
        Residency(PagePool(16)).get("x")


def test_life_of_an_adapter_moves_pages_and_counts():
    pool = PagePool(16)
    residency = Residency(pool)
    residency.register("a", 16, 4)
    adapter = residency.get("a")

    assert residency.acquire(adapter) is False
    residency.reserve(adapter)
    assert adapter.state is State.PENDING
    assert (residency.loading_pages, residency.loads_in_flight) == (4, 0)
    residency.check()

    uid, pages = residency.start_next_load()
    assert (uid, len(pages), residency.loads_in_flight) == ("a", 4, 1)
    assert residency.pages("a") is None
    assert residency.start_next_load() is None
    residency.check()

    residency.finish_load("a", failed=False)
    assert residency.pages("a") == pages
    assert (residency.loading_pages, residency.resident_pages) == (0, 4)
    assert len(residency.candidates) == 0, "in use"
    residency.check()

    assert residency.acquire(adapter) is True
    residency.release(adapter, 3.0)
    assert len(residency.candidates) == 0, "one reference is left"
    residency.release(adapter, 4.0)
    assert residency.candidates.adapters == [adapter]
    assert residency.candidates.last_used_s.tolist() == [4.0]
    assert residency.candidates.frequency.tolist() == [2]
    residency.check()

    residency.evict(adapter)
    assert residency.pages("a") is None
    assert pool.free_pages == 14
    residency.check()

    stats = residency.stats("a")
    assert (stats.state, stats.rank, stats.num_pages) == ("absent", 16, 4)
    assert (stats.hits, stats.misses, stats.loads) == (1, 1, 1)
    assert (stats.evictions, stats.failures) == (1, 0)


def test_failed_load_returns_pages_and_counts():
    pool = PagePool(16)
    residency = Residency(pool)
    residency.register("a", 8, 3)
    adapter = residency.get("a")
    residency.acquire(adapter)
    residency.reserve(adapter)
    residency.start_next_load()
    residency.finish_load("a", failed=True)
    residency.release(adapter, 0.0)
    residency.check()
    assert (adapter.state, pool.free_pages) == (State.ABSENT, 14)
    assert residency.stats("a").failures == residency.failures == 1
    assert residency.loads_in_flight == 0


def test_release_of_unstarted_load_gives_it_up_of_started_load_does_not():
    pool = PagePool(16)
    residency = Residency(pool)
    for uid in ("started", "pending"):
        residency.register(uid, 8, 3)
        residency.acquire(residency.get(uid))
        residency.reserve(residency.get(uid))
    residency.start_next_load()
    for uid in ("started", "pending"):
        residency.release(residency.get(uid), 1.0)
        residency.check()
    assert residency.get("started").state is State.LOADING
    assert residency.get("pending").state is State.ABSENT
    assert residency.start_next_load() is None
    residency.finish_load("started", failed=False)
    assert residency.candidates.adapters == [residency.get("started")]
    assert pool.free_pages == 11


def test_reserve_without_room_changes_nothing():
    residency = Residency(PagePool(4))
    residency.register("a", 8, 3)
    with pytest.raises(PoolExhausted):
        residency.reserve(residency.get("a"))
    assert residency.get("a").state is State.ABSENT
    residency.check()


@pytest.mark.parametrize("state", ["absent", "pending", "resident"])
def test_finish_load_without_load_under_way_raises(state):
    residency = Residency(PagePool(16))
    residency.register("a", 8, 3)
    if state == "pending":
        residency.acquire(residency.get("a"))
        residency.reserve(residency.get("a"))
    if state == "resident":
        resident(residency, "a")
    with pytest.raises(ValueError, match=f"'a' is {state}, no load is under way"):
        residency.finish_load("a", failed=False)


def test_pinned_adapter_is_never_a_candidate():
    residency = Residency(PagePool(16))
    adapter = resident(residency, "a")
    residency.pin("a", pinned=True)
    assert len(residency.candidates) == residency.candidates.total_pages == 0
    residency.acquire(adapter)
    residency.release(adapter, 6.0)
    assert len(residency.candidates) == 0
    residency.check()
    residency.pin("a", pinned=False)
    assert residency.candidates.adapters == [adapter]
    residency.check()


def test_queued_count_of_idle_adapter_shows_in_its_column():
    residency = Residency(PagePool(16))
    resident(residency, "a")
    resident(residency, "b")
    residency.add_queued("b")
    residency.add_queued("b")
    residency.drop_queued("b")
    assert residency.candidates.queued.tolist() == [0, 1]
    residency.check()


def test_evict_of_adapter_in_use_is_an_internal_error():
    residency = Residency(PagePool(16))
    adapter = resident(residency, "a")
    residency.acquire(adapter)
    with pytest.raises(AssertionError, match="may not be evicted"):
        residency.evict(adapter)


def test_random_life_keeps_columns_and_books_in_step():
    """20,000 transitions of 60 adapters; every column is checked after each 10."""
    rng = random.Random(5)
    pool = PagePool(150)
    residency = Residency(pool)
    for i in range(60):
        residency.register(f"a{i}", 8 * (1 + i % 4), 1 + i % 7)
    users = []
    for step in range(20_000):
        adapter = residency.get(f"a{rng.randrange(60)}")
        action = rng.randrange(7)
        if action == 0 and (
            adapter.state is not State.ABSENT or adapter.num_pages <= pool.free_pages
        ):
            residency.acquire(adapter)
            if adapter.state is State.ABSENT:
                residency.reserve(adapter)
            users.append(adapter)
        elif action in (1, 2) and users:
            residency.release(users.pop(rng.randrange(len(users))), float(step))
        elif action == 3 and residency.loads_in_flight < 3:
            residency.start_next_load()
        elif action == 4 and adapter.state is State.LOADING:
            failed = rng.random() < 0.2 and adapter not in users
            residency.finish_load(adapter.uid, failed=failed)
        elif action == 5 and adapter.row >= 0:
            residency.evict(adapter)
        elif action == 6:
            residency.pin(adapter.uid, pinned=rng.random() < 0.2)
            residency.add_queued(adapter.uid)
        if step % 10 == 0:
            pool.check()
            residency.check()
    assert residency.evictions > 50 and residency.failures > 10
