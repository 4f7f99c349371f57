"""The output: rows are appended, and what was there before is never erased."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np

from jchameleon.batch.files import replacing, sync_folder
from jchameleon.batch.index import LineIndex
from jchameleon.batch.source import STANDARD
from jchameleon.errors import BatchError

logger = logging.getLogger(__name__)


def is_file(path: str | Path) -> bool:
    """Return whether an output is, or will be, a file that a run can be resumed from.

    Standard output, pipes and devices are not.

    Raises:
      BatchError: it is a directory, or cannot be looked at.
    """
    if str(path) == STANDARD:
        return False
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return True
    except (OSError, ValueError) as error:
        raise BatchError(f"output {str(path)!r} cannot be used: {error}") from error
    if stat.S_ISDIR(mode):
        raise BatchError(f"output {str(path)!r} cannot be used: it is a directory")
    return stat.S_ISREG(mode)


class Results:
    """An output that is open for appending.

    Attributes:
      num_bytes: its length.
    """

    def __init__(self, fd: int, *, num_bytes: int, sync_rows: int | None) -> None:
        """Take over a file descriptor at its end.

        Args:
          sync_rows: rows after which they are forced to the disk; None where there is
            no disk behind it.
        """
        self.num_bytes = num_bytes
        self._fd = fd
        self._sync_rows = sync_rows
        self._unsynced_rows = 0

    @classmethod
    def stream(cls, path: str | Path) -> Self:
        """Open what is no file.

        Raises:
          OSError: it cannot be opened.
        """
        if str(path) == STANDARD:
            if sys.stdout is None:
                raise OSError(errno.EBADF, "standard output is closed")
            sys.stdout.flush()
            return cls(os.dup(sys.stdout.fileno()), num_bytes=0, sync_rows=None)
        return cls(os.open(path, os.O_WRONLY), num_bytes=0, sync_rows=None)

    @classmethod
    def create(cls, path: Path, *, sync_rows: int) -> Self:
        """Make a new file.

        Raises:
          OSError: there is one, or it cannot be made.
        """
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o666)
        results = cls._locked(fd, path, sync_rows=sync_rows)
        sync_folder(path)
        return results

    @classmethod
    def reopen(cls, path: Path, *, sync_rows: int) -> Self:
        """Open a file that is there.

        Raises:
          BatchError: another run writes to it.
          OSError: it cannot be opened.
        """
        fd = os.open(path, os.O_RDWR | os.O_APPEND)
        return cls._locked(fd, path, sync_rows=sync_rows)

    @classmethod
    def _locked(cls, fd: int, path: Path, *, sync_rows: int) -> Self:
        """Keep others from writing, and see what the file holds only then."""
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                is_ours = False
            except OSError as error:
                logger.warning(
                    "output %r cannot be locked (%s): see to it that no other run "
                    "writes to it",
                    *(str(path), error),
                )
                is_ours = True
            else:  # another run may have put a new file in its place before that
                is_ours = os.path.samestat(os.fstat(fd), os.stat(path))
            if not is_ours:
                raise BatchError(
                    f"output {str(path)!r} is being written by another run"
                )
            num_bytes = os.lseek(fd, 0, os.SEEK_END)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, num_bytes=num_bytes, sync_rows=sync_rows)

    @property
    def is_file(self) -> bool:
        """Whether a later run can go on with it."""
        return self._sync_rows is not None

    def append(self, row: bytes) -> None:
        """Write a row.

        Raises:
          OSError: it could not be written; nothing of it is in a file then.
        """
        rest = memoryview(row)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError:
            if len(rest) < len(row) and self.is_file:
                with contextlib.suppress(OSError):  # resuming would drop it too
                    self.truncate(self.num_bytes)
            raise
        self.num_bytes += len(row)
        self._unsynced_rows += 1
        if self._sync_rows is not None and self._unsynced_rows >= self._sync_rows:
            self.sync()

    def sync(self) -> None:
        """Force what was written to the disk, if there is one.

        Raises:
          OSError: that failed.
        """
        if self.is_file and self._unsynced_rows:
            os.fsync(self._fd)
        self._unsynced_rows = 0

    def truncate(self, num_bytes: int) -> None:
        """Drop what comes after the first bytes."""
        os.ftruncate(self._fd, num_bytes)
        self.num_bytes = num_bytes

    def close(self) -> None:
        """Sync and close.

        Raises:
          OSError: that failed.
        """
        try:
            self.sync()
        finally:
            os.close(self._fd)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, bytes) of every line, its end included."""
        with open(os.dup(self._fd), "rb") as file:
            file.seek(0)
            offset = 0
            for raw in file:
                yield offset, raw
                offset += len(raw)


class KeptRows:
    """The rows of an output that is resumed.

    Attributes:
      offsets: i64[N] where the row of each line begins; -1 where there is none.
      lengths: i64[N] its bytes.
      failed: bool[N] it says that the line failed.
    """

    def __init__(self, path: Path, results: Results, index: LineIndex) -> None:
        """Read an output, drop a torn last line and mark the lines that have rows.

        Raises:
          BatchError: a row is of no line of this input, or there twice.
          OSError: it cannot be read.
        """
        self.offsets = np.full(len(index), -1, np.int64)
        self.lengths = np.zeros(len(index), np.int64)
        self.failed = np.zeros(len(index), bool)
        end = results.num_bytes
        for number, (offset, raw) in enumerate(results.lines(), 1):
            row = _parse(raw)
            if row is None:
                # What a crash leaves at the end is cut, or was never written.
                is_torn = not raw.endswith(b"\n") or b"\0" in raw
                if offset + len(raw) < end or not is_torn:
                    raise BatchError(f"output {str(path)!r}: line {number} is no row")
                results.truncate(offset)
                break
            key, failed = row
            position = index.find(key)
            if position is None or self.offsets[position] >= 0:
                why = "of no line of the input" if position is None else "there twice"
                raise BatchError(
                    f"output {str(path)!r}: row {key!r:.80} on line {number} is {why}"
                )
            self.offsets[position], self.lengths[position] = offset, len(raw)
            self.failed[position] = failed
        index.done[:] = self.offsets >= 0

    @property
    def are_in_order(self) -> bool:
        """Whether they stand in the order of the input, with no line left out."""
        return bool((self.offsets >= 0).all() and (np.diff(self.offsets) > 0).all())


def rewrite(
    path: Path, results: Results, kept: KeptRows, positions: np.ndarray, sync_rows: int
) -> Results:
    """Put a new file in an output's place, with the rows of some lines in this order.

    The old file is there until the new one is whole.

    Args:
      positions: i64[n] of lines.

    Returns:
      the new file, open; the old one is closed.

    Raises:
      OSError: it cannot be written; the old one is still there, and open.
    """
    with replacing(path) as file, open(os.dup(results._fd), "rb") as old:
        # Locked before it is in place, so that no other run comes between.
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for position in positions.tolist():
            offset, length = int(kept.offsets[position]), int(kept.lengths[position])
            raw = os.pread(old.fileno(), length, offset)
            if len(raw) != length:
                raise OSError(errno.EIO, "the output became shorter meanwhile")
            file.write(raw)
        file.flush()
        fd = os.dup(file.fileno())
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_APPEND)
    results.close()
    return Results(fd, num_bytes=os.fstat(fd).st_size, sync_rows=sync_rows)


def _parse(raw: bytes) -> tuple[str, bool] | None:
    """Return a row's key and whether it failed; None if this is no row."""
    if not raw.endswith(b"\n"):
        return None
    try:
        row = json.loads(raw)
        key, failed = row["custom_id"], row["error"] is not None
        status = row["response"]["status_code"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (key, failed) if isinstance(key, str) and isinstance(status, int) else None
