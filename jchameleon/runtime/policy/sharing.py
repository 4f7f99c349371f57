"""Rows and the prefix cache: filled blocks go in, those that others filled come out."""

from typing import TYPE_CHECKING

from jchameleon.runtime.policy.events import StepDone
from jchameleon.runtime.policy.rows import reusable_blocks
from jchameleon.runtime.policy.turn import Turn

if TYPE_CHECKING:
    from jchameleon.runtime.policy.planner import Planner


def keep_filled(planner: "Planner", event: StepDone, turn: Turn) -> None:
    """Put the full blocks of a step that is done into the prefix cache.

    A block that another row put there first is swapped for this row's own, so that
    every block is there once.
    """
    running = planner._running
    rows = {row: None for row in planner._prefilled if row.kv_pages}
    planner._prefilled = []
    for request_id, key in event.block_keys:
        if request_id in running:
            row = running[request_id]
            row.keys += (key,)
            rows[row] = None
    for request_id in event.spoiled:
        if request_id in running:
            planner._space.prefix.forget(running[request_id].request.adapter_uid)
            rows.pop(running[request_id], None)
    for row in rows:
        first = len(row.blocks)
        filled_blocks = row.filled_tokens // planner.config.block_tokens
        turn.note_swap(row, first, planner._space.keep_filled(row, filled_blocks))


def catch_up(planner: "Planner", turn: Turn) -> None:
    """Let prompts go on behind blocks that others have filled since they started.

    Theirs give way to those, and what they need not run counts as found in the cache.
    """
    prefix, block_tokens = planner._space.prefix, planner.config.block_tokens
    if planner._seen_blocks == prefix.added_blocks:
        return
    planner._seen_blocks = prefix.added_blocks
    for row in planner._running.values():
        decodes = row.prefilled_tokens == row.prefill_tokens
        if decodes or row.next_key(block_tokens) is None:
            continue
        first = len(row.blocks)
        pages = planner._space.take_cached(row, reusable_blocks(row, block_tokens))
        if pages:
            turn.note_swap(row, first, pages)
            turn.note_cached(row, len(pages) * block_tokens)
