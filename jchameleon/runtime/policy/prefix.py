"""KV blocks that stay after their request, for requests that begin with the same text.

A block is known by a key that stands for its adapter, its salt and all tokens up to its
end, so equal keys mean equal KV entries, and a block that is here has all those before
it here. Requests hold the blocks that they begin with; a block that nobody holds is
idle and may be evicted.
"""

import bisect
import dataclasses
from collections import OrderedDict
from collections.abc import Sequence

from jchameleon.runtime.policy.candidates import Adapter
from jchameleon.runtime.policy.pool import PagePool
from jchameleon.runtime.policy.rows import Row


@dataclasses.dataclass(slots=True, eq=False)
class Block:
    """One full KV block of the cache, which only `PrefixCache` changes.

    Attributes:
      page: what holds it; nobody writes there any more.
      parent: the block before it; None for the first of a prompt.
      refs: running requests that hold it; never more than hold its parent.
      last_used_s: when the last of them let go of it.
      dropped: no request finds it any more; its page returns when nobody holds it.
    """

    key: str
    uid: str | None
    page: int
    parent: "Block | None"
    refs: int = 1
    last_used_s: float = 0.0
    dropped: bool = False


class PrefixCache:
    """The table of cached blocks, over the pages that the pool has shelved for it.

    A running request's pages are its blocks' (`Row.blocks`), then those of its own.

    Attributes:
      hit_tokens: tokens that requests did not run because their blocks were here.
      queried_tokens: tokens of admitted requests that may use the cache.
      evicted_blocks: blocks that made room.
      added_blocks: blocks that came in.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._blocks: dict[str | None, dict[str, Block]] = {}  # by adapter
        # By last use. Whoever lets go of a chain does so from its end, and who holds a
        # block holds its parents: a block always lies before its parent here, so what
        # is evicted is a leaf.
        self._idle: OrderedDict[Block, None] = OrderedDict()
        self.hit_tokens = 0
        self.queried_tokens = 0
        self.evicted_blocks = 0
        self.added_blocks = 0

    @property
    def idle_pages(self) -> int:
        """Pages of blocks that no running request holds."""
        return len(self._idle)

    @property
    def held_pages(self) -> int:
        """Pages of blocks that running requests hold, each once."""
        return self._pool.shelved_pages - len(self._idle)

    def find(self, row: Row, most: int) -> tuple[int, int]:
        """Return how many leading blocks of a row are here, and how many are held.

        Takes O(log n) steps: with a block all before it are here, and with one that is
        held all before it are held.

        Args:
          most: blocks that the row may use.
        """
        table = self._blocks.get(row.request.adapter_uid)
        if not table:
            return 0, 0
        keys = row.keys
        most = min(most, len(keys))
        found = bisect.bisect_left(
            range(most), True, key=lambda i: keys[i] not in table
        )
        held = bisect.bisect_left(
            range(found), True, key=lambda i: not table[keys[i]].refs
        )
        return found, held

    def find_next(self, row: Row, most: int) -> int:
        """Return how many blocks after those that a row holds are here, one after one.

        Args:
          most: the row's blocks, those that it holds included, that it may use.
        """
        table = self._blocks.get(row.request.adapter_uid)
        first = end = len(row.blocks)
        most = min(most, len(row.keys))
        if table:
            while end < most and row.keys[end] in table:
                end += 1
        return end - first

    def first_blocks(self, row: Row, count: int) -> frozenset[Block]:
        """Return the first `count` blocks of a row, which must be here."""
        table = self._blocks.get(row.request.adapter_uid, {})
        return frozenset(table[key] for key in row.keys[:count])

    def hold(self, row: Row, count: int) -> tuple[int, ...]:
        """Give a row the next `count` blocks after those it holds; return their pages.

        They must be here.
        """
        if not count:
            return ()
        table = self._blocks[row.request.adapter_uid]
        first = len(row.blocks)
        for key in row.keys[first : first + count]:
            block = table[key]
            if not block.refs:
                del self._idle[block]
            block.refs += 1
            row.blocks.append(block)
        return tuple(block.page for block in row.blocks[first:])

    def add(self, row: Row, pages: tuple[int, ...]) -> None:
        """Take in blocks that a row has filled, after those it holds; none is here.

        Args:
          pages: of the blocks, shelved already.
        """
        uid = row.request.adapter_uid
        table = self._blocks.setdefault(uid, {})
        first = len(row.blocks)
        parent = row.blocks[-1] if row.blocks else None
        for key, page in zip(row.keys[first:], pages, strict=False):
            assert key not in table, "a block is here twice"
            table[key] = parent = Block(key, uid, page, parent)
            row.blocks.append(parent)
        self.added_blocks += len(pages)

    def let_go(self, row: Row, now_s: float) -> None:
        """Let a row go of all its blocks."""
        for block in reversed(row.blocks):
            block.refs -= 1
            if block.refs:
                continue
            if block.dropped:
                self._pool.unshelve(block.page)
            else:
                block.last_used_s = now_s
                self._idle[block] = None
        row.blocks.clear()

    def goes_before(self, adapter: Adapter) -> bool:
        """Return whether the oldest idle block is to be evicted before an adapter.

        So it is when it was not used after the adapter, for both cost time to get back
        and the policy has just named the adapter the least worth it of its kind; and
        when a waiting request names the adapter, which is needed for certain.
        """
        if not self._idle:
            return False
        oldest = next(iter(self._idle))
        return adapter.queued > 0 or oldest.last_used_s <= adapter.last_used_s

    def evict(self) -> None:
        """Evict the idle block that was used longest ago, in O(1)."""
        block, _ = self._idle.popitem(last=False)
        table = self._blocks[block.uid]
        del table[block.key]
        if not table:
            del self._blocks[block.uid]
        self._pool.unshelve(block.page)
        self.evicted_blocks += 1

    def forget(self, uid: str | None) -> int:
        """Drop all blocks of an adapter (None: of the base model); return how many.

        No request finds them from now on. Pages of idle ones are free at once, those
        that running requests hold when these end. To be called when an adapter is
        unregistered, so that no KV entry outlives its uid: then no request for it waits
        or runs any more, or those would put more blocks here.
        """
        table = self._blocks.pop(uid, {})
        for block in table.values():
            block.dropped = True
            if not block.refs:
                del self._idle[block]
                self._pool.unshelve(block.page)
        return len(table)

    def forget_all(self) -> None:
        """Drop all blocks, as `forget` does."""
        for uid in list(self._blocks):
            self.forget(uid)

    def keys(self, uid: str | None) -> frozenset[str]:
        """Return the keys of an adapter's blocks."""
        return frozenset(self._blocks.get(uid, ()))

    def check(self, rows: Sequence[Row]) -> None:
        """Assert that table, idle blocks, references and pool agree.

        Args:
          rows: all that run.
        """
        refs: dict[Block, int] = {}
        for row in rows:
            held = row.blocks
            assert [b.key for b in held] == list(row.keys[: len(held)]), "not its keys"
            for block, parent in zip(held, [None, *held], strict=False):
                assert block.parent is parent, f"{block.key}: another parent"
                refs[block] = refs.get(block, 0) + 1
        blocks = [b for table in self._blocks.values() for b in table.values()]
        assert all(self._blocks.values()), "an empty table"
        place = {block: i for i, block in enumerate(self._idle)}
        for block in blocks:
            table = self._blocks[block.uid]
            assert table[block.key] is block and not block.dropped
            assert block.refs == refs.get(block, 0), f"{block.key}: references"
            assert (block in place) == (block.refs == 0), f"{block.key}: idle or not"
            parent = block.parent
            if parent is not None:
                assert table.get(parent.key) is parent, f"{block.key}: no parent"
                assert parent.refs >= block.refs
                assert parent.refs or place[block] < place[parent], "not leaf first"
        assert place.keys() <= set(blocks)
        times = [block.last_used_s for block in self._idle]
        assert times == sorted(times), "idle blocks out of order"
        pages = {b.page for b in [*blocks, *refs]}
        assert len(pages) == len({*blocks, *refs}) == self._pool.shelved_pages


def released_pages(rows: Sequence[Row]) -> list[int]:
    """Return the pages that fall free or evictable as rows end one after another.

    Args:
      rows: all that run, in the order in which they end.
    """
    # A block is released by the last that holds it: from the back, by the first.
    seen: set[Block] = set()
    pages = []
    for row in reversed(rows):
        blocks = row.blocks
        at = bisect.bisect_left(blocks, True, key=lambda block: block.refs == 1)
        count = row.kv_pages - at  # pages of its own, and blocks that it alone holds
        while at and blocks[at - 1] not in seen:
            at -= 1
            seen.add(blocks[at])
            count += 1
        pages.append(count)
    return pages[::-1]


def pages_of_all(rows: Sequence[Row], *, kept: frozenset[Block]) -> int:
    """Return the pages that fall free or evictable when all of `rows` stop at once.

    Args:
      kept: blocks that somebody else takes then.
    """
    refs: dict[Block, int] = {}
    for row in rows:
        for block in row.blocks:
            refs[block] = refs.get(block, 0) + 1
    own = sum(row.kv_pages - len(row.blocks) for row in rows)
    return own + sum(
        count == block.refs and block not in kept for block, count in refs.items()
    )
