"""Tell live requests, loads and the executor what a plan decided about them."""

from collections.abc import Mapping

from jchameleon.runtime.executor import Executor
from jchameleon.runtime.live import LiveRequest
from jchameleon.runtime.loads import AdapterLoads
from jchameleon.runtime.policy.plan import Plan


def carry_out(
    plan: Plan,
    now_s: float,
    *,
    live: Mapping[str, LiveRequest],
    loads: AdapterLoads,
    executor: Executor,
) -> None:
    """Hand out pages, evict and start loads, in the order of the plan's fields.

    All but its steps and the requests that fail, which are no longer among `live`.
    """
    for request_id, _ in plan.squashed:
        if request_id in live:  # not rejected right after
            loads.forget(live[request_id])
            live[request_id].squash(now_s)
    for evicted_uid in plan.evicted:
        executor.evict(evicted_uid)
    hits = set(plan.hits)
    for request_id, pages in plan.kv_pages:
        one, hit = live[request_id], request_id in hits
        one.admit(pages, executor.table, hit=hit, now_s=now_s)
        if not hit:
            loads.wait(one)
    for request_id, tokens in plan.cached:
        live[request_id].cached_tokens += tokens
    for request_id, lane, wrs in plan.lanes:
        live[request_id].enter_lane(lane, wrs)
    for _, passed_id in plan.bypasses:
        if passed_id in live:  # not rejected right after
            live[passed_id].bypasses += 1
    for request_id, block, pages in plan.swapped:
        live[request_id].swap(block, pages)
    for request_id, pages in plan.grown:
        live[request_id].grow(pages)
    for load in plan.loads:
        loads.start(load)
