"""Which adapters are on the device, who uses them and which may be evicted."""

import collections
import dataclasses
import heapq

from jchameleon.runtime.policy.candidates import Adapter, Candidates, State
from jchameleon.runtime.policy.pool import PagePool
from jchameleon.runtime.policy.window import UseWindow


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdapterStats:
    """A snapshot of one adapter's counters, see `Adapter`.

    Attributes:
      frequency: admissions that used it within the window, see `UseWindow`.
    """

    uid: str
    state: str
    pinned: bool
    rank: int
    num_pages: int
    running: int
    queued: int
    frequency: int
    hits: int
    misses: int
    loads: int
    evictions: int
    failures: int


class Residency:
    """The adapter table: states, references, counters, and the pages behind them.

    Attributes:
      leaving: unregistered adapters that are not forgotten yet, by uid.
      max_rank: largest among the registered adapters, 0 without any.
      pinned_pages: of all pinned adapters, on the device or not.
      resident_pages, loading_pages: held by resident adapters and for copies to come.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._adapters: dict[str, Adapter] = {}
        self._pending: dict[str, Adapter] = {}
        self._window = UseWindow()
        self._pinned: dict[str, None] = {}
        # Below the number of adapters, those that no adapter has: a heap.
        self._free_orders: list[int] = []
        self._ranks: collections.Counter[int] = collections.Counter()
        self.leaving: dict[str, Adapter] = {}
        self.candidates = Candidates(self._window)
        self.max_rank = 0
        self.pinned_pages = 0
        self.resident_pages = 0
        self.loading_pages = 0
        self.loads_in_flight = 0
        self.hits = 0
        self.misses = 0
        self.loads = 0
        self.evictions = 0
        self.failures = 0

    def register(self, uid: str, rank: int, num_pages: int) -> None:
        """Add an absent adapter; one that is known, or leaving, stays as it is."""
        if uid in self._adapters:
            if self.leaving.pop(uid, None) is not None:
                self._adapters[uid].leaving = False
                self._count_rank(self._adapters[uid].rank, 1)
            return
        order = len(self._adapters)
        if self._free_orders:
            order = heapq.heappop(self._free_orders)
        self._adapters[uid] = Adapter(uid, order, rank, num_pages)
        self._window.grow(order + 1)
        self._count_rank(rank, 1)

    def leave(self, uid: str) -> None:
        """Unregister an adapter; `forget_leaving` forgets it.

        Raises:
          ValueError: it is not registered, or requests wait or run for it.
        """
        adapter = self.registered(uid)
        if adapter.refs or adapter.queued:
            raise ValueError(
                f"adapter uid={uid!r} has {adapter.refs} running and {adapter.queued} "
                "waiting requests; only one without any can be unregistered"
            )
        self.pin(uid, pinned=False)
        adapter.leaving = True
        self.leaving[uid] = adapter
        self._count_rank(adapter.rank, -1)

    def forget_leaving(self) -> list[Adapter]:
        """Forget the leaving adapters that hold no pages, and return them."""
        gone = [a for a in self.leaving.values() if a.state is State.ABSENT]
        for adapter in gone:
            del self.leaving[adapter.uid]
            del self._adapters[adapter.uid]
            self._window.forget(adapter.order)
            heapq.heappush(self._free_orders, adapter.order)
        return gone

    def knows(self, uid: str) -> bool:
        """Return whether an adapter is registered or leaving."""
        return uid in self._adapters

    def registered(self, uid: str) -> Adapter:
        """Return the adapter `uid`, which is not leaving.

        Raises:
          ValueError: it is not registered, or not any more.
        """
        adapter = self.get(uid)
        if adapter.leaving:
            raise ValueError(f"adapter uid={uid!r} was unregistered")
        return adapter

    def get(self, uid: str) -> Adapter:
        """Return the adapter `uid`, which may be leaving.

        Raises:
          ValueError: it was never registered.
        """
        try:
            return self._adapters[uid]
        except KeyError:
            raise ValueError(f"adapter uid={uid!r} was never registered") from None

    def uids(self) -> tuple[str, ...]:
        """Return the registered uids in registration order."""
        return tuple(self._adapters)

    def pinned_uids(self) -> tuple[str, ...]:
        """Return the uids of pinned adapters in the order of their pins."""
        return tuple(self._pinned)

    def pages(self, uid: str) -> tuple[int, ...] | None:
        """Return the pages of a resident adapter in packed order, else None."""
        if self.get(uid).state is not State.RESIDENT:
            return None
        return self._pool.pages_of(("adapter", uid))

    def pin(self, uid: str, *, pinned: bool) -> None:
        """Exempt an adapter from eviction, or end the exemption.

        Loads nothing, but a copy that was lined up for the pin alone ends with it.
        """
        adapter = self.registered(uid)
        if pinned != adapter.pinned:
            adapter.pinned = pinned
            if pinned:
                self._pinned[uid] = None
            else:
                del self._pinned[uid]
            self.pinned_pages += adapter.num_pages if pinned else -adapter.num_pages
            self._settle(adapter)

    def advance(self, now_s: float) -> None:
        """Move to the time of the current plan: old uses leave the window."""
        self._window.advance(now_s)
        self.candidates.now_s = now_s

    def add_queued(self, uid: str) -> None:
        """Count one more waiting request that names `uid`."""
        adapter = self.get(uid)
        adapter.queued += 1
        self.candidates.set_queued(adapter)

    def drop_queued(self, uid: str) -> None:
        """Count one waiting request less."""
        adapter = self.get(uid)
        adapter.queued -= 1
        self.candidates.set_queued(adapter)

    def acquire(self, adapter: Adapter, now_s: float) -> bool:
        """Add a reference and return whether it was a hit (the adapter is resident)."""
        hit = adapter.state is State.RESIDENT
        adapter.refs += 1
        adapter.unused = False
        self._window.note(adapter.order, now_s)
        if hit:
            adapter.hits += 1
            self.hits += 1
        else:
            adapter.misses += 1
            self.misses += 1
        self.candidates.remove(adapter)
        return hit

    def release(self, adapter: Adapter, now_s: float) -> None:
        """Drop a reference.

        An idle adapter stays where it is, a load under way goes on; only a copy that
        has not started yet is given up when no request and no pin needs it any more.
        """
        adapter.refs -= 1
        adapter.last_used_s = now_s
        self._settle(adapter)

    def reserve(self, adapter: Adapter) -> None:
        """Take pages for an absent adapter and line up its copy.

        Raises:
          PoolExhausted: not enough free pages; nothing was changed.
        """
        assert adapter.state is State.ABSENT, f"{adapter.uid} is {adapter.state.value}"
        self._pool.reserve(("load", adapter.uid), adapter.num_pages)
        self.loading_pages += adapter.num_pages
        adapter.state = State.PENDING
        self._pending[adapter.uid] = adapter

    def start_next_load(self) -> tuple[str, tuple[int, ...]] | None:
        """Start the copy that was lined up first; return its uid and pages, or None."""
        if not self._pending:
            return None
        uid = next(iter(self._pending))
        adapter = self._pending.pop(uid)
        adapter.state = State.LOADING
        adapter.loads += 1
        self.loads += 1
        self.loads_in_flight += 1
        return uid, self._pool.pages_of(("load", uid))

    def finish_load(self, uid: str, *, failed: bool, now_s: float) -> None:
        """Make a loading adapter resident, or absent again when its copy failed.

        A load counts as a use when it comes to age, or the newest would seem oldest.

        Raises:
          ValueError: no copy of `uid` is under way.
        """
        adapter = self.get(uid)
        if adapter.state is not State.LOADING:
            raise ValueError(
                f"adapter uid={uid!r} is {adapter.state.value}, no load is under way"
            )
        self.loads_in_flight -= 1
        adapter.broken = failed
        adapter.declined = False
        if failed:
            adapter.failures += 1
            self.failures += 1
            self._leave(adapter, "load")
        else:
            self._pool.commit(("load", uid), ("adapter", uid))
            self.loading_pages -= adapter.num_pages
            self.resident_pages += adapter.num_pages
            adapter.state = State.RESIDENT
            adapter.last_used_s = now_s
            adapter.unused = adapter.refs == 0
            self._settle(adapter)

    def evict(self, adapter: Adapter) -> None:
        """Drop an eviction candidate from the device."""
        assert adapter.row >= 0, f"adapter {adapter.uid} may not be evicted"
        self.candidates.remove(adapter)
        adapter.evictions += 1
        self.evictions += 1
        self._leave(adapter, "adapter")

    def lose_all(self) -> list[Adapter]:
        """Drop all resident adapters, none of which is in use; return them."""
        lost = [a for a in self._adapters.values() if a.state is State.RESIDENT]
        for adapter in lost:
            assert not adapter.refs, f"adapter {adapter.uid} is in use"
            self.candidates.remove(adapter)
            adapter.evictions += 1
            self.evictions += 1
            self._leave(adapter, "adapter")
        return lost

    def stats(self, uid: str) -> AdapterStats:
        """Return the counters of one adapter."""
        adapter = self.get(uid)
        return AdapterStats(
            uid=uid,
            state=adapter.state.value,
            pinned=adapter.pinned,
            rank=adapter.rank,
            num_pages=adapter.num_pages,
            running=adapter.refs,
            queued=adapter.queued,
            frequency=int(self._window.counts[adapter.order]),
            hits=adapter.hits,
            misses=adapter.misses,
            loads=adapter.loads,
            evictions=adapter.evictions,
            failures=adapter.failures,
        )

    def check(self) -> None:
        """Assert that states, counters, candidate rows and the pool agree."""
        count = {state: 0 for state in State}
        table = self.candidates
        for adapter in self._adapters.values():
            uid, state = adapter.uid, adapter.state
            count[state] += adapter.num_pages
            assert adapter.refs >= 0 and adapter.queued >= 0, f"{uid}: negative count"
            assert (uid in self._pending) == (state is State.PENDING), uid
            wanted = adapter.refs or adapter.pinned
            assert state is not State.PENDING or wanted, f"{uid}: unwanted load"
            idle = state is State.RESIDENT and not adapter.refs and not adapter.pinned
            assert (adapter.row >= 0) == idle, f"{uid}: candidate row {adapter.row}"
            if idle:
                row = adapter.row
                assert table.adapters[row] is adapter
                assert table.num_pages[row] == adapter.num_pages
                assert table.rank[row] == adapter.rank
                assert table.queued[row] == adapter.queued
                assert table.unwanted[row] == (adapter.queued == 0)
                assert table.per_page[row] == 1 / adapter.num_pages
                assert table.order[row] == adapter.order
                assert table.unused[row] == adapter.unused
                assert table.last_used_s[row] == adapter.last_used_s
            if state is not State.ABSENT:
                kind = "adapter" if state is State.RESIDENT else "load"
                pages = self._pool.pages_of((kind, uid))
                assert len(pages) == adapter.num_pages, f"{uid}: page count"
        assert table.total_pages == sum(a.num_pages for a in table.adapters)
        adapters = self._adapters.values()
        orders = [a.order for a in adapters] + self._free_orders
        assert sorted(orders) == list(range(len(orders))), "orders lost or doubled"
        assert not self._window.counts[self._free_orders].any()
        assert self.leaving == {a.uid: a for a in adapters if a.leaving}
        assert not any(a.refs or a.queued or a.pinned for a in self.leaving.values())
        ranks = [a.rank for a in adapters if not a.leaving]
        assert self._ranks == collections.Counter(ranks)
        assert self.pinned_pages == sum(a.num_pages for a in adapters if a.pinned)
        assert self.max_rank == max(ranks, default=0)
        assert self.resident_pages == count[State.RESIDENT]
        assert self.loading_pages == count[State.PENDING] + count[State.LOADING]
        loading = [a for a in adapters if a.state is State.LOADING]
        assert self.loads_in_flight == len(loading)

    def _count_rank(self, rank: int, change: int) -> None:
        """Count a registered adapter of this rank more, or one less."""
        self._ranks[rank] += change
        if not self._ranks[rank]:
            del self._ranks[rank]
        self.max_rank = max(self._ranks, default=0)

    def _settle(self, adapter: Adapter) -> None:
        """Bring lined-up copy and candidate row in step with references and pin."""
        self.candidates.remove(adapter)
        if adapter.refs or adapter.pinned:
            return
        if adapter.state is State.PENDING:
            del self._pending[adapter.uid]
            self._leave(adapter, "load")
        elif adapter.state is State.RESIDENT:
            self.candidates.add(adapter)

    def _leave(self, adapter: Adapter, kind: str) -> None:
        """Give all pages of an adapter back and mark it absent."""
        self._pool.free((kind, adapter.uid))
        if kind == "load":
            self.loading_pages -= adapter.num_pages
        else:
            self.resident_pages -= adapter.num_pages
        adapter.state = State.ABSENT
