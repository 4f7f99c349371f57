"""Move adapters from host memory to the device while steps run.

A small thread pool packs an adapter into pages and starts its copy; the engine thread
polls and commits what has arrived. On CPU `device_put` may alias numpy memory, so every
block is a fresh array that nobody writes again.
"""

import concurrent.futures
import dataclasses
import logging
from collections.abc import Callable

import jax
import numpy as np

from jchameleon.lora.adapter import HostAdapter
from jchameleon.lora.layout import ChunkLayout

logger = logging.getLogger(__name__)

CHUNKS_PER_PIECE = 4
"""Chunks that one commit program writes: 32 ranks bound the staging memory."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Part of an adapter on its way into the pool.

    Attributes:
      pages: i32[N], target pages; padding repeats the first row with its page.
      block: f[L, N, E] on the device.
    """

    pages: np.ndarray
    block: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FinishedLoad:
    """A load that arrived, or failed for a reason.

    Attributes:
      uid: the adapter.
      pieces: what to commit; empty after a failure.
      error: why it failed, or None.
    """

    uid: str
    pieces: tuple[Piece, ...]
    error: str | None


def piece_pages(layout: ChunkLayout) -> int:
    """Return the fixed number of pages of a `Piece`."""
    return CHUNKS_PER_PIECE * layout.pages_per_chunk


def split_pieces(
    packed: np.ndarray,  # f[L, n, E]
    pages: tuple[int, ...],  # n target pages
    piece: int,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (pages i32[piece], block f[L, piece, E]) pairs that cover `packed`."""
    out = []
    for start in range(0, len(pages), piece):
        rows = np.arange(start, start + piece)
        rows[rows >= len(pages)] = start
        out.append((np.asarray(pages, np.int32)[rows], packed[:, rows]))
    return out


class AdapterLoader:
    """Starts loads and hands back those that finished. Engine thread only."""

    def __init__(
        self,
        layout: ChunkLayout,
        dtype: np.dtype,
        device: jax.Device,
        *,
        notify: Callable[[], None],
        threads: int = 2,
    ):
        """Create the thread pool.

        Args:
          layout: how an adapter lies in pages.
          dtype: of the pool.
          device: where the pool lives.
          notify: called from a worker when a load may be ready to poll.
          threads: adapters packed at once.
        """
        self._layout = layout
        self._dtype = dtype
        self._device = device
        self._notify = notify
        self._threads = concurrent.futures.ThreadPoolExecutor(
            threads, thread_name_prefix="jchameleon-load"
        )
        self._started: dict[str, concurrent.futures.Future] = {}

    @property
    def in_flight(self) -> int:
        """Loads started and not yet handed back."""
        return len(self._started)

    def start(self, adapter: HostAdapter, pages: tuple[int, ...]) -> None:
        """Begin to load `adapter` into `pages`, which the planner reserved."""
        assert adapter.uid not in self._started, "one load per adapter"
        future = self._threads.submit(self._stage, adapter, pages)
        future.add_done_callback(lambda _: self._notify())
        self._started[adapter.uid] = future

    def poll(self) -> list[FinishedLoad]:
        """Return the loads that arrived or failed since the last call."""
        finished = []
        for uid, future in list(self._started.items()):
            if not future.done():
                continue
            error = future.exception()
            if error is None and not all(p.block.is_ready() for p in future.result()):
                continue
            del self._started[uid]
            if error is not None:
                logger.error("adapter %s failed to load", uid[:12], exc_info=error)
            finished.append(
                FinishedLoad(
                    uid=uid,
                    pieces=() if error else tuple(future.result()),
                    error=f"{type(error).__name__}: {error}" if error else None,
                )
            )
        return finished

    def close(self) -> None:
        """Stop the threads; loads under way are dropped."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _stage(self, adapter: HostAdapter, pages: tuple[int, ...]) -> list[Piece]:
        packed = self._layout.pack(adapter, dtype=self._dtype)
        return [
            Piece(pages=rows, block=jax.device_put(block, self._device))
            for rows, block in split_pieces(packed, pages, piece_pages(self._layout))
        ]
