"""Adapters that are loaded before a request that needs them starts."""

from typing import TYPE_CHECKING

from jchameleon.runtime.policy.blame import blaming
from jchameleon.runtime.policy.plan import Load
from jchameleon.runtime.policy.turn import Turn

if TYPE_CHECKING:
    from jchameleon.runtime.policy.planner import Planner


def loads_ahead(planner: "Planner", turn: Turn) -> list[Load]:
    """Ask the prefetch policy while link and pages are idle.

    One place on the link is left for a request that is admitted next, and a page
    for each row that may outgrow its own. While somebody lacks pages, nothing is
    loaded ahead but what they need themselves.
    """
    # With a single place, prefetch may have it.
    limit = max(1, planner.config.max_loads_in_flight - 1)
    residency = planner._residency
    loads: list[Load] = []
    with blaming("prefetch", planner._prefetch):
        if planner._observe_prefetch is not None:
            planner._observe_prefetch(turn)
        if residency.loads_in_flight >= limit:
            return []
        keep_pages: int | None = None
        for uid in planner._prefetch.candidates(turn):
            if turn.lacking and uid not in turn.lacking:
                continue
            if keep_pages is None:  # as a rule nobody is named
                keep_pages = sum(map(planner._may_grow, planner._running.values()))
            load = planner._space.prefetch(uid, keep_pages=keep_pages)
            if load is not None:
                loads.append(load)
                if residency.loads_in_flight >= limit:
                    break
    return loads
