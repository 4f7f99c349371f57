"""Files that appear whole: written beside their place, synced and renamed over it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file that takes the place of `path` at the end, unless that raises.

    Raises:
      OSError: it cannot be written; what was at `path` is still there.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    fresh = path.with_name(f".{path.name}.new")
    try:
        with open(fresh, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise
    sync_folder(path)


def sync_folder(path: Path) -> None:
    """Force to the disk that a file of this name is there."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
