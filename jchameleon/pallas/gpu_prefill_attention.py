"""Paged attention of prompt chunks on NVIDIA GPUs.

Program (heads, block) attends for a block of consecutive tokens of one request and for
some query heads of one KV head, at most `bm` rows together, over everything up to the
block's last position, read from pages. It reads `2 * HD` elements of the pool for each
token of the context.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jchameleon.pallas import _compat
from jchameleon.pallas import gpu_pages as pages
from jchameleon.pallas.gpu_device import (
    MIN_CONTRACTION,
    MIN_ROWS,
    check_launch,
    dot,
)
from jchameleon.pallas.tuned import Key, TunedTable, make_key


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PrefillConfig:
    """How the prefill kernel is compiled.

    Attributes:
      bm: rows of a program, query tokens times query heads; a power of two >= 16.
      bn: context tokens of one turn of the loop, a power of two >= 16.
      num_warps, num_stages: of Triton.
    """

    bm: int
    bn: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        for name in ("bm", "bn"):
            value = getattr(self, name)
            if value < MIN_CONTRACTION or value & (value - 1):
                raise ValueError(f"{name}={value} must be a power of two >= 16")
        check_launch(self.num_warps, self.num_stages)


def max_rows(head_dim: int, dtype: np.dtype) -> int:
    """Return the most rows of a program whose registers do not spill (compiled)."""
    if dtype == np.float32:  # without tensor cores: products take many registers
        return 32
    return 128 if head_dim <= 128 else 64


def prefill_config(
    rows: int, head_dim: int, dtype: np.dtype, *, arch: str | None
) -> PrefillConfig:
    """Return the configuration for `rows` rows that one KV head offers to a program.

    Chosen for registers without spills; not measured on hardware yet.
    """
    bm = max(MIN_ROWS, pages.power_of_two(rows))
    bm = min(bm, max_rows(head_dim, dtype))
    bn = 64 if arch == "sm_90" and head_dim <= 128 else 32
    return PrefillConfig(
        bm=bm,
        bn=16 if dtype == np.float32 else bn,
        num_warps=8 if bm >= 128 or head_dim > 128 else 4,
        num_stages=2,
    )


def prefill_key(
    num_tokens: int,
    query_tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    block_tokens: int,
    dtype: Any,
) -> Key:
    """Return what a table knows a prefill step's attention by.

    Args:
      query_tokens: most tokens of a block (`build_attention_blocks`).
    """
    return make_key(
        "attention_prefill",
        phase="prefill",
        dtype=dtype,
        tokens=num_tokens,
        query_tokens=query_tokens,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_tokens=block_tokens,
    )


def check_prefill(config: PrefillConfig, query_tokens: int) -> None:
    """Raise ValueError where a program has too few rows for a block."""
    if config.bm < query_tokens:
        raise ValueError(f"bm={config.bm} must hold a block of {query_tokens} tokens")


def attention_block_tiles(
    heads: int, kv_heads: int, head_dim: int, dtype: np.dtype, *, tile_tokens: int
) -> int:
    """Return how many prefill tiles fill the rows of one program.

    Query heads of one KV head come first: they need no neighbouring tile.
    """
    together = pages.power_of_two(heads // kv_heads)
    return max(1, max_rows(head_dim, dtype) // (together * tile_tokens))


def build_attention_blocks(
    page_table: np.ndarray,  # i32[NT, NB]
    positions: np.ndarray,  # i32[T]
    context_tokens: np.ndarray,  # i32[NT]
    *,
    block_tiles: int,
) -> np.ndarray:  # i32[NT, 3]
    """Return the blocks of a prefill step: first token, tokens, context tokens.

    A tile continues the one before when both have the same pages and positions follow.
    Longest contexts come first, so that the last programs to start are short ones.
    Rows past the last block are zero.
    """
    num_tiles = len(page_table)
    tile = len(positions) // num_tiles
    first = positions[::tile]
    follows = (page_table[1:] == page_table[:-1]).all(axis=1)
    follows &= first[1:] == first[:-1] + tile
    blocks: list[list[int]] = []
    for i in range(num_tiles):
        if i and follows[i - 1] and blocks[-1][1] < block_tiles * tile:
            blocks[-1][1] += tile
            blocks[-1][2] = int(context_tokens[i])
        else:
            blocks.append([i * tile, tile, int(context_tokens[i])])
    blocks.sort(key=lambda block: -block[2])
    out = np.zeros((num_tiles, 3), np.int32)
    out[: len(blocks)] = blocks
    return out


def attend_tiles(
    q: jax.Array,  # f[T, H, HD]
    rows: jax.Array,  # f[P, 2 KVH, BT, HD]
    page_table: jax.Array,  # i32[NT, NB]
    positions: jax.Array,  # i32[T]
    context_tokens: jax.Array,  # i32[NT]
    blocks: jax.Array | None,  # i32[NB, 3]
    *,
    config: PrefillConfig | None,
    arch: str | None,
    tuned: TunedTable,
    interpret: bool,
) -> jax.Array:  # f[T, H, HD]
    """Return causal attention of prefill tiles; see `paged_attention_gpu`."""
    num_tokens, heads, head_dim = q.shape
    num_tiles = len(page_table)
    tile = num_tokens // num_tiles
    kv_heads = rows.shape[1] // 2
    group = heads // kv_heads
    if blocks is None:
        tokens = tile
        first = jnp.arange(0, num_tokens, tile, dtype=jnp.int32)
        blocks = jnp.stack([first, jnp.full_like(first, tile), context_tokens], axis=1)
    else:
        pages.check_integers(blocks=blocks)
        if blocks.ndim != 2 or blocks.shape[1] != 3:
            raise ValueError(f"{blocks.shape=} must be (blocks, 3)")
        tokens = tile * attention_block_tiles(
            heads, kv_heads, head_dim, q.dtype, tile_tokens=tile
        )
    key = prefill_key(
        num_tokens,
        tokens,
        heads,
        kv_heads,
        head_dim,
        block_tokens=rows.shape[2],
        dtype=rows.dtype,
    )
    config = (
        config
        or tuned.find(key)
        or prefill_config(
            tokens * pages.power_of_two(group), head_dim, q.dtype, arch=arch
        )
    )
    check_prefill(config, tokens)
    together = min(pages.power_of_two(group), config.bm // tokens)
    return _compat.triton_call(
        _prefill_kernel,
        name="paged_attention_prefill",
        grid=(kv_heads * -(-group // together), len(blocks)),
        out_shape=_compat.shape_of(q),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
        tile=tile,
        tokens=tokens,
        together=together,
        bm=config.bm,
        bn=config.bn,
    )(q, rows, page_table, positions, blocks)


def seen_keys(at: jax.Array, positions: jax.Array) -> jax.Array:
    """Return bool[M, S], which of the keys at `at` each row may see."""
    return at[None, :] <= positions[:, None]


def _prefill_kernel(
    q_ref,  # f[T, H, HD]
    pool_ref,  # f[P, 2 KVH, BT, HD]
    table_ref,  # i32[NT, NB]
    position_ref,  # i32[T]
    block_ref,  # i32[NB, 3]
    out_ref,  # f[T, H, HD]
    *,
    tile: int,
    tokens: int,
    together: int,
    bm: int,
    bn: int,
):
    heads, head_dim = q_ref.shape[1:]
    group = heads // (pool_ref.shape[1] // 2)
    chunks = -(-group // together)
    head = lax.div(pl.program_id(0), chunks)
    chunk = lax.rem(pl.program_id(0), chunks)
    block = pl.program_id(1)
    first, count, context = (block_ref[block, column] for column in range(3))

    @pl.when(count > 0)
    def _():
        row = jnp.arange(bm, dtype=jnp.int32)
        feature = jnp.arange(pages.power_of_two(head_dim), dtype=jnp.int32)
        offset, place_in_chunk = lax.rem(row, tokens), lax.div(row, tokens)
        token, member = first + offset, chunk * together + place_in_chunk
        real = (offset < count) & (member < group) & (place_in_chunk < together)
        place = (token[:, None], head * group + member[:, None], feature[None, :])
        real2 = real[:, None] & (feature < head_dim)[None, :]
        q = _compat.load(q_ref.at[place], mask=real2, other=0.0)
        # Rows of no token see position 0, like padding tokens: all stays finite.
        position = _compat.load(position_ref.at[token], mask=real, other=0)

        def turn(i: jax.Array, carry: pages.Carry) -> pages.Carry:
            at = i * bn + jnp.arange(bn, dtype=jnp.int32)
            written = pages.written_keys(at, context)
            k, v = pages.load_keys_values(
                pool_ref, table_ref, lax.div(first, tile), head, at, written
            )
            scores = dot(q, k.T) * (pages.LOG2_E / math.sqrt(head_dim))
            return pages.add_keys(carry, scores, seen_keys(at, position), v)

        start = pages.start_carry(bm, feature.shape[0])
        turns = (context + (bn - 1)) // bn
        _, total, acc = lax.fori_loop(0, turns, turn, start)
        out = (acc / total[:, None]).astype(out_ref.dtype)
        _compat.store(out_ref.at[place], out, mask=real2)
