"""Device operations in plain `jax.numpy`, written to be read rather than to be fast.

Each has the signature and the contract of its fast form; the tests of that form, here
and on other backends, compare against these. Products and sums are in float32, rounded
to the result's type once, at the end. LoRA and attention go chunk by chunk and token by
token, so nothing can leak from one to the next.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from jchameleon.lora.layout import GroupLayout
from jchameleon.pallas.multi_lora import CHUNKS_PER_ITEM, LoraWork, tile_tokens


def multi_lora_reference(
    y: jax.Array,  # f[N, T], base product of the fused projection
    x: jax.Array,  # f[d_in, T]
    pool: jax.Array,  # f[P, E]
    work: LoraWork,
    *,
    group: GroupLayout,
) -> jax.Array:  # f[N, T]
    """Return `y + B_a A_a x` per token, a being the token's adapter.

    Takes one chunk of the work list at a time and adds its product to those tokens of
    its tile that belong to the chunk's adapter.
    """
    num_tokens = x.shape[1]
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    num_projections, ranks, d_in = group.a_shape
    _, num_columns = group.b_shape

    def add_chunk(n: jax.Array, out: jax.Array) -> jax.Array:
        item, place = n // CHUNKS_PER_ITEM, n % CHUNKS_PER_ITEM
        pages = work.pages[item].reshape(CHUNKS_PER_ITEM, -1)[place]  # [W]
        chunk = pool[pages].reshape(-1).astype(jnp.float32)
        a = chunk[group.a_offset :][: num_projections * ranks * d_in]
        a = a.reshape(num_projections, ranks, d_in)
        b = chunk[group.b_offset :][: ranks * num_columns].reshape(ranks, num_columns)
        first = work.first_token[item]
        mine = (first <= token) & (token < first + tile_tokens(num_tokens))
        mine &= (work.owner[item, place] >= 0) & (
            work.owner[item, place] == work.token_adapter
        )
        for p, projection in enumerate(group.projections):
            column, size = group.columns[projection]
            row, _ = group.out_columns[projection]
            h = _dot(a[p], x)  # [8, T]
            part = _dot(b[:, column : column + size].T, h)  # [d_out, T]
            out = out.at[row : row + size].add(jnp.where(mine[None], part, 0.0))
        return out

    out = y.astype(jnp.float32)
    out = lax.fori_loop(0, work.count * CHUNKS_PER_ITEM, add_chunk, out)
    return jnp.where(work.token_adapter[None] >= 0, out.astype(y.dtype), y)


def write_kv_reference(
    pool: jax.Array,  # f[P, E]
    k: jax.Array,  # f[KVH, HD, T]
    v: jax.Array,  # f[KVH, HD, T]
    pages: jax.Array,  # i32[T], page of each token; the trash page for padding
    slots: jax.Array,  # i32[T], place of each token in its block
    *,
    block_tokens: int,
) -> jax.Array:  # f[P, E]
    """Return the pool with each token's key and value in its page.

    A page is a block [2, KVH, BT, HD], keys first.
    """
    kv_heads, head_dim, num_tokens = k.shape
    blocks = pool.reshape(-1, 2, kv_heads, block_tokens, head_dim)
    k, v = k.astype(pool.dtype), v.astype(pool.dtype)

    def write_token(t: jax.Array, blocks: jax.Array) -> jax.Array:
        blocks = blocks.at[pages[t], 0, :, slots[t], :].set(k[:, :, t])
        return blocks.at[pages[t], 1, :, slots[t], :].set(v[:, :, t])

    return lax.fori_loop(0, num_tokens, write_token, blocks).reshape(pool.shape)


def paged_attention_reference(
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

    Takes one token at a time: gathers all pages of its request, softmax over positions
    0..p, weighted sum of the values there. `context_tokens` tells a fast form where a
    tile ends; positions alone decide what a token sees.
    """
    del context_tokens
    heads, head_dim, num_tokens = q.shape
    num_tiles, max_blocks = page_table.shape
    tile = num_tokens // num_tiles
    blocks = pool.reshape(-1, 2, kv_heads, block_tokens, head_dim)
    at = jnp.arange(max_blocks * block_tokens, dtype=jnp.int32)

    def attend(t: jax.Array) -> jax.Array:
        own = blocks[page_table[t // tile]].astype(jnp.float32)
        # [2, KVH, NB * BT, HD]
        own = own.transpose(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, head_dim)
        seen = at <= positions[t]
        k = jnp.where(seen[None, :, None], own[0], 0.0)
        v = jnp.where(seen[None, :, None], own[1], 0.0)
        out = []
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            scores = _dot(k[kv_head], q[head, :, t]) / math.sqrt(head_dim)
            scores = jnp.where(seen, scores, -jnp.inf)
            weights = jnp.exp(scores - scores.max())
            out.append(_dot(weights, v[kv_head]) / weights.sum())
        return jnp.stack(out)  # [H, HD]

    out = lax.map(attend, jnp.arange(num_tokens, dtype=jnp.int32))  # [T, H, HD]
    return out.transpose(1, 2, 0).astype(q.dtype)


def _dot(left: jax.Array, right: jax.Array) -> jax.Array:
    """Return the product in f32, whatever a backend's default precision is."""
    return jnp.matmul(
        left.astype(jnp.float32),
        right.astype(jnp.float32),
        precision=lax.Precision.HIGHEST,
    )
