"""Multi-LoRA on NVIDIA GPUs: shrink (h = A x) and expand (y += B h), by Pallas-Triton.

Both read adapters where they lie in the page pool. The projections of a group share
one launch and each tile of x. h is as wide as the largest adapter allowed, but only
the places of listed work are written, and only those are read.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jchameleon.lora.layout import CHUNK_RANK, GroupLayout
from jchameleon.pallas import _compat
from jchameleon.pallas.gpu_device import dot
from jchameleon.pallas.gpu_lora_config import (
    ExpandConfig,
    ShrinkConfig,
    check_expand,
    check_shrink,
    choose_expand,
    choose_shrink,
    expand_key,
    shrink_key,
)
from jchameleon.pallas.gpu_lora_tiles import columns_of, reader_of_a, reader_of_b
from jchameleon.pallas.gpu_lora_work import GpuLoraWork, blocking
from jchameleon.pallas.gpu_pages import DTYPES, check_integers
from jchameleon.pallas.tuned import UNTUNED, TunedTable


def multi_lora_gpu(
    y: jax.Array,  # f[N, T], base product of the fused projection
    x: jax.Array,  # f[d_in, T]
    pool: jax.Array,  # f[P, E]
    work: GpuLoraWork,
    *,
    group: GroupLayout,
    interpret: bool = False,
    arch: str | None = None,
    tuned: TunedTable = UNTUNED,
    shrink: ShrinkConfig | None = None,
    expand: ExpandConfig | None = None,
) -> jax.Array:  # f[N, T]
    """Return `y + B_a A_a x` per token, a being the token's adapter.

    The kernels are token-major: XLA's layout assignment makes the transposes here free.
    Tokens without an adapter keep their bits.

    Args:
      interpret: run on any device, without a GPU's compiler; for tests.
      arch: compute capability ("sm_86") that block sizes are chosen for.
      tuned: block sizes that were measured.
      shrink, expand: block sizes, if not those of `tuned`, nor, where it has none,
        those that `choose_shrink` and `choose_expand` name.

    Raises:
      ValueError: element types differ, the work list is not of these shapes, or block
        sizes do not fit them.
    """
    page_elems = pool.shape[1]
    _check_arrays(y, x, pool, group)
    _check_work(work, page_elems, group)
    num_items, num_blocks = work.items.shape[1], work.blocks.shape[1]
    of_step: dict[str, Any] = {"prefill": work.prefill, "dtype": pool.dtype}
    of_step["num_tokens"] = x.shape[1]
    step: dict[str, Any] = {
        "prefill": work.prefill,
        "elem_bytes": pool.dtype.itemsize,
        "arch": arch,
    }
    shrink = (
        shrink
        or tuned.find(shrink_key(group, page_elems, num_items=num_items, **of_step))
        or choose_shrink(group, page_elems, num_items=num_items, **step)
    )
    expand = (
        expand
        or tuned.find(expand_key(group, page_elems, num_blocks=num_blocks, **of_step))
        or choose_expand(group, page_elems, num_blocks=num_blocks, **step)
    )
    check_shrink(shrink, group, page_elems)
    check_expand(expand, group, page_elems)
    of: dict[str, Any] = {"group": group, "interpret": interpret}
    h = shrink_call(x.T, pool, work, config=shrink, **of)
    out = expand_call(y.T, h, pool, work, config=expand, **of)
    return out.T


def _check_arrays(
    y: jax.Array, x: jax.Array, pool: jax.Array, group: GroupLayout
) -> None:
    if x.dtype != pool.dtype or pool.dtype.name not in DTYPES:
        raise ValueError(
            f"x.dtype={x.dtype.name} must be pool.dtype={pool.dtype.name}, float32 or "
            "bfloat16"
        )
    if y.dtype.name not in DTYPES:
        raise ValueError(f"y.dtype={y.dtype.name} must be one of {DTYPES}")
    if x.shape[0] != group.d_in or y.shape[1] != x.shape[1]:
        raise ValueError(f"{x.shape=} and {y.shape=} must be d_in={group.d_in}, N by T")
    rows = max(sum(group.out_columns[p]) for p in group.projections)
    if y.shape[0] < rows:
        raise ValueError(f"{y.shape=} must have the {rows} rows of {group.name}")


def _check_work(work: GpuLoraWork, page_elems: int, group: GroupLayout) -> None:
    """Raise ValueError where lists would lead out of a chunk, or lose their tail."""
    check_integers(
        counts=work.counts, items=work.items, blocks=work.blocks, pages=work.pages
    )
    num_items, num_blocks = work.items.shape[1], work.blocks.shape[1]
    if num_items % num_blocks:
        raise ValueError(f"{num_items=} must be a multiple of {num_blocks=}")
    a_end = group.a_offset + math.prod(group.a_shape)
    needed = max(a_end, group.b_offset + math.prod(group.b_shape))
    if work.pages.shape[1] * page_elems < needed:
        raise ValueError(
            f"chunks of {work.pages.shape[1]} pages of {page_elems=} must hold "
            f"{needed} elements"
        )


def shrink_call(
    x: jax.Array,  # f[T, d_in]
    pool: jax.Array,  # f[P, E]
    work: GpuLoraWork,
    *,
    group: GroupLayout,
    config: ShrinkConfig,
    interpret: bool,
) -> jax.Array:  # f[splits, T, P * ranks]
    """Return `A_a x` per token and projection, in as many sums as there are splits.

    Of the f32 type where there are several, of the pool's where there is one. ranks is
    the room for the largest adapter; what no work item names is not written.
    """
    cut = blocking(prefill=work.prefill)
    num_items, num_blocks = work.items.shape[1], work.blocks.shape[1]
    ranks = num_items // num_blocks * cut.group_chunks * CHUNK_RANK
    return _compat.triton_call(
        _shrink_kernel,
        name=f"lora_shrink_{group.name}",
        grid=(config.programs, config.splits),
        out_shape=jax.ShapeDtypeStruct(
            (config.splits, x.shape[0], len(group.projections) * ranks),
            pool.dtype if config.splits == 1 else jnp.float32,
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
        group=group,
        config=config,
        block_rows=cut.block_rows,
        group_ranks=cut.group_chunks * CHUNK_RANK,
        page_elems=pool.shape[1],
        ranks=ranks,
    )(work.counts, work.items, work.pages, x, pool)


def expand_call(
    y: jax.Array,  # f[T, N], becomes the result
    h: jax.Array,  # f[splits, T, P * ranks]
    pool: jax.Array,  # f[P, E]
    work: GpuLoraWork,
    *,
    group: GroupLayout,
    config: ExpandConfig,
    interpret: bool,
) -> jax.Array:  # f[T, N]
    """Return `y + B_a h` per token; h as `shrink_call` made it."""
    cut = blocking(prefill=work.prefill)
    tiles = [-(-group.columns[p][1] // config.block_n) for p in group.projections]
    return _compat.triton_call(
        _expand_kernel,
        name=f"lora_expand_{group.name}",
        grid=(sum(tiles), config.programs),
        out_shape=_compat.shape_of(y),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
        input_output_aliases={5: 0},
        group=group,
        config=config,
        tiles=tiles,
        block_rows=cut.block_rows,
        group_ranks=cut.group_chunks * CHUNK_RANK,
        page_elems=pool.shape[1],
        ranks=h.shape[2] // len(group.projections),
    )(work.counts, work.blocks, work.pages, h, pool, y)


def _shrink_kernel(
    counts_ref: Any,  # i32[2]
    items_ref: Any,  # i32[4, NW]
    pages_ref: Any,  # i32[C, W]
    x_ref: Any,  # f[T, d_in]
    pool_ref: Any,  # f[P, E]
    h_ref: Any,  # f[splits, T, P * ranks]
    *,
    group: GroupLayout,
    config: ShrinkConfig,
    block_rows: int,
    group_ranks: int,
    page_elems: int,
    ranks: int,
) -> None:
    """Multiply every `programs`-th item from this one on, for one split of d_in.

    Reads block_rows + P * group_ranks rows of d_in / splits elements an item.
    """
    program, split = pl.program_id(0), pl.program_id(1)
    block_k = config.block_k
    span = -(-group.d_in // (config.splits * block_k)) * block_k
    first_k = pl.multiple_of(split * np.int32(span), span)
    lane = jnp.arange(block_k, dtype=jnp.int32)

    def item(turn: jax.Array, _: None) -> None:
        at = program + turn * np.int32(config.programs)
        table_row, first, end = items_ref[0, at], items_ref[1, at], items_ref[2, at]
        rows = _rows(first, block_rows)
        readers = [
            reader_of_a(
                pool_ref, pages_ref, table_row, p, first_k, span,
                group=group, config=config, group_ranks=group_ranks,
                page_elems=page_elems,
            )
            for p in range(len(group.projections))
        ]  # fmt: skip

        def tile(step: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            k = step * np.int32(block_k)
            feature = first_k + k + lane
            mask = (rows < end)[:, None]
            if config.lookup == "element":  # d_in need not be whole tiles
                mask = mask & (feature < np.int32(group.d_in))[None, :]
            x = _load(x_ref, (rows[:, None], feature[None, :]), mask)
            return tuple(
                s + dot(x, read(k).T) for s, read in zip(sums, readers, strict=True)
            )

        zero = jnp.zeros((block_rows, group_ranks), jnp.float32)
        sums = lax.fori_loop(0, span // block_k, tile, (zero,) * len(group.projections))
        column = items_ref[3, at] * np.int32(group_ranks)
        column += jnp.arange(group_ranks, dtype=jnp.int32)
        for p, value in enumerate(sums):
            place = (rows[:, None], (column + np.int32(p * ranks))[None, :])
            _store(h_ref, place, value, (rows < end)[:, None], lead=split)

    lax.fori_loop(0, _turns(counts_ref[0], program, config.programs), item, None)


def _expand_kernel(
    counts_ref: Any,  # i32[2]
    blocks_ref: Any,  # i32[4, RB]
    pages_ref: Any,  # i32[C, W]
    h_ref: Any,  # f[splits, T, P * ranks]
    pool_ref: Any,  # f[P, E]
    _: Any,  # f[T, N], y by its input's name
    y_ref: Any,  # f[T, N]
    *,
    group: GroupLayout,
    config: ExpandConfig,
    tiles: list[int],
    block_rows: int,
    group_ranks: int,
    page_elems: int,
    ranks: int,
) -> None:
    """Add one tile of columns to every `programs`-th row block from this one on.

    Reads the tile's column of the adapter's B, and y and h of the block's rows. y is
    read by its output's name: the compiler may take the two for different memory.
    """
    tile, program = pl.program_id(0), pl.program_id(1)
    lane = jnp.arange(config.block_n, dtype=jnp.int32)
    p, rest, b_column, y_column = columns_of(tile, tiles, group, config)
    rank = jnp.arange(group_ranks, dtype=jnp.int32)
    inside = (lane < rest)[None, :]

    def block(turn: jax.Array, _: None) -> None:
        at = program + turn * np.int32(config.programs)
        table_row, first, end = blocks_ref[0, at], blocks_ref[1, at], blocks_ref[2, at]
        rows = _rows(first, block_rows)
        own = (rows < end)[:, None]
        read = reader_of_b(
            pool_ref, pages_ref, table_row, b_column, rest,
            group=group, config=config, group_ranks=group_ranks,
            page_elems=page_elems,
        )  # fmt: skip

        def add_group(g: jax.Array, total: jax.Array) -> jax.Array:
            column = p * np.int32(ranks) + g * np.int32(group_ranks) + rank
            place = (rows[:, None], column[None, :])
            h = _load(h_ref, place, own, lead=np.int32(0))
            for split in range(1, h_ref.shape[0]):
                h += _load(h_ref, place, own, lead=np.int32(split))
            return total + dot(h.astype(pool_ref.dtype), read(g))

        zero = jnp.zeros((block_rows, config.block_n), jnp.float32)
        total = lax.fori_loop(0, blocks_ref[3, at], add_group, zero)
        place = (rows[:, None], (y_column + lane)[None, :])
        mask = own & inside if config.lookup == "element" else own
        y = _load(y_ref, place, mask)
        _store(y_ref, place, y.astype(jnp.float32) + total, mask)

    lax.fori_loop(0, _turns(counts_ref[1], program, config.programs), block, None)


def _turns(count: jax.Array, program: jax.Array, programs: int) -> jax.Array:
    """Return how many of `count` entries are dealt to a program."""
    return lax.div(count - program + np.int32(programs - 1), np.int32(programs))


def _rows(first: jax.Array, block_rows: int) -> jax.Array:
    """Return i32[block_rows], the tokens of a block, those beyond its end too."""
    return first + jnp.arange(block_rows, dtype=jnp.int32)


def _load(
    ref: Any,
    place: tuple[jax.Array, jax.Array],
    mask: jax.Array,
    *,
    lead: jax.Array | np.int32 | None = None,
) -> jax.Array:
    """Return the elements at rows x columns, 0 where masked; `lead` indexes axis 0."""
    at, mask = _broadcast(place, mask, lead)
    return _compat.load(ref.at[at], mask=mask, other=0)


def _store(
    ref: Any,
    place: tuple[jax.Array, jax.Array],
    value: jax.Array,
    mask: jax.Array,
    *,
    lead: jax.Array | None = None,
) -> None:
    at, mask = _broadcast(place, mask, lead)
    _compat.store(ref.at[at], value.astype(ref.dtype), mask=mask)


def _broadcast(
    place: tuple[jax.Array, jax.Array],
    mask: jax.Array,
    lead: jax.Array | np.int32 | None,
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Return index arrays of the tile's shape: interpreted kernels take no other."""
    shape = (place[0].shape[0], place[1].shape[1])
    parts = place if lead is None else (lead, *place)
    at = tuple(jnp.broadcast_to(part, shape) for part in parts)
    return at, jnp.broadcast_to(mask, shape)
