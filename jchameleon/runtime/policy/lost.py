"""A device that has lost all that it held: everything is to be computed again."""

from typing import TYPE_CHECKING

from jchameleon.runtime.policy.turn import Turn

if TYPE_CHECKING:
    from jchameleon.runtime.policy.planner import Planner


def start_over(planner: "Planner", turn: Turn) -> None:
    """Let all that runs wait again, and forget cached blocks and resident adapters.

    Nobody squashed these requests for others, so it counts against no limit. Of what
    plans have asked for, whatever was not reported is asked for again.
    """
    rows = sorted(planner._running.values(), key=lambda row: -row.seq)
    for row in rows:  # the oldest ends up first in its line
        planner._squash(row, "the device lost its pages", turn)
        row.squashes -= 1
        row.planned_tokens = row.produced_tokens
        turn.requeued.append(row.request)
        turn.return_to_line(row)
    turn.evicted += planner._space.lose_all()
