"""Names of adapters and the content behind them.

A name is an alias for an immutable uid (content hash). Cache, KV pages and logs use the
uid, so a name can never lead to the wrong weights.
"""

import threading
from pathlib import Path

from jchameleon.config import RESERVED_PAGES, ModelConfig
from jchameleon.errors import (
    AdapterConflictError,
    AdapterError,
    CapacityError,
    UnknownAdapterError,
)
from jchameleon.lora.adapter import HostAdapter
from jchameleon.lora.layout import ChunkLayout
from jchameleon.lora.peft import load_peft_adapter
from jchameleon.runtime.policy.planner import Planner

MAX_NAME_CHARS = 128


class AdapterRegistry:
    """Registered adapters in host memory; safe to use from several threads."""

    def __init__(self, model: ModelConfig, *, max_rank: int):
        """Create an empty registry for adapters of one model."""
        self._model = model
        self._max_rank = max_rank
        self._lock = threading.RLock()
        self._uids: dict[str, str] = {}
        self._adapters: dict[str, HostAdapter] = {}

    def load(self, name: str, path: str | Path) -> HostAdapter:
        """Read and check a PEFT directory without registering it.

        Raises:
          AdapterError: the name or the directory is not acceptable.
        """
        check_name(name)
        if not isinstance(path, str | Path):
            raise AdapterError(f"adapter {name!r}: path {path!r:.80} must be a path")
        return load_peft_adapter(path, self._model, max_rank=self._max_rank)

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
        """Register `adapter` under `name`; the same content again is no change.

        Raises:
          AdapterConflictError: the name stands for other content.
        """
        check_name(name)
        with self._lock:
            self.check(name, adapter)
            self._uids[name] = adapter.uid
            self._adapters.setdefault(adapter.uid, adapter)

    def resolve(self, name: str) -> str:
        """Return the uid behind `name`.

        Raises:
          UnknownAdapterError: no adapter has this name; never the base model instead.
        """
        with self._lock:
            uid = self._uids.get(name)
            if uid is None:
                known = ", ".join(sorted(self._uids)) or "none"
                raise UnknownAdapterError(
                    f"unknown adapter {name!r}; registered are: {known}"
                )
            return uid

    def get(self, uid: str) -> HostAdapter:
        """Return the adapter with this uid."""
        return self._adapters[uid]

    def names(self) -> dict[str, str]:
        """Return name -> uid of all registered adapters."""
        with self._lock:
            return dict(self._uids)


def check_fits(adapter: HostAdapter, layout: ChunkLayout, planner: Planner) -> int:
    """Return the pages that an adapter takes on the device.

    Raises:
      AdapterError: it touches projections outside the engine's lora_targets.
      CapacityError: the pool can never hold it beside a request.
    """
    layout.check_targets(adapter)
    pages = layout.num_pages(adapter.rank)
    if planner.can_ever_fit(1, 1, pages) is not None:
        usable = planner.config.num_pages - RESERVED_PAGES
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
