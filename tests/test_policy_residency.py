"""The adapter table: transitions, references, counters and candidate columns."""

import pytest

from jchameleon.runtime.policy.candidates import State
from jchameleon.runtime.policy.pool import PagePool, PoolExhausted
from jchameleon.runtime.policy.residency import Residency


def resident(residency, uid, *, pages=2, rank=8, used_s=0.0):
    """Register, use once, load and release: an idle resident adapter."""
    residency.register(uid, rank, pages)
    adapter = residency.get(uid)
    residency.acquire(adapter, 0.0)
    residency.reserve(adapter)
    while adapter.state is not State.LOADING:
        assert residency.start_next_load() is not None
    residency.finish_load(uid, failed=False, now_s=1.0)
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

    assert residency.acquire(adapter, 0.0) is False
    residency.reserve(adapter)
    assert adapter.state is State.PENDING
    assert (residency.loading_pages, residency.loads_in_flight) == (4, 0)
    residency.check()

    uid, pages = residency.start_next_load()
    assert (uid, len(pages), residency.loads_in_flight) == ("a", 4, 1)
    assert residency.pages("a") is None
    assert residency.start_next_load() is None
    residency.check()

    residency.finish_load("a", failed=False, now_s=1.0)
    assert residency.pages("a") == pages
    assert (residency.loading_pages, residency.resident_pages) == (0, 4)
    assert len(residency.candidates) == 0, "in use"
    residency.check()

    assert residency.acquire(adapter, 0.0) is True
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
    assert (stats.frequency, stats.pinned) == (2, False)


def test_failed_load_returns_pages_and_counts():
    pool = PagePool(16)
    residency = Residency(pool)
    residency.register("a", 8, 3)
    adapter = residency.get("a")
    residency.acquire(adapter, 0.0)
    residency.reserve(adapter)
    residency.start_next_load()
    residency.finish_load("a", failed=True, now_s=1.0)
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
        residency.acquire(residency.get(uid), 0.0)
        residency.reserve(residency.get(uid))
    residency.start_next_load()
    for uid in ("started", "pending"):
        residency.release(residency.get(uid), 1.0)
        residency.check()
    assert residency.get("started").state is State.LOADING
    assert residency.get("pending").state is State.ABSENT
    assert residency.start_next_load() is None
    residency.finish_load("started", failed=False, now_s=1.0)
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
        residency.acquire(residency.get("a"), 0.0)
        residency.reserve(residency.get("a"))
    if state == "resident":
        resident(residency, "a")
    with pytest.raises(ValueError, match=f"'a' is {state}, no load is under way"):
        residency.finish_load("a", failed=False, now_s=1.0)


def test_pinned_adapter_is_never_a_candidate():
    residency = Residency(PagePool(16))
    adapter = resident(residency, "a")
    residency.pin("a", pinned=True)
    assert len(residency.candidates) == residency.candidates.total_pages == 0
    residency.acquire(adapter, 0.0)
    residency.release(adapter, 6.0)
    assert len(residency.candidates) == 0
    residency.check()
    residency.pin("a", pinned=False)
    assert residency.candidates.adapters == [adapter]
    residency.check()


def test_pinned_pages_count_every_pinned_adapter_once_wherever_it_is():
    residency = Residency(PagePool(16))
    residency.register("absent", 8, 3)
    resident(residency, "there", pages=4)
    for _ in range(2):
        residency.pin("absent", pinned=True)
        residency.pin("there", pinned=True)
        assert residency.pinned_pages == 7
    assert residency.stats("absent").pinned and residency.stats("there").pinned
    residency.check()
    for _ in range(2):
        residency.pin("there", pinned=False)
        assert residency.pinned_pages == 3
    residency.check()


def test_copy_lined_up_for_a_pin_outlives_requests_and_ends_with_the_pin():
    pool = PagePool(16)
    residency = Residency(pool)
    residency.register("a", 8, 3)
    adapter = residency.get("a")
    residency.pin("a", pinned=True)
    residency.reserve(adapter)
    residency.acquire(adapter, 0.0)
    residency.release(adapter, 1.0)
    assert adapter.state is State.PENDING
    residency.check()

    residency.acquire(adapter, 2.0)
    residency.pin("a", pinned=False)
    assert adapter.state is State.PENDING, "a request needs it"
    residency.pin("a", pinned=True)
    residency.release(adapter, 3.0)
    residency.pin("a", pinned=False)
    assert (adapter.state, pool.free_pages) == (State.ABSENT, 14)
    assert residency.start_next_load() is None
    residency.check()


def test_load_for_a_pin_that_ends_meanwhile_leaves_a_candidate():
    residency = Residency(PagePool(16))
    residency.register("a", 8, 3)
    residency.pin("a", pinned=True)
    residency.reserve(residency.get("a"))
    residency.start_next_load()
    residency.pin("a", pinned=False)
    assert residency.get("a").state is State.LOADING
    residency.finish_load("a", failed=False, now_s=1.0)
    assert residency.candidates.adapters == [residency.get("a")]
    residency.check()


def test_fresh_load_is_younger_than_earlier_uses_and_unused_until_acquired():
    residency = Residency(PagePool(16))
    old = resident(residency, "old", used_s=5.0)
    residency.register("ahead", 8, 2)
    ahead = residency.get("ahead")
    residency.reserve(ahead)
    residency.start_next_load()
    residency.finish_load("ahead", failed=False, now_s=6.0)
    table = residency.candidates
    assert table.adapters == [old, ahead]
    assert table.last_used_s.tolist() == [5.0, 6.0]
    assert table.unused.tolist() == [False, True]
    residency.acquire(ahead, 7.0)
    residency.release(ahead, 8.0)
    assert table.unused.tolist() == [False, False]
    assert table.last_used_s.tolist() == [5.0, 8.0]

    residency.evict(ahead)
    residency.reserve(ahead)
    residency.acquire(ahead, 9.0)  # while the copy waits, but nobody stays for it
    residency.start_next_load()
    residency.release(ahead, 10.0)
    residency.finish_load("ahead", failed=False, now_s=11.0)
    assert table.unused.tolist() == [False, True]


def test_advance_sets_the_time_of_the_table_and_forgets_old_uses():
    residency = Residency(PagePool(16))
    adapter = resident(residency, "a")  # one use at 0 s
    residency.acquire(adapter, 200.0)
    residency.release(adapter, 201.0)
    residency.advance(250.0)
    assert residency.candidates.now_s == 250.0
    assert residency.candidates.frequency.tolist() == [2]
    residency.advance(400.0)
    assert residency.candidates.frequency.tolist() == [1]
    assert residency.stats("a").frequency == 1


def test_largest_rank_and_pages_are_over_all_registered():
    residency = Residency(PagePool(16))
    assert residency.max_rank == 0
    residency.register("a", 64, 2)
    residency.register("b", 8, 9)
    assert residency.max_rank == 64
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
    residency.acquire(adapter, 0.0)
    with pytest.raises(AssertionError, match="may not be evicted"):
        residency.evict(adapter)
