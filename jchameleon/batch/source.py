"""The input: a file that is read again by place, and never held in memory."""

import contextlib
import errno
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from jchameleon.errors import BatchError

STANDARD = "-"
"""What stands for standard input or output."""

_CHUNK_BYTES = 1 << 20


class Source:
    """A file of lines, open for reading."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Return bytes of the file; fewer only where it has become shorter."""
        return os.pread(self._file.fileno(), num_bytes, offset)

    def lines(self, max_bytes: int) -> Iterator[tuple[int, int, bytes]]:
        """Yield (offset, length, bytes) of all lines, from the first on.

        Neither counts the line's end. Of a line longer than `max_bytes` only the
        beginning is returned.
        """
        self._file.seek(0)
        offset = 0
        while True:
            raw = self._file.readline(max_bytes + 1)
            if not raw:
                return
            if raw.endswith(b"\n"):
                yield offset, len(raw) - 1, raw[:-1]
                offset += len(raw)
                continue
            length, more = len(raw), raw
            while more and not more.endswith(b"\n"):
                more = self._file.readline(_CHUNK_BYTES)
                length += len(more)
            ends = more.endswith(b"\n")
            yield offset, length - ends, raw
            offset += length

    def chunks(self) -> Iterator[bytes]:
        """Yield all bytes of the file in pieces, for a checksum."""
        self._file.seek(0)
        while chunk := self._file.read(_CHUNK_BYTES):
            yield chunk


@contextlib.contextmanager
def open_source(path: str | Path) -> Iterator[Source]:
    """Open an input; what cannot be read twice is copied to a temporary file first.

    Raises:
      BatchError: it cannot be read.
    """
    with contextlib.ExitStack() as files:
        try:
            if str(path) == STANDARD:
                if sys.stdin is None:
                    raise OSError(errno.EBADF, "standard input is closed")
                given: BinaryIO = sys.stdin.buffer
            else:
                given = files.enter_context(open(path, "rb"))
            if str(path) == STANDARD or not stat.S_ISREG(
                os.fstat(given.fileno()).st_mode
            ):
                copy = files.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(given, copy, _CHUNK_BYTES)
                copy.flush()
                given = copy
        except (OSError, ValueError) as error:
            raise BatchError(f"input {str(path)!r} cannot be read: {error}") from error
        yield Source(given)
