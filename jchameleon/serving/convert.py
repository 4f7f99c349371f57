"""Between the protocol's messages and the library's values."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import grpc

from jchameleon.requests import CallRequest, Prompt
from jchameleon.runtime.outbox import Delta, RequestTiming, TokenLogprobs
from jchameleon.sampling import MAX_TIME_LIMIT_S, SamplingParams
from jchameleon.serving.front import Call
from jchameleon.serving.proto.jchameleon.v1 import inference_pb2 as pb
from jchameleon.serving.status import StatusError, invalid

FINISH_REASONS = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "time_limit": pb.FINISH_REASON_TIME_LIMIT,
    "aborted": pb.FINISH_REASON_ABORTED,
}


def sampling_params(
    request: pb.GenerateRequest, *, deadline_s: float | None
) -> SamplingParams:
    """Return how a request is sampled; its RPC's deadline is a time limit too.

    Args:
      deadline_s: until the RPC's deadline.

    Raises:
      InvalidRequestError: a value is out of its range.
    """
    parts = (
        request.sampling.SerializeToString(),
        request.stopping.SerializeToString(),
        request.response.SerializeToString(),
    )
    # Most callers send one and the same again and again. Fields that are not known
    # here may make them as long as a message; such are not kept.
    make = _params if sum(map(len, parts)) <= _KEPT_BYTES else _params.__wrapped__
    params = make(
        *parts,
        expected_tokens=(
            request.predicted_output_tokens
            if request.HasField("predicted_output_tokens")
            else None
        ),
        priority=request.priority,
        truncate_prompt_tokens=request.truncate_prompt_tokens or None,
    )
    if deadline_s is None or deadline_s >= (params.time_limit_s or MAX_TIME_LIMIT_S):
        return params
    # The engine drops it by itself then, before prefill as well as between steps.
    return dataclasses.replace(params, time_limit_s=deadline_s)


_KEPT_BYTES = 1024


@functools.lru_cache(maxsize=256)
def _params(
    sampling: bytes, stopping: bytes, response: bytes, **others: int | None
) -> SamplingParams:
    """Return what three messages and fields beside them say."""
    fields: dict[str, Any] = dict(others)
    drawing = pb.SamplingParams.FromString(sampling)
    _take(fields, drawing, _SAMPLING_FIELDS)
    fields["logit_bias"] = dict(drawing.logit_bias)
    options = pb.ResponseOptions.FromString(response)
    _take(fields, options, ("logprobs", "prompt_logprobs"))
    criteria = pb.StoppingCriteria.FromString(stopping)
    _take(fields, criteria, _STOPPING_FIELDS)
    return SamplingParams(
        **fields,
        stop=tuple(criteria.stop),
        stop_token_ids=tuple(criteria.stop_token_ids),
        ignore_eos=criteria.ignore_eos,
        include_stop=criteria.include_stop,
    )


_SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
_STOPPING_FIELDS = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "time_limit_seconds": "time_limit_s",
}


def _take(
    fields: dict[str, Any], message: Any, names: Sequence[str] | dict[str, str]
) -> None:
    """Add to `fields` what is set in a message; `names` may rename."""
    renamed = names if isinstance(names, dict) else {}
    for name in names:
        if message.HasField(name):
            fields[renamed.get(name, name)] = getattr(message, name)


def prompt_of(request: Any, chat_tokens: Any) -> Prompt:
    """Return the prompt of a request with a `prompt` oneof.

    Args:
      chat_tokens: turns messages into token ids.

    Raises:
      StatusError: there is none.
      InvalidRequestError: a conversation cannot be rendered.
    """
    kind = request.WhichOneof("prompt")
    if kind == "text":
        return request.text
    if kind == "token_ids":
        return list(request.token_ids.ids)
    if kind == "chat":
        return chat_tokens(
            [{"role": m.role, "content": m.content} for m in request.chat.messages]
        )
    raise invalid("prompt", "prompt is empty; set text, token_ids or chat")


class Replies:
    """Makes the replies of one call from deltas: pieces, or all at once."""

    def __init__(
        self, request: pb.GenerateRequest, request_id: str, call: CallRequest
    ) -> None:
        options = request.response
        self._request_id = request_id
        self._has_text = options.text if options.HasField("text") else True
        self._has_ids = options.token_ids
        self._prompt = call.submissions[0].prompt
        self._owes_prompt_info = True
        self._output_tokens = 0
        self._cached_tokens = 0
        self._unfinished = len(call.submissions)

    @property
    def are_complete(self) -> bool:
        """Whether every completion has ended."""
        return not self._unfinished

    def piece(self, deltas: Sequence[tuple[int, Delta]]) -> pb.GenerateResponse:
        """Return a reply with what is new."""
        reply = pb.GenerateResponse(request_id=self._request_id)
        for index, delta in deltas:
            if self._owes_prompt_info:
                self._add_prompt_info(reply)
            if delta.prompt_logprobs is not None:
                reply.prompt_info.prompt_tokens = len(self._prompt)
                _add_logprobs(reply.prompt_info.logprobs, delta.prompt_logprobs)
            output = reply.outputs.add()
            # What is set costs time for every token; 0 and nothing are set already.
            if index:
                output.index = index
            if self._has_text and delta.text:
                output.text = delta.text
            if self._has_ids:
                output.token_ids.extend(delta.token_ids)
            if delta.logprobs is not None:
                _add_logprobs(output.logprobs, delta.logprobs)
            self._output_tokens += len(delta.token_ids)
            if delta.finish_reason is not None:
                self._unfinished -= 1
                output.finish.reason = FINISH_REASONS[delta.finish_reason]
                assert delta.timing is not None
                _set_timing(output.finish.timing, delta.timing)
                if index == 0:
                    self._cached_tokens = delta.timing.cached_tokens
        if self.are_complete:
            reply.usage.prompt_tokens = len(self._prompt)
            reply.usage.output_tokens = self._output_tokens
            reply.usage.cached_tokens = min(self._cached_tokens, len(self._prompt))
        return reply

    def _add_prompt_info(self, reply: pb.GenerateResponse) -> None:
        reply.prompt_info.prompt_tokens = len(self._prompt)
        if self._has_ids:
            reply.prompt_info.token_ids.extend(self._prompt.tolist())
        self._owes_prompt_info = False


def _add_logprobs(target: Any, logprobs: Sequence[TokenLogprobs | None]) -> None:
    for entry in logprobs:
        top = target.add().top
        for token_id, logprob in (entry or {}).items():
            top.add(token_id=token_id, logprob=logprob)


def _set_timing(message: pb.Timing, timing: RequestTiming) -> None:
    message.queue_ms = 1e3 * timing.queue_s
    message.adapter_load_ms = 1e3 * timing.adapter_load_s
    message.total_ms = 1e3 * timing.total_s
    message.preemptions = timing.squashes
    if timing.ttft_s is not None:
        message.ttft_ms = 1e3 * timing.ttft_s
    for field in ("lane", "adapter_cache_hit", "wrs"):
        if (value := getattr(timing, field)) is not None:
            setattr(message, field, value)


def check_deadline(context: Call) -> float | None:
    """Return the seconds until the RPC's deadline, None if it has none.

    Raises:
      StatusError: DEADLINE_EXCEEDED, it has passed.
    """
    left_s = context.time_remaining()
    if left_s is None or math.isinf(left_s):
        return None
    if left_s <= 0:
        raise deadline_exceeded()
    return left_s


def deadline_exceeded() -> StatusError:
    """Return the status of a request that did not end before its RPC's deadline."""
    return StatusError(
        grpc.StatusCode.DEADLINE_EXCEEDED,
        "DEADLINE",
        "the deadline passed before the answer was complete",
    )
