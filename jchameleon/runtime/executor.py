"""Compile and run the step programs over parameters and pool.

All programs are compiled ahead of time at fixed shapes, so a compile after warm-up
cannot happen: a call with any other shape is an error. The engine thread is the only
caller.
"""

import concurrent.futures
import dataclasses
import functools
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jchameleon.config import PREFILL_TILE_TOKENS, TRASH_PAGE, EngineConfig, ModelConfig
from jchameleon.errors import ConfigError
from jchameleon.lora.layout import ChunkLayout
from jchameleon.pallas.multi_lora import LoraWork, build_lora_work, max_work_items
from jchameleon.runtime.programs import (
    ModelParams,
    StepBatch,
    commit_load,
    model_step,
)
from jchameleon.runtime.sampler import SamplingBatch, empty_sampling, sample
from jchameleon.runtime.transfer import Piece, piece_pages

logger = logging.getLogger(__name__)

DECODE_ROWS = (1, 4, 16, 32, 64, 128, 256)
"""Rows of decode programs, up to the power of two that holds `max_running`.

Fewer than all powers of two: every size is a program to compile at start.
"""

PREFILL_SIZES = 5
"""Prefill programs at most."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RowSampling:
    """How to draw a row's next token; see `SamplingBatch` for the fields."""

    temperature: float
    top_k: int
    top_p: float
    seed: tuple[int, int]
    position: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepRow:
    """One request's part of a step.

    Attributes:
      tokens: i32[n], a prompt chunk, or the last token in decode.
      start: position of the first of them.
      pages: i32[NB], the request's KV pages, padded with 0.
      adapter_uid: resident adapter, or None.
      sampling: how to draw the next token; None inside a prompt.
    """

    tokens: np.ndarray
    start: int
    pages: np.ndarray
    adapter_uid: str | None
    sampling: RowSampling | None


class Executor:
    """Owns parameters, pool and compiled programs."""

    def __init__(
        self,
        params: ModelParams,
        model: ModelConfig,
        config: EngineConfig,
        layout: ChunkLayout,
        *,
        num_pages: int,
        max_model_len: int,
    ):
        """Place the pool on the device of the parameters; nothing compiles yet."""
        self.model = model
        self.config = config
        self.layout = layout
        self.num_pages = num_pages
        self.max_model_len = max_model_len
        self.max_blocks = -(-max_model_len // config.kv_block_tokens)
        self.compile_seconds: dict[str, float] = {}
        self._params = params
        self._max_chunks = layout.num_chunks(config.max_lora_rank)
        self._device = next(iter(params.leaves[0].devices()))
        self._dtype = params.leaves[0].dtype
        self._decode_rows = decode_buckets(config.max_running)
        self._prefill_tokens = prefill_buckets(config.max_batch_tokens)
        self._steps: dict[tuple[int, int], Any] = {}
        self._samplers: dict[int, Any] = {}
        self._commit: Any = None
        self._adapter_pages: dict[str, np.ndarray] = {}
        self._lora_cache: tuple[Any, LoraWork] | None = None
        shape = (num_pages, layout.page_elems)
        try:
            self._pools = [
                jnp.zeros(shape, self._dtype, device=self._device)
                for _ in range(model.num_layers)
            ]
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"{num_pages} pages do not fit on {self._device}, lower pool_bytes: "
                f"{reason}"
            ) from error

    @property
    def params(self) -> ModelParams:
        """The model's parameters, which nothing changes."""
        return self._params

    @property
    def pool_bytes(self) -> int:
        """Device bytes of the pool."""
        return sum(pool.nbytes for pool in self._pools)

    @property
    def device(self) -> jax.Device:
        """Where parameters and pool live."""
        return self._device

    @property
    def dtype(self) -> np.dtype:
        """Element type of parameters and pool."""
        return self._dtype

    @property
    def num_resident(self) -> int:
        """Adapters that rows may use now."""
        return len(self._adapter_pages)

    def warm_up(self) -> None:
        """Compile every program that a step may need.

        Programs compile on two threads: XLA releases the interpreter and a compile
        is mostly one core.
        """
        jobs = [(1, rows) for rows in self._decode_rows]
        jobs += [(PREFILL_TILE_TOKENS, tokens) for tokens in self._prefill_tokens]
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            # The largest first: they take longest.
            for _ in threads.map(self._compile_step, sorted(jobs, reverse=True)):
                pass
            rows = {sampler_rows(num_tokens // tile) for tile, num_tokens in jobs}
            for _ in threads.map(self._compile_sampler, sorted(rows)):
                pass
        self._compile_commit()
        logger.info(
            "compiled %d programs: %s",
            len(self.compile_seconds),
            ", ".join(f"{k} {v:.1f}s" for k, v in self.compile_seconds.items()),
        )

    def commit(self, uid: str, pages: tuple[int, ...], pieces: Sequence[Piece]) -> None:
        """Write a loaded adapter into its pages; from now on rows may use it."""
        for piece in pieces:
            self._pools = self._commit(self._pools, piece.pages, piece.block)
        self._adapter_pages[uid] = np.asarray(pages, np.int32).reshape(
            -1, self.layout.pages_per_chunk
        )

    def evict(self, uid: str) -> None:
        """Forget an adapter's pages; they may be handed out again."""
        del self._adapter_pages[uid]
        self._lora_cache = None  # the same uid may come back in other pages

    def prefill(self, rows: Sequence[StepRow]) -> jax.Array:
        """Run prompt chunks; see `decode` for what is returned.

        Every row takes whole tiles of `PREFILL_TILE_TOKENS`; together at most
        `max_batch_tokens`.
        """
        return self._sample(*self._run(rows, prefill=True))

    def decode(self, rows: Sequence[StepRow]) -> jax.Array:
        """Run one token per row.

        Returns:
          i32[bucket] on the device, the next token of each row in order (for
          prefill: of each row's last tile, see `fetch`); dispatch is asynchronous.
        """
        return self._sample(*self._run(rows, prefill=False))

    def logits(self, rows: Sequence[StepRow], *, prefill: bool) -> np.ndarray:
        """Run a step as `prefill` or `decode` do, without drawing tokens.

        Returns:
          f32[rows, V], the logits that follow each row's last token.
        """
        logits, _ = self._run(rows, prefill=prefill)
        return np.asarray(logits).T[_last_tiles(rows, prefill=prefill)]

    @staticmethod
    def fetch(
        tokens: jax.Array, rows: Sequence[StepRow], *, prefill: bool
    ) -> list[int]:
        """Wait for a step and return one token per row, `INVALID_TOKEN` included."""
        return np.asarray(tokens)[_last_tiles(rows, prefill=prefill)].tolist()

    def poison(self, pages: Sequence[int]) -> None:
        """Fill pages with NaN (tests: nothing may depend on what unused pages hold)."""
        index = np.asarray(pages, np.int32)
        self._pools = [pool.at[index].set(jnp.nan) for pool in self._pools]

    def _run(
        self, rows: Sequence[StepRow], *, prefill: bool
    ) -> tuple[jax.Array, SamplingBatch]:
        """Dispatch a step; return logits f32[V, tiles] and how to sample each tile."""
        tile = PREFILL_TILE_TOKENS if prefill else 1
        tiles = _row_tiles(rows, prefill=prefill)
        buckets = self._prefill_tokens if prefill else self._decode_rows
        num_tokens = self._bucket(buckets, sum(tiles) * tile)
        batch, sampling = self._build(rows, tiles, num_tokens, tile)
        logits, self._pools = self._steps[tile, num_tokens](
            self._params.leaves, self._pools, batch
        )
        return logits, sampling

    def _sample(self, logits: jax.Array, sampling: SamplingBatch) -> jax.Array:
        return self._samplers[logits.shape[1]](logits, sampling)

    def _build(
        self, rows: Sequence[StepRow], tiles: Sequence[int], num_tokens: int, tile: int
    ) -> tuple[StepBatch, SamplingBatch]:
        num_tiles = num_tokens // tile
        block_tokens = self.config.kv_block_tokens
        tokens = np.zeros(num_tokens, np.int32)
        positions = np.zeros(num_tokens, np.int32)
        kv_pages = np.full(num_tokens, TRASH_PAGE, np.int32)
        page_table = np.zeros((num_tiles, self.max_blocks), np.int32)
        context = np.ones(num_tiles, np.int32)
        logit_tokens = np.zeros(sampler_rows(num_tiles), np.int32)
        token_adapter = np.full(num_tokens, -1, np.int32)
        sampling = empty_sampling(len(logit_tokens))
        uids: dict[str, int] = {}
        at = 0  # first tile of the row
        for row, num_row_tiles in zip(rows, tiles, strict=True):
            first, count = at * tile, len(row.tokens)
            own = slice(first, first + count)
            tokens[own] = row.tokens
            place = np.arange(row.start, row.start + count, dtype=np.int32)
            positions[own] = place
            kv_pages[own] = row.pages[place // block_tokens]
            if row.adapter_uid is not None:
                index = uids.setdefault(row.adapter_uid, len(uids))
                token_adapter[own] = index
            last_tile = at + num_row_tiles - 1
            page_table[at : last_tile + 1] = row.pages
            context[at : last_tile + 1] = np.minimum(
                row.start + tile * np.arange(1, num_row_tiles + 1), row.start + count
            )
            logit_tokens[last_tile] = first + count - 1
            if row.sampling is not None:
                _set_sampling(sampling, last_tile, row.sampling)
            at += num_row_tiles
        # numpy arrays: the compiled call copies them to the device.
        fields: dict[str, Any] = {
            "tokens": tokens,
            "positions": positions,
            "kv_pages": kv_pages,
            "page_table": page_table,
            "context_tokens": context,
            "logit_tokens": logit_tokens,
            "lora": self._lora_work(token_adapter, tuple(uids), tile),
        }
        return StepBatch(**fields), SamplingBatch(**sampling)

    def _lora_work(
        self, token_adapter: np.ndarray, uids: tuple[str, ...], tile: int
    ) -> LoraWork:
        # Rows and adapters seldom change from one decode step to the next.
        key = (tile, uids, token_adapter.tobytes())
        if self._lora_cache is not None and self._lora_cache[0] == key:
            return self._lora_cache[1]
        work = LoraWork(
            **build_lora_work(
                token_adapter,
                [self._adapter_pages[uid] for uid in uids],
                num_items=max_work_items(len(token_adapter), tile, self._max_chunks),
                pages_per_chunk=self.layout.pages_per_chunk,
            )
        )
        if tile == 1:
            self._lora_cache = (key, work)
        return work

    @staticmethod
    def _bucket(buckets: Sequence[int], needed: int) -> int:
        return next(size for size in buckets if size >= needed)

    def _compile_step(self, shape: tuple[int, int]) -> None:
        tile, num_tokens = shape
        start_s = time.monotonic()
        batch, _ = self._build([], [], num_tokens, tile)
        step = functools.partial(
            model_step,
            treedef=self._params.treedef,
            layout=self.layout,
            block_tokens=self.config.kv_block_tokens,
        )
        self._steps[shape] = (
            jax.jit(step, donate_argnums=1)
            .lower(self._params.leaves, self._pools, batch)
            .compile()
        )
        name = f"decode[{num_tokens}]" if tile == 1 else f"prefill[{num_tokens}]"
        self.compile_seconds[name] = time.monotonic() - start_s

    def _compile_sampler(self, rows: int) -> None:
        start_s = time.monotonic()
        logits = jax.ShapeDtypeStruct(
            (self.model.vocab_size, rows),
            jnp.float32,
            sharding=jax.sharding.SingleDeviceSharding(self._device),
        )
        batch = SamplingBatch(**empty_sampling(rows))
        self._samplers[rows] = jax.jit(sample).lower(logits, batch).compile()
        self.compile_seconds[f"sample[{rows}]"] = time.monotonic() - start_s

    def _compile_commit(self) -> None:
        start_s = time.monotonic()
        count = piece_pages(self.layout)
        block = jax.ShapeDtypeStruct(
            (self.model.num_layers, count, self.layout.page_elems),
            self._dtype,
            sharding=jax.sharding.SingleDeviceSharding(self._device),
        )
        self._commit = (
            jax.jit(commit_load, donate_argnums=0)
            .lower(self._pools, np.zeros(count, np.int32), block)
            .compile()
        )
        self.compile_seconds[f"commit[{count}]"] = time.monotonic() - start_s


def decode_buckets(max_running: int) -> tuple[int, ...]:
    """Return the row counts of decode programs, the last at least `max_running`."""
    largest = 1 << (max_running - 1).bit_length()
    return (*(size for size in DECODE_ROWS if size < largest), largest)


def prefill_buckets(max_batch_tokens: int) -> tuple[int, ...]:
    """Return the token counts of prefill programs: whole tiles, evenly spread.

    At most `PREFILL_SIZES`, from one tile to `max_batch_tokens`, each at most twice
    the one before where that suffices, else a constant factor apart.
    """
    largest = max_batch_tokens // PREFILL_TILE_TOKENS
    factor = max(2.0, largest ** (1 / (PREFILL_SIZES - 1)))
    sizes = {largest}
    size = 1.0
    while round(size) < largest:
        sizes.add(round(size))
        size *= factor
    return tuple(size * PREFILL_TILE_TOKENS for size in sorted(sizes))


def sampler_rows(num_tiles: int) -> int:
    """Return the rows of the sampler for a step with this many logits: a decode size.

    Prefill steps share the samplers of decode that way.
    """
    return next(
        (size for size in DECODE_ROWS if size >= num_tiles),
        1 << (num_tiles - 1).bit_length(),
    )


def _row_tiles(rows: Sequence[StepRow], *, prefill: bool) -> list[int]:
    """Return how many tiles of the step each row takes."""
    if not prefill:
        return [1] * len(rows)
    return [-(-len(row.tokens) // PREFILL_TILE_TOKENS) for row in rows]


def _last_tiles(rows: Sequence[StepRow], *, prefill: bool) -> np.ndarray:
    """Return i64[rows], the last tile of each row within the step."""
    return np.cumsum(_row_tiles(rows, prefill=prefill)) - 1


def _set_sampling(
    fields: Mapping[str, np.ndarray], row: int, values: RowSampling
) -> None:
    fields["temperature"][row] = values.temperature
    fields["top_k"][row] = values.top_k
    fields["top_p"][row] = values.top_p
    fields["seed"][row] = values.seed
    fields["position"][row] = values.position
