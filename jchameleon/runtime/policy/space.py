"""The device's space: KV pages and adapters in one pool, each making room for others.

Brings pool, adapter table and eviction policy together. Whoever needs pages asks here;
idle adapters are evicted by exactly as much as is needed (Chameleon, section 4.2).
"""

from collections.abc import Sequence

import numpy as np

from jchameleon.runtime.policy.blame import blaming
from jchameleon.runtime.policy.candidates import Adapter, State
from jchameleon.runtime.policy.estimator import Estimator
from jchameleon.runtime.policy.eviction import EvictionPolicy, choose_victims
from jchameleon.runtime.policy.plan import Load
from jchameleon.runtime.policy.pool import PagePool
from jchameleon.runtime.policy.residency import Residency
from jchameleon.runtime.policy.rows import Row


class Space:
    """Hands out pages, evicts idle adapters, starts loads.

    Attributes:
      kv_pages: pages of all running requests.
    """

    def __init__(
        self, pool: PagePool, residency: Residency, eviction: EvictionPolicy
    ) -> None:
        self._pool = pool
        self._residency = residency
        self._eviction = eviction
        self._used = getattr(eviction, "used", None)
        self._evicted = getattr(eviction, "evicted", None)
        self._expired = getattr(eviction, "expired", None)
        # Pinned adapters whose pages are not to be had yet, in the order of their pins.
        self._wanted: dict[str, None] = {}
        self._load_started_s: dict[str, float] = {}
        self._link_free_s = 0.0
        self.kv_pages = 0

    def can_free(self, pages: int) -> bool:
        """Return whether so many pages are free or held by idle adapters."""
        spare = self._pool.free_pages + self._residency.candidates.total_pages
        return pages <= spare

    def spare_pages(
        self, kv_pages: int, adapter: Adapter | None, without: Sequence[Row] = ()
    ) -> int:
        """Return the pages left after `kv_pages` and an adapter; negative: lacking.

        Counts as if the running `without` were squashed. Pinned adapters that are not
        on the device yet come first.
        """
        spare = self._pool.free_pages + self._residency.candidates.total_pages
        spare -= self._wanted_pages(adapter)
        if adapter is not None and (adapter.state is State.ABSENT or adapter.row >= 0):
            # It must be loaded, or it is idle and this request needs it to stay.
            spare -= adapter.num_pages
        return spare - kv_pages + self._freed_by(without, keeping=adapter)

    def _freed_by(self, rows: Sequence[Row], *, keeping: Adapter | None) -> int:
        """Return the pages that fall free or evictable when `rows` are squashed."""
        pages = 0
        refs: dict[str, int] = {}
        for row in rows:
            pages += row.kv_pages
            adapter = row.adapter
            if adapter is None or adapter is keeping or adapter.pinned:
                continue
            refs[adapter.uid] = refs.get(adapter.uid, 0) + 1
            # A copy under way goes on; one that waits for the link is given up.
            if refs[adapter.uid] == adapter.refs and adapter.state is not State.LOADING:
                pages += adapter.num_pages
        return pages

    def free(self, pages: int) -> list[str]:
        """Evict idle adapters until `pages` are free; return the uids that left."""
        short = pages - self._pool.free_pages
        if short <= 0:
            return []
        gone = []
        with blaming("eviction", self._eviction):
            victims = choose_victims(self._eviction, self._residency.candidates, short)
            for adapter, score in victims:
                self._residency.evict(adapter)
                gone.append(adapter.uid)
                if self._evicted is not None:
                    self._evicted(adapter.order, score)
        return gone

    def drop_expired(self) -> list[str]:
        """Evict what the policy no longer wants although nobody needs its pages."""
        table = self._residency.candidates
        if self._expired is None or not len(table):
            return []
        with blaming("eviction", self._eviction) as blame:
            mask = np.asarray(self._expired(table))
            if mask.shape != (len(table),) or mask.dtype != bool:
                blame(
                    f"answered expired() with {mask.dtype}{list(mask.shape)}, must be "
                    f"bool[{len(table)}]"
                )
            rows = np.flatnonzero(mask)
            gone = [table.adapters[row] for row in rows[np.argsort(table.order[rows])]]
        for adapter in gone:
            adapter.declined = adapter.unused
            self._residency.evict(adapter)
        return [adapter.uid for adapter in gone]

    def forget(self, uid: str) -> list[str]:
        """Give up what the device holds of an adapter that is leaving.

        The planner calls this in every plan until it is forgotten: a copy under way
        goes in the plan after it has arrived. Whatever else belongs to the uid (cached
        KV pages) must go here too.

        Returns:
          the uids that left the device.
        """
        adapter = self._residency.get(uid)
        assert adapter.leaving, f"adapter {uid} is registered"
        if adapter.state is not State.RESIDENT:
            return []
        self._residency.evict(adapter)
        return [uid]

    def place(self, row: Row) -> tuple[tuple[int, ...], list[str]]:
        """Take the pages of a row and of its absent adapter, which it has acquired.

        Returns:
          its KV pages, and the uids of adapters evicted for all of it.
        """
        adapter = row.adapter
        loads = adapter is not None and adapter.state is State.ABSENT
        evicted = self.free(
            row.kv_pages + (adapter.num_pages if loads and adapter else 0)
        )
        pages = self._pool.reserve(("kv", row.request.request_id), row.kv_pages)
        self.kv_pages += row.kv_pages
        if adapter is not None and loads:
            self._residency.reserve(adapter)
        # After the evictions for it: GDSF takes it in at the clock that they set.
        if adapter is not None and self._used is not None:
            with blaming("eviction", self._eviction):
                self._used(adapter.order)
        return pages, evicted

    def extend(self, row: Row) -> tuple[int, ...]:
        """Give one more free page to a running row."""
        pages = self._pool.extend(("kv", row.request.request_id), 1)
        row.kv_pages += 1
        self.kv_pages += 1
        return pages

    def give_back(self, row: Row, now_s: float) -> None:
        """Take back a running row's pages and its reference to its adapter."""
        self.kv_pages -= self._pool.free(("kv", row.request.request_id))
        if row.adapter is not None:
            self._residency.release(row.adapter, now_s)

    def copies_ahead(self, estimator: Estimator) -> list[tuple[float, int]]:
        """Return (seconds left, pages) of copies that no request waits for.

        Their pages cannot be taken now, but may be evicted when they have arrived.
        """
        adapters = (self._residency.get(uid) for uid in self._load_started_s)
        return [
            (estimator.load_s(adapter.num_pages), adapter.num_pages)
            for adapter in adapters
            if not adapter.refs and not adapter.pinned
        ]

    def want(self, uid: str, *, wanted: bool) -> None:
        """Load a pinned adapter as soon as there is room, or no longer."""
        if wanted:
            self._wanted[uid] = None
        else:
            self._wanted.pop(uid, None)

    def _wanted_pages(self, beside: Adapter | None) -> int:
        """Return the pages kept for pinned absent adapters other than `beside`."""
        if not self._wanted:
            return 0
        wanted = (self._residency.get(uid) for uid in self._wanted)
        return sum(
            adapter.num_pages
            for adapter in wanted
            if adapter.state is State.ABSENT and adapter is not beside
        )

    def start_loads(self, limit: int, evicted: list[str]) -> list[Load]:
        """Start lined-up copies while fewer than `limit` are under way.

        Pinned adapters join the line when their pages are to be had; the uids evicted
        for them are appended to `evicted`.
        """
        for uid in list(self._wanted):
            adapter = self._residency.get(uid)
            if adapter.state is State.ABSENT:
                if not self.can_free(adapter.num_pages):
                    continue
                evicted += self.free(adapter.num_pages)
                self._residency.reserve(adapter)
            del self._wanted[uid]
        loads = []
        while self._residency.loads_in_flight < limit:
            started = self._residency.start_next_load()
            if started is None:
                break
            loads.append(Load(*started))
        return loads

    def prefetch(self, uid: str, *, keep_pages: int) -> Load | None:
        """Start to load an absent adapter into free pages; None where that is not so.

        Leaves `keep_pages` free. An adapter whose last load failed is left to the next
        request for it, and so is one that the eviction policy dropped unused. A policy
        may still name one that was unregistered.
        """
        if not self._residency.knows(uid):
            return None
        adapter = self._residency.get(uid)
        if adapter.state is not State.ABSENT or adapter.broken or adapter.leaving:
            return None
        if adapter.declined and not adapter.queued:
            return None
        free_pages = self._pool.free_pages - keep_pages - self._wanted_pages(adapter)
        if adapter.num_pages > free_pages:
            return None
        self._residency.reserve(adapter)
        started = self._residency.start_next_load()
        assert started is not None and started[0] == uid, "the line was empty"
        return Load(*started)

    def note_load(self, uid: str, now_s: float) -> None:
        """Remember when a copy was handed to the link."""
        self._load_started_s[uid] = now_s

    def load_done(self, uid: str, now_s: float) -> float:
        """Return when the link was free for a copy that ended now."""
        # Copies share one link: each is timed from the end of the one before it.
        started_s = self._load_started_s.pop(uid, now_s)
        started_s = min(max(started_s, self._link_free_s), now_s)
        self._link_free_s = now_s
        return started_s
