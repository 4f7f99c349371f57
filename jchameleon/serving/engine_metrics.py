"""The engine's totals as metrics, read when somebody asks, and the HTTP endpoint.

When the engine does not answer in time, the values of the last time are given out, with
their age.
"""

import time
from collections.abc import Iterator

import prometheus_client as prom
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from jchameleon.errors import ConfigError
from jchameleon.outputs import AdapterInfo, EngineStats
from jchameleon.serving.metrics import MAX_ADAPTER_LABELS, PREFIX
from jchameleon.serving.server import INFERENCE_SERVICE, Server

# Metric -> field of EngineStats, and what it is.
_COUNTERS = {
    "num_preemptions": ("squashes", "Requests sent back to wait and recomputed"),
    "bypasses": ("bypasses", "Admissions over the head of a lane"),
    "adapter_cache_hits": ("hits", "Admissions that found their adapter resident"),
    "adapter_cache_misses": ("misses", "Admissions that did not"),
    "adapter_loads": ("loads", "Adapter copies to the device"),
    "adapter_load_failures": ("load_failures", "Adapter copies that failed"),
    "adapter_evictions": ("evictions", "Adapters removed from the device"),
    "adapter_host_hits": ("host_hits", "Loads whose weights were in host memory"),
    "adapter_disk_reads": ("disk_reads", "Loads whose weights came from disk"),
    "prefix_cache_queries": (
        "prefix_queried_tokens",
        "Prompt tokens that may have been in the prefix cache",
    ),
    "prefix_cache_hits": ("prefix_hit_tokens", "Prompt tokens that were"),
}
_GAUGES = {
    "num_requests_running": ("running", "Completions that decode or prefill"),
    "num_requests_waiting": ("waiting", "Completions in the engine's queue"),
    "adapter_host_bytes": ("host_bytes", "Adapter weights in host memory"),
    "num_cpu_loaded_lora_adapters": ("host_adapters", "Adapters in host memory"),
    "programs": ("programs", "Compiled programs"),
}
_LANE_GAUGES = {
    "lane_waiting": "Requests that wait in a lane",
    "lane_running": "Requests of a lane that run",
    "lane_quota_tokens": "Tokens that a lane may hold",
    "lane_used_tokens": "Tokens that a lane holds",
}


class EngineCollector(Collector):
    """Turns snapshots into metrics."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        """Yield what is known; nothing of an engine that is not there yet."""
        ready = self._server.health.is_serving(INFERENCE_SERVICE)
        yield _gauge("ready", "1 where requests are taken", ready)
        compiles = self._server.compiles.after_warm_up
        yield _counter("compiles_after_warm_up", "Programs compiled too late", compiles)
        snapshot = self._server.reader.latest()
        if snapshot is None:
            return
        age_s = time.monotonic() - snapshot.taken_s
        yield _gauge("engine_stats_age_seconds", "Age of the values below", age_s)
        stats = snapshot.stats
        for name, (field, text) in _COUNTERS.items():
            yield _counter(name, text, getattr(stats, field))
        for name, (field, text) in _GAUGES.items():
            yield _gauge(name, text, getattr(stats, field))
        yield from _pool(stats)
        yield from _lanes(stats)
        yield from _adapters(snapshot.adapters)


def _pool(stats: EngineStats) -> Iterator[Metric]:
    used = GaugeMetricFamily(
        f"{PREFIX}pool_bytes",
        "The pool that KV blocks and adapters share",
        labels=["use"],
    )
    for use in ("kv", "cached", "adapter", "free"):
        used.add_metric([use], getattr(stats, f"{use}_pages") * stats.page_bytes)
    yield used
    yield _gauge(
        "kv_cache_usage_perc",
        "Part of the pool that running requests hold, from 0 to 1",
        stats.kv_pages / max(1, stats.total_pages),
    )


def _lanes(stats: EngineStats) -> Iterator[Metric]:
    for name, text in _LANE_GAUGES.items():
        lanes = GaugeMetricFamily(PREFIX + name, text, labels=["lane"])
        for index, lane in enumerate(stats.lanes):
            value = getattr(lane, name.removeprefix("lane_"))
            lanes.add_metric([str(index)], value)
        yield lanes


def _adapters(adapters: tuple[AdapterInfo, ...]) -> Iterator[Metric]:
    # Several names may stand for one content.
    on_device = {one.uid for one in adapters if one.tier == "device"}
    yield _gauge("num_gpu_loaded_lora_adapters", "On the device", len(on_device))
    yield _gauge("num_registered_adapters", "Adapters by name", len(adapters))
    loaded = GaugeMetricFamily(
        f"{PREFIX}lora_adapter_loaded",
        f"1 for each adapter in memory, at most {MAX_ADAPTER_LABELS} of them",
        labels=["adapter", "level", "pinned"],
    )
    in_memory = [one for one in adapters if one.tier in ("device", "host")]
    for one in in_memory[:MAX_ADAPTER_LABELS]:
        loaded.add_metric([one.name, one.tier, str(one.pinned).lower()], 1)
    yield loaded
    # For gateways that route by adapter; they read the newest by its value.
    requests = GaugeMetricFamily(
        f"{PREFIX}lora_requests_info",
        "Seconds since 1970, labelled with the adapters that run and wait now",
        labels=["running_lora_adapters", "waiting_lora_adapters", "max_lora"],
    )
    running = [one.name for one in adapters if one.running][:MAX_ADAPTER_LABELS]
    waiting = [one.name for one in adapters if one.waiting][:MAX_ADAPTER_LABELS]
    labels = [",".join(running), ",".join(waiting), str(len(adapters))]
    requests.add_metric(labels, time.time())
    yield requests


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, text, value=value)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


class MetricsEndpoint:
    """`/metrics` over HTTP, on threads of its own."""

    def __init__(self, host: str, port: int, registry: prom.CollectorRegistry) -> None:
        """Listen and answer.

        Args:
          port: 0 takes a free one.

        Raises:
          ConfigError: the address cannot be bound.
        """
        try:
            self._server, self._thread = prom.start_http_server(
                port, addr=host, registry=registry
            )
        except OSError as error:
            raise ConfigError(
                f"cannot serve metrics on {host}:{port}: {error}"
            ) from error
        self.port: int = self._server.server_port

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
