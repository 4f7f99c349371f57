"""What a server knows of its adapters beside the engine; event loop only."""

import dataclasses
import time

import grpc

from jchameleon.serving.adapter_paths import check_adapter_id
from jchameleon.serving.status import StatusError


@dataclasses.dataclass(kw_only=True, slots=True)
class CatalogEntry:
    """One adapter id.

    Attributes:
      source_path: below the adapter root.
      registered_s, last_used_s: seconds since the epoch.
      failure: why it is not served, or None.
    """

    source_path: str
    uid: str
    registered_s: float
    last_used_s: float | None = None
    failure: str | None = None
    pinned: bool = False


class AdapterCatalog:
    """Entries by id, those that have failed too."""

    def __init__(self) -> None:
        self.entries: dict[str, CatalogEntry] = {}

    def check(self, adapter_id: str) -> None:
        """Let a request name an adapter.

        Raises:
          StatusError: INVALID_ARGUMENT, it is no id; FAILED_PRECONDITION, its files
            are gone or have changed.
        """
        if not adapter_id:
            return
        check_adapter_id(adapter_id)
        entry = self.entries.get(adapter_id)
        if entry is None:
            return
        if entry.failure is not None:
            raise failed_adapter(adapter_id, entry.failure)
        entry.last_used_s = time.time()

    def note_failure(self, adapter_id: str, reason: str) -> None:
        """Take no more requests for an adapter until it is registered again."""
        entry = self.entries.get(adapter_id)
        if entry is not None:
            entry.failure = reason


def failed_adapter(adapter_id: str, reason: str) -> StatusError:
    """Return the status of a request for an adapter that cannot be loaded."""
    return StatusError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "ADAPTER_FAILED",
        f"adapter {adapter_id!r} cannot be loaded: {reason}",
    )
