"""Attention of wide query tiles on CPU: tiles of products in registers.

Tokens are the lanes of a vector, as in the layer's own arrays: scores are
f32[keys, tokens], and the softmax's sums run along a vector's own lanes. A unit is one
query tile and one KV head. Keys and values are copied 32 at a time, for all heads that
share them, with zeros in the places of what is not there. Scores and sums of values are
products of whole tiles (`cpu_tiles`), folded into a running softmax (Milakov and
Gimelshein, 2018).
"""

import math

import numba
import numpy as np

from jchameleon.pallas import cpu_ffi, cpu_softmax
from jchameleon.pallas.cpu_softmax import SEGMENT
from jchameleon.pallas.cpu_tiles import ROWS, WIDTH, product, round_up

TARGET = "jchameleon_prefill_attention"

QUERIES = 32
"""Tokens of a query tile that are taken side by side; a multiple of `WIDTH`."""

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)

_jit = numba.njit(fastmath=cpu_ffi.FAST_MATH, error_model="numpy")
_round_up = _jit(round_up)


def handle(frame: int) -> int:
    """Unpack XLA's call; see `paged_attention_cpu` for the arguments."""
    if cpu_ffi.answers_query(frame):
        return 0
    shape = cpu_ffi.i32_pointer(cpu_ffi.argument(frame, 5))
    first = cpu_ffi.i32_pointer(cpu_ffi.argument(frame, 6))
    _attend_tiles(
        cpu_ffi.f32_pointer(cpu_ffi.result(frame, 0)),
        cpu_ffi.f32_pointer(cpu_ffi.argument(frame, 0)),
        cpu_ffi.f32_pointer(cpu_ffi.argument(frame, 1)),
        cpu_ffi.i32_pointer(cpu_ffi.argument(frame, 2)),
        cpu_ffi.i32_pointer(cpu_ffi.argument(frame, 3)),
        cpu_ffi.i32_pointer(cpu_ffi.argument(frame, 4)),
        np.int64(first[0]),
        np.int64(first[1]),
        cpu_ffi.result_dim(frame, 0, 0),
        cpu_ffi.result_dim(frame, 0, 1),
        cpu_ffi.result_dim(frame, 0, 2),
        cpu_ffi.result_dim(frame, 0, 3),
        cpu_ffi.argument_dim(frame, 0, 2),
        cpu_ffi.argument_dim(frame, 1, 1),
        cpu_ffi.argument_dim(frame, 2, 0),
        cpu_ffi.argument_dim(frame, 2, 1),
        np.int64(shape[0]),
        np.int64(shape[1]),
    )
    return 0


@_jit
def _attend_tiles(
    out,  # f32[heads_here, G, HD, tokens_here]
    q,  # f32[H, HD, T]
    pool,  # f32[P, E]
    table,  # i32[NT, NB]
    positions,  # i32[T]
    context,  # i32[NT]
    first_head,  # of the KV heads
    first_token,
    heads_here,
    group,
    head_dim,
    tokens_here,
    num_tokens,
    page_elems,
    num_tiles,
    max_blocks,
    kv_heads,
    block_tokens,
):
    tile = num_tokens // num_tiles
    width = _round_up(head_dim, ROWS)
    head_elems = block_tokens * head_dim
    queries = np.empty(group * head_dim * QUERIES, np.float32)
    sums = np.empty(group * width * QUERIES, np.float32)
    best = np.empty(group * QUERIES, np.float32)
    total = np.empty(group * QUERIES, np.float32)
    keys = np.zeros(SEGMENT * head_dim, np.float32)
    values = np.zeros(SEGMENT * width, np.float32)
    scores = np.empty(SEGMENT * QUERIES, np.float32)
    most = np.empty(QUERIES, np.float32)
    scale = _ONE / np.float32(math.sqrt(np.float32(head_dim)))
    for head in range(heads_here):
        kv = first_head + head
        for begin in range(0, tokens_here, QUERIES):
            token = first_token + begin
            n = token // tile
            _take_queries(
                cpu_ffi.data(queries),
                group * head_dim,
                scale,
                q,
                kv * group * head_dim * num_tokens + token,
                num_tokens,
            )
            sums[:] = _ZERO
            best[:] = cpu_softmax.FIRST
            total[:] = _ZERO
            for start in range(0, context[n], SEGMENT):
                size = min(SEGMENT, context[n] - start)
                _take_segment(
                    cpu_ffi.data(keys),
                    cpu_ffi.data(values),
                    width,
                    start,
                    size,
                    pool,
                    table,
                    n * max_blocks,
                    page_elems,
                    kv * head_elems,
                    (kv_heads + kv) * head_elems,
                    block_tokens,
                    head_dim,
                )
                for g in range(group):
                    _add_segment(
                        cpu_ffi.data(sums),
                        cpu_ffi.data(best),
                        cpu_ffi.data(total),
                        g,
                        cpu_ffi.data(most),
                        cpu_ffi.data(scores),
                        cpu_ffi.data(queries),
                        cpu_ffi.data(keys),
                        cpu_ffi.data(values),
                        width,
                        positions,
                        token,
                        start,
                        size,
                        head_dim,
                    )
            for g in range(group):
                _give_sums(
                    out,
                    (head * group + g) * head_dim * tokens_here + begin,
                    tokens_here,
                    cpu_ffi.data(sums),
                    g * width * QUERIES,
                    cpu_ffi.data(total),
                    g * QUERIES,
                    head_dim,
                )


@_jit
def _take_queries(queries, rows, scale, q, x, num_tokens):
    for row in range(rows):
        for t in range(QUERIES):
            queries[row * QUERIES + t] = q[x + row * num_tokens + t] * scale


@_jit
def _give_sums(out, o, tokens_here, sums, i, total, at, head_dim):
    for t in range(QUERIES):
        total[at + t] = _ONE / total[at + t]
    for d in range(head_dim):
        for t in range(QUERIES):
            out[o + d * tokens_here + t] = sums[i + d * QUERIES + t] * total[at + t]


@_jit
def _take_segment(
    keys,  # f32[SEGMENT, HD]
    values,  # f32[SEGMENT, width]
    width,
    start,
    size,
    pool,
    table,
    pages,
    page_elems,
    key_offset,
    value_offset,
    block_tokens,
    head_dim,
):
    """Copy keys and values of a segment; what is not there becomes 0."""
    for s in range(size):
        at = start + s
        page = np.int64(table[pages + at // block_tokens]) * page_elems
        place = page + at % block_tokens * head_dim
        for d in range(head_dim):
            keys[s * head_dim + d] = pool[place + key_offset + d]
        for d in range(head_dim):
            values[s * width + d] = pool[place + value_offset + d]
    for n in range(size * head_dim, SEGMENT * head_dim):
        keys[n] = _ZERO
    for n in range(size * width, SEGMENT * width):
        values[n] = _ZERO


@_jit
def _add_segment(
    sums,  # f32[G, width, QUERIES]
    best,  # f32[G, QUERIES]
    total,  # f32[G, QUERIES]
    g,
    most,  # f32[QUERIES]
    scores,  # f32[SEGMENT, QUERIES]
    queries,  # f32[G, HD, QUERIES]
    keys,
    values,
    width,
    positions,
    token,
    start,
    size,
    head_dim,
):
    """Fold a segment into the running softmax of one head's queries."""
    x = g * head_dim * QUERIES
    for s in range(0, SEGMENT, ROWS):
        for t in range(0, QUERIES, WIDTH):
            product(
                scores,
                s * QUERIES + t,
                QUERIES,
                keys,
                s * head_dim,
                head_dim,
                1,
                queries,
                x + t,
                QUERIES,
                head_dim,
                1,
            )
    _weigh_tile(scores, most, best, total, g * QUERIES, positions, token, start, size)
    if start > 0:
        for d in range(width):
            o = (g * width + d) * QUERIES
            for t in range(QUERIES):
                sums[o + t] *= most[t]
    for d in range(0, width, ROWS):
        for t in range(0, QUERIES, WIDTH):
            product(
                sums,
                (g * width + d) * QUERIES + t,
                QUERIES,
                values,
                d,
                1,
                width,
                scores,
                t,
                QUERIES,
                size,
                0,
            )


@_jit
def _weigh_tile(scores, most, best, total, at, positions, token, start, size):
    """Turn scores into weights, and `most` into what earlier sums are scaled by.

    Weights of what is not seen are 0. A score that is not finite makes the total, and
    so the output, not finite.
    """
    last = positions[token]
    for t in range(QUERIES):
        last = min(last, positions[token + t])
        most[t] = best[at + t]
    if last < start + size - 1:
        for s in range(size):
            for t in range(QUERIES):
                n = s * QUERIES + t
                hidden = positions[token + t] < start + s
                scores[n] = cpu_softmax.FIRST if hidden else scores[n]
    for s in range(size):
        for t in range(QUERIES):
            most[t] = max(most[t], scores[s * QUERIES + t])
    for s in range(size):
        for t in range(QUERIES):
            n = s * QUERIES + t
            scores[n] = cpu_softmax.exp(scores[n] - most[t])
    for t in range(QUERIES):
        keep = cpu_softmax.exp(best[at + t] - most[t])
        best[at + t] = most[t]
        total[at + t] *= keep
        most[t] = keep
    for s in range(size):
        for t in range(QUERIES):
            total[at + t] += scores[s * QUERIES + t]
