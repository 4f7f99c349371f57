"""The adapter table: transitions, references, counters and candidate columns."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

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
            residency.acquire(adapter, float(step))
            if adapter.state is State.ABSENT:
                residency.reserve(adapter)
            users.append(adapter)
        elif action in (1, 2) and users:
            residency.release(users.pop(rng.randrange(len(users))), float(step))
        elif action == 3 and residency.loads_in_flight < 3:
            residency.start_next_load()
        elif action == 4 and adapter.state is State.LOADING:
            failed = rng.random() < 0.2 and adapter not in users
            residency.finish_load(adapter.uid, failed=failed, now_s=float(step))
        elif action == 5 and adapter.row >= 0:
            residency.evict(adapter)
        elif action == 6:
            residency.pin(adapter.uid, pinned=rng.random() < 0.2)
            residency.add_queued(adapter.uid)
        if step % 10 == 0:
            pool.check()
            residency.check()
    assert residency.evictions > 50 and residency.failures > 10


class ResidencyMachine(RuleBasedStateMachine):
    """Any legal order of calls, beside a model that keeps its own books in dicts."""

    PAGES = {"a": 1, "b": 2, "c": 3, "d": 5, "e": 8}
    uids = st.sampled_from(sorted(PAGES))

    def __init__(self):
        super().__init__()
        self.pool = PagePool(14)
        self.residency = Residency(self.pool)
        for uid, num_pages in self.PAGES.items():
            self.residency.register(uid, 8, num_pages)
        self.now_s = 0.0
        self.refs = dict.fromkeys(self.PAGES, 0)
        self.queued = dict.fromkeys(self.PAGES, 0)
        self.last_used_s = dict.fromkeys(self.PAGES, 0.0)
        self.unused = dict.fromkeys(self.PAGES, False)
        self.uses = []
        self.pinned = set()
        self.pending, self.loading, self.resident = [], [], []
        self.total = dict.fromkeys(("hits", "misses", "loads", "evictions"), 0)
        self.failures = 0

    def absent(self, uid):
        return uid not in self.pending + self.loading + self.resident

    def free(self):
        held = self.pending + self.loading + self.resident
        return 12 - sum(self.PAGES[uid] for uid in held)

    def idle(self):
        return [u for u in self.resident if not self.refs[u] and u not in self.pinned]

    def drop_unwanted(self, uid):
        if uid in self.pending and not self.refs[uid] and uid not in self.pinned:
            self.pending.remove(uid)

    @rule(wait_s=st.sampled_from([0.0, 1.0, 40.0, 250.0]))
    def advance(self, wait_s):
        self.now_s += wait_s
        self.residency.advance(self.now_s)

    @rule(uid=uids)
    def use(self, uid):
        if self.absent(uid) and self.PAGES[uid] > self.free():
            return
        adapter = self.residency.get(uid)
        assert self.residency.acquire(adapter, self.now_s) is (uid in self.resident)
        self.total["hits" if uid in self.resident else "misses"] += 1
        self.refs[uid] += 1
        self.unused[uid] = False
        self.uses.append((uid, self.now_s))
        if self.absent(uid):
            self.residency.reserve(adapter)
            self.pending.append(uid)

    @rule(uid=uids)
    def release(self, uid):
        if self.refs[uid]:
            self.residency.release(self.residency.get(uid), self.now_s)
            self.refs[uid] -= 1
            self.last_used_s[uid] = self.now_s
            self.drop_unwanted(uid)

    @rule(uid=uids, pinned=st.booleans())
    def pin(self, uid, pinned):
        self.residency.pin(uid, pinned=pinned)
        (self.pinned.add if pinned else self.pinned.discard)(uid)
        self.drop_unwanted(uid)

    @rule(uid=uids)
    def load_unasked(self, uid):
        """Line up a copy for a pin, or load ahead when the link is idle."""
        if not self.absent(uid) or self.PAGES[uid] > self.free():
            return
        if uid in self.pinned or not self.pending:
            self.residency.reserve(self.residency.get(uid))
            self.pending.append(uid)
            if uid not in self.pinned:
                self.start()

    @precondition(lambda self: self.pending)
    @rule()
    def start(self):
        uid = self.pending.pop(0)
        started, pages = self.residency.start_next_load()
        assert (started, len(pages)) == (uid, self.PAGES[uid])
        self.loading.append(uid)
        self.total["loads"] += 1

    @precondition(lambda self: self.loading)
    @rule(data=st.data(), failed=st.booleans())
    def finish(self, data, failed):
        uid = data.draw(st.sampled_from(self.loading))
        self.residency.finish_load(uid, failed=failed, now_s=self.now_s)
        self.loading.remove(uid)
        if failed:  # the planner ends all its users in the same breath
            self.failures += 1
            while self.refs[uid]:
                self.release(uid)
        else:
            self.resident.append(uid)
            self.last_used_s[uid] = self.now_s
            self.unused[uid] = not self.refs[uid]

    @precondition(lambda self: self.idle())
    @rule(data=st.data())
    def evict(self, data):
        uid = data.draw(st.sampled_from(self.idle()))
        self.residency.evict(self.residency.get(uid))
        self.resident.remove(uid)
        self.total["evictions"] += 1

    @rule(uid=uids)
    def evict_what_is_needed(self, uid):
        if uid not in self.idle():
            with pytest.raises(AssertionError, match="may not be evicted"):
                self.residency.evict(self.residency.get(uid))

    @rule(uid=uids, more=st.booleans())
    def wait(self, uid, more):
        if more:
            self.residency.add_queued(uid)
            self.queued[uid] += 1
        elif self.queued[uid]:
            self.residency.drop_queued(uid)
            self.queued[uid] -= 1

    @invariant()
    def books_are_those_of_the_model(self):
        residency, table = self.residency, self.residency.candidates
        self.pool.check()
        residency.check()
        assert self.pool.free_pages == self.free()
        assert residency.resident_pages == sum(self.PAGES[u] for u in self.resident)
        assert residency.pinned_pages == sum(self.PAGES[u] for u in self.pinned)
        assert residency.loads_in_flight == len(self.loading)
        assert residency.failures == self.failures
        for name, count in self.total.items():
            assert getattr(residency, name) == count, name
        frequency = {
            uid: sum(
                used == uid and self.now_s // 30 - used_s // 30 < 10
                for used, used_s in self.uses
            )
            for uid in self.PAGES
        }
        for uid in self.PAGES:
            stats = residency.stats(uid)
            assert stats.running == self.refs[uid]
            assert stats.frequency == frequency[uid]
            assert stats.pinned == (uid in self.pinned)
            assert (residency.pages(uid) is not None) == (uid in self.resident)
        rows = [adapter.uid for adapter in table.adapters]
        assert sorted(rows) == sorted(self.idle())
        assert table.queued.tolist() == [self.queued[uid] for uid in rows]
        assert table.unused.tolist() == [self.unused[uid] for uid in rows]
        assert table.frequency.tolist() == [frequency[uid] for uid in rows]
        assert table.last_used_s.tolist() == [self.last_used_s[uid] for uid in rows]


def test_any_order_of_calls_keeps_the_books_of_the_model():
    run_state_machine_as_test(
        ResidencyMachine,
        settings=settings(max_examples=150, stateful_step_count=60, deadline=None),
    )
