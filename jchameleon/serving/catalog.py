"""What a server knows of its adapters beside the engine; event loop only."""

import dataclasses
import time

import grpc

from jchameleon.outputs import AdapterInfo
from jchameleon.serving.adapter_paths import check_adapter_id
from jchameleon.serving.status import StatusError


@dataclasses.dataclass(kw_only=True, slots=True)
class CatalogEntry:
    """One adapter id.

    Attributes:
      source_path: below the adapter root.
      registered_s, last_used_s: seconds since the epoch.
      failure: why it is not served, or None.
      is_registered: the engine knows it; false for one that was remembered from before
        and could not be registered again.
    """

    source_path: str
    uid: str
    registered_s: float
    last_used_s: float | None = None
    failure: str | None = None
    is_registered: bool = True
    pinned: bool = False


class AdapterCatalog:
    """Entries by id, those that have failed too."""

    def __init__(self) -> None:
        self.entries: dict[str, CatalogEntry] = {}

    def use(self, adapter_id: str) -> None:
        """Let a request name an adapter; errors as `check`."""
        if adapter_id:
            self.check(adapter_id)
            entry = self.entries.get(adapter_id)
            if entry is not None:
                entry.last_used_s = time.time()

    def check(self, adapter_id: str) -> None:
        """Raise what keeps an id from being served.

        Raises:
          StatusError: INVALID_ARGUMENT, it is no id; FAILED_PRECONDITION, its files
            are gone or have changed.
        """
        check_adapter_id(adapter_id)
        entry = self.entries.get(adapter_id)
        if entry is not None and entry.failure is not None:
            raise StatusError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "ADAPTER_FAILED",
                f"adapter {adapter_id!r} cannot be loaded: {entry.failure}",
            )

    def failed(self) -> list[str]:
        """Return the ids that are kept and not served."""
        return [
            adapter_id
            for adapter_id, entry in self.entries.items()
            if entry.failure is not None
        ]

    def note_registered(self, info: AdapterInfo, source_path: str) -> None:
        """Take over what the engine says of an adapter that was registered.

        What has failed of the same content is served again: it can be read now.
        """
        entry = self.entries.get(info.name)
        if entry is None or entry.uid != info.uid or entry.failure is not None:
            self.entries[info.name] = CatalogEntry(
                source_path=source_path, uid=info.uid, registered_s=time.time()
            )
        self.entries[info.name].pinned = info.pinned
        for other in self.entries.values():
            if other.uid == info.uid and other.is_registered:
                other.failure = None

    def note_lost(self, uid: str, reason: str) -> None:
        """Take no more requests for a content until it is registered again.

        All names of it, and no name that stands for other content by now.
        """
        for entry in self.entries.values():
            if entry.uid == uid:
                entry.failure = reason
