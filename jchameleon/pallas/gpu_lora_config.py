"""Block sizes of the GPU's LoRA kernels, and which of them a shape allows.

Blocks of A and B lie anywhere in a chunk, and a chunk in any pages. A tile is cheap to
read where it cannot straddle two pages, which divisibility assures: its address is then
a page's plus a multiple of 16 bytes, and loads are wide and asynchronous. How often a
row of A looks its page up is the `lookup`, fixed by the shapes:

  static   the 8 rows of a projection lie in one page: one lookup of a known slot
  hoist    what a program reads of a row lies in one page: a lookup per row
  select   it lies in two: two lookups per row, and a choice per tile
  element  anything: a lookup per element. Slow; no known model needs it
"""

import dataclasses
import math
from typing import Any, Literal

from jchameleon.lora.layout import GroupLayout
from jchameleon.pallas.gpu_device import (
    MIN_CONTRACTION,
    check_launch,
    multiprocessors,
)
from jchameleon.pallas.tuned import Key, make_key

Lookup = Literal["static", "hoist", "select", "element"]

SPLITS = (4, 3, 5, 2, 6, 7, 8, 9, 10, 12, 14, 15, 16, 1)
"""Cuts of a decode step's contraction in order of preference: 4 fill a GPU with few
adapters (A40, A100 and H100 alike), more of them cost traffic of h."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShrinkConfig:
    """How h = A x is computed.

    Attributes:
      block_k: input features of a tile.
      splits: programs that share the features of an item, each with a sum of its own.
      lookup: how pages are found.
      programs: of the grid, for each split; items are dealt to them in turn.
    """

    block_k: int
    splits: int
    lookup: Lookup
    programs: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExpandConfig:
    """How y += B h is computed.

    Attributes:
      block_n: output features of a tile.
      lookup: "hoist" (a tile's row in one page) or "element".
      programs: of the grid, for each tile; row blocks are dealt to them in turn.
    """

    block_n: int
    lookup: Lookup
    programs: int
    num_warps: int
    num_stages: int


def choose_shrink(
    group: GroupLayout,
    page_elems: int,
    *,
    num_items: int,
    prefill: bool,
    elem_bytes: int = 2,
    arch: str | None = None,
) -> ShrinkConfig:
    """Return the block sizes for a shape.

    Grids are sized by the GPU, not by the longest list a step may bring: with ranks to
    128 and 64 rows that is 512 items, of which most steps have a tenth. Programs take
    items in turn, so that live work alone costs.

    Args:
      num_items: the most items of a step.
      elem_bytes: of the pool. Products of float32 take no tensor cores but registers,
        which smaller tiles and more warps make up for.
      arch: "sm_80", "sm_86", "sm_90"; another or None counts as sm_80.
    """
    wide = elem_bytes > 2
    most = 32 if wide else 64 if prefill else 128
    block_k, splits, lookup = _tile_of_a(
        group, page_elems, prefill=prefill, most_k=most
    )
    programs = 4 * multiprocessors(arch) // splits
    return ShrinkConfig(
        block_k=block_k,
        splits=splits,
        lookup=lookup,
        programs=max(1, min(num_items, programs)),
        # With 16 columns all warps would repeat the same product.
        num_warps=(4 if prefill else 2) * (2 if wide else 1),
        num_stages=3,
    )


def choose_expand(
    group: GroupLayout,
    page_elems: int,
    *,
    num_blocks: int,
    prefill: bool,
    elem_bytes: int = 2,
    arch: str | None = None,
) -> ExpandConfig:
    """Return the block sizes for a shape; arguments as of `choose_shrink`."""
    most = 64 if elem_bytes > 2 else 128
    block_n = _power_of_two(_b_divisor(group, page_elems), most=most)
    lookup: Lookup = "hoist"
    if block_n < MIN_CONTRACTION:
        block_n, lookup = 32, "element"
    tiles = sum(-(-size // block_n) for _, size in group.columns.values())
    programs = 8 * multiprocessors(arch) // tiles
    return ExpandConfig(
        block_n=block_n,
        lookup=lookup,
        programs=max(1, min(num_blocks, programs)),
        num_warps=4,
        num_stages=3,
    )


def shrink_key(
    group: GroupLayout,
    page_elems: int,
    *,
    num_tokens: int,
    num_items: int,
    prefill: bool,
    dtype: Any,
) -> Key:
    """Return what a table knows a call of shrink by."""
    return make_key(
        "lora_shrink",
        phase="prefill" if prefill else "decode",
        dtype=dtype,
        tokens=num_tokens,
        items=num_items,
        page_elems=page_elems,
        d_in=group.d_in,
        projections=len(group.projections),
        a_offset=group.a_offset,
    )


def expand_key(
    group: GroupLayout,
    page_elems: int,
    *,
    num_tokens: int,
    num_blocks: int,
    prefill: bool,
    dtype: Any,
) -> Key:
    """Return what a table knows a call of expand by."""
    return make_key(
        "lora_expand",
        phase="prefill" if prefill else "decode",
        dtype=dtype,
        tokens=num_tokens,
        blocks=num_blocks,
        page_elems=page_elems,
        b_offset=group.b_offset,
        columns=tuple(group.columns[p][1] for p in group.projections),
        y_columns=tuple(group.out_columns[p][0] for p in group.projections),
    )


def check_shrink(config: ShrinkConfig, group: GroupLayout, page_elems: int) -> None:
    """Raise ValueError where `config` would read or add up the wrong elements."""
    _check_common(config, page_elems)
    block_k, splits, d_in = config.block_k, config.splits, group.d_in
    _check_tile("block_k", block_k)
    if splits < 1:
        raise ValueError(f"{splits=} must be at least 1")
    if config.lookup == "element":
        if splits != 1:
            raise ValueError(f"{splits=} must be 1 with lookup='element'")
        return
    if d_in % (splits * block_k):
        raise ValueError(
            f"{d_in=} must be a multiple of splits * block_k = {splits * block_k}"
        )
    divisor = math.gcd(page_elems, group.a_offset)
    if divisor % block_k:
        raise ValueError(
            f"{block_k=} must divide {page_elems=} and a_offset={group.a_offset}"
        )
    if config.lookup not in _lookups(group, page_elems, splits):
        raise ValueError(
            f"lookup={config.lookup!r} cannot find runs of {d_in // splits} elements "
            f"of A in pages of {page_elems}"
        )


def check_expand(config: ExpandConfig, group: GroupLayout, page_elems: int) -> None:
    """Raise ValueError where `config` would read or write the wrong elements."""
    _check_common(config, page_elems)
    _check_tile("block_n", config.block_n)
    if config.lookup == "element":
        return
    if config.lookup != "hoist":
        raise ValueError(f"lookup={config.lookup!r} must be 'hoist' or 'element'")
    divisor = _b_divisor(group, page_elems)
    if divisor % config.block_n:
        raise ValueError(
            f"block_n={config.block_n} must divide {divisor}, the greatest common "
            f"divisor of {page_elems=}, b_offset={group.b_offset} and all columns"
        )


def _check_common(config: ShrinkConfig | ExpandConfig, page_elems: int) -> None:
    if page_elems % 8:
        raise ValueError(f"{page_elems=} must be a multiple of 8: loads of 16 bytes")
    if config.programs < 1:
        raise ValueError(f"programs={config.programs} must be at least 1")
    check_launch(config.num_warps, config.num_stages)


def _check_tile(name: str, value: int) -> None:
    if value < MIN_CONTRACTION or value & (value - 1):
        raise ValueError(f"{name}={value} must be a power of two >= {MIN_CONTRACTION}")


def _tile_of_a(
    group: GroupLayout, page_elems: int, *, prefill: bool, most_k: int
) -> tuple[int, int, Lookup]:
    """Return (block_k, splits, lookup); the cheapest lookup decides the splits."""
    d_in = group.d_in
    divisor = math.gcd(d_in, page_elems, group.a_offset)
    block_k = _power_of_two(divisor, most=most_k)
    if block_k < MIN_CONTRACTION:
        return min(64, most_k), 1, "element"
    # A prefill fills the GPU by itself, and writes h in half the bytes if it is whole.
    order = sorted(SPLITS) if prefill else SPLITS
    fitting = [splits for splits in order if d_in % (splits * block_k) == 0]
    for wanted in ("select",) if prefill else ("hoist", "select"):
        for splits in fitting:
            lookups = _lookups(group, page_elems, splits)
            if wanted in lookups:
                return block_k, splits, lookups[0]
    return block_k, 1, "element"


def _lookups(group: GroupLayout, page_elems: int, splits: int) -> list[Lookup]:
    """Return the lookups that find every element, the cheapest first."""
    num_projections, ranks, d_in = group.a_shape
    span = d_in // splits
    found: list[Lookup] = []
    rows = range(num_projections * ranks)
    blocks = [group.a_offset + p * ranks * d_in for p in range(num_projections)]
    if not any(_straddles(e, ranks * d_in, page_elems) for e in blocks):
        found.append("static")
    runs = [
        group.a_offset + row * d_in + split * span
        for row in rows
        for split in range(splits)
    ]
    if not any(_straddles(e, span, page_elems) for e in runs):
        found.append("hoist")
    if span <= page_elems:
        found.append("select")
    return [*found, "element"]


def _straddles(first: int, count: int, page_elems: int) -> bool:
    return first // page_elems != (first + count - 1) // page_elems


def _b_divisor(group: GroupLayout, page_elems: int) -> int:
    """Return what tiles of columns must divide, so that none straddles anything."""
    extents = [group.b_shape[1]]
    for projection in group.projections:
        # Sizes for the tiles, starts for the addresses of y.
        extents += [*group.columns[projection], *group.out_columns[projection]]
    return math.gcd(page_elems, group.b_offset, *extents)


def _power_of_two(number: int, *, most: int) -> int:
    """Return the largest power of two up to `most` that divides `number`."""
    return math.gcd(number, most)
