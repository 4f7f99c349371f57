"""Open files below a folder and nowhere else, whatever links say meanwhile."""

import os

from jchameleon.errors import AdapterError

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def open_below(root: str | os.PathLike[str], path: str | os.PathLike[str]) -> int:
    """Open a file below `root` for reading, without waiting; return its descriptor.

    Links are resolved first and never followed afterwards: what lies outside is not
    opened, not even where a link takes the place of a folder in the same moment.

    Raises:
      AdapterError: the path leads out of `root`.
      OSError, ValueError: as `os.open`.
    """
    base, real = os.path.realpath(root), os.path.realpath(path)
    if os.path.commonpath((base, real)) != base:
        raise AdapterError(f"{os.path.basename(path)} leads out of the adapter root")
    *folders, name = os.path.relpath(real, base).split(os.sep)
    fd = os.open(base, _FOLDER)
    try:
        for folder in folders:
            inner = os.open(folder, _FOLDER, dir_fd=fd)
            os.close(fd)
            fd = inner
        # O_NONBLOCK: opening a FIFO would otherwise wait for a writer.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(name, flags, dir_fd=fd)
    finally:
        os.close(fd)
