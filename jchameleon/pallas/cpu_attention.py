"""Paged attention on CPU as one compiled loop over pages: nothing is gathered.

Same contract as `paged_attention`, in float32. The work is cut into units of one query
tile and one KV head. Wide tiles go to `cpu_prefill_attention`. The few queries of a
decode row are served here: a unit takes 32 tokens of context at a time, computes scores
as dot products straight from the pages and folds them into a running softmax; a query
stops at its own position.
"""

import math

import jax
import jax.numpy as jnp
import numba
import numpy as np

from jchameleon.pallas import cpu_ffi, cpu_prefill_attention, cpu_softmax
from jchameleon.pallas.cpu_prefill_attention import QUERIES
from jchameleon.pallas.cpu_softmax import SEGMENT

TARGET = "jchameleon_paged_attention"

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)

_jit = numba.njit(fastmath=cpu_ffi.FAST_MATH, error_model="numpy")


def paged_attention_cpu(
    q: jax.Array,  # f32[H, HD, T]
    pool: jax.Array,  # f32[P, E]
    page_table: jax.Array,  # i32[NT, NB], pages of each tile's request; 0 pads
    positions: jax.Array,  # i32[T]
    context_tokens: jax.Array,  # i32[NT], last position of the tile + 1
    *,
    kv_heads: int,
    block_tokens: int,
) -> jax.Array:  # f32[H, HD, T]
    """Return causal attention of each token over its own request's pages."""
    heads, head_dim, num_tokens = q.shape
    num_tiles = page_table.shape[0]
    tile, group = num_tokens // num_tiles, heads // kv_heads
    shape = np.array([kv_heads, block_tokens], np.int32)
    others = (pool, page_table, positions, context_tokens, shape)
    if tile % QUERIES == 0:
        return _attend_tiles(q, others, num_tiles=num_tiles, kv_heads=kv_heads)
    q = (q * np.float32(1.0 / math.sqrt(head_dim))).transpose(2, 0, 1)  # [T, H, HD]
    parts = []
    for first, count in cpu_ffi.parts(num_tiles * kv_heads):
        part = jax.ShapeDtypeStruct((count, tile, group, head_dim), jnp.float32)
        parts.append(jax.ffi.ffi_call(TARGET, part)(q, *others, np.int32(first)))
    out = jnp.concatenate(parts).reshape(num_tiles, kv_heads, tile, group, head_dim)
    return out.transpose(1, 3, 4, 0, 2).reshape(heads, head_dim, num_tokens)


def _attend_tiles(
    q: jax.Array,  # f32[H, HD, T]
    others: tuple[jax.Array | np.ndarray, ...],
    *,
    num_tiles: int,
    kv_heads: int,
) -> jax.Array:  # f32[H, HD, T]
    heads, head_dim, num_tokens = q.shape
    tile, group = num_tokens // num_tiles, heads // kv_heads
    rows = []
    # Calls of one head and few tiles, or of all tiles and some heads, so that what
    # they return is put together without a transposition.
    for head, heads_here in cpu_ffi.parts(kv_heads):
        parts = []
        for first, count in cpu_ffi.parts(num_tiles, -(-cpu_ffi.PARTS // kv_heads)):
            part = (heads_here, group, head_dim, count * tile)
            call = jax.ffi.ffi_call(
                cpu_prefill_attention.TARGET, jax.ShapeDtypeStruct(part, jnp.float32)
            )
            parts.append(call(q, *others, np.array([head, first * tile], np.int32)))
        rows.append(jnp.concatenate(parts, axis=3))
    return jnp.concatenate(rows).reshape(heads, head_dim, num_tokens)


def handle(frame: int) -> int:
    """Unpack XLA's call; see `paged_attention_cpu` for the arguments."""
    if cpu_ffi.answers_query(frame):
        return 0
    shape = cpu_ffi.i32_pointer(cpu_ffi.argument(frame, 5))
    _attend_units(
        cpu_ffi.f32_pointer(cpu_ffi.result(frame, 0)),
        cpu_ffi.f32_pointer(cpu_ffi.argument(frame, 0)),
        cpu_ffi.f32_pointer(cpu_ffi.argument(frame, 1)),
        cpu_ffi.i32_pointer(cpu_ffi.argument(frame, 2)),
        cpu_ffi.i32_pointer(cpu_ffi.argument(frame, 3)),
        cpu_ffi.i32_pointer(cpu_ffi.argument(frame, 4)),
        np.int64(cpu_ffi.i32_pointer(cpu_ffi.argument(frame, 6))[0]),
        cpu_ffi.result_dim(frame, 0, 0),
        cpu_ffi.result_dim(frame, 0, 1),
        cpu_ffi.result_dim(frame, 0, 2),
        cpu_ffi.result_dim(frame, 0, 3),
        cpu_ffi.argument_dim(frame, 1, 1),
        cpu_ffi.argument_dim(frame, 2, 1),
        np.int64(shape[0]),
        np.int64(shape[1]),
    )
    return 0


@_jit
def _attend_units(
    out,  # f32[count, TQ, G, HD]
    q,  # f32[T, H, HD], scaled
    pool,  # f32[P, E]
    table,  # i32[NT, NB]
    positions,  # i32[T]
    context,  # i32[NT]
    first,
    count,
    tile,
    group,
    head_dim,
    page_elems,
    max_blocks,
    kv_heads,
    block_tokens,
):
    queries = tile * group
    head_elems = block_tokens * head_dim
    scores = np.zeros(SEGMENT, np.float32)
    best = np.empty(queries, np.float32)
    total = np.empty(queries, np.float32)
    for unit in range(first, first + count):
        n, kv = unit // kv_heads, unit % kv_heads
        o = (unit - first) * queries * head_dim
        for d in range(queries * head_dim):
            out[o + d] = _ZERO
        best[:] = cpu_softmax.FIRST
        total[:] = _ZERO
        pages = n * max_blocks
        key_offset = kv * head_elems
        value_offset = (kv_heads + kv) * head_elems
        for start in range(0, context[n], SEGMENT):
            size = min(SEGMENT, context[n] - start)
            for i in range(queries):
                token = n * tile + i // group
                seen = min(size, positions[token] + 1 - start)
                if seen <= 0:
                    continue
                x = ((token * kv_heads + kv) * group + i % group) * head_dim
                _set_scores(
                    scores,
                    start,
                    seen,
                    q,
                    x,
                    pool,
                    table,
                    pages,
                    page_elems,
                    key_offset,
                    block_tokens,
                    head_dim,
                )
                here = o + i * head_dim
                keep = cpu_softmax.weigh(scores, 0, seen, best, total, i)
                if start:
                    for d in range(head_dim):
                        out[here + d] *= keep
                _add_values(
                    out,
                    here,
                    scores,
                    start,
                    seen,
                    pool,
                    table,
                    pages,
                    page_elems,
                    value_offset,
                    block_tokens,
                    head_dim,
                )
        for i in range(queries):
            share = _ONE / total[i]
            for d in range(head_dim):
                out[o + i * head_dim + d] *= share


@_jit
def _slot(at, table, pages, page_elems, offset, block_tokens, head_dim):
    """Return where a head's key (or value, by `offset`) of position `at` begins."""
    page = np.int64(table[pages + at // block_tokens])
    return page * page_elems + offset + at % block_tokens * head_dim


@_jit
def _set_scores(
    scores,
    start,
    seen,
    q,
    x,
    pool,
    table,
    pages,
    page_elems,
    offset,
    block_tokens,
    head_dim,
):
    """Set the scores of the tokens that are seen, straight from their pages."""
    for s in range(seen):
        k = _slot(start + s, table, pages, page_elems, offset, block_tokens, head_dim)
        dot = _ZERO
        for d in range(head_dim):
            dot += q[x + d] * pool[k + d]
        scores[s] = dot


@_jit
def _add_values(
    out,
    o,
    scores,
    start,
    seen,
    pool,
    table,
    pages,
    page_elems,
    offset,
    block_tokens,
    head_dim,
):
    """Add the values of the tokens that are seen by their weights, four at a time."""
    s = 0
    while s < seen:
        at = start + s
        v = _slot(at, table, pages, page_elems, offset, block_tokens, head_dim)
        count = min(block_tokens - at % block_tokens, seen - s)
        whole = count - count % 4
        for j in range(0, whole, 4):
            w0, w1 = scores[s + j], scores[s + j + 1]
            w2, w3 = scores[s + j + 2], scores[s + j + 3]
            v0 = v + j * head_dim
            v1, v2, v3 = v0 + head_dim, v0 + 2 * head_dim, v0 + 3 * head_dim
            for d in range(head_dim):
                out[o + d] += (
                    w0 * pool[v0 + d]
                    + w1 * pool[v1 + d]
                    + w2 * pool[v2 + d]
                    + w3 * pool[v3 + d]
                )
        for j in range(whole, count):
            w = scores[s + j]
            for d in range(head_dim):
                out[o + d] += w * pool[v + j * head_dim + d]
        s += count
