"""The adapter table under any order of calls, beside a model with its own books."""

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
from jchameleon.runtime.policy.pool import PagePool
from jchameleon.runtime.policy.residency import Residency


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
