"""Add each token's LoRA product to a fused base projection, adapters out of the pool.

A step's adapters are cut into rank-8 chunks (`lora/layout.py`), chunks into work items
of `CHUNKS_PER_ITEM`, and each item belongs to one tile of `TOKENS_PER_TILE` tokens. The
loop over items has a traced trip count, so one compiled program serves every mix of
adapters and ranks, a step of base rows runs no item at all, and the cost of a tile is
proportional to the sum of the true ranks of the adapters in it.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jchameleon.lora.layout import GroupLayout

CHUNKS_PER_ITEM = 16
"""128 ranks an item: with fewer, XLA:CPU's products are mostly overhead."""

TOKENS_PER_TILE = 128
"""Most tokens of a tile; an adapter costs nothing in tiles it has no token in."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraWork:
    """The LoRA work of one step, the same for every layer.

    Attributes:
      count: i32[], live items; the rest of the list is not read.
      first_token: i32[NW], first token of the item's tile.
      pages: i32[NW, CG * W], pages of the item's chunks; 0 (the null page) pads.
      owner: i32[NW, CG], adapter index of each chunk; -1 pads.
      token_adapter: i32[T], adapter index of each token; -1 for the base model.
    """

    count: jax.Array
    first_token: jax.Array
    pages: jax.Array
    owner: jax.Array
    token_adapter: jax.Array


def tile_tokens(num_tokens: int) -> int:
    """Return the tokens of a tile: they divide the step's tokens."""
    if num_tokens <= TOKENS_PER_TILE:
        return num_tokens
    return math.gcd(num_tokens, TOKENS_PER_TILE)


def max_work_items(num_tokens: int, query_tile: int, max_chunks: int) -> int:
    """Return NW, the items that the most demanding batch of this shape needs.

    Args:
      num_tokens: tokens of the step.
      query_tile: tokens that belong to one request for certain (1 in decode).
      max_chunks: chunks of the largest adapter allowed.
    """
    tile = tile_tokens(num_tokens)
    adapters_per_tile = max(1, tile // query_tile)
    items_per_tile = -(-adapters_per_tile * max_chunks // CHUNKS_PER_ITEM)
    return (num_tokens // tile) * items_per_tile


def build_lora_work(
    token_adapter: np.ndarray,  # i32[T]
    adapter_pages: Sequence[np.ndarray],  # per adapter index, i32[chunks, W]
    *,
    num_items: int,
    pages_per_chunk: int,
) -> dict[str, Any]:
    """Return the fields of a `LoraWork` as numpy arrays.

    Raises:
      ValueError: the batch needs more than `num_items` items.
    """
    (num_tokens,) = token_adapter.shape
    tile = tile_tokens(num_tokens)
    first_token = np.zeros(num_items, np.int32)
    pages = np.zeros((num_items, CHUNKS_PER_ITEM * pages_per_chunk), np.int32)
    owner = np.full((num_items, CHUNKS_PER_ITEM), -1, np.int32)
    count = 0
    for start in range(0, num_tokens, tile) if adapter_pages else ():
        present = np.unique(token_adapter[start : start + tile])
        present = present[present >= 0]
        if not present.size:
            continue
        chunks = np.concatenate([adapter_pages[i] for i in present])
        owners = np.repeat(present, [len(adapter_pages[i]) for i in present])
        for at in range(0, len(chunks), CHUNKS_PER_ITEM):
            if count == num_items:
                raise ValueError(f"LoRA work exceeds {num_items=}")
            piece = chunks[at : at + CHUNKS_PER_ITEM]
            first_token[count] = start
            pages[count, : piece.size] = piece.ravel()
            owner[count, : len(piece)] = owners[at : at + len(piece)]
            count += 1
    return {
        "count": np.int32(count),
        "first_token": first_token,
        "pages": pages,
        "owner": owner,
        "token_adapter": token_adapter,
    }


def multi_lora(
    y: jax.Array,  # f[N, T], base product of the fused projection
    x: jax.Array,  # f[d_in, T]
    pool: jax.Array,  # f[P, E]
    work: LoraWork,
    *,
    group: GroupLayout,
) -> jax.Array:  # f[N, T]
    """Return `y + B_a A_a x` per token, a being the token's adapter."""
    num_tokens = x.shape[1]
    tile = tile_tokens(num_tokens)

    def add_item(i: jax.Array, delta: jax.Array) -> jax.Array:
        chunks = pool.at[work.pages[i]].get(mode="promise_in_bounds")
        first = work.first_token[i]
        x_tile = lax.dynamic_slice_in_dim(x, first, tile, axis=1)
        adapter = lax.dynamic_slice_in_dim(work.token_adapter, first, tile)
        mine = work.owner[i][:, None] == adapter[None, :]  # [CG, tile]
        part = item_delta(x_tile, chunks.reshape(CHUNKS_PER_ITEM, -1), mine, group)
        part += lax.dynamic_slice_in_dim(delta, first, tile, axis=0)
        return lax.dynamic_update_slice_in_dim(delta, part, first, axis=0)

    # Token-major here: XLA:CPU is 2x slower when it contracts B's leading axis.
    delta = jnp.zeros((num_tokens, group.b_shape[1]), y.dtype)
    delta = lax.fori_loop(0, work.count, add_item, delta)
    for projection in group.projections:
        start, size = group.columns[projection]
        out = group.out_columns[projection][0]
        y = y.at[out : out + size].add(delta[:, start : start + size].T)
    return y


def item_delta(
    x: jax.Array,  # f[d_in, tile]
    chunks: jax.Array,  # f[CG, W * E]
    mine: jax.Array,  # bool[CG, tile], chunk belongs to the token's adapter
    group: GroupLayout,
) -> jax.Array:  # f[tile, sum(d_out)]
    """Return the product of one work item, columns as in the group's B."""
    num_projections, ranks, d_in = group.a_shape
    _, num_columns = group.b_shape
    a = lax.slice_in_dim(
        chunks, group.a_offset, group.a_offset + num_projections * ranks * d_in, axis=1
    ).reshape(CHUNKS_PER_ITEM * num_projections * ranks, d_in)
    b = lax.slice_in_dim(
        chunks, group.b_offset, group.b_offset + ranks * num_columns, axis=1
    ).reshape(CHUNKS_PER_ITEM * ranks, num_columns)
    h = (a @ x).reshape(CHUNKS_PER_ITEM, num_projections, ranks, -1)
    # A where, not a product: another adapter's overflow must not become NaN here.
    h = jnp.where(mine[:, None, None, :], h, jnp.zeros((), h.dtype))
    parts = []
    for p, projection in enumerate(group.projections):
        start, size = group.columns[projection]
        # The barrier keeps XLA from folding the transpose back into the product.
        h_p = lax.optimization_barrier(h[:, p].reshape(-1, h.shape[-1]).T)
        parts.append(h_p @ b[:, start : start + size])
    return jnp.concatenate(parts, axis=1)
