"""Whether one more adapter can be kept on the device for good."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jchameleon.runtime.policy.planner import Planner


def why_not_pin(planner: "Planner", uid: str, pins: Mapping[str, bool]) -> str | None:
    """Return why an adapter cannot be pinned now, see `Planner.why_not_pin`."""
    residency, config = planner._residency, planner.config
    pinned = {*residency.pinned_uids(), uid}
    pinned |= {other for other, is_pinned in pins.items() if is_pinned}
    pinned -= {other for other, is_pinned in pins.items() if not is_pinned} - {uid}
    kept = sum(residency.get(other).num_pages for other in pinned)
    needed = 1
    for rows in (planner._running, planner._waiting):
        for row in rows.values():
            request = row.request
            pages = config.kv_pages(request.prompt_tokens, request.max_tokens)
            own = row.adapter
            if own is not None and own.uid not in pinned:
                pages += own.num_pages
            needed = max(needed, pages)
    usable = config.usable_pages
    if kept + needed <= usable:
        return None
    return (
        f"pinned adapters would keep {kept} pages of the pool's {usable}, and a "
        f"request needs {needed}: unpin others or enlarge pool_bytes"
    )
