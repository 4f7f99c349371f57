"""What was registered at run time, kept for the next start.

A file is written whole beside the old one, synced and renamed over it; the one before
is kept. A torn or damaged file is recognised by its checksum, and then the one before
counts.
"""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jchameleon.errors import ConfigError

logger = logging.getLogger(__name__)

FORMAT = "jchameleon adapters 1"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ManifestEntry:
    """One registered adapter.

    Attributes:
      source_path: below the adapter root.
      uid: of the content that was registered.
    """

    adapter_id: str
    source_path: str
    uid: str
    pinned: bool


class Manifest:
    """The file; its methods block on the disk."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._before = self._path.with_name(self._path.name + ".before")

    def read(self) -> list[ManifestEntry]:
        """Return what the last good file says; nothing if there never was one.

        Raises:
          ConfigError: neither file is a manifest.
        """
        faults = []
        for path in (self._path, self._before):
            try:
                return _parse(path.read_bytes())
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                faults.append(f"{path}: {error}")
                logger.warning("adapters.manifest: %s", faults[-1])
        if faults:
            raise ConfigError("adapters.manifest cannot be read: " + "; ".join(faults))
        return []

    def write(self, entries: Sequence[ManifestEntry]) -> None:
        """Replace the file.

        Raises:
          OSError: that failed; the old one is still there.
        """
        fresh = self._path.with_name(f".{self._path.name}.new")
        with open(fresh, "wb") as file:
            file.write(_text(entries))
            file.flush()
            os.fsync(file.fileno())
        if self._path.exists():
            os.replace(self._path, self._before)
        os.replace(fresh, self._path)
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _text(entries: Sequence[ManifestEntry]) -> bytes:
    rows = [dataclasses.asdict(entry) for entry in entries]
    body = json.dumps({"format": FORMAT, "adapters": rows}, indent=1, sort_keys=True)
    return f"{body}\n{_checksum(body)}\n".encode()


def _checksum(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def _parse(data: bytes) -> list[ManifestEntry]:
    """Return the entries of a file; ValueError if it is damaged or something else."""
    body, _, checksum = data.decode().rstrip("\n").rpartition("\n")
    if checksum != _checksum(body):
        raise ValueError("it is cut off, damaged or no manifest")
    table: Any = json.loads(body)
    if table["format"] != FORMAT:
        raise ValueError(f"format={table['format']!r} must be {FORMAT!r}")
    return [ManifestEntry(**row) for row in table["adapters"]]
