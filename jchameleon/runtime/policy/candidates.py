"""Adapters as the cache keeps them, and those of them that may be evicted."""

import dataclasses
import enum

import numpy as np

from jchameleon.runtime.policy.window import UseWindow


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
      order: the least number that no adapter had when it was registered, counted from
        0; breaks ties.
      refs: admitted requests that use it.
      queued: waiting requests that name it.
      last_used_s: when a request that used it last ended, or its last load if later.
      unused: no request has used it since it was loaded.
      broken: its last load failed; only a request tries again.
      declined: it was dropped though no page was needed, before anyone used it.
      leaving: it was unregistered, and is forgotten once no copy of it is under way.
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
    last_used_s: float = 0.0
    unused: bool = False
    broken: bool = False
    declined: bool = False
    leaving: bool = False
    row: int = -1
    hits: int = 0
    misses: int = 0
    loads: int = 0
    evictions: int = 0
    failures: int = 0


class Candidates:
    """Columns over the adapters that may be evicted now, one row each, unordered.

    Rows come and go as adapters fall idle and are used again, so a policy scores
    slices of arrays that exist already, which it cannot write, and copies no table.

    Attributes:
      adapters: the adapter of each row.
      largest_order: the largest order that has ever been a candidate's.
      total_pages: pages that evicting all of them would free.
      now_s: time of the current plan.
      load_line: (base_s, s_per_page) of a load, the estimate behind `load_s`.
    """

    def __init__(self, window: UseWindow) -> None:
        self.adapters: list[Adapter] = []
        self.largest_order = -1
        self.total_pages = 0
        self.now_s = 0.0
        self.load_line = (0.0, 1.0)
        self._window = window
        self._ints = np.zeros((4, 16), np.int64)  # order, pages, rank, queued
        self._last_used_s = np.zeros(16, np.float64)
        self._unused = np.zeros(16, np.bool_)
        self._unwanted = np.zeros(16, np.bool_)
        self._per_page = np.ones(16, np.float64)

    def __len__(self) -> int:
        return len(self.adapters)

    @property
    def order(self) -> np.ndarray:
        """Each adapter's number, i64[n]: of its registration, but see `Adapter`."""
        return _frozen(self._ints[0, : len(self.adapters)])

    @property
    def num_pages(self) -> np.ndarray:
        """Pages that an eviction frees, i64[n]."""
        return _frozen(self._ints[1, : len(self.adapters)])

    @property
    def per_page(self) -> np.ndarray:
        """One over `num_pages`, f64[n]: a product costs a third of a division."""
        return _frozen(self._per_page[: len(self.adapters)])

    @property
    def rank(self) -> np.ndarray:
        """Largest rank of each adapter, i64[n]."""
        return _frozen(self._ints[2, : len(self.adapters)])

    @property
    def queued(self) -> np.ndarray:
        """Waiting requests that name each adapter, i64[n]."""
        return _frozen(self._ints[3, : len(self.adapters)])

    @property
    def unwanted(self) -> np.ndarray:
        """Whether no waiting request names the adapter, bool[n]."""
        return _frozen(self._unwanted[: len(self.adapters)])

    @property
    def frequency(self) -> np.ndarray:
        """Admissions that used each adapter within the window, i64[n]; a copy."""
        return self._window.counts.take(self.order)

    @property
    def last_used_s(self) -> np.ndarray:
        """Time of each adapter's last use, or of its last load if later, f64[n]."""
        return _frozen(self._last_used_s[: len(self.adapters)])

    @property
    def unused(self) -> np.ndarray:
        """Whether no request has used the adapter since it was loaded, bool[n]."""
        return _frozen(self._unused[: len(self.adapters)])

    @property
    def load_s(self) -> np.ndarray:
        """Estimated seconds to load each adapter again, f64[n]; a copy."""
        base_s, s_per_page = self.load_line
        return base_s + s_per_page * self.num_pages

    def add(self, adapter: Adapter) -> None:
        """Append a row for an adapter that has none."""
        assert adapter.row < 0, f"adapter {adapter.uid} is a candidate already"
        row = len(self.adapters)
        if row == self._unused.size:
            self._ints = np.pad(self._ints, ((0, 0), (0, row)))
            self._last_used_s = np.pad(self._last_used_s, (0, row))
            self._unused = np.pad(self._unused, (0, row))
            self._unwanted = np.pad(self._unwanted, (0, row))
            self._per_page = np.pad(self._per_page, (0, row))
        self._ints[:, row] = (
            adapter.order,
            adapter.num_pages,
            adapter.rank,
            adapter.queued,
        )
        self._last_used_s[row] = adapter.last_used_s
        self._unused[row] = adapter.unused
        self._unwanted[row] = adapter.queued == 0
        self._per_page[row] = 1.0 / adapter.num_pages
        self.adapters.append(adapter)
        self.largest_order = max(self.largest_order, adapter.order)
        self.total_pages += adapter.num_pages
        adapter.row = row

    def remove(self, adapter: Adapter) -> None:
        """Drop an adapter's row, if it has one; the last row takes its place."""
        row = adapter.row
        if row < 0:
            return
        last = self.adapters.pop()
        if last is not adapter:
            end = len(self.adapters)
            self.adapters[row] = last
            self._ints[:, row] = self._ints[:, end]
            self._last_used_s[row] = self._last_used_s[end]
            self._unused[row] = self._unused[end]
            self._unwanted[row] = self._unwanted[end]
            self._per_page[row] = self._per_page[end]
            last.row = row
        self.total_pages -= adapter.num_pages
        adapter.row = -1

    def set_queued(self, adapter: Adapter) -> None:
        """Copy the adapter's count of waiting requests into its row, if it has one."""
        if adapter.row >= 0:
            self._ints[3, adapter.row] = adapter.queued
            self._unwanted[adapter.row] = adapter.queued == 0


def _frozen(column: np.ndarray) -> np.ndarray:
    """Return a view that a policy cannot write through."""
    column.flags.writeable = False
    return column
