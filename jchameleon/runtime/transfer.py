"""Move adapters to the device while steps run.

A load fetches an adapter from host memory or disk, packs it into pages and starts its
copy, all on a thread of its own; the engine thread polls and commits what has arrived.
On CPU `device_put` may alias numpy memory, so every block is a fresh array that nobody
writes again.
"""

import concurrent.futures
import dataclasses
import logging
import threading
import time
from collections.abc import Callable

import jax
import numpy as np

from jchameleon.config import EngineConfig
from jchameleon.lora.adapter import HostAdapter
from jchameleon.lora.layout import ChunkLayout
from jchameleon.runtime.faults import Fault, load_fault

logger = logging.getLogger(__name__)

CHUNKS_PER_PIECE = 4
"""Chunks that one commit program writes: 32 ranks bound the staging memory."""

PACKERS = 2
"""Adapters packed at once: packing takes cores and memory bandwidth from the steps."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EmulatedLink:
    """A first-in, first-out link to put in place of a copy that costs next to nothing.

    For machines whose device memory is host memory. Loads go over it in the order in
    which they start: a load's bytes occupy it for bytes / bytes_per_s once those before
    it are through, and arrive `latency_s` later, which delays nobody else.
    """

    bytes_per_s: float
    latency_s: float = 0.0

    def __str__(self) -> str:
        return f"{self.bytes_per_s:g} B/s + {self.latency_s:g} s"


def emulated_link(config: EngineConfig) -> EmulatedLink | None:
    """Return the link that a configuration asks for, if any."""
    bytes_per_s = config.link_bytes_per_s
    if bytes_per_s is None:
        return None
    return EmulatedLink(bytes_per_s=bytes_per_s, latency_s=config.link_latency_s)


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
      error: why it failed, or None; fault: what kind of reason.
    """

    uid: str
    pieces: tuple[Piece, ...]
    error: str | None
    fault: Fault = "internal"


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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Started:
    """A load under way: its staged pieces, and when the link delivers them."""

    pieces: concurrent.futures.Future
    due_s: float


class AdapterLoader:
    """Starts loads and hands back those that finished. Engine thread only."""

    def __init__(
        self,
        layout: ChunkLayout,
        dtype: np.dtype,
        device: jax.Device,
        *,
        fetch: Callable[[str], HostAdapter],
        notify: Callable[[], None],
        max_in_flight: int,
        link: EmulatedLink | None = None,
    ):
        """Create the thread pool.

        Args:
          layout: how an adapter lies in pages.
          dtype: of the pool.
          device: where the pool lives.
          fetch: returns the adapter of a uid, or raises; called on a worker, where it
            may read from disk.
          notify: called from a worker when a load may be ready to poll.
          max_in_flight: loads under way at once, a thread for each, so that a slow disk
            holds up nothing but the loads that read from it.
          link: delays what has arrived; None hands it over at once.
        """
        self._fetch = fetch
        self._link = link
        self._link_free_s = 0.0
        self._packers = threading.BoundedSemaphore(PACKERS)
        self._layout = layout
        self._dtype = dtype
        self._device = device
        self._notify = notify
        self._threads = concurrent.futures.ThreadPoolExecutor(
            max_in_flight, thread_name_prefix="jchameleon-load"
        )
        self._started: dict[str, _Started] = {}

    @property
    def in_flight(self) -> int:
        """Loads started and not yet handed back."""
        return len(self._started)

    def start(self, uid: str, pages: tuple[int, ...]) -> None:
        """Begin to load the adapter `uid` into `pages`, which the planner reserved."""
        assert uid not in self._started, "one load per adapter"
        due_s = self._occupy_link(len(pages))
        future = self._threads.submit(self._stage, uid, pages)
        future.add_done_callback(lambda _: self._notify())
        self._started[uid] = _Started(pieces=future, due_s=due_s)

    def poll(self) -> list[FinishedLoad]:
        """Return the loads that arrived or failed since the last call."""
        finished = []
        now_s = time.monotonic()
        for uid, started in list(self._started.items()):
            future = started.pieces
            if not future.done():
                continue
            error = future.exception()
            if error is None:
                if now_s < started.due_s:
                    continue
                if not all(piece.block.is_ready() for piece in future.result()):
                    continue
            del self._started[uid]
            if error is not None:
                logger.error("adapter %s failed to load", uid[:12], exc_info=error)
            finished.append(
                FinishedLoad(
                    uid=uid,
                    pieces=() if error else tuple(future.result()),
                    error=f"{type(error).__name__}: {error}" if error else None,
                    fault="internal" if error is None else load_fault(error),
                )
            )
        return finished

    def close(self) -> None:
        """Stop the threads; loads under way are dropped, their disk reads awaited."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _occupy_link(self, num_pages: int) -> float:
        """Return when the emulated link delivers this many pages that start now."""
        if self._link is None:
            return 0.0
        page_elems = self._layout.page_elems * self._layout.model.num_layers
        load_bytes = num_pages * page_elems * self._dtype.itemsize
        start_s = max(time.monotonic(), self._link_free_s)
        self._link_free_s = start_s + load_bytes / self._link.bytes_per_s
        return self._link_free_s + self._link.latency_s

    def _stage(self, uid: str, pages: tuple[int, ...]) -> list[Piece]:
        adapter = self._fetch(uid)
        with self._packers:
            packed = self._layout.pack(adapter, dtype=self._dtype)
            pieces = split_pieces(packed, pages, piece_pages(self._layout))
            return [
                Piece(pages=rows, block=jax.device_put(block, self._device))
                for rows, block in pieces
            ]
