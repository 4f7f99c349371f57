"""How the tokens of one request are drawn, and what ends it."""

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
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
MAX_N = 64
MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 300
MAX_LOGIT_BIAS = 100.0
MAX_PENALTY = 2.0
MIN_REPETITION_PENALTY = 0.01
MAX_REPETITION_PENALTY = 100.0
MAX_PRIORITY = 2**31 - 1
MAX_TIME_LIMIT_S = 7 * 24 * 3600.0

GREEDY_BELOW = 1e-5
"""Temperatures under this take the likeliest token: dividing logits by them would
overflow float32 and draw the same token anyway."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Sampling of one request; wrong values raise `InvalidRequestError`.

    A token is chosen in this order: `logit_bias`, penalties and the mask of
    `min_tokens` change logits; then temperature, top_k, top_p and min_p.

    Attributes:
      n: completions of the prompt, drawn independently; 1 to 64, and 1 if greedy.
      max_tokens: output tokens at most; 1 to 1,048,576 (the engine's context may allow
        fewer).
      min_tokens: output tokens before a stop string, a stop token or the model's own
        end token may end the output; 0 to max_tokens. Until then the two kinds of end
        token are not drawn.
      temperature: logits are divided by it; 0 to 100. Below 1e-5 the likeliest token is
        taken and top_k, top_p, min_p and seed have no effect.
      top_k: draw among this many likeliest tokens; 0 is all.
      top_p: draw among the likeliest tokens whose probabilities, after top_k, just
        reach this sum; above 0, at most 1. 1 is all.
      min_p: draw among tokens at least this often as likely as the likeliest, after
        temperature; 0 to 1. 0 is all.
      repetition_penalty: logits of tokens that are in the prompt or the output so far
        are divided by it where positive, else multiplied; 0.01 to 100. 1 is none.
      presence_penalty: taken off the logits of tokens that are in the output; -2 to 2.
      frequency_penalty: taken off once for each time that a token is in the output; -2
        to 2.
      logit_bias: token id -> what is added to its logit, -100 to 100, for up to 300
        tokens; kept as pairs in the order of the ids.
      seed: 0 to 2**32 - 1. The same request with the same seed gives the same tokens
        whatever else is in the batch; None lets the engine choose. Of several
        completions the first draws what it would draw alone.
      stop: one string or up to 16 of 1 to 256 characters. The text ends before the one
        that is complete first.
      stop_token_ids: up to 64 token ids that end the output, besides the model's own.
      include_stop: keep the stop string, or the text of the stop token, in the text.
      ignore_eos: go on past the model's end-of-sequence tokens.
      logprobs: for each output token its log-probability and those of this many
        likeliest tokens, 0 to 20, by the model's own distribution: before everything
        above. None is none.
      prompt_logprobs: the same for each prompt token but the first.
      priority: lower numbers start first, -(2**31 - 1) to 2**31 - 1.
      truncate_prompt_tokens: keep only this many tokens from the prompt's end.
      time_limit_s: end with what there is after this time, waiting or running; above 0,
        at most a week, counted from when the engine took the request.
      expected_tokens: the caller's own estimate of the output, 1 to max_tokens. Only
        the scheduler's oracle predictors read it; it never changes a token.
    """

    n: int = 1
    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    priority: int = 0
    truncate_prompt_tokens: int | None = None
    time_limit_s: float | None = None
    expected_tokens: int | None = None

    def __post_init__(self) -> None:
        self._check_integer("n", 1, MAX_N)
        self._check_integer("max_tokens", 1, MAX_TOKENS_LIMIT)
        self._check_integer("min_tokens", 0, self.max_tokens)
        self._check_real("temperature", 0, MAX_TEMPERATURE)
        self._check_integer("top_k", 0, MAX_TOP_K)
        self._check_real("top_p", 0, 1)
        if self.top_p == 0.0:
            raise InvalidRequestError("top_p=0.0 must be above 0 and at most 1")
        self._check_real("min_p", 0, 1)
        self._check_real(
            "repetition_penalty", MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY
        )
        self._check_real("presence_penalty", -MAX_PENALTY, MAX_PENALTY)
        self._check_real("frequency_penalty", -MAX_PENALTY, MAX_PENALTY)
        self._set("logit_bias", _logit_bias(self.logit_bias))
        self._check_integer("seed", 0, MAX_SEED, optional=True)
        self._set("stop", _stops(self.stop))
        self._set("stop_token_ids", _stop_token_ids(self.stop_token_ids))
        for field in ("include_stop", "ignore_eos"):
            if not isinstance(value := getattr(self, field), bool):
                raise InvalidRequestError(
                    f"{field}={shown(value)} must be True or False"
                )
        self._check_integer("logprobs", 0, MAX_LOGPROBS, optional=True)
        self._check_integer("prompt_logprobs", 0, MAX_LOGPROBS, optional=True)
        self._check_integer("priority", -MAX_PRIORITY, MAX_PRIORITY)
        self._check_integer(
            "truncate_prompt_tokens", 1, MAX_TOKENS_LIMIT, optional=True
        )
        self._check_real("time_limit_s", 0, MAX_TIME_LIMIT_S, optional=True)
        if self.time_limit_s == 0.0:
            raise InvalidRequestError("time_limit_s=0.0 must be above 0")
        self._check_integer("expected_tokens", 1, self.max_tokens, optional=True)
        if self.n > 1 and self.greedy:
            raise InvalidRequestError(
                f"n={self.n} must be 1 at temperature={self.temperature:g}: all "
                "completions would be the same"
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken instead of a drawn one."""
        return self.temperature < GREEDY_BELOW

    @property
    def penalises(self) -> bool:
        """Whether tokens of prompt or output change the logits of those to come."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @property
    def edits_logits(self) -> bool:
        """Whether logits are changed before temperature."""
        return self.penalises or bool(self.logit_bias) or self.min_tokens > 0

    def validate_for(self, vocab_size: int) -> None:
        """Raise InvalidRequestError for a token id outside the vocabulary."""
        for field, ids in (
            ("stop_token_ids", self.stop_token_ids),
            ("logit_bias", [token_id for token_id, _ in self.biases]),
        ):
            for token_id in ids:
                if token_id >= vocab_size:
                    raise InvalidRequestError(
                        f"{field} has {token_id}, outside the vocabulary of "
                        f"{vocab_size}"
                    )

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """What `logit_bias` says, as pairs in the order of the ids."""
        assert isinstance(self.logit_bias, tuple), "checked when it was made"
        return self.logit_bias

    def _check_integer(
        self, field: str, low: int, high: int, *, optional: bool = False
    ) -> None:
        value = getattr(self, field)
        if not (optional and value is None):
            self._set(field, _integer(field, value, low, high))

    def _check_real(
        self, field: str, low: float, high: float, *, optional: bool = False
    ) -> None:
        value = getattr(self, field)
        if not (optional and value is None):
            self._set(field, _real(field, value, low, high))

    def _set(self, field: str, value: Any) -> None:
        """Store a checked value in this frozen object."""
        object.__setattr__(self, field, value)


def _integer(field: str, value: Any, low: int, high: int) -> int:
    """Return `value` as an int within [low, high]; numpy integers count, bools not."""
    if type(value) is int:  # asking whether it is Integral takes ten times as long
        number = value
    elif isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise InvalidRequestError(f"{field}={shown(value)} must be an integer")
    else:
        number = int(value)
    if not low <= number <= high:
        raise InvalidRequestError(
            f"{field}={shown(value)} must be from {low} to {high}"
        )
    return number


def _real(field: str, value: Any, low: float, high: float) -> float:
    """Return `value` as a float within [low, high]; NaN is within nothing."""
    if type(value) is float:
        number = value
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InvalidRequestError(f"{field}={shown(value)} must be a number")
    else:
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


def _logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    """Return biases as pairs (token id, bias), in the order of the ids."""
    if not isinstance(value, Mapping | tuple):
        raise InvalidRequestError(
            f"logit_bias={shown(value)} must map token ids to numbers"
        )
    if not len(value) <= MAX_LOGIT_BIASES:
        raise InvalidRequestError(
            f"logit_bias has {len(value)} tokens; at most {MAX_LOGIT_BIASES} are "
            "allowed"
        )
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise InvalidRequestError(
            f"logit_bias={shown(value)} must be pairs of token id and number"
        )
    biases: dict[int, float] = {}
    for key, bias in pairs:
        token_id = _integer("logit_bias token", key, 0, MAX_TOKEN_ID)
        if token_id in biases:
            raise InvalidRequestError(f"logit_bias has token {token_id} twice")
        biases[token_id] = _real(
            f"logit_bias[{token_id}]", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS
        )
    return tuple(sorted(biases.items()))


def shown(value: Any) -> str:
    """Return a short one-line picture of any value a caller may pass."""
    try:
        text = repr(value)
    except Exception as error:  # e.g. an int of more digits than Python prints
        return f"<{type(value).__name__}: {type(error).__name__}>"
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."
