"""The fields of a request's body, by their names in OpenAI's and vLLM's API."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from jchameleon.config import nearest
from jchameleon.errors import InvalidRequestError
from jchameleon.sampling import SamplingParams, shown

# Name in a body -> field of SamplingParams. `logprobs` is read by itself: it is a
# number in completions and a switch in chats.
SAMPLING_FIELDS = {
    **{
        field.name: field.name
        for field in dataclasses.fields(SamplingParams)
        if field.name != "logprobs"
    },
    "max_completion_tokens": "max_tokens",
    "include_stop_str_in_output": "include_stop",
}

# What a row holds, not how it is drawn. `user` labels a request for whoever counts
# them; no row depends on it.
OTHER_FIELDS = ("logprobs", "top_logprobs", "return_token_ids", "cache_salt", "user")

# Fields of the API that are not offered, with the one value, besides null, that asks
# for what is done in any case.
NOT_OFFERED: dict[str, Any] = {
    "add_generation_prompt": True,
    "audio": None,
    "best_of": None,
    "continue_final_message": False,
    "documents": None,
    "echo": False,
    "function_call": "none",
    "functions": None,
    "guided_json": None,
    "guided_regex": None,
    "length_penalty": 1.0,
    "metadata": None,
    "modalities": ["text"],
    "parallel_tool_calls": None,
    "prediction": None,
    "reasoning_effort": None,
    "response_format": {"type": "text"},
    "service_tier": None,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "store": False,
    "stream": False,
    "stream_options": None,
    "structured_outputs": None,
    "suffix": None,
    "tool_choice": "none",
    "tools": None,
    "use_beam_search": False,
}

_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")


def check_names(table: Mapping[str, Any], own: tuple[str, ...]) -> None:
    """Raise InvalidRequestError for a field that is not known, or not offered.

    Args:
      own: fields that this kind of request has besides those of all.
    """
    known = {*SAMPLING_FIELDS, *OTHER_FIELDS, *own}
    for name, value in table.items():
        if name in known:
            continue
        if name not in NOT_OFFERED:
            raise InvalidRequestError(
                f"unknown field {shown(name)}{nearest(name, known)}"
            )
        means_nothing = NOT_OFFERED[name]
        if value is None or (
            value == means_nothing and type(value) is type(means_nothing)
        ):
            continue
        rule = "must be left out"
        if means_nothing is not None:
            rule += f" or {means_nothing!r}"
        raise InvalidRequestError(f"{name}={shown(value)} is not supported; it {rule}")


def sampling_of(
    table: Mapping[str, Any], defaults: SamplingParams, *, chat: bool
) -> SamplingParams:
    """Return how a line is sampled; null stands for the default.

    Raises:
      InvalidRequestError: a value is out of its range, or given by two names.
    """
    values: dict[str, Any] = {}
    for name, field in SAMPLING_FIELDS.items():
        value = table.get(name)
        if value is None:
            continue
        if field in values:
            raise InvalidRequestError(f"{name} and {field} must not both be given")
        values[field] = value
    if "logit_bias" in values:
        values["logit_bias"] = _logit_bias(values["logit_bias"])
    if type(values.get("top_k")) is int and values["top_k"] == -1:
        values["top_k"] = 0  # vLLM's other name for all
    if "stop_token_ids" in values and not isinstance(values["stop_token_ids"], list):
        raise InvalidRequestError(
            f"stop_token_ids={shown(values['stop_token_ids'])} must be a list"
        )
    values |= _chat_logprobs(table) if chat else _logprobs(table)
    return dataclasses.replace(defaults, **values)


def switch(table: Mapping[str, Any], name: str) -> bool | None:
    """Return a field that is true, false or not given.

    Raises:
      InvalidRequestError: it is something else.
    """
    value = table.get(name)
    if value is not None and type(value) is not bool:
        raise InvalidRequestError(f"{name}={shown(value)} must be true or false")
    return value


def text(table: Mapping[str, Any], name: str) -> str | None:
    """Return a field that is a text or not given.

    Raises:
      InvalidRequestError: it is something else.
    """
    value = table.get(name)
    if value is not None and not isinstance(value, str):
        raise InvalidRequestError(f"{name}={shown(value)} must be a string")
    return value


def _logprobs(table: Mapping[str, Any]) -> dict[str, Any]:
    if table.get("top_logprobs") is not None:
        raise InvalidRequestError(
            "top_logprobs is a field of chats; of completions it is logprobs=N"
        )
    value = table.get("logprobs")
    return {} if value is None else {"logprobs": value}


def _chat_logprobs(table: Mapping[str, Any]) -> dict[str, Any]:
    wanted, top = switch(table, "logprobs"), table.get("top_logprobs")
    if top is not None and wanted is not True:
        raise InvalidRequestError(
            f"top_logprobs={shown(top)} must come with logprobs=true"
        )
    if wanted is None:
        return {}
    return {"logprobs": (0 if top is None else top) if wanted else None}


def _logit_bias(value: Any) -> dict[int, Any]:
    """Return biases by token id; JSON has texts for keys."""
    if not isinstance(value, Mapping):
        raise InvalidRequestError(
            f"logit_bias={shown(value)} must map token ids to numbers"
        )
    for key in value:
        if not _TOKEN_ID.fullmatch(key):
            raise InvalidRequestError(f"logit_bias has {shown(key)}, no token id")
    return {int(key): bias for key, bias in value.items()}
