"""Weights of registered adapters: in host memory within a budget, else on disk.

Device pages hold what runs, this store what may be needed next, the disk everything. A
uid is a content hash, so what is read again must hash to it or is refused.
"""

import concurrent.futures
import dataclasses
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import jax

from jchameleon.errors import AdapterError, AdapterReadError
from jchameleon.lora.adapter import HostAdapter

MOST_PATHS = 16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PackedAdapter:
    """An adapter as the pool holds it, ready to be copied to the device.

    Attributes:
      uid: of its content.
      blocks: of its pieces, f[L, N, E] each, in memory that the device reads.
    """

    uid: str
    blocks: tuple[jax.Array, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all blocks, padding included."""
        return sum(block.nbytes for block in self.blocks)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HostStats:
    """Figures of a `HostStore`; counters run since its start.

    Attributes:
      host_bytes, host_adapters: what host memory holds now.
      host_hits: calls of `get` and `get_packed` answered from memory.
      disk_reads: directories that `get` read, or tried to.
      drops: adapters dropped from memory for others.
    """

    host_bytes: int
    host_adapters: int
    host_hits: int
    disk_reads: int
    drops: int


class HostStore:
    """Keeps recently used adapters within a budget; safe to use from several threads.

    Each as it was read, or packed in place of that. Whoever was handed an adapter may
    go on using it after it was dropped here, and its memory is free when the last of
    them has let go: loads under way hold at most `max_loads_in_flight` adapters beyond
    the budget.
    """

    def __init__(self, read: Callable[[str], HostAdapter], *, budget_bytes: int):
        """Create an empty store.

        Args:
          read: reads and checks a PEFT directory, or raises AdapterError naming it.
          budget_bytes: of what is kept in memory; 0 keeps none.
        """
        self.read = read
        self._budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self._paths: dict[str, tuple[str, ...]] = {}
        # Last used last.
        self._kept: OrderedDict[str, HostAdapter | PackedAdapter] = OrderedDict()
        self._kept_bytes = 0
        self._reading: dict[str, concurrent.futures.Future[HostAdapter]] = {}
        self._host_hits = 0
        self._disk_reads = 0
        self._drops = 0

    def put(self, adapter: HostAdapter, path: str | Path) -> None:
        """Make an adapter known, and keep it in memory unless it exceeds the budget.

        `path` is where to read it again; of the latest `MOST_PATHS` for one uid, the
        first that works is taken.
        """
        place = os.path.abspath(path)  # it must outlive a change of directory
        with self._lock:
            known = self._paths.get(adapter.uid, ())
            if place not in known:
                self._paths[adapter.uid] = (*known, place)[-MOST_PATHS:]
            self._keep(adapter)

    def get(self, uid: str) -> HostAdapter:
        """Return an adapter that was `put`, from memory or else from disk.

        One that is kept packed is read, and stays packed.

        Threads that ask for the same absent adapter share one read; reads of different
        adapters do not wait for each other, nor does anything in memory wait for them.

        Raises:
          AdapterError: no path leads to this content any more; names paths and reasons.
          AdapterReadError: one of them cannot be read now.
          KeyError: the uid was never put, or forgotten.
        """
        with self._lock:
            adapter = self._kept.get(uid)
            if isinstance(adapter, HostAdapter):
                self._kept.move_to_end(uid)
                self._host_hits += 1
                return adapter
            under_way = self._reading.get(uid)
            if under_way is None:
                paths = self._paths[uid]
                own: concurrent.futures.Future[HostAdapter] = (
                    concurrent.futures.Future()
                )
                self._reading[uid] = own
        if under_way is not None:
            return under_way.result()
        try:
            adapter = self._read_any(uid, paths)
        except BaseException as error:
            with self._lock:
                del self._reading[uid]
            own.set_exception(error)
            raise
        with self._lock:
            del self._reading[uid]
            if uid in self._paths:  # not forgotten meanwhile
                self._keep(adapter)
        own.set_result(adapter)
        return adapter

    def get_packed(self, uid: str) -> PackedAdapter | None:
        """Return an adapter that is kept packed; never waits for a read."""
        with self._lock:
            packed = self._kept.get(uid)
            if not isinstance(packed, PackedAdapter):
                return None
            self._kept.move_to_end(uid)
            self._host_hits += 1
            return packed

    def keep_packed(self, packed: PackedAdapter) -> None:
        """Keep an adapter packed, in place of what was read.

        One that exceeds the budget, or was forgotten meanwhile, is not kept.
        """
        with self._lock:
            uid = packed.uid
            if uid in self._paths and packed.num_bytes <= self._budget_bytes:
                self._drop(uid)
                self._keep(packed)

    def forget(self, uid: str) -> None:
        """Drop an adapter and the paths to it; one that was never put is ignored."""
        with self._lock:
            self._paths.pop(uid, None)
            self._drop(uid)

    def held_bytes(self, uid: str) -> int:
        """Return the bytes that an adapter takes in memory; that is no use of it."""
        with self._lock:
            adapter = self._kept.get(uid)
            return 0 if adapter is None else adapter.num_bytes

    def stats(self) -> HostStats:
        """Return the figures of this moment."""
        with self._lock:
            return HostStats(
                host_bytes=self._kept_bytes,
                host_adapters=len(self._kept),
                host_hits=self._host_hits,
                disk_reads=self._disk_reads,
                drops=self._drops,
            )

    def _drop(self, uid: str) -> None:
        """Let go of an adapter if it is kept; the lock is held."""
        adapter = self._kept.pop(uid, None)
        if adapter is not None:
            self._kept_bytes -= adapter.num_bytes

    def _keep(self, adapter: HostAdapter | PackedAdapter) -> None:
        """Put an adapter last in line, dropping from the front; the lock is held."""
        if adapter.uid in self._kept:
            self._kept.move_to_end(adapter.uid)
            return
        if adapter.num_bytes > self._budget_bytes:
            return  # it would drop everything and still not fit
        while self._kept_bytes + adapter.num_bytes > self._budget_bytes:
            _, dropped = self._kept.popitem(last=False)
            self._kept_bytes -= dropped.num_bytes
            self._drops += 1
        self._kept[adapter.uid] = adapter
        self._kept_bytes += adapter.num_bytes

    def _read_any(self, uid: str, paths: tuple[str, ...]) -> HostAdapter:
        reasons = []
        kind = AdapterError
        for path in paths:
            with self._lock:
                self._disk_reads += 1
            try:
                adapter = self.read(path)
            except AdapterError as error:
                reasons.append(str(error))
                if isinstance(error, AdapterReadError):  # it may be there after all
                    kind = AdapterReadError
                continue
            if adapter.uid == uid:
                return adapter
            reasons.append(
                f"adapter {path!r} has content {adapter.uid[:12]}, registered was "
                f"{uid[:12]}: files of a registered adapter must not change; register "
                "the new content under a new name or with replace=True"
            )
        raise kind("; ".join(reasons))
