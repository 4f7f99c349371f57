"""Lay the rows of a step out as the arrays that its program takes."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jchameleon.config import PREFILL_TILE_TOKENS, TRASH_PAGE
from jchameleon.lora.layout import ChunkLayout
from jchameleon.pallas.operations import XLA, Operations
from jchameleon.runtime.decode_rows import DecodeRows
from jchameleon.runtime.drawing import RowSampling, StepSampling
from jchameleon.runtime.programs import StepBatch
from jchameleon.runtime.scoring import Targets
from jchameleon.runtime.shapes import sampler_rows


class StepRow(NamedTuple):
    """One request's part of a step, for prefill; decode has `DecodeRows`.

    Attributes:
      tokens: i32[n], a prompt chunk, or the last token in decode.
      start: position of the first of them.
      pages: i32[NB], the request's KV pages, padded with 0.
      adapter_uid: resident adapter, or None.
      sampling: how to draw the next token; None inside a prompt.
      targets: prompt tokens to score; in prefill only.
    """

    tokens: np.ndarray
    start: int
    pages: np.ndarray
    adapter_uid: str | None
    sampling: RowSampling | None
    targets: Targets | None = None


class BatchBuilder:
    """Builds steps, and knows the pages of resident adapters for them.

    Built with numpy: the compiled call copies the arrays to the device.
    """

    def __init__(
        self,
        layout: ChunkLayout,
        *,
        block_tokens: int,
        max_blocks: int,
        max_chunks: int,
        dtype: np.dtype,
        ops: Operations = XLA,
    ) -> None:
        """Start without adapters.

        Args:
          max_chunks: of the largest adapter allowed.
          dtype: of the pool.
          ops: what the steps are built for.
        """
        self._layout = layout
        self._dtype = dtype
        self._ops = ops
        self._block_tokens = block_tokens
        self._max_blocks = max_blocks
        self._max_chunks = max_chunks
        self._adapter_pages: dict[str, np.ndarray] = {}
        self._lora_cache: tuple[Any, Any] | None = None

    @property
    def num_adapters(self) -> int:
        """Adapters that rows may name now."""
        return len(self._adapter_pages)

    def place(self, uid: str, pages: tuple[int, ...]) -> None:
        """Let rows name an adapter that lies in `pages`."""
        self._adapter_pages[uid] = np.asarray(pages, np.int32).reshape(
            -1, self._layout.pages_per_chunk
        )

    def remove(self, uid: str) -> None:
        """Forget an adapter's pages."""
        del self._adapter_pages[uid]
        self._lora_cache = None  # the same uid may come back in other pages

    def build(
        self,
        rows: Sequence[StepRow],
        num_tokens: int,
        *,
        prefill: bool,
    ) -> StepBatch:
        """Return the batch of a step of `num_tokens`, which the rows may not fill."""
        if not prefill:
            return self.build_decode(decode_rows(rows), num_tokens)
        uids = (row.adapter_uid for row in rows)

        def fill(*args: Any) -> None:
            self._fill_prefill(rows, *args)

        return self._build(fill, uids, num_tokens, tile=PREFILL_TILE_TOKENS)

    def build_decode(self, rows: DecodeRows, num_tokens: int) -> StepBatch:
        """Return the batch of a decode step for up to `num_tokens` rows."""

        def fill(*args: Any) -> None:
            self._fill_decode(rows, *args)

        return self._build(fill, rows.adapter_uids, num_tokens, tile=1)

    def _build(
        self,
        fill: Callable[..., None],
        adapter_uids: Iterable[str | None],
        num_tokens: int,
        *,
        tile: int,
    ) -> StepBatch:
        num_tiles = num_tokens // tile
        fields: dict[str, Any] = {
            "tokens": np.zeros(num_tokens, np.int32),
            "positions": np.zeros(num_tokens, np.int32),
            "kv_pages": np.full(num_tokens, TRASH_PAGE, np.int32),
            "page_table": np.zeros((num_tiles, self._max_blocks), np.int32),
            "context_tokens": np.ones(num_tiles, np.int32),
            "logit_tokens": np.zeros(sampler_rows(num_tiles), np.int32),
        }
        token_adapter = np.full(num_tokens, -1, np.int32)
        # In order of appearance; the work list numbers them so.
        uids = tuple(uid for uid in dict.fromkeys(adapter_uids) if uid is not None)
        indices: dict[str | None, int] = {uid: i for i, uid in enumerate(uids)}
        indices[None] = -1
        fill(fields, token_adapter, indices)
        blocks: Any = None
        if self._ops.build_blocks is not None:
            blocks = self._ops.build_blocks(
                fields["page_table"],
                fields["positions"],
                fields["context_tokens"],
                model=self._layout.model,
                dtype=self._dtype,
            )
        lora = self._lora_work(token_adapter, uids, tile)
        return StepBatch(**fields, lora=lora, blocks=blocks)

    def _fill_decode(
        self,
        rows: DecodeRows,
        fields: dict[str, np.ndarray],
        token_adapter: np.ndarray,
        indices: dict[str | None, int],
    ) -> None:
        """Write one token per row; whole columns at once, this is every step's work."""
        count = len(rows.tokens)
        if not count:
            return
        adapters = np.array([indices[uid] for uid in rows.adapter_uids], np.int32)
        each = np.arange(count)
        order: Any = slice(count)
        if self._ops.sorts_rows:
            order = np.argsort(adapters, kind="stable")
        fields["logit_tokens"][order] = each
        num_tokens = rows.num_tokens[order]
        table = fields["page_table"]
        table[:count] = rows.pages[order]
        fields["tokens"][:count] = rows.tokens[order]
        fields["positions"][:count] = num_tokens - 1
        fields["kv_pages"][:count] = table[each, (num_tokens - 1) // self._block_tokens]
        fields["context_tokens"][:count] = num_tokens
        token_adapter[:count] = adapters[order]

    def _fill_prefill(
        self,
        rows: Sequence[StepRow],
        fields: dict[str, np.ndarray],
        token_adapter: np.ndarray,
        indices: dict[str | None, int],
    ) -> None:
        """Write prompt chunks, each from a new tile on."""
        tile = PREFILL_TILE_TOKENS
        at = 0  # first tile of the row
        for row, tiles in zip(rows, row_tiles(rows), strict=True):
            first, count = at * tile, len(row.tokens)
            own = slice(first, first + count)
            place = np.arange(row.start, row.start + count, dtype=np.int32)
            fields["tokens"][own] = row.tokens
            fields["positions"][own] = place
            fields["kv_pages"][own] = row.pages[place // self._block_tokens]
            token_adapter[own] = indices[row.adapter_uid]
            last = at + tiles - 1
            fields["page_table"][at : last + 1] = row.pages
            fields["context_tokens"][at : last + 1] = np.minimum(
                row.start + tile * np.arange(1, tiles + 1), row.start + count
            )
            fields["logit_tokens"][last] = first + count - 1
            at += tiles

    def _lora_work(
        self, token_adapter: np.ndarray, uids: tuple[str, ...], tile: int
    ) -> Any:
        # Rows and adapters seldom change from one decode step to the next.
        key = (tile, uids, token_adapter.tobytes())
        if self._lora_cache is not None and self._lora_cache[0] == key:
            return self._lora_cache[1]
        work = self._ops.build_lora(
            token_adapter,
            [self._adapter_pages[uid] for uid in uids],
            tile=tile,
            max_chunks=self._max_chunks,
            pages_per_chunk=self._layout.pages_per_chunk,
        )
        if tile == 1:
            self._lora_cache = (key, work)
        return work


def decode_rows(rows: Sequence[StepRow]) -> DecodeRows:
    """Return single rows as the columns of a decode step."""
    return DecodeRows(
        tokens=np.array([row.tokens[-1] for row in rows], np.int32),
        num_tokens=np.array([row.start + 1 for row in rows], np.int32),
        pages=np.array([row.pages for row in rows], np.int32),
        adapter_uids=[row.adapter_uid for row in rows],
        sampling=StepSampling.of([row.sampling for row in rows]),
    )


def row_tiles(rows: Sequence[StepRow]) -> list[int]:
    """Return how many tiles of a prefill step each row takes."""
    return [-(-len(row.tokens) // PREFILL_TILE_TOKENS) for row in rows]


def last_tiles(rows: Sequence[StepRow]) -> np.ndarray:
    """Return i64[rows], the last tile of each row within a prefill step."""
    return np.cumsum(row_tiles(rows)) - 1
