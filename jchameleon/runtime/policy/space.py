"""The device's space: KV pages and adapters in one pool, each making room for others.

Brings pool, adapter table, prefix cache and eviction policy together. Whoever needs
pages asks here; idle adapters and cached blocks are evicted by exactly as much as is
needed (Chameleon, section 4.2).
"""

from collections.abc import Sequence

import numpy as np

from jchameleon.runtime.policy.blame import blaming
from jchameleon.runtime.policy.candidates import Adapter, State
from jchameleon.runtime.policy.estimator import Estimator
from jchameleon.runtime.policy.eviction import EvictionPolicy, choose_victims
from jchameleon.runtime.policy.plan import Load
from jchameleon.runtime.policy.pool import PagePool
from jchameleon.runtime.policy.prefix import Block, PrefixCache, pages_of_all
from jchameleon.runtime.policy.residency import Residency
from jchameleon.runtime.policy.rows import Row


class Space:
    """Hands out pages, evicts what is idle, starts loads.

    Attributes:
      prefix: the blocks that stay when their requests end.
    """

    def __init__(
        self, pool: PagePool, residency: Residency, eviction: EvictionPolicy
    ) -> None:
        self.prefix = PrefixCache(pool)
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
        self._own_pages = 0  # of running requests, without cached ones

    @property
    def kv_pages(self) -> int:
        """Pages of all running requests; those that several share count once."""
        return self._own_pages + self.prefix.held_pages

    @property
    def _spare_pages(self) -> int:
        """Pages that are free or would be after evicting all that is idle."""
        idle = self._residency.candidates.total_pages + self.prefix.idle_pages
        return self._pool.free_pages + idle

    def can_free(self, pages: int) -> bool:
        """Return whether so many pages are free or held by what is idle."""
        return pages <= self._spare_pages

    def spare_pages(
        self,
        kv_pages: int,
        row: Row,
        reusable_blocks: int,
        without: Sequence[Row] = (),
    ) -> int:
        """Return the pages left after starting a row; negative: lacking.

        Counts as if the running `without` were squashed. Pinned adapters that are not
        on the device yet come first.

        Args:
          kv_pages: of the row, cached ones included.
          reusable_blocks: how many of them may be cached ones.
        """
        adapter = row.adapter
        spare = self._spare_pages - self._wanted_pages(adapter)
        if adapter is not None and (adapter.state is State.ABSENT or adapter.row >= 0):
            # It must be loaded, or it is idle and this request needs it to stay.
            spare -= adapter.num_pages
        # Of cached blocks, those in use already cost nothing; the others are idle and
        # counted as spare.
        found, held = self.prefix.find(row, reusable_blocks)
        spare -= kv_pages - held
        if not without:
            return spare
        kept = self.prefix.first_blocks(row, found)
        return spare + self._freed_by(without, keeping=adapter, kept=kept)

    def _freed_by(
        self, rows: Sequence[Row], *, keeping: Adapter | None, kept: frozenset[Block]
    ) -> int:
        """Return the pages that fall free or evictable when `rows` are squashed."""
        pages = pages_of_all(rows, kept=kept)
        refs: dict[str, int] = {}
        for row in rows:
            adapter = row.adapter
            if adapter is None or adapter is keeping or adapter.pinned:
                continue
            refs[adapter.uid] = refs.get(adapter.uid, 0) + 1
            # A copy under way goes on; one that waits for the link is given up.
            if refs[adapter.uid] == adapter.refs and adapter.state is not State.LOADING:
                pages += adapter.num_pages
        return pages

    def free(self, pages: int) -> list[str]:
        """Evict what is idle until `pages` are free; return the adapters that left.

        The policy says in which order adapters go, each after the cached blocks that
        were not used later than it (see `PrefixCache.goes_before`).
        """
        short = pages - self._pool.free_pages
        if short <= 0:
            return []
        assert self.can_free(pages), f"{pages} pages are not to be had"
        table = self._residency.candidates
        gone: list[str] = []
        with blaming("eviction", self._eviction):
            most = min(short, table.total_pages)
            for adapter, score in choose_victims(self._eviction, table, most):
                while short > 0 and self.prefix.goes_before(adapter):
                    self.prefix.evict()
                    short -= 1
                if short <= 0:
                    return gone
                self._residency.evict(adapter)
                short -= adapter.num_pages
                gone.append(adapter.uid)
                if self._evicted is not None:
                    self._evicted(adapter.order, score)
        for _ in range(short):
            self.prefix.evict()
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
        goes in the plan after it has arrived. No KV block outlives its adapter.

        Returns:
          the uids that left the device.
        """
        adapter = self._residency.get(uid)
        assert adapter.leaving, f"adapter {uid} is registered"
        self.prefix.forget(uid)
        if adapter.state is not State.RESIDENT:
            return []
        self._residency.evict(adapter)
        return [uid]

    def lose_all(self) -> list[str]:
        """Forget blocks and adapters that the device has lost, while nothing runs.

        Pinned adapters are loaded again as soon as there is room. No policy chose any
        of this, so the eviction policy does not hear of it.

        Returns:
          the uids that left the device.
        """
        self.prefix.forget_all()
        lost = self._residency.lose_all()
        for adapter in lost:
            if adapter.pinned:
                self.want(adapter.uid, wanted=True)
        return [adapter.uid for adapter in lost]

    def place(
        self, row: Row, reusable_blocks: int
    ) -> tuple[tuple[int, ...], list[str]]:
        """Take the pages of a row and of its absent adapter, which it has acquired.

        Returns:
          its KV pages, those of cached blocks that it holds from now on first, and the
          uids of adapters evicted for all of it.
        """
        adapter = row.adapter
        loads = adapter is not None and adapter.state is State.ABSENT
        cached = self.prefix.hold(row, self.prefix.find(row, reusable_blocks)[0])
        own_pages = row.kv_pages - len(cached)
        evicted = self.free(own_pages + (adapter.num_pages if loads and adapter else 0))
        pages = self._pool.reserve(_owner(row), own_pages)
        self._own_pages += own_pages
        if adapter is not None and loads:
            self._residency.reserve(adapter)
        # After the evictions for it: GDSF takes it in at the clock that they set.
        if adapter is not None and self._used is not None:
            with blaming("eviction", self._eviction):
                self._used(adapter.order)
        return cached + pages, evicted

    def extend(self, row: Row) -> tuple[int, ...]:
        """Give one more free page to a running row."""
        pages = self._pool.extend(_owner(row), 1)
        row.kv_pages += 1
        self._own_pages += 1
        return pages

    def take_cached(self, row: Row, most: int) -> tuple[int, ...]:
        """Swap a running row's own pages for cached ones of the same blocks.

        Begins behind the blocks that it holds and goes on to block `most` or the first
        that is not cached; returns the cached pages.
        """
        if row.blocks and row.blocks[-1].dropped:
            return ()
        count = self.prefix.find_next(row, most)
        if not count:
            return ()
        pages = self.prefix.hold(row, count)
        self._pool.trim(_owner(row), count)
        self._own_pages -= count
        return pages

    def keep_filled(self, row: Row, filled_blocks: int) -> tuple[int, ...]:
        """Put the leading blocks that a running row has filled into the prefix cache.

        Those that another row has put there meanwhile are swapped for its own; returns
        the pages of these, as `take_cached` does.
        """
        most = min(len(row.keys), filled_blocks)
        pages = self.take_cached(row, most)
        count = most - len(row.blocks)
        if count > 0 and not (row.blocks and row.blocks[-1].dropped):
            self.prefix.add(row, self._pool.shelve(_owner(row), count))
            self._own_pages -= count
        return pages

    def give_back(self, row: Row, now_s: float) -> None:
        """Take back a running row's pages and its reference to its adapter.

        Blocks of it that are cached stay, and are idle if nobody else holds them.
        """
        self.prefix.let_go(row, now_s)
        self._own_pages -= self._pool.free(_owner(row))
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

        Cached blocks that are idle make room for it, for they fill every page in the
        end. Leaves `keep_pages` free or to be had from them. An adapter whose last load
        failed is left to the next request for it, and so is one that the eviction
        policy dropped unused. A policy may still name one that was unregistered.
        """
        if not self._residency.knows(uid):
            return None
        adapter = self._residency.get(uid)
        if adapter.state is not State.ABSENT or adapter.broken or adapter.leaving:
            return None
        if adapter.declined and not adapter.queued:
            return None
        free_pages = self._pool.free_pages + self.prefix.idle_pages
        free_pages -= keep_pages + self._wanted_pages(adapter)
        if adapter.num_pages > free_pages:
            return None
        for _ in range(adapter.num_pages - self._pool.free_pages):
            self.prefix.evict()
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


def _owner(row: Row) -> tuple[str, str]:
    """Return who the pool knows a row's own pages by."""
    return "kv", row.request.request_id
