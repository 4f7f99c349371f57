"""Paged attention on CPU as one compiled loop over pages: nothing is gathered.

Same contract as `paged_attention`, in float32. The work is cut into units of one query
tile and one KV head. A unit takes 32 tokens of context at a time, computes scores and
folds them into a running softmax (Milakov and Gimelshein, 2018); a query stops at its
own position. The keys of a wide tile are transposed first, so that both products are
sums of scaled rows, which vectorise; the few queries of a decode row take dot products.
"""

import math

import jax
import jax.numpy as jnp
import numba
import numpy as np

from jchameleon.pallas import cpu_ffi

TARGET = "jchameleon_paged_attention"

SEGMENT = 32
"""Context tokens between two updates of the running softmax."""

_FEW = 8
"""Queries of a unit up to which dot products beat transposing the keys."""

_FIRST = np.float32(-1e30)
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
    q = (q * np.float32(1.0 / math.sqrt(head_dim))).transpose(2, 0, 1)  # [T, H, HD]
    shape = np.array([kv_heads, block_tokens], np.int32)
    parts = []
    for first, count in cpu_ffi.parts(num_tiles * kv_heads):
        part = jax.ShapeDtypeStruct((count, tile, group, head_dim), jnp.float32)
        call = jax.ffi.ffi_call(TARGET, part)
        start = np.int32(first)
        parts.append(call(q, pool, page_table, positions, context_tokens, shape, start))
    out = jnp.concatenate(parts).reshape(num_tiles, kv_heads, tile, group, head_dim)
    return out.transpose(1, 3, 4, 0, 2).reshape(heads, head_dim, num_tokens)


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
    wide = queries > _FEW
    head_elems = block_tokens * head_dim
    scores = np.empty(SEGMENT, np.float32)
    keys = np.empty(head_dim * SEGMENT if wide else 1, np.float32)
    best = np.empty(queries, np.float32)
    total = np.empty(queries, np.float32)
    for unit in range(first, first + count):
        n, kv = unit // kv_heads, unit % kv_heads
        o = (unit - first) * queries * head_dim
        for d in range(queries * head_dim):
            out[o + d] = _ZERO
        best[:] = _FIRST
        total[:] = _ZERO
        pages = n * max_blocks
        key_offset = kv * head_elems
        value_offset = (kv_heads + kv) * head_elems
        for start in range(0, context[n], SEGMENT):
            size = min(SEGMENT, context[n] - start)
            if wide:
                _transpose_keys(
                    keys,
                    start,
                    size,
                    pool,
                    table,
                    pages,
                    page_elems,
                    key_offset,
                    block_tokens,
                    head_dim,
                )
            for i in range(queries):
                token = n * tile + i // group
                seen = min(size, positions[token] + 1 - start)
                if seen <= 0:
                    continue
                x = ((token * kv_heads + kv) * group + i % group) * head_dim
                if wide:
                    _wide_scores(scores, q, x, keys, head_dim)
                else:
                    _few_scores(
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
                keep = _weigh(scores, seen, best, total, i)
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
def _transpose_keys(
    keys,  # f32[HD, SEGMENT]
    start,
    size,
    pool,
    table,
    pages,
    page_elems,
    offset,
    block_tokens,
    head_dim,
):
    """Copy the keys of a segment; columns beyond `size` become 0."""
    for s in range(size):
        k = _slot(start + s, table, pages, page_elems, offset, block_tokens, head_dim)
        for d in range(head_dim):
            keys[d * SEGMENT + s] = pool[k + d]
    for s in range(size, SEGMENT):
        for d in range(head_dim):
            keys[d * SEGMENT + s] = _ZERO


@_jit
def _wide_scores(scores, q, x, keys, head_dim):
    """Set all scores of a segment, eight features of the query at a time."""
    for s in range(SEGMENT):
        scores[s] = _ZERO
    whole = head_dim - head_dim % 8
    for d in range(0, whole, 8):
        a0, a1, a2, a3 = q[x + d], q[x + d + 1], q[x + d + 2], q[x + d + 3]
        a4, a5, a6, a7 = q[x + d + 4], q[x + d + 5], q[x + d + 6], q[x + d + 7]
        k = d * SEGMENT
        for s in range(SEGMENT):
            scores[s] += (
                a0 * keys[k + s]
                + a1 * keys[k + SEGMENT + s]
                + a2 * keys[k + 2 * SEGMENT + s]
                + a3 * keys[k + 3 * SEGMENT + s]
                + a4 * keys[k + 4 * SEGMENT + s]
                + a5 * keys[k + 5 * SEGMENT + s]
                + a6 * keys[k + 6 * SEGMENT + s]
                + a7 * keys[k + 7 * SEGMENT + s]
            )
    for d in range(whole, head_dim):
        a = q[x + d]
        for s in range(SEGMENT):
            scores[s] += a * keys[d * SEGMENT + s]


@_jit
def _few_scores(
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
def _weigh(scores, seen, best, total, i):
    """Turn scores into weights and return what earlier sums are to be scaled by.

    A score that is not finite makes the total, and so the output, not finite.
    """
    most = max(best[i], _largest(scores, seen))
    keep = _exp(best[i] - most)
    weight = _ZERO
    for s in range(seen):
        w = _exp(scores[s] - most)
        scores[s] = w
        weight += w
    best[i] = most
    total[i] = total[i] * keep + weight
    return keep


@numba.njit(fastmath=True, error_model="numpy")
def _largest(scores, seen):
    """Return the largest score; where one is NaN, any number."""
    most = _FIRST
    for s in range(seen):
        most = max(most, scores[s])
    return most


@_jit
def _exp(x):
    """Return e**x for x <= 0 to 2e-7 of it (0 below -87), as Cephes' expf does.

    x = n log 2 + r: a polynomial in r, and n goes into the exponent's bits.
    """
    x = np.float32(-87.0) if x < np.float32(-87.0) else x
    n = np.float32(math.floor(x * np.float32(1.44269504) + np.float32(0.5)))
    r = x - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + _ONE
    return p * cpu_ffi.float_from_bits((np.int32(n) + np.int32(127)) << np.int32(23))


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
