"""Chat templates: jinja2 in a sandbox, rendered as transformers renders them."""

import datetime
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jchameleon.errors import InvalidRequestError, ModelLoadError
from jchameleon.models.files import one_line, read_json


class ChatTemplate:
    """A compiled template that turns messages into a prompt string.

    The template is code that comes with the model directory the operator chose. The
    sandbox keeps it from reaching Python objects, files and modules; it bounds neither
    time nor memory (nested loops can run long), so a template must never come from a
    request or an adapter.
    """

    def __init__(
        self, source: str, *, special_tokens: Mapping[str, str] | None = None
    ) -> None:
        """Compile `source`.

        Args:
          special_tokens: what the template sees as variables, such as
            {"bos_token": "<s>", "eos_token": "</s>"}.

        Raises:
          ModelLoadError: the template does not compile.
        """
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, RecursionError, ValueError) as error:
            raise ModelLoadError(
                f"chat template does not compile: {one_line(error)}"
            ) from error

    @classmethod
    def from_directory(cls, directory: Path) -> Self | None:
        """Read the template of a Hugging Face directory, None where it has none.

        chat_template.jinja goes before chat_template.json and `chat_template` in
        tokenizer_config.json (a string, or a list of named templates of which
        "default" is taken).

        Raises:
          ModelLoadError: unreadable, or it does not compile.
        """
        config_path = directory / "tokenizer_config.json"
        config = read_json(config_path) if config_path.is_file() else {}
        source: Any = config.get("chat_template")
        for name in ("chat_template.json", "chat_template.jinja"):
            path = directory / name
            if path.is_file() and name.endswith(".json"):
                source = read_json(path).get("chat_template")
            elif path.is_file():
                try:
                    source = path.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError) as error:
                    raise ModelLoadError(f"cannot read {path}: {error}") from error
        if isinstance(source, list):
            source = _default_template(source, config_path)
        if source is None:
            return None
        if not isinstance(source, str):
            raise ModelLoadError(f"{config_path}: chat_template must be a string")
        tokens = {
            name: token
            for name, value in config.items()
            if name.endswith("_token") and (token := token_text(value)) is not None
        }
        return cls(source, special_tokens=tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the prompt for `messages`, special tokens spelled out.

        Tokenise it with `parse_special=True`. It may begin with the beginning-of-text
        token; `Tokenizer.encode` adds no second one.

        Args:
          messages: mappings of strings with at least "role" and "content".
          add_generation_prompt: end with what opens the assistant's turn.

        Raises:
          InvalidRequestError: malformed messages, or the template refuses them.
        """
        plain = _plain_messages(messages)
        try:
            return self._template.render(
                **self.special_tokens,
                messages=plain,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
            )
        except Exception as error:  # whatever the template's own code may raise
            raise InvalidRequestError(
                f"chat template refuses the messages: {one_line(error)}"
            ) from error

    def render_parts(
        self, messages: Sequence[Mapping[str, Any]]
    ) -> list[tuple[str, bool]] | None:
        """Return `render`'s prompt in pieces: (text, whether the template wrote it).

        Contents are found by rendering once more with marks in their place. They may
        be stripped on the way, of blanks as Llama 3's template does or of newlines as
        Qwen3's; where a template changes them otherwise, or writes other text for other
        contents, the result is None.

        Raises:
          InvalidRequestError: malformed messages, or the template refuses them.
        """
        text = self.render(messages)
        # Nobody can write a mark into a content without knowing this number.
        mark = f"\ue000{secrets.token_hex(8)}:%d\ue001"
        marked = [
            {**message, "content": mark % i} if message["content"] else message
            for i, message in enumerate(messages)
        ]
        try:
            skeleton = self.render(marked)
        except InvalidRequestError:  # it looks into contents
            return None
        pattern = re.escape(mark).replace("%d", "([0-9]+)")
        first, *rest = re.split(pattern, skeleton)
        parts = [(first, True)]
        position = len(first)
        for index, literal in zip(rest[::2], rest[1::2], strict=True):
            content = messages[int(index)]["content"]
            for form in _stripped_forms(content):
                if text.startswith(form + literal, position):
                    break
            else:
                return None
            parts += [(form, False), (literal, True)]
            position += len(form) + len(literal)
        return parts if "".join(part for part, _ in parts) == text else None


def _stripped_forms(content: str) -> list[str]:
    """Return `content` and what is left of it when its ends are stripped."""
    forms = [content]
    for blanks in (None, "\n"):
        forms += [
            content.strip(blanks),
            content.rstrip(blanks),
            content.lstrip(blanks),
        ]
    return forms


def token_text(value: Any) -> str | None:
    """Return a token of tokenizer_config.json: a string or {"content": string}."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


class _GenerationBlock(Extension):
    """Accept `{% generation %}`, which marks replies for training, as its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """Return the environment that templates on the Hugging Face hub are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Replace jinja2's filter, which escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(
        messages, Sequence
    ):
        raise InvalidRequestError(
            f"messages must be a list of mappings, got {type(messages).__name__}"
        )
    if not messages:
        raise InvalidRequestError("messages must not be empty")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InvalidRequestError(
                f"messages[{i}] must be a mapping, got {type(message).__name__}"
            )
        for key in ("role", "content"):
            if key not in message:
                raise InvalidRequestError(f"messages[{i}] has no {key!r}")
        for key, value in message.items():
            # Strings only: other objects have methods that the sandbox cannot judge.
            if type(key) is not str or type(value) is not str:
                raise InvalidRequestError(
                    f"messages[{i}][{key!r}] must be a string, got "
                    f"{type(value).__name__}"
                )
    return [dict(message) for message in messages]


def _default_template(named: list[Any], path: Path) -> str:
    for entry in named:
        if isinstance(entry, Mapping) and entry.get("name") == "default":
            if isinstance(entry.get("template"), str):
                return entry["template"]
    raise ModelLoadError(f"{path}: chat_template has no entry named 'default'")
