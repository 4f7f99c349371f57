"""Names of adapters and the cards of what is behind them.

A name is an alias for an immutable uid (content hash). Cache, KV pages and logs use the
uid, so a name can never lead to the wrong weights. Weights live in the host store.
"""

import threading
from pathlib import Path

from jchameleon.errors import (
    AdapterConflictError,
    AdapterError,
    CapacityError,
    UnknownAdapterError,
)
from jchameleon.lora.adapter import AdapterCard, HostAdapter
from jchameleon.lora.layout import ChunkLayout
from jchameleon.runtime.host_store import HostStore
from jchameleon.runtime.policy.planner import Planner

MAX_NAME_CHARS = 128

_NAMES_SHOWN = 20
"""Registered names that a message lists at most."""


class AdapterRegistry:
    """Registered adapters, without weights; safe to use from several threads."""

    def __init__(self, host: HostStore):
        """Create an empty registry; weights go to `host`."""
        self._host = host
        self._lock = threading.RLock()
        self._uids: dict[str, str] = {}
        self._cards: dict[str, AdapterCard] = {}

    def load(self, name: str, path: str | Path) -> HostAdapter:
        """Read and check a PEFT directory without registering it.

        Raises:
          AdapterError: the name or the directory is not acceptable.
        """
        check_name(name)
        if not isinstance(path, str | Path):
            raise AdapterError(f"adapter {name!r}: path {path!r:.80} must be a path")
        return self._host.read(str(path))

    def check(self, name: str, adapter: HostAdapter) -> None:
        """Raise AdapterConflictError if `name` stands for other content."""
        with self._lock:
            known = self._uids.get(name)
        if known is not None and known != adapter.uid:
            raise AdapterConflictError(
                f"adapter name {name!r} is taken by content {known[:12]}, and "
                f"{adapter.source} has content {adapter.uid[:12]}; use another name"
            )

    def add(self, name: str, adapter: HostAdapter) -> None:
        """Register `adapter` under `name` and hand its weights to the host store.

        The same content under the same name again is no change.

        Raises:
          AdapterConflictError: the name stands for other content.
        """
        check_name(name)
        with self._lock:
            self.check(name, adapter)
            self._host.put(adapter, adapter.source)
            self._cards.setdefault(adapter.uid, adapter.card)
            self._uids[name] = adapter.uid

    def resolve(self, name: str) -> str:
        """Return the uid behind `name`.

        Raises:
          UnknownAdapterError: no adapter has this name; never the base model instead.
        """
        with self._lock:
            uid = self._uids.get(name)
            if uid is None:
                names = sorted(self._uids)
                known = ", ".join(names[:_NAMES_SHOWN]) or "none"
                if len(names) > _NAMES_SHOWN:
                    known += f" and {len(names) - _NAMES_SHOWN} more"
                raise UnknownAdapterError(
                    f"unknown adapter {name!r}; registered are: {known}"
                )
            return uid

    def get(self, uid: str) -> HostAdapter:
        """Return the adapter with this uid, read from disk where memory lacks it.

        Raises:
          AdapterError: its files are gone or have changed.
        """
        return self._host.get(uid)

    def card(self, uid: str) -> AdapterCard:
        """Return the card of the adapter with this uid."""
        return self._cards[uid]

    def names(self) -> dict[str, str]:
        """Return name -> uid of all registered adapters."""
        with self._lock:
            return dict(self._uids)


def check_fits(adapter: AdapterCard, layout: ChunkLayout, planner: Planner) -> int:
    """Return the pages that an adapter takes on the device.

    Raises:
      AdapterError: it touches projections outside the engine's lora_targets.
      CapacityError: the pool can never hold it beside a request.
    """
    layout.check_targets(adapter)
    pages = layout.num_pages(adapter.rank)
    usable = planner.config.usable_pages
    if pages + 1 > usable:
        raise CapacityError(
            f"adapter {adapter.source!r} of rank {adapter.rank} takes {pages} pages, "
            f"a request one more at least, the pool has {usable}: enlarge pool_bytes"
        )
    return pages


def check_name(name: str) -> None:
    """Raise AdapterError unless `name` is a short printable string."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS:
        raise AdapterError(
            f"adapter name {name!r:.80} must be a string of 1 to {MAX_NAME_CHARS} "
            "characters"
        )
    if not name.isprintable():
        raise AdapterError(f"adapter name {name!r} must be printable")
