"""The one way from output tokens to text: detokenise, stop, stream.

Library, batch runs and server all read replies through `OutputText`, so none of them
can stream half a character, or text that a stop string takes back.
"""

import functools

from jchameleon.errors import InvalidRequestError
from jchameleon.models.tokenizer import Tokenizer


class OutputText:
    """The text of one reply while its tokens arrive.

    A stop string is looked for in the text, not in the tokens: it may begin and end
    inside tokens, and where it is found does not depend on how the text was cut into
    tokens. The one whose last character comes first counts; of several that end there,
    the longest. The text ends before it, or behind it if it is to be included.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        stop: tuple[str, ...],
        *,
        include_stop: bool = False,
    ) -> None:
        """Start an empty reply.

        Args:
          tokenizer: None where prompts and replies are token ids only; the text is then
            always empty.
          stop: non-empty strings that end the reply.
          include_stop: leave the stop string in the text.

        Raises:
          InvalidRequestError: stop strings without a tokenizer to find them with.
        """
        if stop and tokenizer is None:
            raise InvalidRequestError(
                f"stop={list(stop)} needs a tokenizer, and this model has none; "
                "use stop_token_ids"
            )
        self._stream = None if tokenizer is None else tokenizer.stream()
        self._matchers = [_StopMatcher(text) for text in stop]
        self._include_stop = include_stop
        self._text = ""
        self._taken_chars = 0
        self._stopped = False

    @property
    def text(self) -> str:
        """All text so far, whole characters only, cut at a complete stop string."""
        return self._text

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete."""
        return self._stopped

    def push(self, token_id: int, *, may_stop: bool = True) -> bool:
        """Add one token; return True once a stop string is complete.

        Tokens after that are dropped. A stop string that is completed by a token that
        may not stop the reply is plain text.
        """
        if self._stream is not None and not self._stopped:
            self._add(self._stream.push(token_id), may_stop=may_stop)
        return self._stopped

    def take(self) -> str:
        """Return the text, not returned before, that no later token can take back."""
        return self._take(held_chars=0 if self._stopped else self._undecided_chars())

    def close(self) -> str:
        """End the reply; return all text not returned before.

        Bytes of an incomplete character come out as the replacement character.
        """
        if self._stream is not None and not self._stopped:
            self._add(self._stream.flush(), may_stop=True)
        self._stream = None
        return self._take(held_chars=0)

    def _take(self, *, held_chars: int) -> str:
        end = len(self._text) - held_chars
        fresh = self._text[self._taken_chars : end]
        self._taken_chars = end
        return fresh

    def _undecided_chars(self) -> int:
        """Return the length of the longest suffix that may begin a stop string."""
        return max((matcher.matched_chars for matcher in self._matchers), default=0)

    def _add(self, piece: str, *, may_stop: bool) -> None:
        """Append `piece` up to the stop string that it completes, if any."""
        if not self._matchers:
            self._text += piece
            return
        for index, char in enumerate(piece):
            complete = [len(m.stop) for m in self._matchers if m.push(char)]
            if complete and may_stop:
                cut_chars = 0 if self._include_stop else max(complete)
                text = self._text + piece[: index + 1]
                self._text = text[: len(text) - cut_chars]
                self._stopped = True
                return
        self._text += piece


class _StopMatcher:
    """Knuth-Morris-Pratt automaton of one stop string, a character at a time.

    Attributes:
      matched_chars: length of the longest prefix of `stop` that the text ends with.
    """

    __slots__ = ("stop", "matched_chars", "_borders")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched_chars = 0
        self._borders = _borders(stop)

    def push(self, char: str) -> bool:
        """Read one character; return whether the text now ends with `stop`."""
        matched = self.matched_chars
        while matched and self.stop[matched] != char:
            matched = self._borders[matched - 1]
        if self.stop[matched] == char:
            matched += 1
        complete = matched == len(self.stop)
        # The reply may go on: the end of this one may begin the next.
        self.matched_chars = self._borders[-1] if complete else matched
        return complete


@functools.lru_cache(maxsize=1024)
def _borders(text: str) -> tuple[int, ...]:
    """Return, per prefix of `text`, the length of its longest proper border.

    A border is both a prefix and a suffix (Knuth, Morris, Pratt 1977, "failure
    function").
    """
    borders = [0] * len(text)
    for index in range(1, len(text)):
        length = borders[index - 1]
        while length and text[index] != text[length]:
            length = borders[length - 1]
        borders[index] = length + (text[index] == text[length])
    return tuple(borders)
