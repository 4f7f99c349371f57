"""One iteration on the device: the prompt chunks and decode rows of a plan."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from jchameleon.runtime.drawing import DrawnToken
from jchameleon.runtime.executor import Executor
from jchameleon.runtime.live import LiveRequest
from jchameleon.runtime.policy.plan import Plan


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepOutput:
    """What an iteration produced.

    Attributes:
      drawn: (request id, token drawn for it).
      scored: (request id, i32[n, 2, 1 + K] of `pack_logprobs`) of prompt tokens.
    """

    drawn: list[tuple[str, DrawnToken]]
    scored: list[tuple[str, np.ndarray]]


def run_step(
    executor: Executor, live: Mapping[str, LiveRequest], plan: Plan
) -> StepOutput:
    """Run what a plan lays out.

    Args:
      live: running requests by id.
    """
    prompt_ids = [c.request_id for c in plan.prefill]
    prompts = [
        live[c.request_id].row(c.start, c.start + c.length) for c in plan.prefill
    ]
    lives = [live[request_id] for request_id in plan.decode]
    rows = [one.row(one.num_tokens - 1, one.num_tokens) for one in lives]
    # Both are dispatched before either is waited for.
    prefill = executor.prefill(prompts) if prompts else None
    decode = executor.decode(rows) if rows else None
    output = StepOutput(drawn=[], scored=[])
    for step, ids in ((prefill, prompt_ids), (decode, plan.decode)):
        if step is None:
            continue
        draws = step.draws.fetch()
        output.drawn.extend(
            (request_id, drawn)
            for request_id, drawn in zip(ids, draws, strict=True)
            if drawn is not None
        )
        if step.scores is not None:
            scores = step.scores.fetch()
            output.scored.extend(
                (request_id, packed)
                for request_id, packed in zip(ids, scores, strict=True)
                if len(packed)
            )
    return output
