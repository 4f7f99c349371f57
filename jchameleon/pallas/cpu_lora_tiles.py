"""The LoRA product of one adapter and up to `BLOCK` tokens side by side, on CPU.

Both halves are products of whole tiles (`cpu_tiles`): A's rows by the tokens'
features, then B's columns by what came out, over all ranks of the adapter at once.
Tokens of other adapters among them count as zeros, and nothing is added to them.
"""

import numba
import numpy as np

from jchameleon.pallas import cpu_ffi
from jchameleon.pallas.cpu_tiles import ROWS, WIDTH, product

BLOCK = 32
"""Tokens side by side; a multiple of `WIDTH`."""

RANKS = 8  # of a chunk

_COLUMNS = 192
"""Columns of B that are copied at a time, a multiple of `ROWS`: 100 KB at rank 128."""

_COLUMN_STRIDE = _COLUMNS + 16  # no power of two: rows fall into different cache sets

_ZERO = np.float32(0.0)

_jit = numba.njit(fastmath=cpu_ffi.FAST_MATH, error_model="numpy")


@_jit
def add_block(
    out,  # f32[N, count]
    count,
    at,  # the block's first token within `out`
    x,  # f32[d_in, T]
    num_tokens,
    first,  # the block's first token within `x`
    mine,  # bool[BLOCK], tokens of the adapter
    pool,  # f32[P, E]
    page_elems,
    pages,
    chunk,  # place in `pages` of the adapter's first chunk
    chunk_pages,
    chunks,
    d_in,
    num_columns,
    shape,  # see `multi_lora_cpu`
):
    """Add the product of `chunks` chunks of one adapter to its tokens of a block."""
    whole = mine.all()
    features = np.empty(d_in * BLOCK, np.float32)
    _take_tokens(cpu_ffi.data(features), x, num_tokens, first, mine, whole, d_in)
    rows = np.empty(ROWS * d_in, np.float32)
    low = np.empty(chunks * RANKS * BLOCK, np.float32)
    tile = np.empty(ROWS * BLOCK, np.float32)
    columns = np.zeros(chunks * RANKS * _COLUMN_STRIDE, np.float32)
    for p in range(shape[3]):
        for c in range(chunks):
            here = chunk + c * chunk_pages
            for r in range(0, RANKS, ROWS):
                _shrink(
                    cpu_ffi.data(low),
                    (c * RANKS + r) * BLOCK,
                    cpu_ffi.data(features),
                    cpu_ffi.data(rows),
                    pool,
                    page_elems,
                    pages,
                    here,
                    np.int64(shape[1]) + (p * RANKS + r) * d_in,
                    d_in,
                )
        column, size, out_row = shape[4 + 3 * p], shape[5 + 3 * p], shape[6 + 3 * p]
        for begin in range(0, size, _COLUMNS):
            taken = min(_COLUMNS, size - begin)
            for k in range(chunks * RANKS):
                _copy(
                    cpu_ffi.data(columns),
                    k * _COLUMN_STRIDE,
                    pool,
                    page_elems,
                    pages,
                    chunk + k // RANKS * chunk_pages,
                    shape[2] + k % RANKS * num_columns + column + begin,
                    taken,
                )
            _expand(
                out,
                np.int64(out_row + begin) * count + at,
                count,
                cpu_ffi.data(low),
                cpu_ffi.data(columns),
                cpu_ffi.data(tile),
                taken,
                chunks * RANKS,
                mine,
                whole,
            )


@_jit
def _take_tokens(features, x, num_tokens, first, mine, whole, d_in):
    """Set features f32[d_in, BLOCK] to those of the adapter's tokens, others to 0."""
    if whole:
        for d in range(d_in):
            for j in range(BLOCK):
                features[d * BLOCK + j] = x[d * num_tokens + first + j]
        return
    for n in range(d_in * BLOCK):
        features[n] = _ZERO
    for j in range(BLOCK):
        if mine[j]:
            for d in range(d_in):
                features[d * BLOCK + j] = x[d * num_tokens + first + j]


@_jit
def _copy(to, at, pool, page_elems, pages, chunk, place, size):
    """Copy `size` elements of a chunk from `place` on, page by page."""
    done = 0
    while done < size:
        page = (place + done) // page_elems
        within = place + done - page * page_elems
        run = min(size - done, page_elems - within)
        start = np.int64(pages[chunk + page]) * page_elems + within
        for n in range(run):
            to[at + done + n] = pool[start + n]
        done += run


@_jit
def _shrink(low, at, features, rows, pool, page_elems, pages, chunk, place, d_in):
    """Set low f32[ROWS, BLOCK] at `at` to so many rows of A times the features."""
    page = place // page_elems
    within = place - page * page_elems
    start = np.int64(pages[chunk + page]) * page_elems + within
    crosses = within + ROWS * d_in > page_elems
    if crosses:
        _copy(rows, 0, pool, page_elems, pages, chunk, place, ROWS * d_in)
    for j in range(0, BLOCK, WIDTH):
        if crosses:
            product(low, at + j, BLOCK, rows, 0, d_in, 1, features, j, BLOCK, d_in, 1)
        else:
            product(
                low, at + j, BLOCK, pool, start, d_in, 1, features, j, BLOCK, d_in, 1
            )


@_jit
def _expand(out, o, count, low, columns, tile, size, ranks, mine, whole):
    """Add columns f32[ranks, size] of B times low f32[ranks, BLOCK] to rows of out."""
    for n in range(0, size, ROWS):
        rows = min(ROWS, size - n)
        if whole and rows == ROWS:
            for j in range(0, BLOCK, WIDTH):
                product(
                    out,
                    o + n * count + j,
                    count,
                    columns,
                    n,
                    1,
                    _COLUMN_STRIDE,
                    low,
                    j,
                    BLOCK,
                    ranks,
                    0,
                )
            continue
        for j in range(0, BLOCK, WIDTH):
            product(
                tile, j, BLOCK, columns, n, 1, _COLUMN_STRIDE, low, j, BLOCK, ranks, 1
            )
        for m in range(rows):
            for j in range(BLOCK):
                if mine[j]:
                    out[o + (n + m) * count + j] += tile[m * BLOCK + j]
