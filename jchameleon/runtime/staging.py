"""How adapters wait in host memory, and what brings them to the device.

Where device memory is host memory, a worker packs an adapter and hands it over. A GPU
reads pinned memory by itself, while it computes: there an adapter is packed once and
rests pinned, and the engine thread only starts its copy.
"""

import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

import jax
import numpy as np

from jchameleon.lora.adapter import HostAdapter
from jchameleon.lora.layout import CHUNK_RANK, ChunkLayout
from jchameleon.runtime.executor import Executor
from jchameleon.runtime.host_store import HostStore, PackedAdapter
from jchameleon.runtime.pieces import split_blocks
from jchameleon.runtime.shapes import CHUNKS_PER_PIECE, piece_pages

PACKERS = 2
"""Adapters packed at once: packing takes cores and memory bandwidth from the steps."""

PINNED = "pinned_host"
"""Memory kind of host memory that a device reads by itself, as jax names it."""

Blocks = tuple[Any, ...]
"""Arrays f[L, N, E], a piece each; Any, since their type has no `is_ready`."""


class Staging(Protocol):
    """Brings the blocks of an adapter to the device."""

    def at_rest(self, uid: str) -> Blocks | None:
        """Return what `copy` takes if that needs no work; engine thread, no waiting."""

    def prepare(self, uid: str) -> Blocks:
        """Return what `copy` takes; on a worker, where it may read from disk.

        Raises whatever keeps this adapter from being loaded.
        """

    def copy(self, blocks: Blocks) -> Blocks:
        """Start to copy to the device; engine thread, no waiting.

        A copy can overlap only steps that are dispatched after it.
        """


class Packer:
    """Lays out adapters as the pool holds them; safe to use from several threads."""

    def __init__(self, layout: ChunkLayout, dtype: np.dtype):
        """`dtype` is the pool's."""
        self._layout = layout
        self._dtype = dtype
        self._slots = threading.BoundedSemaphore(PACKERS)

    def put(self, adapter: HostAdapter, sharding: jax.sharding.Sharding) -> Blocks:
        """Pack an adapter and put its blocks where `sharding` says.

        On a CPU `device_put` may alias numpy memory: every block is a fresh array that
        nobody writes again.
        """
        with self._slots:
            return tuple(
                jax.device_put(block, sharding) for block in self._blocks(adapter)
            )

    def _blocks(self, adapter: HostAdapter) -> Iterator[np.ndarray]:
        """Yield its pages f[L, N, E], a piece each, every one a new array.

        Packed piece by piece: arrays of a whole large adapter come fresh from the
        system each time, and to touch their pages took up to 0.17 s for 59 MB.
        """
        piece = piece_pages(self._layout)
        ranks = CHUNKS_PER_PIECE * CHUNK_RANK
        for first in range(0, adapter.rank, ranks):
            part = adapter.slice_ranks(first, first + ranks)
            packed = self._layout.pack(part, dtype=self._dtype)
            is_whole = packed.shape[1] == piece
            yield packed if is_whole else split_blocks(packed, piece)[0]


class HostStaging:
    """Adapters rest as they were read; a worker packs one for every load."""

    def __init__(
        self,
        packer: Packer,
        device: jax.Device,
        fetch: Callable[[str], HostAdapter],
    ):
        """`fetch` returns the adapter of a uid, or raises; workers call it."""
        self._packer = packer
        self._sharding = jax.sharding.SingleDeviceSharding(device)
        self._fetch = fetch

    def at_rest(self, uid: str) -> Blocks | None:
        """Return None: there is always something to pack."""
        return None

    def prepare(self, uid: str) -> Blocks:
        """Pack an adapter and start its copy."""
        return self._packer.put(self._fetch(uid), self._sharding)

    def copy(self, blocks: Blocks) -> Blocks:
        """Return the blocks, whose copy `prepare` started."""
        return blocks


class PinnedStaging:
    """Adapters rest packed in pinned host memory, from their first load on."""

    def __init__(self, packer: Packer, device: jax.Device, store: HostStore):
        """`store` keeps them, within its budget."""
        self._packer = packer
        self._sharding = jax.sharding.SingleDeviceSharding(device)
        self._pinned = jax.sharding.SingleDeviceSharding(device, memory_kind=PINNED)
        self._store = store

    def at_rest(self, uid: str) -> Blocks | None:
        """Return the pinned blocks, if the store has them."""
        packed = self._store.get_packed(uid)
        return None if packed is None else packed.blocks

    def prepare(self, uid: str) -> Blocks:
        """Read an adapter, pack and pin it, and let it rest like that from now on."""
        blocks = self._packer.put(self._store.get(uid), self._pinned)
        jax.block_until_ready(blocks)
        self._store.keep_packed(PackedAdapter(uid=uid, blocks=blocks))
        return blocks

    def copy(self, blocks: Blocks) -> Blocks:
        """Start a copy that the device makes by itself."""
        return tuple(jax.device_put(block, self._sharding) for block in blocks)


def choose_staging(executor: Executor, store: HostStore) -> Staging:
    """Return the way to load adapters of `store` that suits the executor's device."""
    packer, device = Packer(executor.layout, executor.dtype), executor.device
    kinds = {memory.kind for memory in device.addressable_memories()}
    if rests_pinned(device.platform, kinds):
        return PinnedStaging(packer, device, store)
    return HostStaging(packer, device, store.get)


def rests_pinned(platform: str, kinds: Collection[str]) -> bool:
    """Return whether adapters for a device rest in pinned memory.

    Args:
      platform: of the device, as jax names it.
      kinds: of memory that it can address.
    """
    # A CPU has the kind, but its device memory is host memory: a copy more for nothing.
    return platform != "cpu" and PINNED in kinds
