"""Draw the next token of each row of a step: the sampler's programs and what they take.

Three small programs for each number of rows: `edit` changes logits, `sample` draws,
`pack_logprobs` reads the model's own distribution. Only `sample` runs for a step in
which no row asks for more, and it is the same program for all rows of any step: what
one row asks for cannot change the bits of another.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jchameleon.runtime.edits import RowEdits, edit, edit_lists, edits_width
from jchameleon.runtime.logprobs import pack_logprobs, unpack_logprobs
from jchameleon.runtime.outbox import TokenLogprobs
from jchameleon.runtime.sampler import SamplingBatch, empty_sampling, sample


class RowSampling(NamedTuple):
    """How to draw a row's next token; see `SamplingBatch` for the first fields.

    A named tuple like all that is made for every token: the cheapest to make.

    Attributes:
      edits: changes of its logits, read when the draw is dispatched; None for none.
      logprobs: how many of the likeliest tokens to report beside the drawn one; None
        reports nothing.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: tuple[int, int]
    position: int
    edits: RowEdits | None
    logprobs: int | None


class DrawnToken(NamedTuple):
    """What was drawn for a row: `INVALID_TOKEN` where its logits are not finite."""

    token: int
    logprobs: TokenLogprobs | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Draws:
    """The draws of a step while the device works on them.

    Attributes:
      tokens: i32[R].
      packed: of `pack_logprobs`, or None if no row asks for them.
      rows, columns: how each row was drawn and its place in `tokens`.
    """

    tokens: jax.Array
    packed: jax.Array | None
    rows: Sequence[RowSampling | None]
    columns: np.ndarray

    def fetch(self) -> list[DrawnToken | None]:
        """Wait, and return one draw for each row; None where nothing was drawn."""
        tokens = np.asarray(self.tokens)[self.columns].tolist()
        packed = None if self.packed is None else np.asarray(self.packed)
        drawn: list[DrawnToken | None] = []
        for row, token, column in zip(self.rows, tokens, self.columns, strict=True):
            if row is None:
                drawn.append(None)
                continue
            logprobs = None
            if packed is not None and row.logprobs is not None:
                logprobs = unpack_logprobs(packed[column], row.logprobs)
            drawn.append(DrawnToken(token=token, logprobs=logprobs))
        return drawn


class Drawing:
    """The sampler's compiled programs; the engine thread is the only caller.

    Attributes:
      compile_seconds: by program.
    """

    def __init__(self, vocab_size: int, device: jax.Device) -> None:
        """Nothing compiles yet."""
        self.compile_seconds: dict[str, float] = {}
        self._vocab_size = vocab_size
        self._sharding = jax.sharding.SingleDeviceSharding(device)
        self._programs: dict[tuple[str, int], Any] = {}

    @property
    def programs(self) -> list[Any]:
        """All that are compiled."""
        return list(self._programs.values())

    def compile(self, num_rows: int) -> None:
        """Compile what steps with logits for `num_rows` may need."""
        width = edits_width(num_rows)
        logits = self._shape((self._vocab_size, num_rows), jnp.float32)
        tokens = self._shape((num_rows,), jnp.int32)
        batch = SamplingBatch(**empty_sampling(num_rows))
        place, change = np.zeros((2, width), np.int32), np.zeros((3, width), np.float32)
        self._compile("sample", num_rows, sample, logits, batch)
        self._compile("edit", num_rows, edit, logits, place, change)
        self._compile("logprobs", num_rows, pack_logprobs, logits, tokens)

    def draw(
        self,
        logits: jax.Array,  # f32[V, R]
        rows: Sequence[RowSampling | None],
        columns: np.ndarray,  # i64[rows], the column of each in `logits`
    ) -> Draws:
        """Dispatch the draws of a step; None among `rows` draws nothing."""
        num_rows = logits.shape[1]
        fields = empty_sampling(num_rows)
        edits: list[tuple[int, RowEdits]] = []
        scored = False
        for row, column in zip(rows, columns.tolist(), strict=True):
            if row is None:
                continue
            _set_sampling(fields, column, row)
            if row.edits is not None:
                edits.append((column, row.edits))
            scored |= row.logprobs is not None
        edited = logits
        if edits:
            width = edits_width(num_rows)
            for lists in edit_lists(edits, width=width, vocab_size=self._vocab_size):
                edited = self._programs["edit", num_rows](edited, *lists)
        tokens = self._programs["sample", num_rows](edited, SamplingBatch(**fields))
        packed = (
            self._programs["logprobs", num_rows](logits, tokens) if scored else None
        )
        return Draws(tokens=tokens, packed=packed, rows=rows, columns=columns)

    def _compile(
        self, name: str, num_rows: int, function: Callable[..., Any], *args: Any
    ) -> None:
        start_s = time.monotonic()
        self._programs[name, num_rows] = jax.jit(function).lower(*args).compile()
        self.compile_seconds[f"{name}[{num_rows}]"] = time.monotonic() - start_s

    def _shape(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._sharding)


def _set_sampling(
    fields: Mapping[str, np.ndarray], row: int, values: RowSampling
) -> None:
    for name, column in fields.items():
        column[row] = getattr(values, name)
