"""Rows that outgrow the pages that their predicted output was given."""

from typing import TYPE_CHECKING

from jchameleon.runtime.policy.rows import Row
from jchameleon.runtime.policy.turn import Turn

if TYPE_CHECKING:
    from jchameleon.runtime.policy.planner import Planner


def grow_rows(planner: "Planner", turn: Turn) -> None:
    """Give a page to each row whose next token has no room, the oldest first.

    Free pages and idle adapters go first; then the youngest row that is younger
    and has not been squashed too often waits again; else the row itself skips this
    step. So the oldest row always gets on, or waits for rows that hold all they
    will ever need (those squashed too often), which end.
    """
    block_tokens = planner.config.block_tokens
    short = [
        row
        for row in planner._running.values()
        if row.request.prompt_tokens + row.planned_tokens > row.kv_pages * block_tokens
        and row.decodes
    ]
    if planner._space.can_free(len(short)):
        # At once: the eviction policy is asked once, and not for every page.
        turn.evicted += planner._space.free(len(short))
    for row in sorted(short, key=lambda row: row.seq):
        request_id = row.request.request_id
        if planner._running.get(request_id) is not row:
            continue  # squashed for an older one
        while not planner._space.can_free(1):
            victim = _youngest_after(planner, row)
            if victim is None:
                break
            planner._squash(victim, "growth", turn)
            planner._growth_squashes += 1
            turn.requeued.append(victim.request)
            turn.return_to_line(victim)
        if planner._space.can_free(1):
            turn.evicted += planner._space.free(1)
            turn.grown.append((request_id, planner._space.extend(row)))
            planner._grown_pages += 1
        else:
            row.stalled = True
            planner._stalls += 1


def _youngest_after(planner: "Planner", row: Row) -> Row | None:
    """Return the youngest row that may be squashed in favour of `row`."""
    younger = [
        other
        for other in planner._running.values()
        if other.seq > row.seq
        and other.settled
        and other.squashes < planner.config.max_squashes
    ]
    return max(younger, key=lambda other: other.seq, default=None)
