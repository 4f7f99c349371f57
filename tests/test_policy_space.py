"""Blocks and adapters in one pool: which makes room, in which order, and how much."""

from jchameleon.runtime.policy.candidates import State
from jchameleon.runtime.policy.pool import PagePool
from jchameleon.runtime.policy.prefix import released_pages
from jchameleon.runtime.policy.request import Request
from jchameleon.runtime.policy.residency import Residency
from jchameleon.runtime.policy.rows import Row
from jchameleon.runtime.policy.space import Space

BLOCK = 16


def space_of(adapters=(), *, pages=100, eviction=None):
    """Return a space with idle resident adapters (pages, last use), and its parts."""
    pool = PagePool(pages)
    residency = Residency(pool)
    space = Space(pool, residency, eviction or ByPages())
    for number, (num_pages, used_s) in enumerate(adapters):
        uid = f"adapter-{number}"
        residency.register(uid, 8, num_pages)
        adapter = residency.get(uid)
        residency.pin(uid, pinned=True)
        residency.reserve(adapter)
        residency.start_next_load()
        residency.finish_load(uid, failed=False, now_s=used_s)
        residency.pin(uid, pinned=False)
    return space, pool, residency


class ByPages:
    """Evicts the smallest first: a policy as somebody writes it who knows no blocks."""

    def score(self, table):
        return table.num_pages.astype(float)


def fill(space, name, blocks, now_s, *, uid=None):
    """Put blocks of one chain into the cache; their last use is `now_s`."""
    keys = tuple(f"{name}{i}" for i in range(blocks))
    request = Request(
        request_id=name,
        prompt_tokens=BLOCK * blocks,
        max_tokens=1,
        adapter_uid=uid,
        block_keys=keys,
    )
    row = Row(request, None, 0, 1, 0, keys)
    row.start(blocks)
    space.place(row, blocks)
    space.keep_filled(row, blocks)
    space.give_back(row, now_s)
    return row


def test_blocks_older_than_the_policys_victim_go_before_it_and_newer_ones_after():
    # The policy names the smallest: 0 (2 pages, used at 5), then 1 (3 pages, at 1).
    space, pool, residency = space_of([(2, 5.0), (3, 1.0)], pages=2 + 5 + 4)
    fill(space, "old", 2, 4.0)
    fill(space, "new", 2, 6.0)
    assert pool.free_pages == 0
    gone = []
    for _ in range(4):
        before = space.prefix.evicted_blocks
        uids = space.free(pool.free_pages + 1)
        gone.append((uids, space.prefix.evicted_blocks - before))
    assert gone == [([], 1), ([], 1), (["adapter-0"], 0), (["adapter-1"], 0)]
    assert space.free(11 - 2) == [] and space.prefix.evicted_blocks == 4


def test_adapter_that_somebody_waits_for_goes_after_all_blocks():
    space, pool, residency = space_of([(2, 5.0), (3, 9.0)], pages=2 + 5 + 2)
    residency.add_queued("adapter-0")
    fill(space, "new", 2, 6.0)
    assert space.free(3) == ["adapter-1"]  # its use is newer, but nobody waits for it
    assert space.prefix.evicted_blocks == 2
    assert space.free(7) == ["adapter-0"]


def test_prefetch_takes_pages_of_idle_blocks_but_of_no_adapter():
    space, pool, residency = space_of([(4, 0.0)], pages=2 + 4 + 5)
    fill(space, "a", 5, 1.0)
    residency.register("next", 8, 3)
    assert space.prefetch("next", keep_pages=3) is None
    load = space.prefetch("next", keep_pages=2)
    assert len(load.pages) == 3 and space.prefix.evicted_blocks == 3
    residency.register("larger", 8, 3)
    assert space.prefetch("larger", keep_pages=0) is None
    assert residency.get("adapter-0").state is State.RESIDENT


def test_pages_released_by_ends_count_a_shared_block_with_its_last_user():
    space, _, _ = space_of()
    fill(space, "s", 3, 0.0)
    rows = []
    for name, blocks, own in (("a", 3, 2), ("b", 2, 1), ("c", 3, 4)):
        keys = ("s0", "s1", "s2")[:blocks]
        request = Request(
            request_id=name, prompt_tokens=99, max_tokens=1, block_keys=keys
        )
        row = Row(request, None, 0, 1, 0, keys)
        row.start(blocks + own)
        space.place(row, blocks)
        rows.append(row)
    a, b, c = rows
    assert released_pages([a, b, c]) == [2, 1, 4 + 3]
    assert released_pages([c, a, b]) == [4, 2 + 1, 1 + 2]
