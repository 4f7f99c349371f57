"""Between the protocol's messages and the clients' values."""

import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypedDict, TypeVar

from google.protobuf.timestamp_pb2 import Timestamp

from jchameleon.client import values
from jchameleon.errors import InvalidRequestError
from jchameleon.serving.proto.jchameleon.v1 import inference_pb2 as pb

T = TypeVar("T")


Messages = Sequence[Mapping[str, str]]
"""A conversation: {"role": ..., "content": ...} each."""


class Sampling(TypedDict, total=False):
    """Fields of `jchameleon.SamplingParams`, whose meaning and defaults they have."""

    n: int
    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop: bool
    ignore_eos: bool
    logprobs: int | None
    prompt_logprobs: int | None
    priority: int
    truncate_prompt_tokens: int | None
    time_limit_s: float | None
    expected_tokens: int | None


class Request(Sampling, total=False):
    """What `generate` and `stream` take besides a prompt as text.

    Attributes:
      token_ids, messages: the prompt, instead of a text.
      adapter: None is the base model.
      request_id: for `abort`; empty lets the server choose one.
      cache_salt: cached KV is shared only among requests of the same salt.
    """

    token_ids: Sequence[int] | None
    messages: Messages | None
    adapter: str | None
    request_id: str
    cache_salt: str


# Where the protocol has a field: in which part of the request, under which name.
_PLACES = {
    **{
        name: ("sampling", name)
        for name in (
            "n",
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "seed",
        )
    },
    "max_tokens": ("stopping", "max_new_tokens"),
    "min_tokens": ("stopping", "min_new_tokens"),
    "stop_token_ids": ("stopping", "stop_token_ids"),
    "stop": ("stopping", "stop"),
    "include_stop": ("stopping", "include_stop"),
    "ignore_eos": ("stopping", "ignore_eos"),
    "time_limit_s": ("stopping", "time_limit_seconds"),
    "logprobs": ("response", "logprobs"),
    "prompt_logprobs": ("response", "prompt_logprobs"),
    "priority": (None, "priority"),
    "truncate_prompt_tokens": (None, "truncate_prompt_tokens"),
    "expected_tokens": (None, "predicted_output_tokens"),
    "adapter": (None, "adapter_id"),
    "request_id": (None, "request_id"),
    "cache_salt": (None, "cache_salt"),
}


def generate_request(
    prompt: str | None, fields: Mapping[str, Any]
) -> pb.GenerateRequest:
    """Return the message of a request; the server checks its values.

    Raises:
      InvalidRequestError: not one prompt, an unknown field, or a value that the
        protocol cannot carry.
    """
    request = pb.GenerateRequest(response=pb.ResponseOptions(token_ids=True))
    set_prompt(request, prompt, fields.get("token_ids"), fields.get("messages"))
    for name, value in fields.items():
        if value is None or name in ("token_ids", "messages"):
            continue
        if name == "logit_bias":
            _put(name, value, lambda biases: request.sampling.logit_bias.update(biases))
        elif name in _PLACES:
            part, field = _PLACES[name]
            if name == "stop" and isinstance(value, str):
                value = (value,)
            _set(getattr(request, part) if part else request, field, value, name)
        else:
            raise InvalidRequestError(f"{name}={value!r:.80} is no field of a request")
    return request


def set_prompt(
    request: Any,
    prompt: str | None,
    token_ids: Sequence[int] | None,
    messages: Messages | None,
) -> None:
    """Set the prompt of a request.

    Raises:
      InvalidRequestError: it is not given in exactly one way.
    """
    if [prompt, token_ids, messages].count(None) != 2:
        raise InvalidRequestError("one of prompt, token_ids and messages must be given")
    if prompt is not None:
        _set(request, "text", prompt, "prompt")
    elif token_ids is not None:
        request.token_ids.SetInParent()
        _set(request.token_ids, "ids", token_ids, "token_ids")
    else:
        request.chat.SetInParent()
        for message in messages or ():
            _put("messages", message, lambda one: request.chat.messages.add(**one))


def _set(message: Any, field: str, value: Any, name: str) -> None:
    if isinstance(value, str | bool | int | float):
        _put(name, value, lambda scalar: setattr(message, field, scalar))
    else:
        _put(name, value, lambda items: getattr(message, field).extend(items))


def _put(name: str, value: Any, action: Callable[[Any], object]) -> None:
    """Put a value into a message; say which it was where it does not fit."""
    try:
        action(value)
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidRequestError(
            f"{name}={value!r:.80} cannot be sent: {error}"
        ) from error


def generation(reply: pb.GenerateResponse) -> values.Generation:
    """Return the value of a reply of Generate."""
    return values.Generation(
        request_id=reply.request_id,
        prompt_token_ids=tuple(reply.prompt_info.token_ids),
        prompt_logprobs=_logprobs(reply.prompt_info.logprobs),
        completions=tuple(
            values.Completion(
                index=output.index,
                text=output.text,
                token_ids=tuple(output.token_ids),
                logprobs=_logprobs(output.logprobs),
                finish_reason=enum_name(output.finish, "reason"),
                timing=_timing(output.finish.timing),
            )
            for output in reply.outputs
        ),
        usage=value_of(values.Usage, reply.usage),
    )


def pieces(reply: pb.GenerateResponse) -> Iterator[values.Piece]:
    """Yield the pieces in a reply of GenerateStream."""
    last = len(reply.outputs) - 1
    for place, output in enumerate(reply.outputs):
        is_first = place == 0 and reply.HasField("prompt_info")
        is_last = place == last and reply.HasField("usage")
        ends = output.HasField("finish")
        yield values.Piece(
            request_id=reply.request_id,
            index=output.index,
            text=output.text,
            token_ids=tuple(output.token_ids),
            logprobs=_logprobs(output.logprobs),
            finish_reason=enum_name(output.finish, "reason") if ends else None,
            timing=_timing(output.finish.timing) if ends else None,
            prompt_token_ids=tuple(reply.prompt_info.token_ids) if is_first else None,
            prompt_logprobs=(
                _logprobs(reply.prompt_info.logprobs) if is_first else None
            ),
            usage=value_of(values.Usage, reply.usage) if is_last else None,
        )


def _logprobs(entries: Any) -> values.Logprobs | None:
    if not entries:
        return None
    return tuple({one.token_id: one.logprob for one in entry.top} for entry in entries)


def _timing(message: pb.Timing) -> values.Timing:
    def optional(field: str) -> Any:
        return getattr(message, field) if message.HasField(field) else None

    ttft_ms = optional("ttft_ms")
    return values.Timing(
        queue_s=message.queue_ms / 1e3,
        adapter_load_s=message.adapter_load_ms / 1e3,
        ttft_s=None if ttft_ms is None else ttft_ms / 1e3,
        total_s=message.total_ms / 1e3,
        lane=optional("lane"),
        adapter_cache_hit=optional("adapter_cache_hit"),
        wrs=optional("wrs"),
        preemptions=message.preemptions,
    )


_PARTS: dict[str, type] = {
    "CacheStats": values.CacheStats,
    "QueueStats": values.QueueStats,
    "KvStats": values.KvStats,
    "EngineStats": values.EngineStats,
}


def value_of(kind: type[T], message: Any) -> T:
    """Return a message as a dataclass whose fields are called as the message's."""
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.is_repeated:
            found[field.name] = tuple(_plain(field, one) for one in value)
        elif field.has_presence and not message.HasField(field.name):
            found[field.name] = None if _is_optional(field) else _plain(field, value)
        elif field.enum_type is not None:
            found[field.name] = enum_name(message, field.name)
        else:
            found[field.name] = _plain(field, value)
    return kind(**found)


def _is_optional(field: Any) -> bool:
    """Return whether the protocol says `optional`."""
    return field.containing_oneof is not None


def _plain(field: Any, value: Any) -> Any:
    if isinstance(value, Timestamp):
        return value.ToDatetime(tzinfo=datetime.UTC)
    if field.message_type is not None:
        return value_of(_PARTS[field.message_type.name], value)
    return value


def enum_name(message: Any, field: str) -> Any:
    """Return an enum's value as a lower-case word, without the enum's own name."""
    number = getattr(message, field)
    kind = message.DESCRIPTOR.fields_by_name[field].enum_type
    known = kind.values_by_number.get(number)
    if known is None:  # of a newer server
        return f"unknown_{number}"
    # buf's rule: values begin with the enum's name in capitals.
    words = "".join("_" + c if c.isupper() else c for c in kind.name).strip("_")
    return known.name.removeprefix(words.upper() + "_").lower()
