"""Conversations to token ids: only the template's own special tokens are special."""

from collections.abc import Mapping, Sequence
from typing import Any

from jchameleon.errors import InvalidRequestError
from jchameleon.models.chat import ChatTemplate
from jchameleon.models.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")

Conversation = str | Sequence[Mapping[str, Any]]
"""Messages with a role of `ROLES` and a content; a string is one message of a user."""


def as_conversations(
    messages: Conversation | Sequence[Conversation],
) -> list[Conversation]:
    """Return a list of conversations; one conversation is a list of one.

    Raises:
      InvalidRequestError: neither a conversation nor a list of them.
    """
    if isinstance(messages, str):
        return [messages]
    if not isinstance(messages, Sequence) or isinstance(messages, bytes):
        raise InvalidRequestError(
            f"messages of type {type(messages).__name__} must be a list of messages or "
            "a list of such lists"
        )
    if messages and all(isinstance(item, Mapping) for item in messages):
        return [messages]  # type: ignore[list-item]
    for item in messages:
        if not isinstance(item, Sequence) or isinstance(item, bytes):
            raise InvalidRequestError(
                f"messages has {item!r:.60}, which must be a conversation: a string or "
                "a list of messages"
            )
    return list(messages)  # type: ignore[arg-type]


def conversation_tokens(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Conversation
) -> list[int]:
    """Return the token ids of a conversation, ready for the assistant's turn.

    They are those of transformers' `apply_chat_template` as long as no content spells
    a special token; where one does, it becomes the plain tokens of its characters.

    Raises:
      InvalidRequestError: malformed messages, the template refuses them, or a content
        spells a special token and the template changes contents on the way, so that
        the two cannot be told apart.
    """
    checked = _checked(messages)
    parts = template.render_parts(checked)
    if parts is not None:
        return tokenizer.encode_parts(parts)
    for i, message in enumerate(checked):
        special = tokenizer.find_special(message["content"])
        if special is not None:
            raise InvalidRequestError(
                f"messages[{i}] spells the special token {special!r}, which this "
                "model's chat template does not keep apart from its own"
            )
    text = template.render(checked)
    return tokenizer.encode(text, add_special=False)


def _checked(messages: Conversation) -> list[Mapping[str, Any]]:
    """Return the messages of a conversation, with known roles and no other keys."""
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            continue  # rendering says what is wrong with it
        if "role" in message and message["role"] not in ROLES:
            raise InvalidRequestError(
                f"messages[{i}] has role {message['role']!r:.60}, must be one of "
                + ", ".join(ROLES)
            )
        for key in message:
            if key not in ("role", "content"):
                raise InvalidRequestError(
                    f"messages[{i}] has {key!r:.60}; a message is a role and a content"
                )
    return list(messages)
