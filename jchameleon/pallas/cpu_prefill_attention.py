"""Attention of wide query tiles on CPU: tiles of products in registers.

A unit is one query tile and one KV head: all queries that share keys. Its queries are
scaled and copied once; 32 tokens of context at a time, so are keys (transposed) and
values, zeros in the places of what is not there. Scores, and sums of values, are then
products of whole tiles (`cpu_tiles`), folded into a running softmax (Milakov and
Gimelshein, 2018). Rows of queries that see nothing of a segment skip it.
"""

import math

import numba
import numpy as np

from jchameleon.pallas import cpu_ffi, cpu_softmax
from jchameleon.pallas.cpu_softmax import SEGMENT
from jchameleon.pallas.cpu_tiles import ROWS, WIDTH, product, round_up

TARGET = "jchameleon_prefill_attention"

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
    queries = tile * group  # the query of token t and head g is t * group + g
    rows = _round_up(queries, ROWS)
    width = _round_up(head_dim, WIDTH)
    head_elems = block_tokens * head_dim
    scaled = np.zeros(rows * head_dim, np.float32)
    sums = np.empty(rows * width, np.float32)
    keys = np.empty(head_dim * SEGMENT, np.float32)
    values = np.zeros(SEGMENT * width, np.float32)
    scores = np.empty(ROWS * SEGMENT, np.float32)
    best = np.empty(rows, np.float32)
    total = np.empty(rows, np.float32)
    scale = _ONE / np.float32(math.sqrt(np.float32(head_dim)))
    for head in range(heads_here):
        kv = first_head + head
        for begin in range(0, tokens_here, tile):
            n = (first_token + begin) // tile
            _take_queries(
                scaled,
                scale,
                q,
                kv * group,
                group,
                head_dim,
                n * tile,
                tile,
                num_tokens,
            )
            sums[:] = _ZERO
            best[:] = cpu_softmax.FIRST
            total[:] = _ZERO
            for start in range(0, context[n], SEGMENT):
                size = min(SEGMENT, context[n] - start)
                _take_segment(
                    keys,
                    values,
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
                for row in range(0, queries, ROWS):
                    _add_segment(
                        sums,
                        best,
                        total,
                        scores,
                        row,
                        min(ROWS, queries - row),
                        scaled,
                        keys,
                        values,
                        width,
                        positions,
                        n * tile,
                        group,
                        start,
                        size,
                        head_dim,
                    )
            _give_sums(
                out,
                (head * group) * head_dim * tokens_here + begin,
                tokens_here,
                sums,
                total,
                tile,
                group,
                head_dim,
                width,
            )


@_jit
def _take_queries(
    scaled,  # f32[tile, G, HD]
    scale,
    q,  # f32[H, HD, T]
    first_head,
    group,
    head_dim,
    first_token,
    tile,
    num_tokens,
):
    for g in range(group):
        for d in range(head_dim):
            x = ((first_head + g) * head_dim + d) * num_tokens + first_token
            for t in range(tile):
                scaled[(t * group + g) * head_dim + d] = q[x + t] * scale


@_jit
def _take_segment(
    keys,  # f32[HD, SEGMENT]
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
    """Copy keys, transposed, and values of a segment; what is not there becomes 0."""
    for s in range(size):
        at = start + s
        page = np.int64(table[pages + at // block_tokens]) * page_elems
        place = page + at % block_tokens * head_dim
        for d in range(head_dim):
            keys[d * SEGMENT + s] = pool[place + key_offset + d]
        for d in range(head_dim):
            values[s * width + d] = pool[place + value_offset + d]
    for s in range(size, SEGMENT):
        for d in range(head_dim):
            keys[d * SEGMENT + s] = _ZERO
        for d in range(head_dim):
            values[s * width + d] = _ZERO


@_jit
def _add_segment(
    sums,
    best,
    total,
    scores,
    row,
    count,
    scaled,
    keys,
    values,
    width,
    positions,
    first_token,
    group,
    start,
    size,
    head_dim,
):
    """Fold a segment into the running softmax of `ROWS` queries from `row` on."""
    most = np.int64(0)
    for i in range(count):
        seen = positions[first_token + (row + i) // group] + 1 - start
        most = max(most, min(seen, size))
    if most <= 0:
        return
    for s in range(0, SEGMENT, WIDTH):
        product(
            scores,
            s,
            SEGMENT,
            scaled,
            row * head_dim,
            head_dim,
            1,
            keys,
            s,
            SEGMENT,
            head_dim,
            1,
        )
    for i in range(count):
        seen = min(size, positions[first_token + (row + i) // group] + 1 - start)
        keep = cpu_softmax.weigh(scores, i * SEGMENT, seen, best, total, row + i)
        if start > 0 and keep != _ONE:
            for d in range(width):
                sums[(row + i) * width + d] *= keep
    for d in range(0, width, WIDTH):
        product(
            sums,
            row * width + d,
            width,
            scores,
            0,
            SEGMENT,
            1,
            values,
            d,
            width,
            most,
            0,
        )


@_jit
def _give_sums(
    out,  # f32[.., G, HD, tokens]
    o,
    tokens,
    sums,  # f32[tile, G, width]
    total,
    tile,
    group,
    head_dim,
    width,
):
    for i in range(tile * group):
        total[i] = _ONE / total[i]
    for g in range(group):
        for d in range(head_dim):
            here = o + (g * head_dim + d) * tokens
            for t in range(tile):
                i = t * group + g
                out[here + t] = sums[i * width + d] * total[i]
