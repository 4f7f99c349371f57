"""Log-probabilities of prompt tokens, a few of them at a time.

A prefill step leaves the residual stream of all its tokens; their logits would be an
array of the vocabulary's size for each of them, so they exist for `SCORED_TOKENS` at a
time only.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jchameleon.runtime.logprobs import pack_logprobs
from jchameleon.runtime.programs import ModelParams, merge_model

SCORED_TOKENS = 64
"""Prompt tokens whose logits exist at once."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """Prompt tokens of one row whose log-probabilities are wanted.

    Attributes:
      offset: place, among the row's tokens, of the one before the first of them.
      tokens: i32[n], in a row.
    """

    offset: int
    tokens: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Log-probabilities of a step while the device works on them.

    Attributes:
      packed: of `pack_logprobs`, `SCORED_TOKENS` at a time, the last of them padded.
      counts: how many tokens each row of the step has among them.
    """

    packed: Sequence[jax.Array]
    counts: Sequence[int]

    def fetch(self) -> list[np.ndarray]:
        """Wait, and return i32[n, 2, 1 + K] for each row."""
        if not self.packed:
            return [np.zeros((0, 2, 1), np.int32) for _ in self.counts]
        whole = np.concatenate([np.asarray(piece) for piece in self.packed])
        return np.split(whole, np.cumsum(self.counts))[:-1]


class Scoring:
    """Compiled programs over the parameters; the engine thread is the only caller.

    Attributes:
      compile_seconds: by program.
    """

    def __init__(self, params: ModelParams, hidden_size: int) -> None:
        """Nothing compiles yet."""
        self.compile_seconds: dict[str, float] = {}
        self._params = params
        self._hidden_size = hidden_size
        self._device = next(iter(params.leaves[0].devices()))
        self._gather: dict[int, Any] = {}
        self._score: Any = None

    @property
    def programs(self) -> list[Any]:
        """All that are compiled; `compile_score` is through."""
        return [*self._gather.values(), self._score]

    def compile_gather(self, num_tokens: int) -> None:
        """Compile what reads from the stream of a step of `num_tokens`."""
        start_s = time.monotonic()
        stream = self._stream(num_tokens)
        columns = np.zeros(SCORED_TOKENS, np.int32)
        self._gather[num_tokens] = jax.jit(gather).lower(stream, columns).compile()
        self.compile_seconds[f"gather[{num_tokens}]"] = time.monotonic() - start_s

    def compile_score(self) -> None:
        """Compile the output head over a few tokens."""
        start_s = time.monotonic()
        treedef = self._params.treedef

        def score(leaves: Any, x: jax.Array, tokens: jax.Array) -> jax.Array:
            logits = merge_model(treedef, leaves).logits(x)
            return pack_logprobs(logits.astype(jnp.float32), tokens)

        self._score = (
            jax.jit(score)
            .lower(
                self._params.leaves,
                self._stream(SCORED_TOKENS),
                np.zeros(SCORED_TOKENS, np.int32),
            )
            .compile()
        )
        self.compile_seconds[f"score[{SCORED_TOKENS}]"] = time.monotonic() - start_s

    def score(
        self,
        stream: jax.Array,  # f[D, T]
        targets: Sequence[Targets | None],
        firsts: np.ndarray,  # i64[rows], column of each row's first token
    ) -> Scores:
        """Dispatch the scores of a step's rows; None among `targets` asks for none."""
        wanted = [
            (first + one.offset + np.arange(len(one.tokens)), one.tokens)
            for first, one in zip(firsts, targets, strict=True)
            if one is not None
        ]
        packed: list[jax.Array] = []
        if wanted:
            columns = np.concatenate([columns for columns, _ in wanted])
            tokens = np.concatenate([tokens for _, tokens in wanted])
            for start in range(0, len(columns), SCORED_TOKENS):
                own = slice(start, start + SCORED_TOKENS)
                x = self._gather[stream.shape[1]](stream, _padded(columns[own]))
                packed.append(self._score(self._params.leaves, x, _padded(tokens[own])))
        counts = [0 if one is None else len(one.tokens) for one in targets]
        return Scores(packed=packed, counts=counts)

    def _stream(self, num_tokens: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            (self._hidden_size, num_tokens),
            self._params.leaves[0].dtype,
            sharding=jax.sharding.SingleDeviceSharding(self._device),
        )


def gather(
    stream: jax.Array,  # f[D, T]
    columns: jax.Array,  # i32[N]
) -> jax.Array:  # f[D, N]
    """Return some tokens of the residual stream."""
    return stream.at[:, columns].get(mode="promise_in_bounds")


def _padded(values: np.ndarray) -> np.ndarray:
    out = np.zeros(SCORED_TOKENS, np.int32)
    out[: len(values)] = values
    return out
