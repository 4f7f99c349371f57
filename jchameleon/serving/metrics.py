"""What the server counts and times, and the log line at each request's end."""

import logging
import time
from collections.abc import Iterable

import grpc
import prometheus_client as prom

from jchameleon.runtime.outbox import Delta
from jchameleon.serving.logs import log_event

logger = logging.getLogger(__name__)

PREFIX = "jchameleon_"
MAX_ADAPTER_LABELS = 100
"""Adapters with label values of their own; later ones share `OTHER`."""

# No adapter is called so: an id begins with a letter or digit.
BASE, OTHER = "_base", "_other"

LATENCY_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)


class AdapterLabels:
    """Label values of adapters, so many and no more."""

    def __init__(self, limit: int = MAX_ADAPTER_LABELS) -> None:
        self._limit = limit
        self._known: set[str] = set()

    def of(self, adapter_id: str) -> str:
        """Return the label value of an adapter; first come, first named."""
        if not adapter_id:
            return BASE
        if adapter_id not in self._known:
            if len(self._known) >= self._limit:
                return OTHER
            self._known.add(adapter_id)
        return adapter_id


class Metrics:
    """Counters and histograms of requests; hears of them as a `RequestObserver`.

    Attributes:
      registry: all metrics of this server, and of no other in the process.
    """

    def __init__(self) -> None:
        self.registry = prom.CollectorRegistry()
        prom.ProcessCollector(registry=self.registry)
        self.labels = AdapterLabels()
        self.received = self._counter(
            "requests_received", "Calls of Generate and GenerateStream"
        )
        self.refused = self._counter(
            "requests_refused",
            "Calls that ended before they were handed to the engine",
            ("code", "reason"),
        )
        self.admitted = self._counter(
            "requests_admitted", "Calls handed to the engine", ("adapter",)
        )
        self.finished = self._counter(
            "requests_finished", "Admitted calls answered with OK"
        )
        self.failed = self._counter(
            "requests_failed", "Admitted calls answered otherwise", ("code", "reason")
        )
        self.cancelled = self._counter(
            "requests_cancelled", "Admitted calls that the caller or an operator ended"
        )
        self.success = self._counter(
            "request_success",
            "Completions that ended, by why they did",
            ("finished_reason",),
        )
        self.prompt_tokens = self._counter(
            "prompt_tokens", "Tokens of admitted prompts", ("adapter",)
        )
        self.output_tokens = self._counter(
            "generation_tokens", "Tokens of output", ("adapter",)
        )
        self.ttft_s = self._histogram(
            "time_to_first_token_seconds", "From a call's arrival to its first output"
        )
        self.itl_s = self._histogram(
            "inter_token_latency_seconds",
            "From one piece of a call's output to the next, for each token in it",
        )
        self.e2e_s = self._histogram(
            "e2e_request_latency_seconds",
            "From a call's arrival to its end, of those answered with OK",
        )
        self.queue_s = self._histogram(
            "request_queue_time_seconds",
            "Time that a completion waited in the engine's queue",
        )
        self.load_s = self._histogram(
            "adapter_load_seconds",
            "Time that a completion waited for its adapter, where it had to be loaded",
        )

    def _counter(
        self, name: str, text: str, labels: Iterable[str] = ()
    ) -> prom.Counter:
        return prom.Counter(PREFIX + name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str) -> prom.Histogram:
        return prom.Histogram(
            PREFIX + name, text, registry=self.registry, buckets=LATENCY_BUCKETS_S
        )

    def opened(self, request_id: str) -> "RequestMeter":
        """See `RequestObserver`."""
        self.received.inc()
        return RequestMeter(self, request_id)


class RequestMeter:
    """Counts and times one call; see `RequestWatch`."""

    def __init__(self, metrics: Metrics, request_id: str) -> None:
        self._metrics = metrics
        self._request_id = request_id
        self._adapter_id: str | None = None
        self._prompt_tokens = 0
        self._output_tokens = 0
        self._start_s = time.monotonic()
        self._last_s: float | None = None

    def admitted(self, request_id: str, adapter_id: str, prompt_tokens: int) -> None:
        """See `RequestWatch`."""
        metrics = self._metrics
        self._request_id, self._adapter_id = request_id, adapter_id
        self._prompt_tokens = prompt_tokens
        label = metrics.labels.of(adapter_id)
        metrics.admitted.labels(label).inc()
        metrics.prompt_tokens.labels(label).inc(prompt_tokens)
        self._output_counter = metrics.output_tokens.labels(label)

    def piece(self, num_tokens: int) -> None:
        """See `RequestWatch`."""
        if not num_tokens:
            return
        self._output_counter.inc(num_tokens)
        now_s = time.monotonic()
        if self._last_s is None:
            self._metrics.ttft_s.observe(now_s - self._start_s)
        else:
            self._metrics.itl_s.observe((now_s - self._last_s) / num_tokens)
        self._last_s = now_s
        self._output_tokens += num_tokens

    def finished(self, delta: Delta) -> None:
        """See `RequestWatch`."""
        assert delta.finish_reason is not None
        self._metrics.success.labels(delta.finish_reason).inc()
        if delta.timing is not None:
            self._metrics.queue_s.observe(delta.timing.queue_s)
            if delta.timing.adapter_cache_hit is False:
                self._metrics.load_s.observe(delta.timing.adapter_load_s)

    def ended(self, code: grpc.StatusCode, reason: str) -> None:
        """See `RequestWatch`; the request's one line of the log is written here."""
        metrics, seconds = self._metrics, time.monotonic() - self._start_s
        was_admitted = self._adapter_id is not None
        if not was_admitted:
            metrics.refused.labels(code.name, reason).inc()
        elif code is grpc.StatusCode.OK:
            metrics.finished.inc()
            metrics.e2e_s.observe(seconds)
        elif code is grpc.StatusCode.CANCELLED:
            metrics.cancelled.inc()
        else:
            metrics.failed.labels(code.name, reason).inc()
        log_event(
            logger,
            "request_end",
            # One that was refused may be anything, line breaks too.
            request_id=ascii(self._request_id[:128])[1:-1] or None,
            adapter_id=self._adapter_id or None,
            code=code.name,
            reason=reason or None,
            prompt_tokens=self._prompt_tokens if was_admitted else None,
            tokens=self._output_tokens,
            ms=round(1e3 * seconds, 1),
        )
