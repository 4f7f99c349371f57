"""Text that cannot spell special tokens, beside text that can."""

import json
import re
import secrets
from collections.abc import Iterable

from tokenizers import Tokenizer as Backend

from jchameleon.errors import InvalidRequestError


class SpecialGuard:
    """A tokenizer that knows special tokens by secret names only.

    A copy of the vocabulary in which special tokens are renamed: text cannot spell
    them, and a caller who means one writes its secret name. All else, such as what a
    special token does to the blanks around it, stays as it is.
    """

    def __init__(self, backend: Backend) -> None:
        table = json.loads(backend.to_str())
        table["post_processor"] = None
        secret = secrets.token_hex(8)
        self._names: dict[str, str] = {}
        for token in table["added_tokens"]:
            if token["special"]:
                # Private-use characters: no normaliser changes them.
                name = f"\ue000{secret}:{token['id']}\ue001"
                self._names[token["content"]] = name
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
        # Of two that begin at the same character the longer one counts. The pattern of
        # no alternatives, which matches nothing, is spelled so.
        longest_first = sorted(self._names, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def encode(self, parts: Iterable[tuple[str, bool]]) -> list[int]:
        """Return the ids of the joined parts; see `Tokenizer.encode_parts`."""
        text = "".join(
            self.pattern.sub(lambda found: self._names[found[0]], part)
            if special
            else part
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
