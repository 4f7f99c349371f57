"""Text that cannot spell special tokens, beside text that can."""

import json
import re
import secrets
import string
import threading
from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Tokenizer as Backend

from jchameleon.errors import InvalidRequestError

Parts = Iterable[tuple[str, bool]]
"""Pieces of a text: (text, whether special tokens spelled in it are those tokens)."""


SECRET_LETTERS = 16
"""82 bits where all letters may be used."""

SECRET_DRAWS = 1000


class SpecialGuard:
    """Encodes texts in which only some parts may spell special tokens.

    Where the other parts spell none, the vocabulary itself does it. Else a copy of it
    does, in which special tokens go by secret names: no text can spell them, and the
    parts that may are given those names. All else, such as what a special token does
    to the blanks around it, stays as it is.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        special = [
            token
            for token in backend.get_added_tokens_decoder().values()
            if token.special
        ]
        # Of two that begin at the same character the longer one counts.
        texts = sorted((token.content for token in special), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, texts)) or _NOTHING)
        # A normaliser can make special tokens of texts in which there are none yet.
        self._always = backend.normalizer is not None and any(
            token.normalized for token in special
        )
        self._lock = threading.Lock()
        self._copy: _RenamedCopy | None = None

    def find(self, text: str) -> str | None:
        """Return the first special token that `text` spells, None where it has none."""
        found = self._pattern.search(text)
        return None if found is None else found[0]

    def encode(self, parts: Parts) -> list[int]:
        """Return the ids of the joined parts; see `Tokenizer.encode_parts`."""
        parts = list(parts)
        text = "".join(part for part, _ in parts)
        if not self._always and [
            found.span() for found in self._pattern.finditer(text)
        ] == list(self._spans(parts)):
            return encode_text(self._backend, text)
        with self._lock:
            if self._copy is None:
                self._copy = _RenamedCopy(self._backend)
        return self._copy.encode(parts, self._pattern)

    def _spans(self, parts: Parts) -> Iterator[tuple[int, int]]:
        """Yield where special tokens lie that the parts may spell."""
        offset = 0
        for part, special in parts:
            if special:
                for found in self._pattern.finditer(part):
                    yield found.start() + offset, found.end() + offset
            offset += len(part)


class _RenamedCopy:
    """A vocabulary whose special tokens are known by secret names only."""

    def __init__(self, backend: Backend) -> None:
        table = json.loads(backend.to_str())
        table["post_processor"] = None
        plain = [t["content"] for t in table["added_tokens"] if not t["special"]]
        self._names: dict[str, str] = {}
        for token in table["added_tokens"]:
            if token["special"]:
                name = self._names[token["content"]] = _secret_name(plain)
                token["content"] = name
        self._backend = Backend.from_str(json.dumps(table))
        # Added tokens are numbered anew where the new name is not in the vocabulary.
        self._ids = {
            self._backend.token_to_id(token["content"]): token["id"]
            for token in table["added_tokens"]
        }
        vocab = self._backend.get_vocab()
        self._spelled = {
            vocab[text]: text for text in self._names if text in vocab
        }  # in the vocabulary itself: merging might make them of plain text

    def encode(self, parts: Parts, pattern: re.Pattern[str]) -> list[int]:
        text = "".join(
            pattern.sub(lambda found: self._names[found[0]], part) if special else part
            for part, special in parts
        )
        ids = encode_text(self._backend, text)
        for token_id in ids:
            if token_id in self._spelled:
                raise InvalidRequestError(
                    f"text spells the special token {self._spelled[token_id]!r}, which "
                    "this vocabulary cannot write as plain text"
                )
        return [self._ids.get(token_id, token_id) for token_id in ids]


def _secret_name(added: Sequence[str]) -> str:
    """Return a name in which none of the `added` tokens occurs.

    Those that are matched before the text is normalised would cut a name that is looked
    for afterwards.

    Raises:
      InvalidRequestError: they leave no such name.
    """
    letters = [c for c in string.ascii_lowercase + string.digits if c not in added]
    for _ in range(SECRET_DRAWS if letters else 0):
        secret = "".join(secrets.choice(letters) for _ in range(SECRET_LETTERS))
        # Private-use characters: no normaliser changes them.
        name = f"\ue000{secret}\ue001"
        if not any(content in name for content in added):
            return name
    raise InvalidRequestError(
        "this vocabulary's added tokens leave no name that text cannot spell, so "
        "contents cannot be kept from special tokens"
    )


_NOTHING = r"(?!)"
"""The pattern that matches nowhere; no alternatives at all would match everywhere."""


def encode_text(backend: Backend, text: str) -> list[int]:
    """Return the ids of `text`, without surroundings.

    Raises:
      InvalidRequestError: the text has a lone surrogate, so it is no Unicode text.
    """
    try:
        return backend.encode(text, add_special_tokens=False).ids
    except TypeError as error:  # what the library says to surrogates too
        surrogate = re.search("[\ud800-\udfff]", text)
        if surrogate is None:
            raise
        raise InvalidRequestError(
            f"text has a lone surrogate at character {surrogate.start()}"
        ) from error
