"""LoRA products on CPU straight from adapter pages: every weight is read once.

Same contract as `multi_lora`. A call takes the tokens of its part and, chunk by chunk
of the work list, adds `B (A x)` to those of them that the chunk's adapter owns. Nothing
is gathered or packed, so the cost is the bytes of the true ranks, read once a part.
Steps of many tokens go to `cpu_prefill_lora`.
"""

import jax
import jax.numpy as jnp
import numba
import numpy as np
from jax import lax

from jchameleon.lora.layout import GroupLayout
from jchameleon.pallas import cpu_ffi, cpu_prefill_lora
from jchameleon.pallas.multi_lora import CHUNKS_PER_ITEM, LoraWork, tile_tokens

TARGET = "jchameleon_multi_lora"

_RANKS = 8  # of a chunk
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
    if cpu_prefill_lora.serves(x.shape[1]):
        add = cpu_prefill_lora.add_products
    else:
        add = _add_products
    return lax.cond(
        work.count > 0,
        lambda: add(y, x, pool, work, group=group),
        lambda: y,
    )


def _add_products(
    y: jax.Array,  # f32[N, T]
    x: jax.Array,  # f32[d_in, T]
    pool: jax.Array,  # f32[P, E]
    work: LoraWork,
    *,
    group: GroupLayout,
) -> jax.Array:  # f32[N, T]
    num_tokens = x.shape[1]
    num_columns = group.b_shape[1]
    columns = [number for p in group.projections for number in group.columns[p]]
    shape = np.array(
        [
            tile_tokens(num_tokens),
            group.a_offset,
            group.b_offset,
            len(group.projections),
            *columns,
        ],
        np.int32,
    )
    x = x.T
    parts = []
    for first, count in cpu_ffi.parts(num_tokens):
        part = jax.ShapeDtypeStruct((count, num_columns), jnp.float32)
        parts.append(
            jax.ffi.ffi_call(TARGET, part)(
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
    delta = jnp.concatenate(parts).T  # rows as in B
    pieces, row = [], 0
    for projection in group.projections:  # in the order of y's rows
        start, size = group.columns[projection]
        first_row = group.out_columns[projection][0]
        pieces.append(jnp.zeros((first_row - row, num_tokens), y.dtype))
        pieces.append(delta[start : start + size])
        row = first_row + size
    pieces.append(jnp.zeros((y.shape[0] - row, num_tokens), y.dtype))
    return y + jnp.concatenate(pieces)


def handle(frame: int) -> int:
    """Unpack XLA's call; see `multi_lora_cpu` for the arguments."""
    if cpu_ffi.answers_query(frame):
        return 0
    _add_tokens(
        cpu_ffi.f32_pointer(cpu_ffi.result(frame, 0)),
        cpu_ffi.f32_pointer(cpu_ffi.argument(frame, 0)),
        cpu_ffi.f32_pointer(cpu_ffi.argument(frame, 1)),
        cpu_ffi.i32_pointer(cpu_ffi.argument(frame, 2))[0],
        cpu_ffi.i32_pointer(cpu_ffi.argument(frame, 3)),
        cpu_ffi.i32_pointer(cpu_ffi.argument(frame, 4)),
        cpu_ffi.i32_pointer(cpu_ffi.argument(frame, 5)),
        cpu_ffi.i32_pointer(cpu_ffi.argument(frame, 6)),
        cpu_ffi.i32_pointer(cpu_ffi.argument(frame, 7)),
        cpu_ffi.i32_pointer(cpu_ffi.argument(frame, 8))[0],
        cpu_ffi.result_dim(frame, 0, 0),
        cpu_ffi.result_dim(frame, 0, 1),
        cpu_ffi.argument_dim(frame, 0, 1),
        cpu_ffi.argument_dim(frame, 1, 1),
        cpu_ffi.argument_dim(frame, 4, 1) // CHUNKS_PER_ITEM,
    )
    return 0


@_jit
def _add_tokens(
    out,  # f32[count, N]
    x,  # f32[T, d_in]
    pool,  # f32[P, E]
    num_items,
    first_token,  # i32[NW]
    pages,  # i32[NW, CG * W]
    owner,  # i32[NW, CG]
    token_adapter,  # i32[T]
    shape,  # tile, offsets of A and B, projections, (column, columns) of each
    first,
    count,
    num_columns,
    d_in,
    page_elems,
    chunk_pages,
):
    for n in range(count * num_columns):
        out[n] = np.float32(0.0)
    tile, a_offset, b_offset, projections = shape[0], shape[1], shape[2], shape[3]
    mine = np.empty(count, np.int64)
    low = np.empty(count * _RANKS, np.float32)
    for i in range(num_items):
        start = max(first, first_token[i])
        end = min(first + count, first_token[i] + tile)
        if start >= end:
            continue
        for c in range(CHUNKS_PER_ITEM):
            adapter = owner[i * CHUNKS_PER_ITEM + c]
            if adapter < 0:
                continue
            found = 0
            for t in range(start, end):
                if token_adapter[t] == adapter:
                    mine[found] = t
                    found += 1
            if found == 0:
                continue
            chunk = (np.int64(i) * CHUNKS_PER_ITEM + c) * chunk_pages
            for p in range(projections):
                a = a_offset + p * _RANKS * d_in
                for r in range(0, _RANKS, 4):
                    _shrink(
                        low,
                        r,
                        x,
                        mine,
                        found,
                        d_in,
                        pool,
                        pages,
                        chunk,
                        a + r * d_in,
                        page_elems,
                    )
                column, columns = shape[4 + 2 * p], shape[5 + 2 * p]
                for r in range(0, _RANKS, 4):
                    _expand(
                        out,
                        first,
                        num_columns,
                        column,
                        columns,
                        low,
                        r,
                        mine,
                        found,
                        pool,
                        pages,
                        chunk,
                        b_offset + r * num_columns + column,
                        page_elems,
                    )


@_jit
def _shrink(low, r, x, mine, found, d_in, pool, pages, chunk, offset, page_elems):
    """Set low[token, r : r + 4] to the products with four rows of A at `offset`."""
    page = offset // page_elems
    at = offset - page * page_elems
    if at + 4 * d_in <= page_elems:
        a0 = np.int64(pages[chunk + page]) * page_elems + at
        a1, a2, a3 = a0 + d_in, a0 + 2 * d_in, a0 + 3 * d_in
        for j in range(found):
            t = mine[j] * d_in
            h0 = h1 = h2 = h3 = np.float32(0.0)
            for d in range(d_in):
                value = x[t + d]
                h0 += value * pool[a0 + d]
                h1 += value * pool[a1 + d]
                h2 += value * pool[a2 + d]
                h3 += value * pool[a3 + d]
            low[j * _RANKS + r] = h0
            low[j * _RANKS + r + 1] = h1
            low[j * _RANKS + r + 2] = h2
            low[j * _RANKS + r + 3] = h3
        return
    for row in range(4):  # rows that cross into the next page, piece by piece
        for j in range(found):
            low[j * _RANKS + r + row] = np.float32(0.0)
        done = 0
        while done < d_in:
            place = offset + row * d_in + done
            page = place // page_elems
            at = place - page * page_elems
            size = min(d_in - done, page_elems - at)
            a0 = np.int64(pages[chunk + page]) * page_elems + at
            for j in range(found):
                t = mine[j] * d_in + done
                h0 = np.float32(0.0)
                for d in range(size):
                    h0 += x[t + d] * pool[a0 + d]
                low[j * _RANKS + r + row] += h0
            done += size


@_jit
def _expand(
    out,
    first,
    num_columns,
    column,
    columns,
    low,
    r,
    mine,
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
            o = (mine[j] - first) * num_columns + column
            h0, h1 = low[j * _RANKS + r], low[j * _RANKS + r + 1]
            h2, h3 = low[j * _RANKS + r + 2], low[j * _RANKS + r + 3]
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
                o = (mine[j] - first) * num_columns + column + done
                h0 = low[j * _RANKS + r + row]
                for n in range(size):
                    out[o + n] += h0 * pool[b0 + n]
            done += size
