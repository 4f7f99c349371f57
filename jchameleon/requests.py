"""The requests of one call of the front door, from its arguments to their ends."""

import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from jchameleon.errors import InvalidRequestError, QueueFullError
from jchameleon.models.tokenizer import Tokenizer
from jchameleon.outputs import CompletionOutput, RequestDelta, RequestOutput
from jchameleon.runtime.adapters import AdapterRegistry
from jchameleon.runtime.completions import prepare_completions
from jchameleon.runtime.engine import Engine
from jchameleon.runtime.outbox import Delta, Outbox, RequestTiming
from jchameleon.runtime.submission import Submission
from jchameleon.sampling import SamplingParams

Prompt = str | Sequence[int]

NEVER_RUN = Delta(
    finish_reason="aborted",
    fault="cancelled",
    timing=RequestTiming(
        queue_s=0.0,
        adapter_load_s=0.0,
        ttft_s=None,
        total_s=0.0,
        adapter_cache_hit=None,
    ),
)
"""The end of a completion that was cancelled before the engine had room for it."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CallRequest:
    """A validated prompt: one submission for each of its completions.

    Attributes:
      adapter: name it was asked for under; None is the base model.
    """

    adapter: str | None
    submissions: tuple[Submission, ...]

    @property
    def request_id(self) -> str:
        """The id that callers know."""
        return self.submissions[0].request_id

    def output(self, wholes: Sequence[Delta]) -> RequestOutput:
        """Return what came of it, from everything that each completion sent."""
        return RequestOutput(
            request_id=self.request_id,
            adapter=self.adapter,
            prompt_token_ids=tuple(self.submissions[0].prompt.tolist()),
            prompt_logprobs=wholes[0].prompt_logprobs,
            outputs=tuple(map(_completion_output, range(len(wholes)), wholes)),
        )


class Call:
    """Requests that run together and share an outbox."""

    def __init__(self, engine: Engine, requests: Sequence[CallRequest]) -> None:
        """Nothing runs yet."""
        self.requests = requests
        self._engine = engine
        self._cancelled: set[str] = set()
        # Between asking whether a request is cancelled and submitting it, or between
        # noting that it is and telling the engine, nothing of the other may happen.
        self._lock = threading.Lock()

    def outputs(self) -> list[RequestOutput]:
        """Run all to their ends; one output for each request, in order."""
        wholes = [[Delta() for _ in one.submissions] for one in self.requests]
        for index, completion, delta in self._run():
            wholes[index][completion] = wholes[index][completion].then(delta)
        return [
            request.output(whole)
            for request, whole in zip(self.requests, wholes, strict=True)
        ]

    @property
    def submissions(self) -> list[Submission]:
        """All that the engine gets, in order."""
        return [one for request in self.requests for one in request.submissions]

    def deltas(self) -> Generator[RequestDelta, None, None]:
        """Run all and yield pieces of output; closed early, cancel what still runs."""
        for index, completion, delta in self._run():
            yield RequestDelta(
                index=index,
                completion=completion,
                request_id=self.requests[index].request_id,
                text=delta.text,
                token_ids=delta.token_ids,
                logprobs=delta.logprobs,
                prompt_logprobs=delta.prompt_logprobs,
                finish_reason=delta.finish_reason,
                error=delta.error,
                fault=delta.fault,
                timing=delta.timing,
            )

    def cancel(self, request_id: str) -> None:
        """End all completions of a request, also those that wait for room."""
        with self._lock:
            self._cancelled.add(request_id)
            for request in self.requests:
                if request.request_id == request_id:
                    for submission in request.submissions:
                        self._engine.cancel(submission.request_id)

    def _run(self) -> Iterator[tuple[int, int, Delta]]:
        """Submit all and yield (request, completion, delta) until all have ended.

        A call may be larger than the engine's queue: what does not fit yet is
        submitted as earlier requests end.
        """
        waiting = [
            (index, submission)
            for index, request in enumerate(self.requests)
            for submission in request.submissions
        ]
        waiting.reverse()
        open_ids: dict[str, tuple[int, int]] = {}
        try:
            while waiting or open_ids:
                try:
                    while waiting:
                        index, submission = waiting[-1]
                        place = index, submission.completion
                        submitted = self._submit(index, submission)
                        waiting.pop()
                        if submitted:
                            open_ids[submission.request_id] = place
                        else:
                            yield *place, NEVER_RUN
                except QueueFullError:
                    if not open_ids:
                        raise
                if not open_ids:
                    continue
                request_id, delta = self._outbox.get()
                place = open_ids[request_id]
                if delta.finish_reason is not None:
                    del open_ids[request_id]
                yield *place, delta
        finally:
            for request_id in open_ids:
                self._engine.cancel(request_id)
            for _, submission in waiting:
                submission.abandon()

    @property
    def _outbox(self) -> Outbox:
        return self.requests[0].submissions[0].outbox

    def _submit(self, index: int, submission: Submission) -> bool:
        """Hand one to the engine unless its request was cancelled; return whether."""
        with self._lock:
            if self.requests[index].request_id in self._cancelled:
                submission.abandon()
                return False
            self._engine.submit(submission)
            return True


class Caller:
    """Checks the arguments of calls and resolves what they name; for any thread."""

    def __init__(
        self,
        engine: Engine,
        registry: AdapterRegistry,
        tokenizer: Tokenizer | None,
        model_name: str,
    ) -> None:
        self._engine = engine
        self._registry = registry
        self._tokenizer = tokenizer
        self._model_name = model_name
        self._ids = itertools.count()

    def call(
        self,
        prompts: Prompt | Sequence[Prompt],
        adapters: str | None | Sequence[str | None],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        cache_salt: str | None | Sequence[str | None],
    ) -> Call:
        """Return a call whose requests are all valid and have claimed their adapters.

        Raises:
          JChameleonError: what is wrong with one of them; nothing is claimed then.
        """
        prompts = as_prompt_list(prompts)
        count, name = len(prompts), (str, type(None))
        sampling = SamplingParams() if sampling is None else sampling
        columns = (
            prompts,
            per_prompt("adapters", adapters, name, count),
            per_prompt("sampling", sampling, (SamplingParams,), count),
            per_prompt("cache_salt", cache_salt, name, count),
        )
        outbox = Outbox()
        requests = []
        with contextlib.ExitStack() as on_error:
            for prompt, adapter, params, salt in zip(*columns, strict=True):
                request = self.request(
                    f"req-{next(self._ids)}", prompt, adapter, params, salt, outbox
                )
                for submission in request.submissions:
                    on_error.callback(submission.abandon)
                requests.append(request)
            on_error.pop_all()
        return Call(self._engine, requests)

    def request(
        self,
        request_id: str,
        prompt: Prompt,
        adapter: str | None,
        sampling: SamplingParams,
        cache_salt: str | None,
        outbox: Outbox,
    ) -> CallRequest:
        """Return one valid request that has claimed its adapter.

        Raises:
          JChameleonError: what is wrong with it; nothing is claimed then.
        """
        tokens = self._encoded(prompt)
        with contextlib.ExitStack() as on_error:
            lease = None
            if adapter is not None:
                lease = self._registry.lease(adapter, request_id)
                on_error.callback(lease.abandon)
            submissions = prepare_completions(
                self._engine,
                request_id,
                tokens,
                sampling,
                adapter_uid=None if lease is None else lease.uid,
                outbox=outbox,
                lease=lease,
                cache_salt=cache_salt,
            )
            on_error.pop_all()
        return CallRequest(adapter=adapter, submissions=submissions)

    def _encoded(self, prompt: Prompt) -> Sequence[int]:
        if not isinstance(prompt, str):
            return prompt
        if self._tokenizer is None:
            raise InvalidRequestError(
                f"model {self._model_name!r} has no tokenizer; pass token ids"
            )
        if not prompt:
            raise InvalidRequestError("prompt is empty")
        return self._tokenizer.encode(prompt)


def _completion_output(index: int, whole: Delta) -> CompletionOutput:
    assert whole.finish_reason is not None and whole.timing is not None
    return CompletionOutput(
        index=index,
        token_ids=whole.token_ids,
        text=whole.text,
        logprobs=whole.logprobs,
        finish_reason=whole.finish_reason,
        error=whole.error,
        fault=whole.fault,
        timing=whole.timing,
    )


class RequestStream(Iterator[RequestDelta]):
    """Pieces of the outputs of one call, as they come."""

    def __init__(
        self,
        deltas: Generator[RequestDelta, None, None],
        submissions: Sequence[Submission],
    ) -> None:
        self._deltas = deltas
        self._submissions = submissions

    def __next__(self) -> RequestDelta:
        return next(self._deltas)

    def close(self) -> None:
        """Cancel what is left, also what never started; a second call does nothing."""
        self._deltas.close()
        for submission in self._submissions:
            submission.abandon()


def as_prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return a list of prompts; one string or one list of token ids is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise InvalidRequestError(
            f"prompts of type {type(prompts).__name__} must be a string, a list of "
            "strings or a list of lists of token ids"
        )
    if not prompts:
        return []
    if all(isinstance(item, int) and not isinstance(item, bool) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    for item in prompts:
        if isinstance(item, str):
            continue
        if not isinstance(item, Sequence) or isinstance(item, bytes):
            raise InvalidRequestError(
                f"prompt {item!r:.60} must be a string or a list of token ids"
            )
    return list(prompts)  # type: ignore[arg-type]


def per_prompt(field: str, value: Any, kinds: tuple[type, ...], count: int) -> list:
    """Return one value per prompt; a single value stands for all.

    Raises:
      InvalidRequestError: wrong type, or a list of another length than the prompts.
    """
    if isinstance(value, kinds):
        return [value] * count
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise InvalidRequestError(f"{field}={value!r:.60} must be {names} or a list")
    for item in value:
        if not isinstance(item, kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise InvalidRequestError(
                f"{field} has {item!r:.60}, which must be {names}"
            )
    if len(value) != count:
        raise InvalidRequestError(
            f"{field} has {len(value)} entries for {count} prompts"
        )
    return list(value)
