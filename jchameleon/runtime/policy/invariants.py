"""What holds in a planner after every plan, whatever happened before."""

from typing import TYPE_CHECKING

from jchameleon.runtime.policy.candidates import State

if TYPE_CHECKING:
    from jchameleon.runtime.policy.planner import Planner


def check_planner(planner: "Planner") -> None:
    """Assert that pool, adapter table, line and rows agree; walks all of them."""
    config, residency = planner.config, planner._residency
    planner._pool.check()
    residency.check()
    rows = list(planner._running.values())
    planner._space.prefix.check(rows)
    books = planner.books()
    assert config.usable_pages == (
        books.free_pages
        + books.kv_pages
        + books.cached_pages
        + books.resident_pages
        + books.loading_pages
    ), f"pages do not add up: {books}"
    assert books.running <= config.max_running
    assert not planner._running.keys() & set(planner._waiting)
    shared = {block for row in rows for block in row.blocks}
    own_pages = sum(row.kv_pages - len(row.blocks) for row in rows)
    assert books.kv_pages == own_pages + len(shared)
    refs: dict[str, int] = {}
    queued: dict[str, int] = {}
    for request_id, row in planner._running.items():
        request = row.request
        pages = [block.page for block in row.blocks]
        pages += planner._pool.pages_of(("kv", request_id))
        held_tokens = len(pages) * config.block_tokens
        most = config.kv_pages(request.prompt_tokens, request.max_tokens)
        assert len(pages) == row.kv_pages <= most, f"{request_id}: page count"
        # KV entries of all but the last token that plans have asked for.
        assert request.prompt_tokens + row.planned_tokens - 1 <= held_tokens
        assert 0 <= row.prefilled_tokens <= row.prefill_tokens
        # Nobody reads a block before it is filled, and the last token runs.
        assert len(row.blocks) * config.block_tokens <= row.filled_tokens
        assert row.produced_tokens <= row.planned_tokens <= request.max_tokens
        assert row.squashes <= config.max_squashes, f"{request_id}: squashes"
        if row.adapter is not None:
            uid = row.adapter.uid
            assert row.adapter.state is not State.ABSENT, f"{request_id}: no {uid}"
            refs[uid] = refs.get(uid, 0) + 1
    for row in planner._waiting.values():
        assert row.kv_pages == 0 and row.settled and not row.blocks
        if row.adapter is not None:
            uid = row.adapter.uid
            queued[uid] = queued.get(uid, 0) + 1
    for stats in map(residency.stats, residency.uids()):
        assert stats.running == refs.get(stats.uid, 0), f"{stats.uid}: references"
        assert stats.queued == queued.get(stats.uid, 0), f"{stats.uid}: queued"
