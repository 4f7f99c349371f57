"""Write keys and values into pool pages and attend over them.

One function serves decode (a query tile is one token) and packed prefill (a tile is
up to `PREFILL_TILE_TOKENS` tokens of one request): everything, the tokens of this very
step included, is read back from pages, so chunked prefill and reuse of earlier pages
are the same code. The loop over the context has a traced trip count with an online
softmax (Milakov and Gimelshein, 2018), so one program serves every context length and
reads no more than the longest context of the step.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from jchameleon.config import TRASH_PAGE

CONTEXT_TOKENS_PER_STEP = 128
"""Context tokens that one turn of the loop gathers for every tile."""


def write_kv(
    pool: jax.Array,  # f[P, E]
    k: jax.Array,  # f[KVH, HD, T]
    v: jax.Array,  # f[KVH, HD, T]
    pages: jax.Array,  # i32[T], page of each token; the trash page for padding
    slots: jax.Array,  # i32[T], place of each token in its block
    *,
    block_tokens: int,
) -> jax.Array:  # f[P, E]
    """Return the pool with each token's key and value in its page."""
    num_pages, page_elems = pool.shape
    kv_heads, head_dim, _ = k.shape
    blocks = pool.reshape(num_pages, 2, kv_heads, block_tokens, head_dim)
    kv = jnp.stack([k, v]).transpose(3, 0, 1, 2).astype(pool.dtype)  # [T, 2, KVH, HD]
    if pages.shape == (1,):
        # XLA:CPU turns a scatter of one row into a slice update that copies the pool.
        kv, slots = jnp.tile(kv, (2, 1, 1, 1)), jnp.tile(slots, 2)
        pages = jnp.concatenate([pages, jnp.full(1, TRASH_PAGE, pages.dtype)])
    # Padding tokens share one target, so the indices are not unique.
    blocks = blocks.at[pages, :, :, slots, :].set(kv, mode="promise_in_bounds")
    return blocks.reshape(num_pages, page_elems)


def paged_attention(
    q: jax.Array,  # f[H, HD, T]
    pool: jax.Array,  # f[P, E]
    page_table: jax.Array,  # i32[NT, NB], pages of each tile's request; 0 pads
    positions: jax.Array,  # i32[T]
    context_tokens: jax.Array,  # i32[NT], last position of the tile + 1
    *,
    kv_heads: int,
    block_tokens: int,
) -> jax.Array:  # f[H, HD, T]
    """Return causal attention of each token over its own request's pages.

    A token at position p sees positions 0..p. Pages that hold no token of the request
    may contain anything, NaN included.
    """
    heads, head_dim, num_tokens = q.shape
    num_tiles, max_blocks = page_table.shape
    tile = num_tokens // num_tiles
    group = heads // kv_heads
    num_pages = pool.shape[0]
    per_step = min(CONTEXT_TOKENS_PER_STEP // block_tokens or 1, max_blocks)
    step_tokens = per_step * block_tokens
    # Whole steps only: padding columns point at the null page.
    page_table = jnp.pad(page_table, ((0, 0), (0, -max_blocks % per_step)))

    # One row of this view is one head's keys, or values, of one block.
    head_blocks = pool.reshape(num_pages * 2 * kv_heads, block_tokens * head_dim)
    # [NT, KVH, G * TQ, HD]
    q = q.reshape(kv_heads, group, head_dim, num_tiles, tile)
    q = q.transpose(3, 0, 1, 4, 2).reshape(num_tiles, kv_heads, group * tile, head_dim)
    q = (q * (1.0 / math.sqrt(head_dim))).astype(pool.dtype)
    q_positions = jnp.tile(positions.reshape(num_tiles, tile), (1, group))  # [NT, G*TQ]
    head_index = jnp.arange(kv_heads, dtype=jnp.int32)

    def attend(
        i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        best, total, acc = carry
        pages = lax.dynamic_slice_in_dim(page_table, i * per_step, per_step, axis=1)
        # [NT, KVH, per_step] rows of head_blocks
        rows = pages[:, None, :] * (2 * kv_heads) + head_index[None, :, None]
        shape = (num_tiles, kv_heads, step_tokens, head_dim)
        k = head_blocks.at[rows].get(mode="promise_in_bounds").reshape(shape)
        v = head_blocks.at[rows + kv_heads].get(mode="promise_in_bounds").reshape(shape)
        at = i * step_tokens + jnp.arange(step_tokens, dtype=jnp.int32)
        # Slots past the context hold stale data: 0 * NaN would be NaN.
        written = at[None, :] < context_tokens[:, None]  # [NT, S]
        v = jnp.where(written[:, None, :, None], v, jnp.zeros((), v.dtype))
        scores = jnp.einsum("nkqd,nksd->nkqs", q, k, preferred_element_type=jnp.float32)
        seen = at[None, None, :] <= q_positions[:, :, None]  # [NT, G*TQ, S]
        scores = jnp.where(seen[:, None], scores, -jnp.inf)
        new_best = jnp.maximum(best, scores.max(axis=-1))
        weights = jnp.exp(scores - new_best[..., None])
        keep = jnp.exp(best - new_best)
        total = total * keep + weights.sum(axis=-1)
        part = jnp.einsum(
            "nkqs,nksd->nkqd",
            weights.astype(v.dtype),
            v,
            preferred_element_type=jnp.float32,
        )
        return new_best, total, acc * keep[..., None] + part

    shape = (num_tiles, kv_heads, group * tile)
    # A finite start: position 0 is always seen, so no row stays at it.
    start = (
        jnp.full(shape, -1e30, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, head_dim), jnp.float32),
    )
    steps = (context_tokens.max() + step_tokens - 1) // step_tokens
    _, total, acc = lax.fori_loop(0, steps, attend, start)
    out = (acc / total[..., None]).astype(q.dtype)
    out = out.reshape(num_tiles, kv_heads, group, tile, head_dim)
    return out.transpose(1, 2, 4, 0, 3).reshape(heads, head_dim, num_tokens)
