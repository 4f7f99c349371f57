"""Where every element of an adapter lies in the pages of the pool.

An adapter is a list of rank-8 chunks. In every layer a chunk holds, for each group of
projections that read the same input, `A: [P, 8, d_in]` and then `B: [8, sum(d_out)]`,
each at an offset that is a multiple of 64 elements (128 bytes of bfloat16: what wide
asynchronous copies want, with room to spare). A chunk occupies whole pages. Element e
of chunk c is element `e % page_elems` of page `c * pages_per_chunk + e // page_elems`.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import ml_dtypes
import numpy as np

from jchameleon.config import PROJECTIONS, ModelConfig
from jchameleon.errors import AdapterError, ConfigError
from jchameleon.lora.adapter import AdapterCard, HostAdapter, LoraPair

CHUNK_RANK = 8
"""Ranks of one chunk."""

ALIGN_ELEMS = 64
"""Every block of a chunk starts at a multiple of this many elements."""

GROUPS = {
    "qkv": ("q", "k", "v"),
    "o": ("o",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}
"""Projections that share an input and a fused base matrix, in layer order."""

_PACK_DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GroupLayout:
    """Blocks of one group within a chunk; offsets and extents in elements.

    Attributes:
      name: one of `GROUPS`.
      projections: targets of the group, in canonical order.
      d_in: input features.
      columns: (start, size) of each projection among the B columns.
      out_columns: (start, size) of each projection among the rows of the fused base
        matrix (q | k | v, gate | up).
      a_offset: first element of A within the chunk.
      a_shape: (P, 8, d_in).
      b_offset: first element of B within the chunk.
      b_shape: (8, sum of d_out).
    """

    name: str
    projections: tuple[str, ...]
    d_in: int
    columns: Mapping[str, tuple[int, int]]
    out_columns: Mapping[str, tuple[int, int]]
    a_offset: int
    a_shape: tuple[int, int, int]
    b_offset: int
    b_shape: tuple[int, int]


@dataclasses.dataclass(frozen=True, slots=True)
class ChunkLayout:
    """Layout of rank-8 chunks for one model, one set of targets and one page size.

    Attributes:
      model: shapes of the projections.
      targets: projections that adapters may touch, or none; kept in canonical order.
      page_elems: elements of a page in one layer, a multiple of 64.
      groups: blocks of a chunk, in layer order.
      chunk_elems: elements of a chunk in one layer, before rounding to pages.
      pages_per_chunk: whole pages that a chunk occupies.
    """

    model: ModelConfig
    targets: tuple[str, ...]
    page_elems: int
    groups: tuple[GroupLayout, ...] = dataclasses.field(
        init=False, repr=False, compare=False
    )
    chunk_elems: int = dataclasses.field(init=False, compare=False)
    pages_per_chunk: int = dataclasses.field(init=False, compare=False)

    def __post_init__(self) -> None:
        if any(target not in PROJECTIONS for target in self.targets):
            raise ConfigError(
                f"targets={self.targets!r} must be among " + ", ".join(PROJECTIONS)
            )
        if self.page_elems <= 0 or self.page_elems % ALIGN_ELEMS:
            raise ConfigError(
                f"page_elems={self.page_elems} must be a positive multiple of "
                f"{ALIGN_ELEMS}"
            )
        targets = tuple(p for p in PROJECTIONS if p in self.targets)
        groups: list[GroupLayout] = []
        chunk_elems = 0
        for name, members in GROUPS.items():
            projections = tuple(p for p in members if p in targets)
            if projections:
                group = _group_layout(self.model, name, projections, chunk_elems)
                groups.append(group)
                chunk_elems = _align(group.b_offset + CHUNK_RANK * group.b_shape[1])
        set_field = object.__setattr__
        set_field(self, "targets", targets)
        set_field(self, "groups", tuple(groups))
        set_field(self, "chunk_elems", chunk_elems)
        # Without targets there are no adapters, and so no chunks.
        set_field(self, "pages_per_chunk", max(1, -(-chunk_elems // self.page_elems)))

    def num_chunks(self, rank: int) -> int:
        """Return the chunks of an adapter of `rank` >= 1: ceil(rank / 8)."""
        if rank < 1:
            raise AdapterError(f"{rank=} must be at least 1")
        return -(-rank // CHUNK_RANK)

    def num_pages(self, rank: int) -> int:
        """Return the pages of an adapter of `rank` >= 1."""
        return self.num_chunks(rank) * self.pages_per_chunk

    def pack(self, adapter: HostAdapter, *, dtype: np.typing.DTypeLike) -> np.ndarray:
        """Lay out an adapter in pages: `dtype`[L, num_pages, page_elems].

        The scale is folded into B in float32; then both factors are rounded to `dtype`
        (float32 or bfloat16), to nearest even. Chunk c owns pages c*W .. c*W+W-1, W
        being `pages_per_chunk`. Everything that the adapter does not set is zero:
        projections it does not touch, ranks beyond a module's own, padding.

        Raises:
          AdapterError: it touches projections, layers or shapes this layout lacks.
        """
        out_dtype = np.dtype(dtype)
        if out_dtype not in _PACK_DTYPES:
            raise ConfigError(f"dtype={out_dtype} must be float32 or bfloat16")
        self.check_targets(adapter)
        chunks = self.num_chunks(adapter.rank)
        pages = np.zeros(
            (self.model.num_layers, chunks, self.pages_per_chunk * self.page_elems),
            out_dtype,
        )
        blocks = {p: (g, i) for g in self.groups for i, p in enumerate(g.projections)}
        for (layer, projection), pair in adapter.modules.items():
            self._check_module(layer, projection, pair)
            group, index = blocks[projection]
            _pack_module(pages[layer], group, index, pair)
        return pages.reshape(
            self.model.num_layers, chunks * self.pages_per_chunk, self.page_elems
        )

    def check_targets(self, adapter: HostAdapter | AdapterCard) -> None:
        """Raise AdapterError if `adapter` touches projections outside `targets`."""
        extra = [
            p for p in PROJECTIONS if p in adapter.targets and p not in self.targets
        ]
        if extra:
            raise AdapterError(
                f"adapter touches {', '.join(extra)}, but lora_targets are "
                + (", ".join(self.targets) or "none: LoRA is off")
            )

    def _check_module(self, layer: int, projection: str, pair: LoraPair) -> None:
        d_in, d_out = self.model.projection_shape(projection)
        if not 0 <= layer < self.model.num_layers:
            raise AdapterError(
                f"adapter touches layer {layer}, the model has {self.model.num_layers}"
            )
        expected = ((pair.rank, d_in), (d_out, pair.rank))
        if (pair.a.shape, pair.b.shape) != expected:
            raise AdapterError(
                f"layer {layer} {projection}: A {pair.a.shape} and B {pair.b.shape} "
                f"must be {expected[0]} and {expected[1]}"
            )


def _group_layout(
    model: ModelConfig, name: str, projections: tuple[str, ...], offset: int
) -> GroupLayout:
    out_columns = {}
    start = 0
    for projection in GROUPS[name]:
        size = model.projection_shape(projection)[1]
        out_columns[projection] = (start, size)
        start += size
    columns = {}
    start = 0
    for projection in projections:
        size = model.projection_shape(projection)[1]
        columns[projection] = (start, size)
        start += size
    d_in = model.projection_shape(projections[0])[0]
    return GroupLayout(
        name=name,
        projections=projections,
        d_in=d_in,
        columns=MappingProxyType(columns),
        out_columns=MappingProxyType({p: out_columns[p] for p in projections}),
        a_offset=offset,
        a_shape=(len(projections), CHUNK_RANK, d_in),
        b_offset=_align(offset + len(projections) * CHUNK_RANK * d_in),
        b_shape=(CHUNK_RANK, start),
    )


def _pack_module(
    chunks: np.ndarray,  # [C, W * page_elems], written
    group: GroupLayout,
    index: int,
    pair: LoraPair,
) -> None:
    start, size = group.columns[group.projections[index]]
    width = group.b_shape[1]
    a_offset = group.a_offset + index * CHUNK_RANK * group.d_in
    a_blocks = chunks[:, a_offset : a_offset + CHUNK_RANK * group.d_in]
    b_blocks = chunks[:, group.b_offset : group.b_offset + CHUNK_RANK * width]
    a_rows = a_blocks.reshape(-1, CHUNK_RANK, group.d_in)
    b_rows = b_blocks.reshape(-1, CHUNK_RANK, width)[:, :, start : start + size]
    a = pair.a.astype(np.float32, copy=False)
    b = pair.b.astype(np.float32, copy=False) * np.float32(pair.scale)
    _scatter_ranks(a_rows, a.astype(chunks.dtype, copy=False))
    _scatter_ranks(b_rows, b.astype(chunks.dtype, copy=False).T)


def _scatter_ranks(
    rows: np.ndarray,  # [C, 8, n], a view of the chunks
    values: np.ndarray,  # [r, n]
) -> None:
    whole, rest = divmod(values.shape[0], CHUNK_RANK)
    rows[:whole] = values[: whole * CHUNK_RANK].reshape(rows[:whole].shape)
    if rest:
        rows[whole, :rest] = values[whole * CHUNK_RANK :]


def _align(elems: int) -> int:
    return -(-elems // ALIGN_ELEMS) * ALIGN_ELEMS
