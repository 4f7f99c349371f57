"""Draw the next token of each row of a step: the sampler's programs and what they take.

Three small programs for each number of rows: `edit` changes logits, `sample` draws,
`pack_logprobs` reads the model's own distribution. Only `sample` runs for a step in
which no row asks for more, and it is the same program for all rows of any step: what
one row asks for cannot change the bits of another.
"""

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping, Sequence
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


class StepSampling(NamedTuple):
    """How all rows of a step draw, n of them.

    Attributes:
      fields: of a `SamplingBatch`, [n] each.
      edits: changes of logits, by row; read when the draw is dispatched.
      logprobs: how many of the likeliest tokens to report beside the drawn one, by row.
      silent: rows for which nothing is drawn.
    """

    fields: Mapping[str, np.ndarray]
    edits: Mapping[int, RowEdits]
    logprobs: Mapping[int, int]
    silent: Collection[int]

    @classmethod
    def of(cls, rows: Sequence[RowSampling | None]) -> "StepSampling":
        """Return what single rows ask for; None among them draws nothing."""
        fields = empty_sampling(len(rows))
        drawn = {i: row for i, row in enumerate(rows) if row is not None}
        for i, row in drawn.items():
            for name, column in fields.items():
                column[i] = getattr(row, name)
        return cls(
            fields=fields,
            edits={i: row.edits for i, row in drawn.items() if row.edits is not None},
            logprobs={
                i: row.logprobs for i, row in drawn.items() if row.logprobs is not None
            },
            silent=[i for i, row in enumerate(rows) if row is None],
        )


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
      sampling, columns: how the rows were drawn, and the place of each in `tokens`.
    """

    tokens: jax.Array
    packed: jax.Array | None
    sampling: StepSampling
    columns: np.ndarray

    def fetch(self) -> list[DrawnToken | None]:
        """Wait, and return one draw for each row; None where nothing was drawn."""
        tokens = np.asarray(self.tokens)[self.columns].tolist()
        drawn: list[DrawnToken | None] = [DrawnToken(token, None) for token in tokens]
        if self.packed is not None:
            packed = np.asarray(self.packed)[self.columns]
            for row, count in self.sampling.logprobs.items():
                logprobs = unpack_logprobs(packed[row], count)
                drawn[row] = DrawnToken(tokens[row], logprobs)
        for row in self.sampling.silent:
            drawn[row] = None
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
        sampling: StepSampling,  # of n rows
        columns: np.ndarray,  # i64[n], the column of each in `logits`
    ) -> Draws:
        """Dispatch the draws of a step."""
        num_rows = logits.shape[1]
        fields = empty_sampling(num_rows)
        for name, column in fields.items():
            column[columns] = sampling.fields[name]
        edited = logits
        if sampling.edits:
            width = edits_width(num_rows)
            edits = [(int(columns[row]), one) for row, one in sampling.edits.items()]
            for lists in edit_lists(edits, width=width, vocab_size=self._vocab_size):
                edited = self._programs["edit", num_rows](edited, *lists)
        tokens = self._programs["sample", num_rows](edited, SamplingBatch(**fields))
        packed = None
        if sampling.logprobs:
            packed = self._programs["logprobs", num_rows](logits, tokens)
        return Draws(tokens=tokens, packed=packed, sampling=sampling, columns=columns)

    def _compile(
        self, name: str, num_rows: int, function: Callable[..., Any], *args: Any
    ) -> None:
        start_s = time.monotonic()
        self._programs[name, num_rows] = jax.jit(function).lower(*args).compile()
        self.compile_seconds[f"{name}[{num_rows}]"] = time.monotonic() - start_s

    def _shape(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._sharding)
