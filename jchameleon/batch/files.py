"""Files that appear whole: written beside their place, synced and renamed over it."""

import contextlib
import os
import stat
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
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
    try:
        fresh.unlink(missing_ok=True)  # of a run that was killed
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        # Nobody reads what they may not read of the old one, not for a moment.
        fd = os.open(fresh, flags, 0o666 if mode is None else 0o600)
        with open(fd, "w+b") as file:
            if mode is not None:
                os.fchmod(fd, mode)
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
