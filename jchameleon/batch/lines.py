"""One line of a batch: who it is, and what it asks for."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

from jchameleon.batch.fields import check_names, sampling_of, switch, text
from jchameleon.batch.strict_json import (
    has_lone_surrogate,
    parse_object,
)
from jchameleon.errors import InvalidRequestError
from jchameleon.sampling import SamplingParams, shown

MAX_ID_CHARS = 512

URLS = {"/v1/completions": False, "/v1/chat/completions": True}
"""Whether a request to it is a chat."""

_ENVELOPE = ("custom_id", "method", "url", "body")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LineRequest:
    """What a good line asks for.

    Attributes:
      messages: of a chat, else None.
      prompt: text or token ids; None in a chat.
      name: what `model` or `adapter_id` said; None is the base model.
      may_be_base: the name may also be that of the base model.
      returns_ids: its row has token ids.
    """

    messages: list[Any] | None
    prompt: str | list[int] | None
    name: str | None
    may_be_base: bool
    sampling: SamplingParams
    cache_salt: str | None
    returns_ids: bool

    @property
    def is_chat(self) -> bool:
        """Whether it is answered as a chat completion."""
        return self.messages is not None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A line with a key; parsed if that could be done.

    Attributes:
      key: its custom_id, or `line-N` where it has none that can be used.
      table: the parsed line; None where `fault` says why not.
    """

    key: str
    table: Mapping[str, Any] | None
    fault: str | None

    @property
    def adapter(self) -> str | None:
        """The adapter that it names, unchecked; None if that is no name."""
        table = self.table or {}
        body = table.get("body")
        name = table.get("adapter_id")
        if isinstance(body, dict):
            name = body.get("model")
        return name if isinstance(name, str) else None


def open_line(raw: bytes, number: int) -> Line:
    """Return a line's key and content; whatever the bytes are, it has a key.

    Args:
      number: of the line, from 1.
    """
    try:
        table = parse_object(raw)
        custom_id = _usable_id(table.get("custom_id"))
    except InvalidRequestError as error:
        return Line(key=fallback_key(number), table=None, fault=str(error))
    if has_lone_surrogate(table, raw):
        return Line(
            key=custom_id, table=None, fault="a text has half of a surrogate pair"
        )
    return Line(key=custom_id, table=table, fault=None)


def too_long_line(number: int, max_line_bytes: int) -> Line:
    """Return the line that stands for one that is not read."""
    return Line(
        key=fallback_key(number),
        table=None,
        fault=f"the line is longer than max_line_bytes={max_line_bytes}",
    )


def fallback_key(number: int) -> str:
    """Return the key of a line without a usable custom_id."""
    return f"line-{number}"


def key_digest(key: str) -> bytes:
    """Return 16 bytes that stand for a key in indexes and ids."""
    return hashlib.blake2b(key.encode("utf-8"), digest_size=16).digest()


def seed_of(key: str, run_seed: int) -> int:
    """Return the seed, below 2**32, of a line that has none of its own."""
    digest = hashlib.sha256(f"{run_seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def request_of(line: Line, defaults: SamplingParams, run_seed: int) -> LineRequest:
    """Return what a line asks for.

    Raises:
      InvalidRequestError: it is malformed, or asks for what there is not.
    """
    if line.table is None:
        raise InvalidRequestError(line.fault)
    table: Mapping[str, Any] = line.table
    own: tuple[str, ...] = ("messages", "prompt", "prompt_token_ids", "adapter_id")
    # "url" and "method" without "body": the other form, with its body forgotten.
    is_enveloped = any(name in table for name in _ENVELOPE[1:])
    if is_enveloped:
        is_chat = _check_envelope(table)
        table = table["body"]
        own = ("model", "messages" if is_chat else "prompt")
        name = text(table, "model")
        if name is None:
            raise InvalidRequestError(
                "body.model must name the base model or an adapter"
            )
    else:
        table = {name: value for name, value in table.items() if name != "custom_id"}
        name = text(table, "adapter_id")
        is_chat = table.get("messages") is not None
    check_names(table, own)
    text(table, "user")
    sampling = sampling_of(table, defaults, chat=is_chat)
    if sampling.seed is None and not sampling.greedy:
        sampling = dataclasses.replace(sampling, seed=seed_of(line.key, run_seed))
    return LineRequest(
        messages=_messages(table) if is_chat else None,
        prompt=None if is_chat else _prompt(table),
        name=name,
        may_be_base=is_enveloped,
        sampling=sampling,
        cache_salt=text(table, "cache_salt"),
        returns_ids=bool(switch(table, "return_token_ids")),
    )


def _usable_id(custom_id: Any) -> str:
    """Return an id that can be used.

    Raises:
      InvalidRequestError: it cannot.
    """
    if custom_id is None:
        raise InvalidRequestError("custom_id is missing")
    if not isinstance(custom_id, str):
        raise InvalidRequestError(f"custom_id={shown(custom_id)} must be a string")
    if not 1 <= len(custom_id) <= MAX_ID_CHARS:
        raise InvalidRequestError(
            f"custom_id has {len(custom_id)} characters; it must have 1 to "
            f"{MAX_ID_CHARS}"
        )
    try:
        custom_id.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequestError("custom_id has half of a surrogate pair") from error
    return custom_id


def _check_envelope(table: Mapping[str, Any]) -> bool:
    """Check all of a line but its body; return whether it is a chat."""
    for name in table:
        if name not in _ENVELOPE:
            raise InvalidRequestError(
                f"unknown field {shown(name)}; beside body there are "
                + ", ".join(_ENVELOPE)
            )
    method, url = table.get("method", "POST"), table.get("url")
    if method != "POST":
        raise InvalidRequestError(f"method={shown(method)} must be 'POST'")
    if not isinstance(url, str) or url not in URLS:
        raise InvalidRequestError(f"url={shown(url)} must be one of " + ", ".join(URLS))
    if not isinstance(table.get("body"), dict):
        raise InvalidRequestError(f"body={shown(table.get('body'))} must be an object")
    return URLS[url]


def _messages(table: Mapping[str, Any]) -> list[Any]:
    """Return the messages of a chat; contents are checked where they are rendered."""
    for name in ("prompt", "prompt_token_ids"):
        if table.get(name) is not None:
            raise InvalidRequestError(f"{name} and messages must not both be given")
    messages = table.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidRequestError(
            f"messages={shown(messages)} must be a list of messages, not empty"
        )
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InvalidRequestError(
                f"messages[{index}]={shown(message)} must be an object"
            )
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise InvalidRequestError(
                    f"messages[{index}].{key}={shown(message.get(key))} must be a "
                    "string"
                )
    return messages


def _prompt(table: Mapping[str, Any]) -> str | list[int]:
    """Return a prompt as text or token ids."""
    prompt, ids = table.get("prompt"), table.get("prompt_token_ids")
    if prompt is not None and ids is not None:
        raise InvalidRequestError("prompt and prompt_token_ids must not both be given")
    if ids is not None:
        if not _are_ids(ids):
            raise InvalidRequestError(
                f"prompt_token_ids={shown(ids)} must be a list of token ids"
            )
        return ids
    # The API allows lists of prompts; one of one is one prompt.
    if isinstance(prompt, list) and len(prompt) == 1 and not _are_ids(prompt):
        [prompt] = prompt
    if isinstance(prompt, str) or (isinstance(prompt, list) and _are_ids(prompt)):
        return prompt
    raise InvalidRequestError(
        f"prompt={shown(prompt)} must be one string or one list of token ids"
    )


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)
