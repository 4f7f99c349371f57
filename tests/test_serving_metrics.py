"""What the server counts, against what was sent."""

import threading
import time
import urllib.request

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_harness import greedy, refusal, running_server

from jchameleon.errors import ConfigError, EngineDeadError
from jchameleon.serving.engine_metrics import EngineCollector, MetricsEndpoint
from jchameleon.serving.engine_reader import EngineReader
from jchameleon.serving.metrics import MAX_ADAPTER_LABELS, AdapterLabels, Metrics
from jchameleon.serving.proto.jchameleon.v1 import inference_pb2 as pb

P = "jchameleon_"


class Scraped:
    """A server, its endpoint and what that says."""

    def __init__(self, server, metrics):
        metrics.registry.register(EngineCollector(server.server))
        self.server = server
        self.endpoint = MetricsEndpoint("127.0.0.1", 0, metrics.registry)

    def values(self):
        """Return samples by name and labels."""
        url = f"http://127.0.0.1:{self.endpoint.port}/metrics"
        with urllib.request.urlopen(url, timeout=30) as reply:
            text = reply.read().decode()
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def settled(self):
        """Return values once no request is open."""
        end_s = time.monotonic() + 20
        while self.server.server.admission.open_requests:
            assert time.monotonic() < end_s
            time.sleep(0.01)
        return self.values()


@pytest.fixture(scope="module")
def scraped():
    metrics = Metrics()
    with running_server({}, observer=metrics) as server:
        scraped = Scraped(server, metrics)
        yield scraped
        scraped.endpoint.close()


def gained(before, after, *key):
    return after.get(key, 0) - before.get(key, 0)


def total(values, name):
    return sum(value for key, value in values.items() if key[0] == name)


def test_counters_add_up_whatever_becomes_of_requests(scraped):
    server, before = scraped.server, scraped.values()
    for _ in range(3):
        server.generate(greedy("fine", 7))
    list(server.stream(greedy("fine", 5)))
    for wrong in (
        pb.GenerateRequest(text="x", adapter_id="nobody"),
        pb.GenerateRequest(text=""),
    ):
        refusal(lambda request=wrong: server.generate(request))
    cancelled = server.stream(greedy("long", 400))
    next(cancelled)
    cancelled.cancel()
    # The deadline ends it too, and by whom it was noticed first is a matter of luck.
    refusal(lambda: server.generate(greedy("late", 480), timeout=0.05))
    after = scraped.settled()

    def more(name, *labels):
        return gained(before, after, P + name, *labels)

    assert more("requests_received_total") == 8
    assert more("requests_finished_total") == 4
    assert more("requests_refused_total", "NOT_FOUND", "UNKNOWN_ADAPTER") == 1
    assert more("requests_refused_total", "INVALID_ARGUMENT", "INVALID_REQUEST") == 1
    assert more("requests_cancelled_total") >= 1
    assert more("request_success_total", "length") == 4
    assert more("e2e_request_latency_seconds_count") == 4
    assert more("time_to_first_token_seconds_count") >= 5
    admitted = total(after, P + "requests_admitted_total")
    refused = total(after, P + "requests_refused_total")
    ends = ("requests_finished", "requests_failed", "requests_cancelled")
    assert admitted == sum(total(after, f"{P}{name}_total") for name in ends)
    assert total(after, P + "requests_received_total") == admitted + refused


def test_tokens_are_those_of_the_replies(scraped):
    before = scraped.settled()
    request = greedy("three of them", 9)
    request.sampling.MergeFrom(pb.SamplingParams(n=3, temperature=1))
    reply = scraped.server.generate(request)
    after = scraped.settled()
    assert gained(before, after, P + "generation_tokens_total", "_base") == 27
    prompt_tokens = gained(before, after, P + "prompt_tokens_total", "_base")
    assert prompt_tokens == reply.usage.prompt_tokens


def test_engine_totals_are_the_librarys(scraped):
    stats, values = scraped.server.server.state.llm.stats(), scraped.settled()
    assert values[P + "num_requests_running",] == 0
    assert values[P + "programs",] == stats.programs > 0
    pool = sum(v for k, v in values.items() if k[0] == P + "pool_bytes")
    assert pool == stats.total_pages * stats.page_bytes
    assert values[P + "ready",] == 1


def test_scrape_answers_while_the_engine_hangs(scraped):
    engine = scraped.server.server.state.llm.engine
    go_on, hangs = threading.Event(), threading.Event()

    def hang():
        hangs.set()
        go_on.wait()

    asking = threading.Thread(target=engine.on_engine_thread, args=(hang,))
    asking.start()
    try:
        hangs.wait()
        first, second = scraped.values(), scraped.values()
    finally:
        go_on.set()
        asking.join()
    age = (P + "engine_stats_age_seconds",)
    assert second[age] > first[age] > 0
    assert first[P + "programs",] == second[P + "programs",] > 0
    readers = [t for t in threading.enumerate() if t.name == "engine-reader"]
    assert len(readers) <= 1
    assert scraped.values()[age] < second[age]


def test_compiles_after_warm_up_are_counted():
    import jax
    import numpy as np

    with running_server({}) as server:
        counter = server.server.compiles
        server.generate(greedy("hello", 3))
        assert counter.after_warm_up == 0
        jax.jit(lambda x: x * 5 + 2)(np.ones(7, np.float32))
        assert counter.after_warm_up == 1


def test_adapters_beyond_the_limit_share_a_label():
    labels = AdapterLabels()
    names = [f"adapter-{i}" for i in range(MAX_ADAPTER_LABELS + 50)]
    values = {labels.of(name) for name in names * 2}
    assert values == {*names[:MAX_ADAPTER_LABELS], "_other"}
    assert labels.of("") == "_base"


def test_port_of_the_endpoint_in_use_is_a_configuration_error():
    endpoint = MetricsEndpoint("127.0.0.1", 0, Metrics().registry)
    with pytest.raises(ConfigError, match=f"cannot serve metrics on .*{endpoint.port}"):
        MetricsEndpoint("127.0.0.1", endpoint.port, Metrics().registry)
    endpoint.close()


def test_dead_engine_leaves_the_last_values_and_unavailable():
    metrics = Metrics()
    with running_server({}, observer=metrics) as server:
        scraped = Scraped(server, metrics)
        programs = scraped.values()[P + "programs",]

        def die():
            raise SystemExit("gone")

        with pytest.raises(Exception, match="gone"):
            server.server.state.llm.engine.on_engine_thread(die)
        error = refusal(lambda: server.generate(greedy()))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert scraped.values()[P + "programs",] == programs
        scraped.endpoint.close()


def test_many_callers_share_one_reading_of_an_engine_that_hangs():
    goes_on = threading.Event()

    def llm():
        goes_on.wait(30)
        return None

    reader = EngineReader(llm)
    readings = {id(reader.read()) for _ in range(100)}
    assert len(readings) == 1
    waiting = [t for t in threading.enumerate() if t.name == "engine-reader"]
    assert len(waiting) == 1 and waiting[0].daemon
    assert reader.latest(timeout_s=0.01) is None
    goes_on.set()
    with pytest.raises(EngineDeadError, match="not there yet"):
        reader.read().result(30)
