"""Turns by adapter: whoever has been served least goes first."""

import heapq
import itertools
from collections import OrderedDict

from jchameleon.config import is_number
from jchameleon.errors import ConfigError
from jchameleon.runtime.policy.admission import AdmissionView
from jchameleon.runtime.policy.request import Request

_Key = tuple[int, str | None]
"""Of a line: priority and adapter."""

_SLACK = 64
"""Entries of lines that are gone which are not worth a look at all."""


class Turns:
    """What each adapter was given, and its requests in line; see `Vtc`.

    The counter of who is in line never falls, so that two heaps know the least without
    a look at every line: an entry that lags behind is moved when it comes up.
    """

    def __init__(self, *, prompt_weight: float, output_weight: float) -> None:
        self._prompt_weight = prompt_weight
        self._output_weight = output_weight
        self._lines: dict[_Key, OrderedDict[str, Request]] = {}
        self._counters: dict[str | None, float] = {}
        self._in_line: dict[str | None, int] = {}  # requests, of who has any
        self._left_last = 0.0  # the counter of whoever had the last one in line
        self._charged: dict[str, int] = {}  # output tokens, of all that are there
        self._unpaid: set[str] = set()  # whose prompt was not charged yet
        self._began = itertools.count()
        self._places: dict[_Key, int] = {}  # of lines, in the order they began
        # (priority, counter, place, key) of lines, and (counter, place, adapter).
        self._next: list[tuple[int, float, int, _Key]] = []
        self._least: list[tuple[float, int, str | None]] = []

    def given(self, uid: str | None) -> float:
        """Return the counter of an adapter that has or had requests in line."""
        return self._counters[uid]

    def first(self) -> Request | None:
        """Return whose turn it is: lowest priority, least counter, oldest line."""
        heap = self._next
        while heap:
            priority, counter, place, key = heap[0]
            if self._places.get(key) != place:
                heapq.heappop(heap)  # that line is gone
            elif counter != (given := self._counters[key[1]]):
                heapq.heapreplace(heap, (priority, given, place, key))
            else:
                return next(iter(self._lines[key].values()))
        return None

    def started(self, request: Request) -> None:
        """Take out of its line who was admitted, and charge its prompt once."""
        if request.request_id in self._unpaid:
            self._unpaid.remove(request.request_id)
            self._counters[request.adapter_uid] += (
                self._prompt_weight * request.prompt_tokens
            )
        self._leave(request)

    def forget(self, uid: str) -> None:
        """Forget what an adapter that was unregistered had been given."""
        self._counters.pop(uid, None)

    def take_in(self, view: AdmissionView) -> None:
        """Take in who ended, came back or arrived, and charge output."""
        # Arrivals last: an id that ended may come again.
        for request in view.ended:
            self._charged.pop(request.request_id, None)
            self._unpaid.discard(request.request_id)
            self._leave(request)
        for request in view.running:
            self._charge(request, view.produced_tokens(request))
        if not (view.requeued or view.arrived):
            return
        least = self._least_given()  # nobody who joins lowers it
        for request in view.requeued:
            if request.request_id in self._charged:  # else it has left meanwhile
                self._join(request, least, first=True)
        for request in view.arrived:
            self._charged[request.request_id] = 0
            self._unpaid.add(request.request_id)
            self._join(request, least, first=False)

    def _charge(self, request: Request, produced_tokens: int) -> None:
        more = produced_tokens - self._charged[request.request_id]
        if more:
            self._charged[request.request_id] = produced_tokens
            self._counters[request.adapter_uid] += self._output_weight * more

    def _least_given(self) -> float:
        """Return the least counter in line, or of who left it last."""
        heap = self._least
        while heap:
            counter, place, uid = heap[0]
            if uid not in self._in_line:
                heapq.heappop(heap)
            elif counter != (given := self._counters[uid]):
                heapq.heapreplace(heap, (given, place, uid))
            else:
                return counter
        return self._left_last

    def _join(self, request: Request, least: float, *, first: bool) -> None:
        uid = request.adapter_uid
        key = (request.priority, uid)
        if uid not in self._in_line:
            self._counters[uid] = max(self._counters.get(uid, 0.0), least)
            self._in_line[uid] = 0
            heapq.heappush(self._least, (self._counters[uid], next(self._began), uid))
        self._in_line[uid] += 1
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = OrderedDict()
            place = self._places[key] = next(self._began)
            counter = self._counters[uid]
            heapq.heappush(self._next, (request.priority, counter, place, key))
            self._sweep()
        line[request.request_id] = request
        if first:
            line.move_to_end(request.request_id, last=False)

    def _leave(self, request: Request) -> None:
        """Take a request out of its line, if it is in one."""
        uid = request.adapter_uid
        key = (request.priority, uid)
        line = self._lines.get(key)
        if line is None or line.pop(request.request_id, None) is None:
            return
        if not line:
            del self._lines[key], self._places[key]
        self._in_line[uid] -= 1
        if not self._in_line[uid]:
            del self._in_line[uid]
            self._left_last = self._counters[uid]

    def _sweep(self) -> None:
        """Drop entries of what is gone before they are more than what is there."""
        if len(self._next) > 2 * len(self._lines) + _SLACK:
            live = [one for one in self._next if self._places.get(one[3]) == one[2]]
            heapq.heapify(live)
            self._next = live
        if len(self._least) > 2 * len(self._in_line) + _SLACK:
            self._least = [
                (self._counters[uid], place, uid)
                for place, uid in enumerate(self._in_line)
            ]
            heapq.heapify(self._least)


class Vtc:
    """Admit for the adapter that has been served least: virtual token counters.

    Sheng et al., "Fairness in serving large language models" (OSDI '24, arXiv
    2401.00588). Each client, here each adapter and the base model, has a counter of the
    tokens that it was given, weighted; the least is served next, its requests in order
    of arrival. Who joins without any request in line starts no lower than the least of
    those that wait, or than who left the line last, so that nobody saves up. A prompt
    is charged when its request first starts and output as it comes, but for the last
    token; who was sent back to wait comes first in its line and pays no prompt again
    (ours). If the first does not fit, all wait. Lower priorities come first, whatever
    the counters (ours).

    An adapter that asks for too much then delays itself: of those who always have
    requests in line none gets more than another by over twice what a batch holds. An
    iteration takes time for who runs and, with the logarithm of the lines, for who
    comes and goes; not for who waits.

    Options:
      prompt_weight, output_weight: of a token; the paper's are 1 and 2.

    Raises:
      ConfigError: a weight is no finite number above 0.
    """

    def __init__(
        self, *, prompt_weight: float = 1.0, output_weight: float = 2.0
    ) -> None:
        for name, weight in (
            ("prompt_weight", prompt_weight),
            ("output_weight", output_weight),
        ):
            if not (is_number(weight) and weight > 0):
                raise ConfigError(f"{name}={weight!r} must be a finite number above 0")
        self._turns = Turns(prompt_weight=prompt_weight, output_weight=output_weight)

    def admit(self, view: AdmissionView) -> None:
        """Admit from the line of the least counter until one does not fit."""
        turns = self._turns
        turns.take_in(view)
        if view.num_running >= view.capacity.max_running:
            return
        while (request := turns.first()) is not None and view.try_admit(request):
            turns.started(request)

    def forget(self, uid: str) -> None:
        """Forget what an adapter that was unregistered had been given."""
        self._turns.forget(uid)
