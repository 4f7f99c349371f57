"""Paged attention on NVIDIA GPUs: the entry, and the decode kernel.

Decode is bound by reading the context, so it is split over the context as well
(flash-decoding): program (row, KV head, split) attends over one piece of the row's
context for all query heads of the KV head, and a second launch merges the pieces. A
program reads `2 * HD` elements for each token of its piece, once; programs beyond a
row's context end at once.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jchameleon.pallas import _compat
from jchameleon.pallas import gpu_pages as pages
from jchameleon.pallas.gpu_device import (
    MIN_CONTRACTION,
    MIN_ROWS,
    check_launch,
    dot,
    multiprocessors,
)
from jchameleon.pallas.gpu_prefill_attention import PrefillConfig, attend_tiles
from jchameleon.pallas.tuned import UNTUNED, Key, TunedTable, make_key

MAX_SPLITS = 16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DecodeConfig:
    """How the decode kernel is compiled.

    Attributes:
      bn: context tokens of one turn of the loop, a power of two >= 16.
      splits: pieces of each context.
      num_warps, num_stages: of Triton.
    """

    bn: int
    splits: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        if self.bn < MIN_CONTRACTION or self.bn & (self.bn - 1):
            raise ValueError(f"bn={self.bn} must be a power of two >= 16")
        if self.splits < 1:
            raise ValueError(f"splits={self.splits} must be at least 1")
        check_launch(self.num_warps, self.num_stages)


def decode_config(
    rows: int,
    kv_heads: int,
    head_dim: int,
    max_context_tokens: int,
    *,
    arch: str | None,
) -> DecodeConfig:
    """Return the configuration for a decode step; not measured on hardware yet.

    Splits so far that all multiprocessors get several programs, in about two waves, but
    leaves every piece of the longest context a few turns of its loop.
    """
    bn = 32
    wanted = 7 * multiprocessors(arch)
    splits = 1
    while (
        splits < MAX_SPLITS
        and rows * kv_heads * splits < wanted
        and 4 * 2 * splits * bn <= max_context_tokens
    ):
        splits *= 2
    num_warps = 8 if head_dim > 128 else 4
    return DecodeConfig(bn=bn, splits=splits, num_warps=num_warps, num_stages=3)


def decode_key(
    rows: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    block_tokens: int,
    max_context_tokens: int,
    dtype: Any,
) -> Key:
    """Return what a table knows a decode step's attention by."""
    return make_key(
        "attention_decode",
        phase="decode",
        dtype=dtype,
        rows=rows,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_tokens=block_tokens,
        max_context_tokens=max_context_tokens,
    )


def paged_attention_gpu(
    q: jax.Array,  # f[H, HD, T]
    pool: jax.Array,  # f[P, E]
    page_table: jax.Array,  # i32[NT, NB], pages of each tile's request; 0 pads
    positions: jax.Array,  # i32[T]
    context_tokens: jax.Array,  # i32[NT], last position of the tile + 1
    *,
    kv_heads: int,
    block_tokens: int,
    interpret: bool = False,
    arch: str | None = None,
    tuned: TunedTable = UNTUNED,
    blocks: jax.Array | None = None,  # i32[NB, 3], see build_attention_blocks
    config: DecodeConfig | PrefillConfig | None = None,
) -> jax.Array:  # f[H, HD, T]
    """Return causal attention of each token over its own request's pages.

    As `paged_attention`, with one more condition: in decode (tiles of one token)
    `context_tokens` is the position plus one.

    Args:
      arch: "sm_80", "sm_86", "sm_90" or None, for the choice of a configuration.
      blocks: prefill tiles to take together; each by itself without it.
      tuned: configurations that were measured.
      config: instead of one of `tuned`, or, where it has none, the one chosen by shapes
        and `arch`.

    Raises:
      ValueError: no kernel serves these shapes, types or this configuration.
    """
    heads, head_dim, num_tokens = q.shape
    num_tiles, max_blocks = page_table.shape
    pages.check_pool(pool, kv_heads, block_tokens, head_dim)
    pages.check_integers(
        page_table=page_table, positions=positions, context_tokens=context_tokens
    )
    if heads % kv_heads:
        raise ValueError(f"{heads=} must be a multiple of {kv_heads=}")
    tile = num_tokens // num_tiles
    if tile * num_tiles != num_tokens or tile & (tile - 1):
        raise ValueError(
            f"{num_tokens=} must be {num_tiles=} times a power of two of tokens"
        )
    if positions.shape != (num_tokens,) or context_tokens.shape != (num_tiles,):
        raise ValueError(
            f"{positions.shape=} and {context_tokens.shape=} must be ({num_tokens},) "
            f"and ({num_tiles},)"
        )
    q = q.transpose(2, 0, 1).astype(pool.dtype)  # [T, H, HD]
    rows = pages.as_rows(pool, kv_heads, block_tokens)
    if tile > 1:
        if isinstance(config, DecodeConfig):
            raise ValueError(f"{config=} is for decode, tiles have {tile} tokens")
        out = attend_tiles(
            q,
            rows,
            page_table,
            positions,
            context_tokens,
            blocks,
            config=config,
            arch=arch,
            tuned=tuned,
            interpret=interpret,
        )
        return out.transpose(1, 2, 0)
    if isinstance(config, PrefillConfig) or blocks is not None:
        raise ValueError("PrefillConfig and blocks are for tiles of several tokens")
    context = max_blocks * block_tokens
    key = decode_key(
        num_tokens,
        heads,
        kv_heads,
        head_dim,
        block_tokens=block_tokens,
        max_context_tokens=context,
        dtype=pool.dtype,
    )
    config = (
        config
        or tuned.find(key)
        or decode_config(num_tokens, kv_heads, head_dim, context, arch=arch)
    )
    out = _attend_rows(
        q, rows, page_table, context_tokens, config=config, interpret=interpret
    )
    return out.transpose(1, 2, 0)


def _attend_rows(
    q: jax.Array,  # f[B, H, HD]
    rows: jax.Array,  # f[P, 2 KVH, BT, HD]
    page_table: jax.Array,  # i32[B, NB]
    context_tokens: jax.Array,  # i32[B]
    *,
    config: DecodeConfig,
    interpret: bool,
) -> jax.Array:  # f[B, H, HD]
    num_rows, heads, head_dim = q.shape
    splits = config.splits
    kv_heads = rows.shape[1] // 2
    part = (num_rows, splits, heads)
    dtype = q.dtype if splits == 1 else jnp.float32
    out, weight = _compat.triton_call(
        _decode_kernel,
        name="paged_attention_decode",
        grid=(num_rows, kv_heads, splits),
        out_shape=(
            jax.ShapeDtypeStruct((*part, head_dim), dtype),
            jax.ShapeDtypeStruct(part, jnp.float32),
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
        splits=splits,
        bn=config.bn,
    )(q, rows, page_table, context_tokens)
    if splits == 1:
        return out[:, 0]
    return _compat.triton_call(
        _merge_kernel,
        name="paged_attention_merge",
        grid=(num_rows, heads),
        out_shape=_compat.shape_of(q),
        num_warps=1,
        num_stages=1,
        interpret=interpret,
        bn=config.bn,
    )(out, weight, context_tokens)


def split_turns(
    context: jax.Array, split: jax.Array, *, splits: int, bn: int
) -> tuple[jax.Array, jax.Array]:
    """Return the turns [first, end) of a split; first >= end when it has none.

    A turn is `bn` tokens, and every split but the last ones takes equally many.
    """
    turns = (context + (bn - 1)) // bn
    each = (turns + (splits - 1)) // splits
    first = split * each
    return first, jnp.minimum(first + each, turns)


def _decode_kernel(
    q_ref,  # f[B, H, HD]
    pool_ref,  # f[P, 2 KVH, BT, HD]
    table_ref,  # i32[B, NB]
    context_ref,  # i32[B]
    out_ref,  # f[B, splits, H, HD], softmax of the split by itself
    weight_ref,  # f32[B, splits, H], log2 of the sum of its weights
    *,
    splits: int,
    bn: int,
):
    row, head, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    heads, head_dim = q_ref.shape[1:]
    group = heads // (pool_ref.shape[1] // 2)
    context = context_ref[row]
    first, end = split_turns(context, split, splits=splits, bn=bn)

    @pl.when(first < end)
    def _():
        member = jnp.arange(max(MIN_ROWS, pages.power_of_two(group)), dtype=jnp.int32)
        feature = jnp.arange(pages.power_of_two(head_dim), dtype=jnp.int32)
        real = (member < group)[:, None] & (feature < head_dim)[None, :]
        own = head * group + member
        q = _compat.load(
            q_ref.at[row, own[:, None], feature[None, :]], mask=real, other=0.0
        )

        def turn(i: jax.Array, carry: pages.Carry) -> pages.Carry:
            at = i * bn + jnp.arange(bn, dtype=jnp.int32)
            written = pages.written_keys(at, context)
            k, v = pages.load_keys_values(pool_ref, table_ref, row, head, at, written)
            scores = dot(q, k.T) * (pages.LOG2_E / math.sqrt(head_dim))
            return pages.add_keys(carry, scores, written[None, :], v)

        start = pages.start_carry(member.shape[0], feature.shape[0])
        best, total, acc = lax.fori_loop(first, end, turn, start)
        out = (acc / total[:, None]).astype(out_ref.dtype)
        place = out_ref.at[row, split, own[:, None], feature[None, :]]
        _compat.store(place, out, mask=real)
        _compat.store(
            weight_ref.at[row, split, own], best + jnp.log2(total), mask=member < group
        )


def _merge_kernel(
    part_ref,  # f32[B, splits, H, HD]
    weight_ref,  # f32[B, splits, H]
    context_ref,  # i32[B]
    out_ref,  # f[B, H, HD]
    *,
    bn: int,
):
    """Program (row, head) merges the splits; those without a turn hold anything."""
    row, head = pl.program_id(0), pl.program_id(1)
    splits, head_dim = part_ref.shape[1], part_ref.shape[3]
    split = jnp.arange(pages.power_of_two(splits), dtype=jnp.int32)
    feature = jnp.arange(pages.power_of_two(head_dim), dtype=jnp.int32)
    first, end = split_turns(context_ref[row], split, splits=splits, bn=bn)
    live = (first < end) & (split < splits)
    weight = _compat.load(
        weight_ref.at[row, split, head], mask=live, other=-float("inf")
    )
    weight = jnp.exp2(weight - weight.max(axis=0))
    mask = live[:, None] & (feature < head_dim)[None, :]
    part = _compat.load(
        part_ref.at[row, split[:, None], head, feature[None, :]], mask=mask, other=0.0
    )
    out = (part * weight[:, None]).sum(axis=0) / weight.sum(axis=0)
    _compat.store(
        out_ref.at[row, head, feature],
        out.astype(out_ref.dtype),
        mask=feature < head_dim,
    )
