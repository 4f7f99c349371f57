"""What decode steps read of running requests, in columns.

A decode step needs a few words of every running request, and the caches of the
processor hold weights by then: from an object of each they would come from memory one
by one. So they lie side by side, and a step gathers whole columns.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from jchameleon.runtime.drawing import RowSampling, StepSampling
from jchameleon.runtime.edits import RowEdits
from jchameleon.runtime.sampler import empty_sampling

T = TypeVar("T")


class DecodeRows(NamedTuple):
    """The rows of a decode step, n of them.

    Attributes:
      tokens: i32[n], the last token of each.
      num_tokens: i32[n], tokens of each so far, that one included.
      pages: i32[n, NB], the KV pages of each, padded with 0.
      adapter_uids: resident adapters, or None.
      sampling: how to draw the next tokens.
    """

    tokens: np.ndarray
    num_tokens: np.ndarray
    pages: np.ndarray
    adapter_uids: Sequence[str | None]
    sampling: StepSampling


class DecodeTable:
    """A place for each running request; the engine thread is the only caller.

    Attributes:
      pages: i32[places, NB], the KV pages of each, padded with 0. A request writes
        its own row.
    """

    def __init__(self, max_rows: int, max_blocks: int) -> None:
        """Start empty, with places for `max_rows` requests."""
        self.pages = np.zeros((max_rows, max_blocks), np.int32)
        self._tokens = np.zeros(max_rows, np.int32)
        self._num_tokens = np.zeros(max_rows, np.int32)
        self._adapter_uids: list[str | None] = [None] * max_rows
        self._sampling = empty_sampling(max_rows)
        # Of those alone that ask for it: hardly any.
        self._edits: dict[int, RowEdits] = {}
        self._logprobs: dict[int, int] = {}
        self._free = list(reversed(range(max_rows)))

    @property
    def free_places(self) -> int:
        """Places that no request has."""
        return len(self._free)

    def take(self, sampling: RowSampling, *, adapter_uid: str | None) -> int:
        """Give a request that starts a place and return it; its pages are all 0.

        `sampling` says how it draws; the position does not count.
        """
        place = self._free.pop()
        self.pages[place] = 0
        self._adapter_uids[place] = adapter_uid
        for name, column in self._sampling.items():
            column[place] = getattr(sampling, name)
        if sampling.edits is not None:
            self._edits[place] = sampling.edits
        if sampling.logprobs is not None:
            self._logprobs[place] = sampling.logprobs
        return place

    def set_last(self, place: int, token: int, num_tokens: int) -> None:
        """Note the last of a request's tokens, and how many they are now."""
        self._tokens[place] = token
        self._num_tokens[place] = num_tokens

    def drop_edits(self, place: int) -> None:
        """Let a request draw from logits as they are from now on."""
        del self._edits[place]

    def release(self, place: int) -> None:
        """Take a place back."""
        self._adapter_uids[place] = None
        self._edits.pop(place, None)
        self._logprobs.pop(place, None)
        self._free.append(place)

    def rows(self, places: np.ndarray) -> DecodeRows:
        """Return the rows of some places, i64[n], in their order."""
        num_tokens = self._num_tokens[places]
        fields = {name: column[places] for name, column in self._sampling.items()}
        fields["position"] = num_tokens
        listed = places.tolist()
        return DecodeRows(
            tokens=self._tokens[places],
            num_tokens=num_tokens,
            pages=self.pages[places],
            adapter_uids=[self._adapter_uids[place] for place in listed],
            sampling=StepSampling(
                fields=fields,
                edits=_found(self._edits, listed),
                logprobs=_found(self._logprobs, listed),
                silent=(),
            ),
        )


def _found(of_places: dict[int, T], places: Sequence[int]) -> dict[int, T]:
    """Return what some places have by their index in `places`."""
    if not of_places:
        return {}
    return {i: of_places[place] for i, place in enumerate(places) if place in of_places}
