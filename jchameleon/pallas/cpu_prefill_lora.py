"""LoRA products of many tokens on CPU: tiles of products in registers.

Up to `BLOCK` tokens lie side by side, as in the layer's own arrays, so nothing is
transposed, and what an adapter adds is added where it belongs. Both halves are products
of whole tiles (`cpu_tiles`): A's rows by the tokens' features, then B's columns by what
came out, over all ranks of the adapter at once. Tokens of other adapters in a block
count as zeros, and nothing is added to them.
"""

import jax
import jax.numpy as jnp
import numba
import numpy as np

from jchameleon.lora.layout import GroupLayout
from jchameleon.pallas import cpu_ffi
from jchameleon.pallas.cpu_tiles import ROWS, WIDTH, product
from jchameleon.pallas.multi_lora import CHUNKS_PER_ITEM, LoraWork, tile_tokens

TARGET = "jchameleon_prefill_lora"

BLOCK = 32
"""Tokens side by side; a multiple of `WIDTH`."""

RANKS = 8  # of a chunk

_COLUMNS = 192
"""Columns of B that are copied at a time, a multiple of `ROWS`: 100 KB at rank 128."""

_COLUMN_STRIDE = _COLUMNS + 16  # no power of two: rows fall into different cache sets

_ZERO = np.float32(0.0)

_jit = numba.njit(fastmath=cpu_ffi.FAST_MATH, error_model="numpy")


def serves(num_tokens: int) -> bool:
    """Return whether a step has blocks enough for threads to share."""
    return num_tokens >= cpu_ffi.PARTS * BLOCK


def add_products(
    y: jax.Array,  # f32[N, T]
    x: jax.Array,  # f32[d_in, T]
    pool: jax.Array,  # f32[P, E]
    work: LoraWork,
    *,
    group: GroupLayout,
) -> jax.Array:  # f32[N, T]
    """Return `y + B_a A_a x` per token; see `multi_lora_cpu`."""
    num_rows, num_tokens = y.shape
    places = [
        number
        for projection in group.projections
        for number in (
            *group.columns[projection],
            group.out_columns[projection][0],
        )
    ]
    shape = np.array(
        [
            tile_tokens(num_tokens),
            group.a_offset,
            group.b_offset,
            len(group.projections),
            *places,
            group.b_shape[1],
        ],
        np.int32,
    )
    parts = []
    for first_block, blocks in cpu_ffi.parts(-(-num_tokens // BLOCK)):
        first = first_block * BLOCK
        count = min(blocks * BLOCK, num_tokens - first)
        part = jax.ShapeDtypeStruct((num_rows, count), jnp.float32)
        parts.append(
            jax.ffi.ffi_call(TARGET, part)(
                y,
                x,
                pool,
                work.count,
                work.first_token,
                work.pages,
                work.owner,
                work.token_adapter,
                shape,
                np.int32(first),
            )
        )
    return jnp.concatenate(parts, axis=1)


def handle(frame: int) -> int:
    """Unpack XLA's call; see `add_products` for the arguments."""
    if cpu_ffi.answers_query(frame):
        return 0
    shape = cpu_ffi.i32_pointer(cpu_ffi.argument(frame, 8))
    _add_products(
        cpu_ffi.f32_pointer(cpu_ffi.result(frame, 0)),
        cpu_ffi.f32_pointer(cpu_ffi.argument(frame, 0)),
        cpu_ffi.f32_pointer(cpu_ffi.argument(frame, 1)),
        cpu_ffi.f32_pointer(cpu_ffi.argument(frame, 2)),
        cpu_ffi.i32_pointer(cpu_ffi.argument(frame, 3))[0],
        cpu_ffi.i32_pointer(cpu_ffi.argument(frame, 4)),
        cpu_ffi.i32_pointer(cpu_ffi.argument(frame, 5)),
        cpu_ffi.i32_pointer(cpu_ffi.argument(frame, 6)),
        cpu_ffi.i32_pointer(cpu_ffi.argument(frame, 7)),
        shape,
        np.int64(cpu_ffi.i32_pointer(cpu_ffi.argument(frame, 9))[0]),
        cpu_ffi.result_dim(frame, 0, 0),
        cpu_ffi.result_dim(frame, 0, 1),
        cpu_ffi.argument_dim(frame, 1, 0),
        cpu_ffi.argument_dim(frame, 1, 1),
        cpu_ffi.argument_dim(frame, 2, 1),
        np.int64(shape[4 + 3 * shape[3]]),
        cpu_ffi.argument_dim(frame, 5, 1) // CHUNKS_PER_ITEM,
    )
    return 0


@_jit
def _add_products(
    out,  # f32[N, count]
    y,  # f32[N, T]
    x,  # f32[d_in, T]
    pool,  # f32[P, E]
    num_items,
    first_token,  # i32[NW]
    pages,  # i32[NW, CG * W]
    owner,  # i32[NW, CG]
    token_adapter,  # i32[T]
    shape,  # tile, offsets of A and B, projections, (column, columns, row) of each, ..
    first,
    num_rows,
    count,
    d_in,
    num_tokens,
    page_elems,
    num_columns,
    chunk_pages,
):
    for n in range(num_rows):
        for t in range(count):
            out[n * count + t] = y[n * num_tokens + first + t]
    mine = np.empty(BLOCK, np.bool_)
    for at in range(0, count, BLOCK):
        begin = first + at
        for i in range(num_items):
            start = max(begin, first_token[i])
            end = min(first + count, begin + BLOCK, first_token[i] + shape[0])
            c = np.int64(0)
            while c < CHUNKS_PER_ITEM and start < end:
                own = i * CHUNKS_PER_ITEM
                adapter = owner[own + c]
                chunks = np.int64(1)
                while c + chunks < CHUNKS_PER_ITEM:
                    if owner[own + c + chunks] != adapter:
                        break
                    chunks += 1
                if adapter >= 0 and _find(
                    mine, start - begin, end - begin, begin, token_adapter, adapter
                ):
                    _add_block(
                        out,
                        count,
                        at,
                        x,
                        num_tokens,
                        begin,
                        mine,
                        pool,
                        page_elems,
                        pages,
                        (own + c) * chunk_pages,
                        chunk_pages,
                        chunks,
                        d_in,
                        num_columns,
                        shape,
                    )
                c += chunks


@_jit
def _find(mine, start, end, first, token_adapter, adapter):
    """Mark an adapter's tokens among `start` to `end` of a block; return if any."""
    found = False
    mine[:] = False
    for j in range(start, end):
        mine[j] = token_adapter[first + j] == adapter
        found = found or mine[j]
    return found


@_jit
def _add_block(
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
    shape,  # see `add_products`
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
