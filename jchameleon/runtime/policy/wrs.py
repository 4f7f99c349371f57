"""Weighted request size (WRS): prompt, predicted output and adapter rank in one."""

import dataclasses
from typing import TypeVar

import numpy as np

PROMPT_WEIGHT = 0.4
OUTPUT_WEIGHT = 0.6
"""A and B of Chameleon, section 4.3."""

_CHUNK_RANK = 8

_Number = TypeVar("_Number", float, np.ndarray)


def rank_chunks(rank: int) -> int:
    """Return ceil(rank / 8), to which an adapter's bytes are proportional.

    The bare base model, rank 0, counts as rank 8: a product with 0 bytes would call
    its longest request as small as its shortest. Our own choice.
    """
    return max(1, -(-rank // _CHUNK_RANK))


@dataclasses.dataclass(slots=True)
class LargestSeen:
    """What sizes are measured against: the largest values seen so far.

    Attributes:
      prompt_tokens, predicted_tokens: of any request.
      chunks: `rank_chunks` of any adapter; Chameleon brings it down again when the
        largest is unregistered, for that one no request can name any more.
    """

    prompt_tokens: int = 1
    predicted_tokens: int = 1
    chunks: int = 1

    def see(
        self, *, prompt_tokens: int = 0, predicted_tokens: int = 0, chunks: int = 0
    ) -> None:
        """Raise the maxima to what was seen."""
        self.prompt_tokens = max(self.prompt_tokens, prompt_tokens)
        self.predicted_tokens = max(self.predicted_tokens, predicted_tokens)
        self.chunks = max(self.chunks, chunks)

    def wrs(
        self, prompt_tokens: _Number, predicted_tokens: _Number, chunks: _Number
    ) -> _Number:
        """Return the WRS of one request, or f64[n] of n; at most 1 if all were seen.

        WRS = (A * prompt / largest prompt + B * output / largest output) * adapter
        bytes / largest adapter bytes (Chameleon, section 4.3).
        """
        prompt_part = PROMPT_WEIGHT * (prompt_tokens / self.prompt_tokens)
        output_part = OUTPUT_WEIGHT * (predicted_tokens / self.predicted_tokens)
        return (prompt_part + output_part) * (chunks / self.chunks)
