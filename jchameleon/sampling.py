"""How the tokens of one request are drawn, and what ends it."""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any

from jchameleon.errors import InvalidRequestError

MAX_TOKENS_LIMIT = 1 << 20
MAX_TOP_K = 2**31 - 1
MAX_SEED = 2**32 - 1
MAX_TEMPERATURE = 100.0
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_TOKEN_ID = 2**31 - 1

GREEDY_BELOW = 1e-5
"""Temperatures under this take the likeliest token: dividing logits by them would
overflow float32 and draw the same token anyway."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Sampling of one request; wrong values raise `InvalidRequestError`.

    Attributes:
      max_tokens: output tokens at most; 1 to 1,048,576 (the engine's context may allow
        fewer).
      temperature: logits are divided by it; 0 to 100. Below 1e-5 the likeliest token is
        taken and top_k, top_p and seed have no effect.
      top_k: draw among this many likeliest tokens; 0 is all.
      top_p: draw among the likeliest tokens whose probabilities, after top_k, just
        reach this sum; above 0, at most 1. 1 is all.
      seed: 0 to 2**32 - 1. The same request with the same seed gives the same tokens
        whatever else is in the batch; None lets the engine choose.
      stop: one string or up to 16 of 1 to 256 characters. The text ends before the one
        that is complete first.
      stop_token_ids: up to 64 token ids that end the output, besides the model's own.
      ignore_eos: go on past the model's end-of-sequence tokens.
      expected_tokens: the caller's own estimate of the output, 1 to max_tokens. Only
        the scheduler's oracle predictors read it; it never changes a token.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    expected_tokens: int | None = None

    def __post_init__(self) -> None:
        self._set(
            "max_tokens", _integer("max_tokens", self.max_tokens, 1, MAX_TOKENS_LIMIT)
        )
        self._set(
            "temperature", _real("temperature", self.temperature, 0, MAX_TEMPERATURE)
        )
        self._set("top_k", _integer("top_k", self.top_k, 0, MAX_TOP_K))
        self._set("top_p", _real("top_p", self.top_p, 0, 1))
        if self.top_p == 0.0:
            raise InvalidRequestError("top_p=0.0 must be above 0 and at most 1")
        if self.seed is not None:
            self._set("seed", _integer("seed", self.seed, 0, MAX_SEED))
        self._set("stop", _stops(self.stop))
        self._set("stop_token_ids", _stop_token_ids(self.stop_token_ids))
        if self.expected_tokens is not None:
            self._set(
                "expected_tokens",
                _integer("expected_tokens", self.expected_tokens, 1, self.max_tokens),
            )
        if not isinstance(self.ignore_eos, bool):
            raise InvalidRequestError(
                f"ignore_eos={shown(self.ignore_eos)} must be True or False"
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken instead of a drawn one."""
        return self.temperature < GREEDY_BELOW

    def validate_for(self, vocab_size: int) -> None:
        """Raise InvalidRequestError for a stop token id outside the vocabulary."""
        for token_id in self.stop_token_ids:
            if token_id >= vocab_size:
                raise InvalidRequestError(
                    f"stop_token_ids has {token_id}, outside the vocabulary of "
                    f"{vocab_size}"
                )

    def _set(self, field: str, value: Any) -> None:
        """Store a checked value in this frozen object."""
        object.__setattr__(self, field, value)


def _integer(field: str, value: Any, low: int, high: int) -> int:
    """Return `value` as an int within [low, high]; numpy integers count, bools not."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise InvalidRequestError(f"{field}={shown(value)} must be an integer")
    number = int(value)
    if not low <= number <= high:
        raise InvalidRequestError(
            f"{field}={shown(value)} must be from {low} to {high}"
        )
    return number


def _real(field: str, value: Any, low: float, high: float) -> float:
    """Return `value` as a float within [low, high]; NaN is within nothing."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InvalidRequestError(f"{field}={shown(value)} must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not low <= number <= high:
        raise InvalidRequestError(
            f"{field}={shown(value)} must be a number from {low:g} to {high:g}"
        )
    return number


def _stops(value: Any) -> tuple[str, ...]:
    """Return stop strings as a tuple; one string stands for itself."""
    stops = (value,) if isinstance(value, str) else value
    if not isinstance(stops, Sequence) or isinstance(stops, bytes | bytearray):
        raise InvalidRequestError(
            f"stop={shown(value)} must be a string or a list of strings"
        )
    if not len(stops) <= MAX_STOPS:
        raise InvalidRequestError(
            f"stop has {len(stops)} strings; at most {MAX_STOPS} are allowed"
        )
    for stop in stops:
        if not isinstance(stop, str):
            raise InvalidRequestError(f"stop has {shown(stop)}, which is no string")
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise InvalidRequestError(
                f"stop has a string of {len(stop)} characters; it must have 1 to "
                f"{MAX_STOP_CHARS}"
            )
    return tuple(stops)


def _stop_token_ids(value: Any) -> tuple[int, ...]:
    """Return stop token ids as a tuple of non-negative ints."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray):
        raise InvalidRequestError(
            f"stop_token_ids={shown(value)} must be a list of token ids"
        )
    if not len(value) <= MAX_STOP_TOKEN_IDS:
        raise InvalidRequestError(
            f"stop_token_ids has {len(value)} ids; at most {MAX_STOP_TOKEN_IDS} are "
            "allowed"
        )
    return tuple(_integer("stop_token_ids", item, 0, MAX_TOKEN_ID) for item in value)


def shown(value: Any) -> str:
    """Return a short one-line picture of any value a caller may pass."""
    try:
        text = repr(value)
    except Exception as error:  # e.g. an int of more digits than Python prints
        return f"<{type(value).__name__}: {type(error).__name__}>"
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."
