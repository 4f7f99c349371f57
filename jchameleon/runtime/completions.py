"""Several completions of one prompt: to the engine each is a request of its own."""

import dataclasses
from collections.abc import Sequence

from jchameleon.runtime.engine import Engine
from jchameleon.runtime.outbox import Outbox
from jchameleon.runtime.submission import Submission
from jchameleon.sampling import SamplingParams


def completion_id(request_id: str, index: int) -> str:
    """Return the engine's id of one completion of a request; of the first, its own."""
    return request_id if index == 0 else f"{request_id}#{index}"


def prepare_completions(
    engine: Engine,
    request_id: str,
    prompt: Sequence[int],
    sampling: SamplingParams,
    *,
    adapter_uid: str | None,
    outbox: Outbox,
) -> tuple[Submission, ...]:
    """Validate a request and return a submission for each of its `n` completions.

    The first draws what it would draw alone, and it alone scores the prompt.

    Raises:
      JChameleonError: as `Engine.prepare`.
    """
    first = engine.prepare(
        request_id,
        prompt,
        dataclasses.replace(sampling, n=1),
        adapter_uid=adapter_uid,
        outbox=outbox,
    )
    others = dataclasses.replace(first.sampling, prompt_logprobs=None)
    return first, *(
        dataclasses.replace(
            first,
            request_id=completion_id(request_id, index),
            sampling=others,
            completion=index,
        )
        for index in range(1, sampling.n)
    )
