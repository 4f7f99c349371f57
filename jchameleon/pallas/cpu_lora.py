"""LoRA products on CPU straight from adapter pages: every weight is read once.

Same contract as `multi_lora`. A call takes the tokens of its part, a block of them at a
time, and adds `B (A x)` of each adapter in the work list to its tokens of the block: to
a few, as in decode, by dot products straight from the pages, to many, as in prefill, by
`cpu_lora_tiles`. The cost is that of the true ranks, read once for each block.
"""

import jax
import jax.numpy as jnp
import numba
import numpy as np
from jax import lax

from jchameleon.lora.layout import GroupLayout
from jchameleon.pallas import cpu_ffi
from jchameleon.pallas.cpu_lora_tiles import BLOCK, RANKS, add_block
from jchameleon.pallas.multi_lora import CHUNKS_PER_ITEM, LoraWork, tile_tokens

TARGET = "jchameleon_multi_lora"

_SIDE_BY_SIDE = 8
"""Tokens of one adapter in a block from which tiles beat dot products."""

_jit = numba.njit(fastmath=cpu_ffi.FAST_MATH, error_model="numpy")


def multi_lora_cpu(
    y: jax.Array,  # f32[N, T], base product of the fused projection
    x: jax.Array,  # f32[d_in, T]
    pool: jax.Array,  # f32[P, E]
    work: LoraWork,
    *,
    group: GroupLayout,
) -> jax.Array:  # f32[N, T]
    """Return `y + B_a A_a x` per token, a being the token's adapter.

    A step of base rows alone passes `y` on.
    """
    return lax.cond(
        work.count > 0,
        lambda: _adapted(y, x, pool, work, group=group),
        lambda: y,
    )


def _adapted(
    y: jax.Array,  # f32[N, T]
    x: jax.Array,  # f32[d_in, T]
    pool: jax.Array,  # f32[P, E]
    work: LoraWork,
    *,
    group: GroupLayout,
) -> jax.Array:  # f32[N, T]
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
    # Whole blocks to a call where there are enough of them to be shared among threads.
    unit = BLOCK if num_tokens >= cpu_ffi.PARTS * BLOCK else 1
    parts = []
    for first_unit, units in cpu_ffi.parts(-(-num_tokens // unit)):
        first = first_unit * unit
        count = min(units * unit, num_tokens - first)
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
    """Unpack XLA's call; see `multi_lora_cpu` for the arguments."""
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
    few_x = np.empty(min(BLOCK, count) * d_in, np.float32)
    few_out = np.empty(min(BLOCK, count) * num_columns, np.float32)
    mine = np.empty(BLOCK, np.bool_)
    low = np.empty(BLOCK * RANKS, np.float32)
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
                found = np.int64(0)
                if adapter >= 0:
                    found = _find(
                        mine, start - begin, end - begin, begin, token_adapter, adapter
                    )
                if found >= _SIDE_BY_SIDE:
                    add_block(
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
                elif found > 0:
                    _add_few(
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
                        cpu_ffi.data(few_x),
                        cpu_ffi.data(few_out),
                        cpu_ffi.data(low),
                    )
                c += chunks


@_jit
def _find(mine, start, end, first, token_adapter, adapter):
    """Mark an adapter's tokens among `start` to `end` of a block; return how many."""
    found = 0
    mine[:] = False
    for j in range(start, end):
        mine[j] = token_adapter[first + j] == adapter
        found += mine[j]
    return found


@_jit
def _add_few(
    out,  # f32[N, count]
    count,
    at,
    x,  # f32[d_in, T]
    num_tokens,
    first,
    mine,  # bool[BLOCK]
    pool,
    page_elems,
    pages,
    chunk,
    chunk_pages,
    chunks,
    d_in,
    num_columns,
    shape,
    few_x,  # scratch f32[BLOCK, d_in]
    few_out,  # scratch f32[BLOCK, columns of B]
    low,  # scratch f32[BLOCK, RANKS]
):
    """Do what `add_block` does, token by token, for a few of them."""
    found = 0
    for j in range(BLOCK):
        if mine[j]:
            for d in range(d_in):
                few_x[found * d_in + d] = x[d * num_tokens + first + j]
            found += 1
    for n in range(found * num_columns):
        few_out[n] = np.float32(0.0)
    for c in range(chunks):
        here = chunk + c * chunk_pages
        for p in range(shape[3]):
            a = np.int64(shape[1]) + p * RANKS * d_in
            for r in range(0, RANKS, 4):
                _shrink(
                    low,
                    r,
                    few_x,
                    found,
                    d_in,
                    pool,
                    pages,
                    here,
                    a + r * d_in,
                    page_elems,
                )
            column, columns = np.int64(shape[4 + 3 * p]), np.int64(shape[5 + 3 * p])
            for r in range(0, RANKS, 4):
                _expand(
                    few_out,
                    num_columns,
                    column,
                    columns,
                    low,
                    r,
                    found,
                    pool,
                    pages,
                    here,
                    shape[2] + r * num_columns + column,
                    page_elems,
                )
    for p in range(shape[3]):
        column, row = np.int64(shape[4 + 3 * p]), np.int64(shape[6 + 3 * p])
        for n in range(shape[5 + 3 * p]):
            o = (row + n) * count + at
            i = column + n
            for j in range(BLOCK):
                if mine[j]:
                    out[o + j] += few_out[i]
                    i += num_columns


@_jit
def _shrink(low, r, x, found, d_in, pool, pages, chunk, offset, page_elems):
    """Set low[token, r : r + 4] to the products with four rows of A at `offset`."""
    page = offset // page_elems
    at = offset - page * page_elems
    if at + 4 * d_in <= page_elems:
        a0 = np.int64(pages[chunk + page]) * page_elems + at
        a1, a2, a3 = a0 + d_in, a0 + 2 * d_in, a0 + 3 * d_in
        for j in range(found):
            t = j * d_in
            h0 = h1 = h2 = h3 = np.float32(0.0)
            for d in range(d_in):
                value = x[t + d]
                h0 += value * pool[a0 + d]
                h1 += value * pool[a1 + d]
                h2 += value * pool[a2 + d]
                h3 += value * pool[a3 + d]
            low[j * RANKS + r] = h0
            low[j * RANKS + r + 1] = h1
            low[j * RANKS + r + 2] = h2
            low[j * RANKS + r + 3] = h3
        return
    for row in range(4):  # rows that cross into the next page, piece by piece
        for j in range(found):
            low[j * RANKS + r + row] = np.float32(0.0)
        done = 0
        while done < d_in:
            place = offset + row * d_in + done
            page = place // page_elems
            at = place - page * page_elems
            size = min(d_in - done, page_elems - at)
            a0 = np.int64(pages[chunk + page]) * page_elems + at
            for j in range(found):
                t = j * d_in + done
                h0 = np.float32(0.0)
                for d in range(size):
                    h0 += x[t + d] * pool[a0 + d]
                low[j * RANKS + r + row] += h0
            done += size


@_jit
def _expand(
    out,
    num_columns,
    column,
    columns,
    low,
    r,
    found,
    pool,
    pages,
    chunk,
    offset,
    page_elems,
):
    """Add low[token, r : r + 4] times four rows of B, which begin at `offset`."""
    page = offset // page_elems
    at = offset - page * page_elems
    if at + 3 * num_columns + columns <= page_elems:
        b0 = np.int64(pages[chunk + page]) * page_elems + at
        b1, b2, b3 = b0 + num_columns, b0 + 2 * num_columns, b0 + 3 * num_columns
        for j in range(found):
            o = j * num_columns + column
            h0, h1 = low[j * RANKS + r], low[j * RANKS + r + 1]
            h2, h3 = low[j * RANKS + r + 2], low[j * RANKS + r + 3]
            for n in range(columns):
                out[o + n] += (
                    h0 * pool[b0 + n]
                    + h1 * pool[b1 + n]
                    + h2 * pool[b2 + n]
                    + h3 * pool[b3 + n]
                )
        return
    for row in range(4):
        done = 0
        while done < columns:
            place = offset + row * num_columns + done
            page = place // page_elems
            at = place - page * page_elems
            size = min(columns - done, page_elems - at)
            b0 = np.int64(pages[chunk + page]) * page_elems + at
            for j in range(found):
                o = j * num_columns + column + done
                h0 = low[j * RANKS + r + row]
                for n in range(size):
                    out[o + n] += h0 * pool[b0 + n]
            done += size
