"""A line of those who wait: the more urgent first, within a priority in order."""

import bisect
import itertools
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

K = TypeVar("K")
T = TypeVar("T")


class PriorityLine(Generic[K, T]):
    """Items by key. Lower priorities come first; within one, as they were added.

    Whatever its length, any key and the ends of a priority are found in O(1); only a
    priority that comes or goes takes more, a shift of as many integers as there are
    priorities.
    """

    def __init__(self) -> None:
        # OrderedDict: both ends and deletion are O(1) however long the line is.
        self._lines: dict[int, OrderedDict[K, T]] = {}
        self._priorities: list[int] = []  # those that are there, in order
        self._priority_of: dict[K, int] = {}

    def __len__(self) -> int:
        return len(self._priority_of)

    def __contains__(self, key: K) -> bool:
        return key in self._priority_of

    def __iter__(self) -> Iterator[K]:
        """Yield keys in order; the line must not change meanwhile."""
        for priority in self._priorities:
            yield from self._lines[priority]

    def values(self) -> Iterator[T]:
        """Yield items in order; the line must not change meanwhile."""
        for priority in self._priorities:
            yield from self._lines[priority].values()

    def get(self, key: K) -> T | None:
        """Return an item, or None where there is none."""
        priority = self._priority_of.get(key)
        return None if priority is None else self._lines[priority][key]

    @property
    def first_priority(self) -> int | None:
        """The most urgent priority that is there."""
        return self._priorities[0] if self._priorities else None

    def end_of(self, priority: int, *, last: bool = False) -> T | None:
        """Return the first or the last item of a priority, None if it has none."""
        line = self._lines.get(priority)
        if line is None:
            return None
        return line[next(reversed(line) if last else iter(line))]

    def add(self, key: K, item: T, priority: int, *, first: bool = False) -> None:
        """Put an item, whose key must be new, at the end or the front of its priority.

        Raises:
          ValueError: the key is there.
        """
        if key in self._priority_of:
            raise ValueError(f"{key=} waits already")
        line = self._lines.get(priority)
        if line is None:
            line = self._lines[priority] = OrderedDict()
            bisect.insort(self._priorities, priority)
        line[key] = item
        self._priority_of[key] = priority
        if first:
            line.move_to_end(key, last=False)

    def pop(self, key: K) -> T | None:
        """Take out and return an item, or return None where there is none."""
        priority = self._priority_of.pop(key, None)
        if priority is None:
            return None
        line = self._lines[priority]
        item = line.pop(key)
        if not line:
            del self._lines[priority]
            del self._priorities[bisect.bisect_left(self._priorities, priority)]
        return item

    def insert(self, key: Any, item: T, priority: int) -> None:
        """Put an item into a priority whose keys ascend, so that they still do.

        O(1) where its key is the largest; else O(those with smaller keys): who returns
        to a line had, as a rule, hardly anyone before it when it left.
        """
        line = self._lines.get(priority)
        is_last = line is None or next(reversed(line)) < key
        self.add(key, item, priority)
        if is_last:
            return
        assert line is not None
        smaller = list(itertools.takewhile(lambda other: other < key, line))
        for one in (key, *reversed(smaller)):
            line.move_to_end(one, last=False)
