"""S-LoRA's scheduler: first come, first served, with early abort under overload."""

from collections import OrderedDict

from jchameleon.config import is_number
from jchameleon.errors import ConfigError
from jchameleon.runtime.policy.admission import AdmissionView
from jchameleon.runtime.policy.line import PriorityLine
from jchameleon.runtime.policy.request import Request

PREFILL_MARGIN_S = 0.5
"""What S-LoRA adds to a wait for the prefill that is still to come."""


class SLora:
    """Admit in arrival order; when the first does not fit, everyone waits.

    With `early_abort_slo_s` set, as in S-LoRA (Sheng et al., MLSys '24, section 7.5;
    the figures are those of its released scheduler), each call that finds a free row

    1. updates rate <- int(0.7 * (queue - last_queue) + 0.3 * rate), where queue is the
       number waiting and last_queue what the last call that admitted left behind;
    2. rejects each request whose wait + 0.5 s >= SLO: its user would be dissatisfied;
    3. admits newest first if rate >= batch, oldest first otherwise, until one does
       not fit: when more come than can be served, the old are lost in any case;
    4. if it admitted any, updates batch <- max(1, int(0.7 * admitted + 0.3 * batch)).

    Rate and batch start at 1, last_queue at 0.

    Our own reading: a call is one iteration, where S-LoRA forms batches every few
    decode steps. Waits count from the request's `arrival_s`, and those who wait are
    visited in the order in which they joined the line, until one is young enough. Who
    was squashed has been served, so it is never rejected and comes before all others,
    whatever the rate; S-LoRA itself never squashes. All that holds within a priority,
    and lower ones are admitted first. A reason names the wait and the option.

    Options:
      early_abort_slo_s: time to first token beyond which a request is worthless; None
        rejects nobody. S-LoRA's experiments take 6.0.

    Raises:
      ConfigError: `early_abort_slo_s` leaves no time to wait.
    """

    def __init__(self, *, early_abort_slo_s: float | None = None) -> None:
        slo_s = early_abort_slo_s
        if slo_s is not None and not (is_number(slo_s) and slo_s > PREFILL_MARGIN_S):
            raise ConfigError(
                f"early_abort_slo_s={slo_s!r} must be above {PREFILL_MARGIN_S} seconds"
            )
        self._slo_s = slo_s
        self._joined: OrderedDict[str, Request] = OrderedDict()  # whatever priority
        self._line: PriorityLine[str, Request] = PriorityLine()  # the same
        self._squashed: PriorityLine[str, Request] = PriorityLine()
        self._rate = 1
        self._batch = 1
        self._last_queue = 0

    def admit(self, view: AdmissionView) -> None:
        """Reject who waited too long, then admit until one does not fit."""
        if self._slo_s is None:
            for request in view.waiting:
                if not view.try_admit(request):
                    return
            return
        self._update(view)
        if view.num_running >= view.capacity.max_running:
            return
        queue = len(self._line) + len(self._squashed)
        self._rate = int(0.7 * (queue - self._last_queue) + 0.3 * self._rate)
        self._abort(view, self._slo_s)
        admitted = self._admit(view)
        if admitted:
            self._batch = max(1, int(0.7 * admitted + 0.3 * self._batch))
            self._last_queue = len(self._line) + len(self._squashed)

    def _update(self, view: AdmissionView) -> None:
        """Bring the line up to date; an id that ended may have arrived again."""
        for request in view.ended:
            self._joined.pop(request.request_id, None)
            self._line.pop(request.request_id)
            self._squashed.pop(request.request_id)
        for request in view.arrived:
            self._joined[request.request_id] = request
            self._line.add(request.request_id, request, request.priority)
        for request in view.requeued:  # the youngest was squashed first
            self._squashed.add(
                request.request_id, request, request.priority, first=True
            )

    def _abort(self, view: AdmissionView, slo_s: float) -> None:
        while self._joined:
            request_id, request = next(iter(self._joined.items()))
            wait_s = view.now_s - request.arrival_s
            if wait_s + PREFILL_MARGIN_S < slo_s:
                return
            del self._joined[request_id]
            self._line.pop(request_id)
            view.reject(
                request,
                f"waited {wait_s:.3f} s, too long for early_abort_slo_s={slo_s:g}",
            )

    def _admit(self, view: AdmissionView) -> int:
        """Admit from the head of the line, or from its end; return how many."""
        newest_first = self._rate >= self._batch
        admitted = 0
        while (request := self._next(newest_first=newest_first)) is not None:
            if not view.try_admit(request):
                break
            self._squashed.pop(request.request_id)
            self._line.pop(request.request_id)
            self._joined.pop(request.request_id, None)
            admitted += 1
        return admitted

    def _next(self, *, newest_first: bool) -> Request | None:
        lines = (self._squashed, self._line)
        priorities = [line.first_priority for line in lines]
        priority = min((p for p in priorities if p is not None), default=None)
        if priority is None:
            return None
        squashed = self._squashed.end_of(priority)
        return squashed or self._line.end_of(priority, last=newest_first)
