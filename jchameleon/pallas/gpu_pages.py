"""What the attention kernels for GPUs share: tiles of pages and the online softmax.

In a kernel the pool is `f[P, 2 KVH, BT, HD]`: keys of KV head n in row n of a page,
values in row KVH + n. A tile of keys or values is addressed token by token, so its
tokens may come from any number of pages; head dimensions that are no power of two are
filled up with zeros by masked loads.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jchameleon.pallas import _compat
from jchameleon.pallas.gpu_device import dot

HEAD_DIMS = range(16, 257, 8)
"""Supported head dimensions; 8 elements of bfloat16 are one 16-byte copy."""

DTYPES = ("bfloat16", "float32")

LOG2_E = math.log2(math.e)

Carry = tuple[jax.Array, jax.Array, jax.Array]
"""(greatest score f32[M], sum of weights f32[M], weighted values f32[M, HD])."""


def power_of_two(n: int) -> int:
    """Return the least power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def check_pool(
    pool: jax.Array, kv_heads: int, block_tokens: int, head_dim: int
) -> None:
    """Raise ValueError unless the kernels serve pages of this kind."""
    if pool.dtype.name not in DTYPES:
        raise ValueError(f"pool dtype={pool.dtype.name} must be one of {DTYPES}")
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"{head_dim=} must be a multiple of 8 from 16 to 256")
    page_elems = 2 * kv_heads * block_tokens * head_dim
    if pool.ndim != 2 or pool.shape[1] != page_elems:
        raise ValueError(
            f"pool shape {pool.shape} must be [P, {page_elems}] for {kv_heads=}, "
            f"{block_tokens=}, {head_dim=}"
        )


def check_integers(**arrays: jax.Array) -> None:
    """Raise ValueError unless all arrays are int32."""
    for name, array in arrays.items():
        if array.dtype != np.int32:
            raise ValueError(f"{name} dtype={array.dtype.name} must be int32")


def as_rows(pool: jax.Array, kv_heads: int, block_tokens: int) -> jax.Array:
    """Return the pool f[P, E] as the kernels see it, f[P, 2 KVH, BT, HD]: no copy."""
    return pool.reshape(pool.shape[0], 2 * kv_heads, block_tokens, -1)


def key_row(head: jax.Array, kv_heads: int) -> jax.Array:
    """Return the row of a page with a head's keys."""
    del kv_heads
    return head


def value_row(head: jax.Array, kv_heads: int) -> jax.Array:
    """Return the row of a page with a head's values."""
    return head + kv_heads


def token_pages(
    table_ref,  # i32[NT, NB]
    tile: jax.Array,  # i32
    at: jax.Array,  # i32[S], positions
    written: jax.Array,  # bool[S]
    block_tokens: int,
) -> jax.Array:  # i32[S]
    """Return the page of each position; of unwritten ones the null page."""
    return _compat.load(
        table_ref.at[tile, lax.div(at, block_tokens)], mask=written, other=0
    )


def written_keys(at: jax.Array, context: jax.Array) -> jax.Array:
    """Return which positions hold a key: others may hold NaN, and 0 * NaN is NaN."""
    return at < context


def load_rows(
    pool_ref,  # f[P, 2 KVH, BT, HD]
    pages: jax.Array,  # i32[S]
    row: jax.Array,  # i32
    slots: jax.Array,  # i32[S]
    written: jax.Array,  # bool[S]
) -> jax.Array:  # f[S, HD as a power of two]
    """Return one head's keys, or values, of S tokens; zeros where none is written."""
    head_dim = pool_ref.shape[3]
    feature = jnp.arange(power_of_two(head_dim), dtype=jnp.int32)
    mask = written[:, None]
    if feature.shape[0] != head_dim:
        mask = mask & (feature < head_dim)[None, :]
    mask = jnp.broadcast_to(mask, (slots.shape[0], feature.shape[0]))
    place = pool_ref.at[pages[:, None], row, slots[:, None], feature[None, :]]
    return _compat.load(place, mask=mask, other=0.0)


def load_keys_values(
    pool_ref,  # f[P, 2 KVH, BT, HD]
    table_ref,  # i32[NT, NB]
    tile: jax.Array,  # i32
    head: jax.Array,  # i32, KV head
    at: jax.Array,  # i32[S], positions
    written: jax.Array,  # bool[S]
) -> tuple[jax.Array, jax.Array]:  # f[S, HD as a power of two] each
    """Return keys and values of one head at S positions of a tile's request."""
    kv_heads, block_tokens = pool_ref.shape[1] // 2, pool_ref.shape[2]
    page = token_pages(table_ref, tile, at, written, block_tokens)
    slots = lax.rem(at, block_tokens)
    k = load_rows(pool_ref, page, key_row(head, kv_heads), slots, written)
    v = load_rows(pool_ref, page, value_row(head, kv_heads), slots, written)
    return k, v


def start_carry(rows: int, features: int) -> Carry:
    """Return the softmax of nothing; finite: every row sees a key in its first turn."""
    return (
        jnp.full((rows,), -1e30, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows, features), jnp.float32),
    )


def add_keys(
    carry: Carry,
    scores: jax.Array,  # f32[M, S], in units of log2
    seen: jax.Array,  # bool[M, S] or [1, S]
    v: jax.Array,  # f[S, HD]
) -> Carry:
    """Return the softmax with S more keys (Milakov and Gimelshein, 2018), in base 2."""
    best, total, acc = carry
    scores = jnp.where(seen, scores, -jnp.inf)
    new_best = jnp.maximum(best, scores.max(axis=1))
    weights = jnp.exp2(scores - new_best[:, None])
    keep = jnp.exp2(best - new_best)
    total = total * keep + weights.sum(axis=1)
    acc = acc * keep[:, None] + dot(weights.astype(v.dtype), v)
    return new_best, total, acc
