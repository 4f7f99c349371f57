"""One iteration on the device: the prompt chunks and decode rows of a plan."""

from collections.abc import Mapping

from jchameleon.runtime.executor import Executor
from jchameleon.runtime.live import LiveRequest
from jchameleon.runtime.policy.plan import Plan


def run_step(
    executor: Executor, live: Mapping[str, LiveRequest], plan: Plan
) -> list[tuple[str, int]]:
    """Run what a plan lays out and return (request id, token) of what was drawn.

    Args:
      live: running requests by id.
    """
    prompts = [
        live[c.request_id].row(c.start, c.start + c.length) for c in plan.prefill
    ]
    lives = [live[request_id] for request_id in plan.decode]
    rows = [one.row(one.num_tokens - 1, one.num_tokens) for one in lives]
    # Both are dispatched before either is waited for.
    prompt_tokens = executor.prefill(prompts) if prompts else None
    row_tokens = executor.decode(rows) if rows else None
    drawn: list[tuple[str, int]] = []
    if prompt_tokens is not None:
        tokens = executor.fetch(prompt_tokens, prompts, prefill=True)
        drawn += [
            (chunk.request_id, token)
            for chunk, row, token in zip(plan.prefill, prompts, tokens, strict=True)
            if row.sampling is not None
        ]
    if row_tokens is not None:
        tokens = executor.fetch(row_tokens, rows, prefill=False)
        drawn += zip(plan.decode, tokens, strict=True)
    return drawn
