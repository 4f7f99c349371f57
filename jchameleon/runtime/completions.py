"""Several completions of one prompt: to the engine each is a request of its own."""

import dataclasses
from collections.abc import Sequence

from jchameleon.runtime.engine import Engine
from jchameleon.runtime.leases import AdapterLease
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
    lease: AdapterLease | None = None,
    cache_salt: str | None = None,
) -> tuple[Submission, ...]:
    """Validate a request and return a submission for each of its `n` completions.

    The first draws what it would draw alone, and it alone scores the prompt. Each has a
    claim of its own to the adapter, the first has `lease`.

    Raises:
      JChameleonError: as `Engine.prepare`.
    """
    # A copy checks every field again: not for the one completion that most have.
    one = sampling if sampling.n == 1 else dataclasses.replace(sampling, n=1)
    first = engine.prepare(
        request_id,
        prompt,
        one,
        adapter_uid=adapter_uid,
        outbox=outbox,
        lease=lease,
        cache_salt=cache_salt,
    )
    submissions = [first]
    if sampling.n > 1:
        others = dataclasses.replace(one, prompt_logprobs=None)
    for index in range(1, sampling.n):
        own_id = completion_id(request_id, index)
        submissions.append(
            dataclasses.replace(
                first,
                request_id=own_id,
                sampling=others,
                completion=index,
                lease=None if lease is None else lease.another(own_id),
            )
        )
    return tuple(submissions)
