"""Where the tiles of an adapter's A and B lie, as the GPU's LoRA kernels compute it.

All of it runs within a kernel. Element e of a chunk is element `e % E` of the chunk's
page `e // E`. Offsets within a page are differences, never remainders: that keeps what
divides them known to the compiler, and loads 16 bytes wide.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jchameleon.lora.layout import CHUNK_RANK, GroupLayout
from jchameleon.pallas.gpu_lora_config import ExpandConfig, ShrinkConfig


def reader_of_a(
    pool_ref: Any,
    pages_ref: Any,
    table_row: jax.Array,
    p: int,
    first_k: jax.Array,
    span: int,
    *,
    group: GroupLayout,
    config: ShrinkConfig,
    group_ranks: int,
    page_elems: int,
) -> Any:
    """Return the function k -> f[group_ranks, block_k], A's tile at first_k + k.

    Lookups that hold for all of a program's tiles are made here, outside of its loop.
    """
    rank = jnp.arange(group_ranks, dtype=jnp.int32)
    row = table_row + _chunk_of(rank)
    start = group.a_offset + p * CHUNK_RANK * group.d_in
    # Element of the chunk at which each row's run starts.
    run = _row_of(rank) * np.int32(group.d_in) + np.int32(start) + first_k
    lane = jnp.arange(config.block_k, dtype=jnp.int32)
    if config.lookup == "element":
        last = np.int32(group.d_in - 1)

        def read_elements(k: jax.Array) -> jax.Array:
            # x is 0 beyond the last feature; what A has there must just be finite.
            e = run[:, None] + jnp.minimum(k + lane, last)[None, :]
            slot = _slot_of(e, page_elems)
            page = pages_ref[_fit(row[:, None], e), slot]
            return pool_ref[page, e - slot * np.int32(page_elems)]

        return read_elements
    if config.lookup == "select":
        slot = _slot_of(run, page_elems)
        page = pages_ref[row, slot]
        last_slot = _slot_of(run + np.int32(span - 1), page_elems)
        last_page = pages_ref[row, last_slot]
        base = run - slot * np.int32(page_elems)

        def read_either(k: jax.Array) -> jax.Array:
            offset = base + k
            over = offset >= np.int32(page_elems)
            offset = jnp.where(over, offset - np.int32(page_elems), offset)
            return _tile(pool_ref, jnp.where(over, last_page, page), offset, lane)

        return read_either
    if config.lookup == "static":
        slot = jnp.full((group_ranks,), start // page_elems, jnp.int32)
    else:
        slot = _slot_of(run, page_elems)
    page = pages_ref[row, slot]
    base = run - slot * np.int32(page_elems)
    return lambda k: _tile(pool_ref, page, base + k, lane)


def reader_of_b(
    pool_ref: Any,
    pages_ref: Any,
    table_row: jax.Array,
    column: jax.Array,
    rest: jax.Array,
    *,
    group: GroupLayout,
    config: ExpandConfig,
    group_ranks: int,
    page_elems: int,
) -> Any:
    """Return the function g -> f[group_ranks, block_n], B's tile of chunk group g.

    Args:
      column: first column of the tile within B.
      rest: columns of the projection from there on.
    """
    rank = jnp.arange(group_ranks, dtype=jnp.int32)
    row = table_row + _chunk_of(rank)
    run = _row_of(rank) * np.int32(group.b_shape[1]) + np.int32(group.b_offset) + column
    lane = jnp.arange(config.block_n, dtype=jnp.int32)
    if config.lookup == "element":
        # Columns beyond the projection are not stored; read any of its own there.
        e = run[:, None] + jnp.minimum(lane, rest - np.int32(1))[None, :]
        slots = _slot_of(e, page_elems)
        offsets = e - slots * np.int32(page_elems)

        def read_elements(g: jax.Array) -> jax.Array:
            rows = row + g * np.int32(group_ranks // CHUNK_RANK)
            return pool_ref[pages_ref[_fit(rows[:, None], e), slots], offsets]

        return read_elements
    slot = _slot_of(run, page_elems)
    base = run - slot * np.int32(page_elems)

    def read(g: jax.Array) -> jax.Array:
        rows = row + g * np.int32(group_ranks // CHUNK_RANK)
        return _tile(pool_ref, pages_ref[rows, slot], base, lane)

    return read


def columns_of(
    tile: jax.Array, tiles: list[int], group: GroupLayout, config: ExpandConfig
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return where a tile lies, of those of all projections one after the other.

    The projection's index, its columns from the tile's first on, and the tile's first
    column within B and within y.
    """
    fields: list[Any] = []
    before = 0
    for p, projection in enumerate(group.projections):
        b_start, size = group.columns[projection]
        y_start, _ = group.out_columns[projection]
        values = [np.int32(v) for v in (before, p, size, b_start, y_start)]
        inside = tile >= np.int32(before)
        fields = [
            jnp.where(inside, value, field) if p else value
            for value, field in zip(values, fields or values, strict=True)
        ]
        before += tiles[p]
    first, index, size, b_start, y_start = fields
    local = (tile - first) * np.int32(config.block_n)
    b_column, y_column = b_start + local, y_start + local
    if config.lookup == "hoist":
        b_column = pl.multiple_of(b_column, config.block_n)
        y_column = pl.multiple_of(y_column, config.block_n)
    return index, size - local, b_column, y_column


def _chunk_of(rank: jax.Array) -> jax.Array:
    """Return the chunk within a group that each of its ranks lies in."""
    return lax.div(rank, np.int32(CHUNK_RANK))


def _row_of(rank: jax.Array) -> jax.Array:
    """Return the row of its chunk that each rank of a group is."""
    return lax.rem(rank, np.int32(CHUNK_RANK))


def _slot_of(element: jax.Array, page_elems: int) -> jax.Array:
    """Return the page of a chunk, 0..W-1, that an element of it lies in."""
    return lax.div(element, np.int32(page_elems))


def _fit(array: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.broadcast_to(array, like.shape)


def _tile(
    pool_ref: Any, page: jax.Array, offset: jax.Array, lane: jax.Array
) -> jax.Array:
    """Return the pool's elements from each `offset` of each `page` on."""
    shape = (page.shape[0], lane.shape[0])
    columns = offset[:, None] + lane[None, :]
    return pool_ref[jnp.broadcast_to(page[:, None], shape), columns]
