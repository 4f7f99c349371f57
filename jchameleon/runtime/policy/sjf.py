"""Shortest job first by predicted output: the scheduler of SSJF and muServe."""

import dataclasses
import heapq

from jchameleon.runtime.policy.admission import AdmissionView
from jchameleon.runtime.policy.request import Request

_FEW_ENTRIES = 64


@dataclasses.dataclass(slots=True, eq=False)
class _Entry:
    """A request from its arrival to its end, and how many arrived before it."""

    request: Request
    order: int
    waiting: bool = True


class ShortestJobFirst:
    """Admit whoever is expected to produce least; equals in order of arrival.

    Lower priorities come first, whatever the lengths (our own addition).

    A baseline, as published (Qiu et al., "Efficient Interactive LLM Serving with Proxy
    Model-based Sequence Length Prediction", arXiv 2404.08509, and muServe, ATC '24):
    the queue is sorted by predicted output length. Prompts and adapters do not count,
    nothing ages and nothing bounds a wait, so long requests starve for as long as
    shorter ones keep coming. When the first does not fit, everyone waits (our own
    choice). One that was squashed lines up by its prediction of then and its first
    arrival. Each arrival and admission takes O(log n).
    """

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._heap: list[tuple[int, int, int, _Entry]] = []
        self._num_arrived = 0
        self._num_waiting = 0

    def admit(self, view: AdmissionView) -> None:
        """Admit from the head of the line until one does not fit."""
        self._update(view)
        heap = self._heap
        while heap:
            entry = heap[0][-1]
            if entry.waiting:
                if not view.try_admit(entry.request):
                    return
                entry.waiting = False
                self._num_waiting -= 1
            heapq.heappop(heap)

    def _update(self, view: AdmissionView) -> None:
        """Bring the line up to date; an id that ended may have arrived again."""
        for request in view.ended:
            entry = self._entries.pop(request.request_id)
            if entry.waiting:
                entry.waiting = False
                self._num_waiting -= 1
        for request in view.arrived:
            entry = _Entry(request, self._num_arrived)
            self._num_arrived += 1
            self._entries[request.request_id] = entry
            self._push(entry, view)
        for request in view.requeued:
            entry = self._entries[request.request_id]
            entry.waiting = True
            self._push(entry, view)
        # Who left while waiting stays in the heap until it comes up, or until such
        # entries are the majority: long requests may never come up.
        if len(heap := self._heap) > 2 * self._num_waiting + _FEW_ENTRIES:
            self._heap = [item for item in heap if item[-1].waiting]
            heapq.heapify(self._heap)

    def _push(self, entry: _Entry, view: AdmissionView) -> None:
        predicted_tokens = view.predicted_tokens(entry.request)
        priority = entry.request.priority
        heapq.heappush(self._heap, (priority, predicted_tokens, entry.order, entry))
        self._num_waiting += 1
