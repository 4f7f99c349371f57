"""Move adapters to the device while steps run.

A load fetches what is to be copied, on a thread of its own unless that is at hand, and
copies it; the engine thread polls and commits what has arrived. How that is done on a
device is its staging's affair.
"""

import concurrent.futures
import dataclasses
import logging
import time
from collections.abc import Callable

import numpy as np

from jchameleon.config import EngineConfig
from jchameleon.lora.layout import ChunkLayout
from jchameleon.runtime.faults import Fault, load_fault
from jchameleon.runtime.pieces import Piece, split_targets
from jchameleon.runtime.shapes import piece_pages
from jchameleon.runtime.staging import Blocks, Staging

logger = logging.getLogger(__name__)


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


@dataclasses.dataclass(kw_only=True, slots=True)
class _Started:
    """A load under way.

    Attributes:
      pages: where it goes.
      prepared: what is to be copied.
      due_s: when the emulated link delivers it.
      blocks: on their way to the device; None before that.
      error: why the copy could not start.
    """

    pages: tuple[int, ...]
    prepared: concurrent.futures.Future[Blocks]
    due_s: float
    blocks: Blocks | None = None
    error: BaseException | None = None


class AdapterLoader:
    """Starts loads and hands back those that finished. Engine thread only."""

    def __init__(
        self,
        layout: ChunkLayout,
        dtype: np.dtype,
        staging: Staging,
        *,
        notify: Callable[[], None],
        max_in_flight: int,
        link: EmulatedLink | None = None,
    ):
        """Create the thread pool.

        Args:
          layout: how an adapter lies in pages.
          dtype: of the pool.
          staging: brings adapters to the device.
          notify: called from a worker when a load may be ready to poll.
          max_in_flight: loads under way at once, a thread for each, so that a slow disk
            holds up nothing but the loads that read from it.
          link: delays what has arrived; None hands it over at once.
        """
        self._staging = staging
        self._link = link
        self._link_free_s = 0.0
        self._layout = layout
        self._dtype = dtype
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
        """Begin to load the adapter `uid` into `pages`, which the planner reserved.

        What is at hand is on its way when this returns, so that the copy overlaps a
        step that is dispatched next.
        """
        assert uid not in self._started, "one load per adapter"
        due_s = self._occupy_link(len(pages))
        at_rest = self._staging.at_rest(uid)
        prepared: concurrent.futures.Future[Blocks]
        if at_rest is None:
            prepared = self._threads.submit(self._staging.prepare, uid)
            prepared.add_done_callback(lambda _: self._notify())
        else:
            prepared = concurrent.futures.Future()
            prepared.set_result(at_rest)
        started = _Started(pages=pages, prepared=prepared, due_s=due_s)
        self._started[uid] = started
        self._copy(started)

    def poll(self) -> list[FinishedLoad]:
        """Return the loads that arrived or failed since the last call.

        The copies of those that are prepared by now are under way afterwards.
        """
        finished = []
        now_s = time.monotonic()
        for uid, started in list(self._started.items()):
            self._copy(started)
            error = started.error
            pieces: tuple[Piece, ...] = ()
            if error is None:
                if started.blocks is None or now_s < started.due_s:
                    continue
                if not all(block.is_ready() for block in started.blocks):
                    continue
                pieces = self._pieces(started.pages, started.blocks)
            else:
                logger.error("adapter %s failed to load", uid[:12], exc_info=error)
            del self._started[uid]
            finished.append(
                FinishedLoad(
                    uid=uid,
                    pieces=pieces,
                    error=f"{type(error).__name__}: {error}" if error else None,
                    fault="internal" if error is None else load_fault(error),
                )
            )
        return finished

    def close(self) -> None:
        """Stop the threads; loads under way are dropped, their disk reads awaited."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _copy(self, started: _Started) -> None:
        """Start the copy of a load that is prepared and not copied yet."""
        if started.blocks is not None or not started.prepared.done():
            return
        started.error = started.prepared.exception()
        if started.error is None:
            try:
                started.blocks = self._staging.copy(started.prepared.result())
            except Exception as error:  # no memory for it now, say: others may go on
                started.error = error

    def _pieces(self, pages: tuple[int, ...], blocks: Blocks) -> tuple[Piece, ...]:
        targets = split_targets(pages, piece_pages(self._layout))
        return tuple(
            Piece(pages=own, block=block)
            for own, block in zip(targets, blocks, strict=True)
        )

    def _occupy_link(self, num_pages: int) -> float:
        """Return when the emulated link delivers this many pages that start now."""
        if self._link is None:
            return 0.0
        page_elems = self._layout.page_elems * self._layout.model.num_layers
        load_bytes = num_pages * page_elems * self._dtype.itemsize
        start_s = max(time.monotonic(), self._link_free_s)
        self._link_free_s = start_s + load_bytes / self._link.bytes_per_s
        return self._link_free_s + self._link.latency_s
