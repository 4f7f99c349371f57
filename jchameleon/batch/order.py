"""In which order lines run, and in which their rows are written."""

from collections import OrderedDict, deque
from collections.abc import Iterator

import numpy as np


class Feed:
    """Hands out the lines that have no row, in windows grouped by adapter.

    Within a window of lines those for one adapter follow one another, so that it is
    loaded once a window, not once a line, where there are more adapters than fit. A
    window is handed out in full before the next one is looked at: no line runs a
    window's length or more from its place among those to run, so none starves.
    """

    def __init__(
        self,
        adapters: np.ndarray,  # i32[N], number of each line's adapter
        done: np.ndarray,  # bool[N], lines that do not run
        *,
        window_lines: int,
    ) -> None:
        self._adapters = adapters
        self._taken = done.copy()
        self._window_lines = window_lines
        self._window: deque[int] = deque()
        self._cursor = 0  # all lines before it are in the window or behind
        self._last_adapter: int | None = None

    def take(self) -> int | None:
        """Return the position of the line that runs next, None after the last."""
        while True:
            if not self._window:
                self._window.extend(self._next_window())
                if not self._window:
                    return None
            position = self._window.popleft()
            if not self._taken[position]:
                self._taken[position] = True
                self._last_adapter = int(self._adapters[position])
                return position

    def take_this(self, position: int) -> bool:
        """Take a line out of its turn; return whether it was still to be had."""
        if self._taken[position]:
            return False
        self._taken[position] = True
        return True

    def _next_window(self) -> list[int]:
        """Return the positions of the next window, grouped."""
        start = self._cursor
        # Positions are looked at in pieces: no window costs a look at the whole file.
        free: list[int] = []
        while start < len(self._taken) and len(free) < self._window_lines:
            piece = np.flatnonzero(~self._taken[start : start + self._window_lines])
            free += (piece[: self._window_lines - len(free)] + start).tolist()
            start += self._window_lines
        if not free:
            self._cursor = len(self._taken)
            return []
        self._cursor = free[-1] + 1
        groups: OrderedDict[int, list[int]] = OrderedDict()
        for position in free:
            groups.setdefault(int(self._adapters[position]), []).append(position)
        # The one that ran last is still on the device.
        if self._last_adapter is not None and self._last_adapter in groups:
            groups.move_to_end(self._last_adapter, last=False)
        return [position for group in groups.values() for position in group]


class Reorder:
    """Holds rows until those of all earlier lines are written.

    Attributes:
      held_bytes: of the rows that wait.
    """

    def __init__(self, done: np.ndarray, *, max_rows: int, max_bytes: int) -> None:
        """`done` is bool[N], lines whose rows are written already."""
        self._done = done.copy()
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._held: dict[int, bytes] = {}
        self.held_bytes = 0
        self._head = 0
        self._skip_done()

    @property
    def head(self) -> int:
        """Position of the line whose row is written next."""
        return self._head

    @property
    def is_full(self) -> bool:
        """Whether no line should begin but the head."""
        return len(self._held) >= self._max_rows or self.held_bytes >= self._max_bytes

    def __len__(self) -> int:
        return len(self._held)

    def add(self, position: int, row: bytes) -> Iterator[tuple[int, bytes]]:
        """Take a row; yield (position, row) of those that can be written now."""
        self._held[position] = row
        self.held_bytes += len(row)
        while self._head in self._held:
            head, ready = self._head, self._held.pop(self._head)
            self.held_bytes -= len(ready)
            self._done[head] = True
            self._skip_done()
            yield head, ready

    def rest(self) -> Iterator[tuple[int, bytes]]:
        """Yield what is held, for a run that is told to stop."""
        yield from sorted(self._held.items())

    def _skip_done(self) -> None:
        while self._head < len(self._done) and self._done[self._head]:
            self._head += 1
