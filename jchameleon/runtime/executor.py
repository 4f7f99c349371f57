"""Compile and run the step programs over parameters and pool.

All programs are compiled ahead of time at fixed shapes, so a compile after warm-up
cannot happen: a call with any other shape is an error. The engine thread is the only
caller.
"""

import concurrent.futures
import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jchameleon.config import PREFILL_TILE_TOKENS, EngineConfig, ModelConfig
from jchameleon.errors import ConfigError
from jchameleon.lora.layout import ChunkLayout
from jchameleon.pallas.operations import XLA, Operations, compile_operations
from jchameleon.runtime.batch import (
    BatchBuilder,
    StepRow,
    decode_rows,
    last_tiles,
    row_tiles,
)
from jchameleon.runtime.decode_rows import DecodeRows, DecodeTable
from jchameleon.runtime.drawing import Drawing, Draws, StepSampling
from jchameleon.runtime.pieces import Piece
from jchameleon.runtime.programs import (
    ModelParams,
    StepBatch,
    compile_commit,
    compile_step,
)
from jchameleon.runtime.scoring import Scores, Scoring
from jchameleon.runtime.shapes import (
    decode_buckets,
    piece_pages,
    prefill_buckets,
    returned_bytes,
    sampler_rows,
)

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a dispatched step draws, and what it scores in prefill; fetch either."""

    draws: Draws
    scores: Scores | None


class Executor:
    """Owns parameters, pool and compiled programs.

    Attributes:
      compile_seconds: of each program, by name.
      table: the running requests, for decode steps.
      build_s: seconds spent so far on laying out steps.
    """

    def __init__(
        self,
        params: ModelParams,
        model: ModelConfig,
        config: EngineConfig,
        layout: ChunkLayout,
        *,
        num_pages: int,
        max_model_len: int,
        ops: Operations = XLA,
    ):
        """Nothing compiles yet, and the pool is not placed."""
        self.model = model
        self.config = config
        self.layout = layout
        self.num_pages = num_pages
        self.max_model_len = max_model_len
        self.max_blocks = -(-max_model_len // config.kv_block_tokens)
        self.compile_seconds: dict[str, float] = {}
        self.table = DecodeTable(config.max_running, self.max_blocks)
        self.build_s = 0.0
        self._params = params
        self._ops = ops
        self._device = next(iter(params.leaves[0].devices()))
        self._dtype = params.leaves[0].dtype
        self._builder = BatchBuilder(
            layout,
            block_tokens=config.kv_block_tokens,
            max_blocks=self.max_blocks,
            max_chunks=layout.num_chunks(config.max_lora_rank),
            dtype=self._dtype,
            ops=ops,
        )
        self._decode_rows = decode_buckets(config.max_running)
        self._prefill_tokens = prefill_buckets(config.max_batch_tokens)
        self._steps: dict[tuple[int, int], Any] = {}
        self._drawing = Drawing(model.vocab_size, self._device)
        self._scoring = Scoring(params, model.hidden_size)
        self._commit: Any = None
        # Until `place_pool`, what describes the arrays.
        self._pools: list[Any] = [
            jax.ShapeDtypeStruct(
                (num_pages, layout.page_elems),
                self._dtype,
                sharding=jax.sharding.SingleDeviceSharding(self._device),
            )
        ] * model.num_layers

    @property
    def params(self) -> ModelParams:
        """The model's parameters, which nothing changes."""
        return self._params

    @property
    def pool_bytes(self) -> int:
        """Device bytes of the pool."""
        return sum(pool.size * pool.dtype.itemsize for pool in self._pools)

    @property
    def temp_bytes(self) -> int:
        """Temporaries of the largest program that is compiled.

        Raises:
          ConfigError: the device does not say.
        """
        programs = [
            *self._steps.values(),
            *self._drawing.programs,
            *self._scoring.programs,
            self._commit,
        ]
        analyses = [program.memory_analysis() for program in programs]
        if None in analyses:
            raise ConfigError(
                f"{self._device} does not say what programs need: name pool_bytes"
            )
        return max(one.temp_size_in_bytes for one in analyses)

    @property
    def output_bytes(self) -> int:
        """Most bytes of what the steps of an iteration return and the sampler edits."""
        return returned_bytes(self.config, self.model, self._dtype.itemsize)

    @property
    def device(self) -> jax.Device:
        """Where parameters and pool live."""
        return self._device

    @property
    def backend(self) -> str:
        """Name of the device operations."""
        return self._ops.name

    @property
    def dtype(self) -> np.dtype:
        """Element type of parameters and pool."""
        return self._dtype

    @property
    def num_resident(self) -> int:
        """Adapters that rows may use now."""
        return self._builder.num_adapters

    def compile_largest(self) -> None:
        """Compile the largest program of each kind, as `warm_up` would."""
        self._compile(self._largest)

    def warm_up(self) -> None:
        """Compile every program that a step may need."""
        jobs = [(1, rows) for rows in self._decode_rows]
        jobs += [(PREFILL_TILE_TOKENS, tokens) for tokens in self._prefill_tokens]
        self._compile(jobs)
        self.compile_seconds |= self._drawing.compile_seconds
        self.compile_seconds |= self._scoring.compile_seconds
        logger.info(
            "compiled %d programs: %s",
            len(self.compile_seconds),
            ", ".join(f"{k} {v:.1f}s" for k, v in self.compile_seconds.items()),
        )

    def place_pool(self) -> None:
        """Create the pool on the device of the parameters.

        After the compiles: XLA tries out kernels on a GPU, in memory of its own.

        Raises:
          ConfigError: it does not fit.
        """
        try:
            self._pools = self._empty_pools()
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"{self.num_pages} pages do not fit on {self._device}, lower "
                f"pool_bytes: {reason}"
            ) from error

    def commit(self, uid: str, pages: tuple[int, ...], pieces: Sequence[Piece]) -> None:
        """Write a loaded adapter into its pages; from now on rows may use it."""
        for piece in pieces:
            self._pools = self._commit(self._pools, piece.pages, piece.block)
        self._builder.place(uid, pages)

    def evict(self, uid: str) -> None:
        """Forget an adapter's pages; they may be handed out again."""
        self._builder.remove(uid)

    def prefill(self, rows: Sequence[StepRow]) -> StepResult:
        """Run prompt chunks, draw where a row says how, score its targets.

        Every row takes whole tiles of `PREFILL_TILE_TOKENS`; together at most
        `max_batch_tokens`. Dispatch is asynchronous.
        """
        logits, stream = self._run_prefill(rows)
        tiles = np.array(row_tiles(rows))
        firsts = (np.cumsum(tiles) - tiles) * PREFILL_TILE_TOKENS
        scores = self._scoring.score(stream, [row.targets for row in rows], firsts)
        sampling = StepSampling.of([row.sampling for row in rows])
        draws = self._drawing.draw(logits, sampling, last_tiles(rows))
        return StepResult(draws=draws, scores=scores)

    def decode(self, rows: DecodeRows) -> StepResult:
        """Run one token per row and draw the next; dispatch is asynchronous."""
        logits = self._run_decode(rows)
        draws = self._drawing.draw(logits, rows.sampling, np.arange(len(rows.tokens)))
        return StepResult(draws=draws, scores=None)

    def logits(self, rows: Sequence[StepRow], *, prefill: bool) -> np.ndarray:
        """Run a step as `prefill` or `decode` do, without drawing tokens.

        Returns:
          f32[rows, V], the logits that follow each row's last token.
        """
        if not prefill:
            return np.asarray(self._run_decode(decode_rows(rows))).T[: len(rows)]
        return np.asarray(self._run_prefill(rows)[0]).T[last_tiles(rows)]

    def rebuild_pool(self) -> None:
        """Put zeros in the place of a pool that a failed program may have taken.

        Adapters stay in the books until they are evicted; the pages are empty.

        Raises:
          JaxRuntimeError: the device cannot hold it any more.
        """
        for pool in self._pools:  # a traceback may still refer to it
            pool.delete()
        self._pools = self._empty_pools()
        jax.block_until_ready(self._pools)

    def test_device(self) -> None:
        """Run every step program without rows; raises what they raise."""
        for (tile, num_tokens), step in self._steps.items():
            batch = self._builder.build([], num_tokens, prefill=tile > 1)
            logits, self._pools, _ = step(self._params.leaves, self._pools, batch)
            logits.block_until_ready()

    def poison(self, pages: Sequence[int]) -> None:
        """Fill pages with NaN (tests: nothing may depend on what unused pages hold)."""
        index = np.asarray(pages, np.int32)
        self._pools = [pool.at[index].set(jnp.nan) for pool in self._pools]

    def _empty_pools(self) -> list[jax.Array]:
        return [
            jnp.zeros(pool.shape, pool.dtype, device=self._device)
            for pool in self._pools
        ]

    def _run_prefill(self, rows: Sequence[StepRow]) -> tuple[jax.Array, jax.Array]:
        """Dispatch a step; return logits f32[V, tiles] and residual stream f[D, T]."""
        start_s = time.monotonic()
        needed = sum(row_tiles(rows)) * PREFILL_TILE_TOKENS
        num_tokens = next(size for size in self._prefill_tokens if size >= needed)
        batch = self._builder.build(rows, num_tokens, prefill=True)
        self.build_s += time.monotonic() - start_s
        return self._run((PREFILL_TILE_TOKENS, num_tokens), batch)

    def _run_decode(self, rows: DecodeRows) -> jax.Array:
        """Dispatch a step; return logits f32[V, rows]."""
        start_s = time.monotonic()
        needed = len(rows.tokens)
        num_tokens = next(size for size in self._decode_rows if size >= needed)
        batch = self._builder.build_decode(rows, num_tokens)
        self.build_s += time.monotonic() - start_s
        return self._run((1, num_tokens), batch)[0]

    def _run(
        self, shape: tuple[int, int], batch: StepBatch
    ) -> tuple[jax.Array, jax.Array]:
        logits, self._pools, stream = self._steps[shape](
            self._params.leaves, self._pools, batch
        )
        return logits, stream

    @property
    def _largest(self) -> list[tuple[int, int]]:
        """The largest prefill and decode steps: (tokens of a tile, tokens)."""
        return [
            (PREFILL_TILE_TOKENS, self._prefill_tokens[-1]),
            (1, self._decode_rows[-1]),
        ]

    def _compile(self, jobs: Sequence[tuple[int, int]]) -> None:
        """Compile steps (tokens of a tile, tokens), and what goes with them.

        On two threads: XLA releases the interpreter and a compile is mostly one core.
        """
        rows = {sampler_rows(num_tokens // tile) for tile, num_tokens in jobs}
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            # Beside what traces the first programs.
            running = [threads.submit(compile_operations, self._ops)]
            # The largest first: they take longest.
            running += [
                threads.submit(self._compile_step, job)
                for job in sorted(jobs, reverse=True)
            ]
            running += [threads.submit(self._drawing.compile, n) for n in sorted(rows)]
            running += [
                threads.submit(self._scoring.compile_gather, tokens)
                for tile, tokens in jobs
                if tile > 1
            ]
            running.append(threads.submit(self._scoring.compile_score))
            running.append(threads.submit(self._compile_commit))
            for one in running:
                one.result()

    def _compile_step(self, shape: tuple[int, int]) -> None:
        tile, num_tokens = shape
        start_s = time.monotonic()
        batch = self._builder.build([], num_tokens, prefill=tile > 1)
        self._steps[shape] = compile_step(
            self._params,
            self._pools,
            batch,
            layout=self.layout,
            block_tokens=self.config.kv_block_tokens,
            ops=self._ops,
        )
        name = f"decode[{num_tokens}]" if tile == 1 else f"prefill[{num_tokens}]"
        self.compile_seconds[name] = time.monotonic() - start_s

    def _compile_commit(self) -> None:
        start_s = time.monotonic()
        count = piece_pages(self.layout)
        self._commit = compile_commit(self._pools, count)
        self.compile_seconds[f"commit[{count}]"] = time.monotonic() - start_s
