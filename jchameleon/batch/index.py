"""Where every line of an input lies and who it is: some 50 bytes a line."""

import array
import hashlib
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from jchameleon.batch.lines import Line, key_digest, open_line, too_long_line
from jchameleon.batch.source import Source
from jchameleon.errors import BatchError, BatchStoppedError

NO_ADAPTER = -1
"""Number of what names no known adapter: the base model, and lines that will fail."""

BOM = b"\xef\xbb\xbf"


class LineIndex:
    """All lines that are not empty, by position in the input's order.

    Attributes:
      adapters: i32[N] number of the adapter that each names.
      done: bool[N] those that have a row.
      sha256: of the whole input.
    """

    def __init__(
        self,
        source: Source,
        offsets: np.ndarray,  # i64[N]
        lengths: np.ndarray,  # u32[N], in bytes
        numbers: np.ndarray,  # u32[N], lines of the file from 1
        adapters: np.ndarray,  # i32[N]
        digests: np.ndarray,  # u64[N, 2]
        crcs: np.ndarray,  # u32[N], of each line's bytes
        *,
        sha256: str,
        max_line_bytes: int,
    ) -> None:
        """Of `build_index`.

        Raises:
          BatchError: two lines have the same key.
        """
        self.adapters = adapters
        self.done = np.zeros(len(offsets), bool)
        self.sha256 = sha256
        self._source = source
        self._max_line_bytes = max_line_bytes
        self._offsets, self._lengths, self._numbers = offsets, lengths, numbers
        self._crcs = crcs
        # Apart, because a search needs its column in one piece.
        self._high = np.ascontiguousarray(digests[:, 0])
        self._low = np.ascontiguousarray(digests[:, 1])
        self._order = np.lexsort((self._low, self._high))
        self._check_duplicates()

    def __len__(self) -> int:
        return len(self._offsets)

    def line(self, position: int) -> Line:
        """Read a line again.

        Raises:
          BatchStoppedError: the input cannot be read, or has changed.
        """
        number = int(self._numbers[position])
        length = int(self._lengths[position])
        if length > self._max_line_bytes:
            return too_long_line(number, self._max_line_bytes)
        try:
            raw = self._source.read(int(self._offsets[position]), length)
        except OSError as error:
            raise BatchStoppedError(
                f"line {number} of the input cannot be read: {error}"
            ) from error
        if zlib.crc32(raw) != self._crcs[position]:
            raise BatchStoppedError(
                f"line {number} of the input has changed since the run began"
            )
        return open_line(raw, number)

    def find(self, key: str) -> int | None:
        """Return the position of the line with this key, or None."""
        try:
            high, low = _columns(key_digest(key))
        except UnicodeEncodeError:
            return None
        place = int(np.searchsorted(self._high, high, sorter=self._order))
        while place < len(self) and self._high[self._order[place]] == high:
            position = int(self._order[place])
            if self._low[position] == low:
                return position
            place += 1
        return None

    def _check_duplicates(self) -> None:
        order = self._order
        same = (self._high[order[1:]] == self._high[order[:-1]]) & (
            self._low[order[1:]] == self._low[order[:-1]]
        )
        if not same.any():
            return
        # The sort is stable: of equal keys each stands behind the one before it.
        places = np.flatnonzero(same)
        place = places[np.argmin(order[1:][places])]
        first, second = int(order[place]), int(order[place + 1])
        raise BatchError(
            f"custom_id {self.line(second).key!r} is on lines {self._numbers[first]} "
            f"and {self._numbers[second]} of the input; it must be there once (a line "
            "without a custom_id that can be used counts as 'line-N')"
        )


def build_index(
    source: Source, adapters: Sequence[str], *, max_line_bytes: int
) -> LineIndex:
    """Read an input once.

    Args:
      adapters: known names; a line's number is its adapter's place here.

    Raises:
      BatchError: it cannot be read, or two lines have the same key.
    """
    numbers_by_name: Mapping[str, int] = {n: i for i, n in enumerate(adapters)}
    offsets, lengths = array.array("q"), array.array("I")
    numbers, names = array.array("I"), array.array("i")
    digests, crcs = bytearray(), array.array("I")
    checksum = hashlib.sha256()
    try:
        for chunk in source.chunks():
            checksum.update(chunk)
        for number, (offset, length, raw) in enumerate(source.lines(max_line_bytes), 1):
            if number == 1 and raw.startswith(BOM):
                offset, length, raw = offset + 3, length - 3, raw[3:]
            if length <= max_line_bytes:
                if not raw.strip():
                    continue
                line = open_line(raw, number)
            else:
                line = too_long_line(number, max_line_bytes)
            offsets.append(offset)
            lengths.append(min(length, max_line_bytes + 1))
            numbers.append(number)
            names.append(numbers_by_name.get(line.adapter or "", NO_ADAPTER))
            digests += key_digest(line.key)
            crcs.append(zlib.crc32(raw))
    except OSError as error:
        raise BatchError(f"the input cannot be read: {error}") from error
    return LineIndex(
        source,
        np.frombuffer(offsets, np.int64),
        np.frombuffer(lengths, np.uint32),
        np.frombuffer(numbers, np.uint32),
        np.frombuffer(names, np.int32),
        np.frombuffer(digests, "<u8").reshape(-1, 2),
        np.frombuffer(crcs, np.uint32),
        sha256=checksum.hexdigest(),
        max_line_bytes=max_line_bytes,
    )


def _columns(digest: bytes) -> tuple[np.uint64, np.uint64]:
    high, low = np.frombuffer(digest, "<u8")
    return high, low
