"""One layer's inputs of a model, several times over, so that no cache holds them.

A world is one pool with the pages of `turns` steps of one shape: each has keys, values
and adapters of its own, so that kernels that run over the turns one after the other
read from memory what they would read there in an engine.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jchameleon.config import (
    RESERVED_PAGES,
    EngineConfig,
    ModelConfig,
    default_max_model_len,
)
from jchameleon.lora.layout import CHUNK_RANK, ChunkLayout, GroupLayout
from jchameleon.pallas.operations import XLA, pallas_operations
from jchameleon.runtime.batch import BatchBuilder, StepRow
from jchameleon.runtime.setup import chunk_layout

POOL_BYTES = 4 << 30
"""Most of a pool of several turns; larger ones need wider offsets in kernels."""

MAX_TURNS = 32

POOL_SCALE = 0.05
"""Of random elements: LoRA products come out near 1, as their inputs are."""

QUERY_SCALE = 40.0
"""Of queries: scores against keys of `POOL_SCALE` then tell keys apart."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """The requests of a step.

    Attributes:
      phase: "decode" or "prefill".
      tokens: rows in decode, prompt tokens in prefill.
      context_tokens: of every row in decode; most of a prompt in prefill.
      ranks: of adapters, in turn; every request has one of its own.
    """

    phase: str
    tokens: int
    context_tokens: int
    ranks: tuple[int, ...]

    @property
    def name(self) -> str:
        """As programs are called: decode[16]."""
        return f"{self.phase}[{self.tokens}]"

    @property
    def request_tokens(self) -> int:
        """Tokens of this step that each request has."""
        if self.phase == "decode":
            return 1
        return min(self.context_tokens, self.tokens)

    @property
    def request_ranks(self) -> list[int]:
        """The adapter's rank of each request."""
        count = self.tokens // self.request_tokens
        return [self.ranks[i % len(self.ranks)] for i in range(count)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """A pool and the steps in it.

    Attributes:
      num_pages: of the pool.
      dtype: of the pool, and of all activations.
      steps: the arrays of each turn: "lora" and "blocks" as the kernels take them,
        "xla_lora" as XLA's form does, "token_adapter" i32[T], "table", "positions",
        "context", "kv_pages", "slots".
      adapter_pages: of each turn and request, i32[chunks, W].
    """

    model: ModelConfig
    layout: ChunkLayout
    load: Load
    block_tokens: int
    max_context_tokens: int
    arch: str | None
    interpret: bool
    num_pages: int
    dtype: np.dtype
    steps: list[dict[str, Any]]
    adapter_pages: list[list[np.ndarray]]

    @functools.cached_property
    def pool(self) -> jax.Array:  # f[P, E]
        """Random pages; made when first asked for."""

        def fill() -> jax.Array:
            shape = (self.num_pages, self.layout.page_elems)
            values = jax.random.normal(jax.random.key(1), shape, self.dtype)
            return (values * jnp.asarray(POOL_SCALE, self.dtype)).at[0].set(0)

        return jax.jit(fill)()

    def random(self, *shape: int, scale: float = 1.0, seed: int = 0) -> jax.Array:
        """Return normal numbers in the pool's type."""
        values = jax.random.normal(jax.random.key(seed), shape, jnp.float32)
        return (scale * values).astype(self.dtype)


def make_world(
    model: ModelConfig,
    config: EngineConfig,
    load: Load,
    *,
    arch: str | None,
    interpret: bool = False,
    max_turns: int = MAX_TURNS,
) -> World:
    """Return the inputs of a step as an engine of this configuration would build it.

    Raises:
      ValueError: the load is no step of such an engine.
    """
    layout = chunk_layout(model, config, ())
    max_len = config.max_model_len or default_max_model_len(model)
    if load.context_tokens > max_len:
        raise ValueError(f"context_tokens={load.context_tokens} exceed {max_len=}")
    if load.tokens % load.request_tokens:
        raise ValueError(
            f"tokens={load.tokens} must be a multiple of the requests' "
            f"{load.request_tokens}"
        )
    if max(load.ranks) > config.max_lora_rank:
        raise ValueError(f"ranks={load.ranks} exceed {config.max_lora_rank=}")
    block = config.kv_block_tokens
    ranks = load.request_ranks
    kv_pages = -(-load.context_tokens // block)
    pages_a_turn = sum(kv_pages + layout.num_pages(rank) for rank in ranks)
    dtype = jnp.dtype(config.dtype)
    turn_bytes = pages_a_turn * layout.page_elems * dtype.itemsize
    turns = max(2, min(max_turns, POOL_BYTES // turn_bytes))
    num_pages = RESERVED_PAGES + turns * pages_a_turn
    order = np.random.default_rng(0).permutation(num_pages - RESERVED_PAGES)
    free = iter((order + RESERVED_PAGES).astype(np.int32))

    def take(count: int) -> np.ndarray:
        return np.fromiter(free, np.int32, count)

    steps, adapter_pages = [], []
    for _ in range(turns):
        caches = [take(kv_pages) for _ in ranks]
        adapters = [take(layout.num_pages(rank)) for rank in ranks]
        steps.append(
            _build(layout, config, load, max_len, caches, adapters, ranks=ranks)
        )
        shape = (-1, layout.pages_per_chunk)
        adapter_pages.append([pages.reshape(shape) for pages in adapters])
    return World(
        model=model,
        layout=layout,
        load=load,
        block_tokens=block,
        max_context_tokens=-(-max_len // block) * block,
        arch=arch,
        interpret=interpret,
        num_pages=num_pages,
        dtype=dtype,
        steps=jax.device_put(steps),
        adapter_pages=adapter_pages,
    )


def dense_slabs(
    world: World, turn: int, group: GroupLayout
) -> tuple[jax.Array, jax.Array]:
    """Return A f[S, P, R, d_in] and B f[S, R, N] of a turn's adapters.

    As engines without pages keep them: every adapter in the room of the largest.
    """
    a_all, b_all = [], []
    tables = world.adapter_pages[turn]
    room = CHUNK_RANK * max(len(table) for table in tables)
    projections, _, d_in = group.a_shape
    for table in tables:
        chunks = world.pool[table].reshape(len(table), -1)
        a = chunks[:, group.a_offset :][:, : projections * CHUNK_RANK * d_in]
        a = a.reshape(len(table), projections, CHUNK_RANK, d_in).swapaxes(0, 1)
        a = a.reshape(projections, -1, d_in)
        b = chunks[:, group.b_offset :][:, : CHUNK_RANK * group.b_shape[1]]
        b = b.reshape(-1, group.b_shape[1])
        pad = room - b.shape[0]
        a_all.append(jnp.pad(a, ((0, 0), (0, pad), (0, 0))))
        b_all.append(jnp.pad(b, ((0, pad), (0, 0))))
    return jnp.stack(a_all), jnp.stack(b_all)


def _build(
    layout: ChunkLayout,
    config: EngineConfig,
    load: Load,
    max_len: int,
    caches: list[np.ndarray],
    adapters: list[np.ndarray],
    *,
    ranks: list[int],
) -> dict[str, Any]:
    block = config.kv_block_tokens
    max_blocks = -(-max_len // block)
    start = load.context_tokens - 1 if load.phase == "decode" else 0
    rows = [
        StepRow(
            tokens=np.zeros(load.request_tokens, np.int32),
            start=start,
            pages=np.pad(pages, (0, max_blocks - len(pages))),
            adapter_uid=str(i),
            sampling=None,
        )
        for i, pages in enumerate(caches)
    ]
    batches = []
    for ops in (pallas_operations(None), XLA):
        builder = BatchBuilder(
            layout,
            block_tokens=block,
            max_blocks=max_blocks,
            max_chunks=layout.num_chunks(config.max_lora_rank),
            dtype=np.dtype(config.dtype),
            ops=ops,
        )
        for i, pages in enumerate(adapters):
            builder.place(str(i), tuple(pages.tolist()))
        prefill = load.phase == "prefill"
        batches.append(builder.build(rows, load.tokens, prefill=prefill))
    batch, plain = batches
    return {
        "lora": batch.lora,
        "xla_lora": plain.lora,
        "token_adapter": plain.lora.token_adapter,
        "blocks": batch.blocks,
        "table": batch.page_table,
        "positions": batch.positions,
        "context": batch.context_tokens,
        "kv_pages": batch.kv_pages,
        "slots": batch.positions % np.int32(block),
    }
