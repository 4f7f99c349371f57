"""Which adapters are on the device, who uses them and which may be evicted."""

import dataclasses
import enum

import numpy as np

from jchameleon.runtime.policy.pool import PagePool


class State(enum.Enum):
    """Where an adapter is; every state but ABSENT holds device pages."""

    ABSENT = "absent"
    PENDING = "pending"  # pages held, the copy waits for the link
    LOADING = "loading"
    RESIDENT = "resident"


@dataclasses.dataclass(slots=True, eq=False)
class Adapter:
    """One registered adapter; only `Residency` writes to it.

    Attributes:
      order: how many adapters were registered before it; breaks ties.
      refs: admitted requests that use it.
      queued: waiting requests that name it.
      frequency: admissions that used it since it was registered.
      last_used_s: when a request that used it last ended.
      row: its row among the eviction candidates, -1 when it is none.
      loads: copies started; failures: those of them that failed.
    """

    uid: str
    order: int
    rank: int
    num_pages: int
    state: State = State.ABSENT
    pinned: bool = False
    refs: int = 0
    queued: int = 0
    frequency: int = 0
    last_used_s: float = 0.0
    row: int = -1
    hits: int = 0
    misses: int = 0
    loads: int = 0
    evictions: int = 0
    failures: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdapterStats:
    """A snapshot of one adapter's counters, see `Adapter`."""

    uid: str
    state: str
    rank: int
    num_pages: int
    running: int
    queued: int
    hits: int
    misses: int
    loads: int
    evictions: int
    failures: int


class Candidates:
    """Columns over the adapters that may be evicted now, one row each, unordered.

    Rows come and go as adapters fall idle and are used again, so a policy scores
    slices of arrays that exist already and never copies a table.
    """

    def __init__(self) -> None:
        self.adapters: list[Adapter] = []
        self.total_pages = 0
        self._ints = np.zeros((5, 16), np.int64)  # order, pages, rank, uses, queued
        self._last_used_s = np.zeros(16, np.float64)

    def __len__(self) -> int:
        return len(self.adapters)

    @property
    def order(self) -> np.ndarray:
        """Registration order, i64[n]."""
        return self._ints[0, : len(self.adapters)]

    @property
    def num_pages(self) -> np.ndarray:
        """Pages that an eviction frees, i64[n]."""
        return self._ints[1, : len(self.adapters)]

    @property
    def rank(self) -> np.ndarray:
        """Largest rank of each adapter, i64[n]."""
        return self._ints[2, : len(self.adapters)]

    @property
    def frequency(self) -> np.ndarray:
        """Admissions that used each adapter, i64[n]."""
        return self._ints[3, : len(self.adapters)]

    @property
    def queued(self) -> np.ndarray:
        """Waiting requests that name each adapter, i64[n]."""
        return self._ints[4, : len(self.adapters)]

    @property
    def last_used_s(self) -> np.ndarray:
        """Time of each adapter's last use, f64[n]."""
        return self._last_used_s[: len(self.adapters)]

    def add(self, adapter: Adapter) -> None:
        """Append a row for an adapter that has none."""
        assert adapter.row < 0, f"adapter {adapter.uid} is a candidate already"
        row = len(self.adapters)
        if row == self._last_used_s.size:
            self._ints = np.concatenate([self._ints, np.zeros_like(self._ints)], axis=1)
            self._last_used_s = np.concatenate(
                [self._last_used_s, np.zeros_like(self._last_used_s)]
            )
        self._ints[:, row] = (
            adapter.order,
            adapter.num_pages,
            adapter.rank,
            adapter.frequency,
            adapter.queued,
        )
        self._last_used_s[row] = adapter.last_used_s
        self.adapters.append(adapter)
        self.total_pages += adapter.num_pages
        adapter.row = row

    def remove(self, adapter: Adapter) -> None:
        """Drop an adapter's row, if it has one; the last row takes its place."""
        row = adapter.row
        if row < 0:
            return
        last = self.adapters.pop()
        if last is not adapter:
            self.adapters[row] = last
            self._ints[:, row] = self._ints[:, len(self.adapters)]
            self._last_used_s[row] = self._last_used_s[len(self.adapters)]
            last.row = row
        self.total_pages -= adapter.num_pages
        adapter.row = -1

    def set_queued(self, adapter: Adapter) -> None:
        """Copy the adapter's count of waiting requests into its row, if it has one."""
        if adapter.row >= 0:
            self._ints[4, adapter.row] = adapter.queued


class Residency:
    """The adapter table: states, references, counters, and the pages behind them."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._adapters: dict[str, Adapter] = {}
        self._pending: dict[str, Adapter] = {}
        self.candidates = Candidates()
        self.resident_pages = 0
        self.loading_pages = 0
        self.loads_in_flight = 0
        self.hits = 0
        self.misses = 0
        self.loads = 0
        self.evictions = 0
        self.failures = 0

    def register(self, uid: str, rank: int, num_pages: int) -> None:
        """Add an absent adapter; a uid that is known already changes nothing."""
        if uid not in self._adapters:
            order = len(self._adapters)
            self._adapters[uid] = Adapter(uid, order, rank, num_pages)

    def get(self, uid: str) -> Adapter:
        """Return the adapter `uid`.

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

    def pages(self, uid: str) -> tuple[int, ...] | None:
        """Return the pages of a resident adapter in packed order, else None."""
        if self.get(uid).state is not State.RESIDENT:
            return None
        return self._pool.pages_of(("adapter", uid))

    def pin(self, uid: str, *, pinned: bool) -> None:
        """Exempt an adapter from eviction, or end the exemption."""
        adapter = self.get(uid)
        adapter.pinned = pinned
        self._place(adapter)

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

    def acquire(self, adapter: Adapter) -> bool:
        """Add a reference and return whether it was a hit (the adapter is resident)."""
        hit = adapter.state is State.RESIDENT
        adapter.refs += 1
        adapter.frequency += 1
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
        has not started yet is given up when nobody needs it any more.
        """
        adapter.refs -= 1
        adapter.last_used_s = now_s
        if adapter.refs == 0 and adapter.state is State.PENDING:
            del self._pending[adapter.uid]
            self._leave(adapter, "load")
        self._place(adapter)

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

    def finish_load(self, uid: str, *, failed: bool) -> None:
        """Make a loading adapter resident, or absent again when its copy failed.

        Raises:
          ValueError: no copy of `uid` is under way.
        """
        adapter = self.get(uid)
        if adapter.state is not State.LOADING:
            raise ValueError(
                f"adapter uid={uid!r} is {adapter.state.value}, no load is under way"
            )
        self.loads_in_flight -= 1
        if failed:
            adapter.failures += 1
            self.failures += 1
            self._leave(adapter, "load")
        else:
            self._pool.commit(("load", uid), ("adapter", uid))
            self.loading_pages -= adapter.num_pages
            self.resident_pages += adapter.num_pages
            adapter.state = State.RESIDENT
            self._place(adapter)

    def evict(self, adapter: Adapter) -> None:
        """Drop an eviction candidate from the device."""
        assert adapter.row >= 0, f"adapter {adapter.uid} may not be evicted"
        self.candidates.remove(adapter)
        adapter.evictions += 1
        self.evictions += 1
        self._leave(adapter, "adapter")

    def stats(self, uid: str) -> AdapterStats:
        """Return the counters of one adapter."""
        adapter = self.get(uid)
        return AdapterStats(
            uid=uid,
            state=adapter.state.value,
            rank=adapter.rank,
            num_pages=adapter.num_pages,
            running=adapter.refs,
            queued=adapter.queued,
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
            assert state is not State.PENDING or adapter.refs, f"{uid}: unwanted load"
            idle = state is State.RESIDENT and not adapter.refs and not adapter.pinned
            assert (adapter.row >= 0) == idle, f"{uid}: candidate row {adapter.row}"
            if idle:
                row = adapter.row
                assert table.adapters[row] is adapter
                assert table.num_pages[row] == adapter.num_pages
                assert table.rank[row] == adapter.rank
                assert table.queued[row] == adapter.queued
                assert table.frequency[row] == adapter.frequency
                assert table.last_used_s[row] == adapter.last_used_s
            if state is not State.ABSENT:
                kind = "adapter" if state is State.RESIDENT else "load"
                pages = self._pool.pages_of((kind, uid))
                assert len(pages) == adapter.num_pages, f"{uid}: page count"
        assert table.total_pages == sum(a.num_pages for a in table.adapters)
        assert self.resident_pages == count[State.RESIDENT]
        assert self.loading_pages == count[State.PENDING] + count[State.LOADING]
        loading = [a for a in self._adapters.values() if a.state is State.LOADING]
        assert self.loads_in_flight == len(loading)

    def _place(self, adapter: Adapter) -> None:
        """Make an adapter a candidate exactly when it is resident, idle, unpinned."""
        self.candidates.remove(adapter)
        if adapter.state is State.RESIDENT and adapter.refs == 0 and not adapter.pinned:
            self.candidates.add(adapter)

    def _leave(self, adapter: Adapter, kind: str) -> None:
        """Give all pages of an adapter back and mark it absent."""
        self._pool.free((kind, adapter.uid))
        if kind == "load":
            self.loading_pages -= adapter.num_pages
        else:
            self.resident_pages -= adapter.num_pages
        adapter.state = State.ABSENT
