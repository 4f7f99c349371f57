"""One iteration on the device: the prompt chunks and decode rows of a plan."""

import dataclasses
import time
from collections.abc import Callable, Mapping

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
      device_s: from the first call of a program until all results were here, without
        what went into laying out batches meanwhile.
    """

    drawn: list[tuple[str, DrawnToken]]
    scored: list[tuple[str, np.ndarray]]
    device_s: float

    def __add__(self, other: "StepOutput") -> "StepOutput":
        """Return what two steps produced."""
        return StepOutput(
            drawn=self.drawn + other.drawn,
            scored=self.scored + other.scored,
            device_s=self.device_s + other.device_s,
        )


def run_step(
    executor: Executor,
    live: Mapping[str, LiveRequest],
    plan: Plan,
    *,
    meanwhile: Callable[[], None],
) -> StepOutput:
    """Run what a plan lays out.

    Args:
      live: running requests by id.
      meanwhile: called once, when the device has its work and before it is waited for.
    """
    prompt_ids = [c.request_id for c in plan.prefill]
    prompts = [
        live[c.request_id].row(c.start, c.start + c.length) for c in plan.prefill
    ]
    rows = None
    if plan.decode:
        places = np.array([live[request_id].place for request_id in plan.decode])
        rows = executor.table.rows(places)
    start_s, built_s = time.monotonic(), executor.build_s
    # Both are dispatched before either is waited for.
    prefill = executor.prefill(prompts) if prompts else None
    decode = None if rows is None else executor.decode(rows)
    meanwhile()
    drawn: list[tuple[str, DrawnToken]] = []
    scored: list[tuple[str, np.ndarray]] = []
    for step, ids in ((prefill, prompt_ids), (decode, plan.decode)):
        if step is None:
            continue
        draws = step.draws.fetch()
        drawn.extend(
            (request_id, draw)
            for request_id, draw in zip(ids, draws, strict=True)
            if draw is not None
        )
        if step.scores is not None:
            scored.extend(
                (request_id, packed)
                for request_id, packed in zip(ids, step.scores.fetch(), strict=True)
                if len(packed)
            )
    built_s = executor.build_s - built_s
    return StepOutput(
        drawn=drawn, scored=scored, device_s=time.monotonic() - start_s - built_s
    )
