"""The serving process under load, at signals and at faults of its engine."""

import json
import os
import signal
import time
from pathlib import Path

import grpc
import pytest
from adapter_versions import write_version
from grpc_health.v1 import health_pb2
from serve_process import Load, serving, wait_until
from server_harness import error_details, greedy, joined_ids

from jchameleon.serving.proto.jchameleon.v1.adapter_pb2 import RegisterAdapterRequest

ADMITTED = 'jchameleon_requests_admitted_total{adapter="_base"}'
INFERENCE = "jchameleon.v1.InferenceService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def ask_health(target, service=INFERENCE):
    with grpc.insecure_channel(target) as channel:
        return channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )(health_pb2.HealthCheckRequest(service=service)).status


def reasons_of(load):
    return {error_details(error)["ErrorInfo"].reason for error in load.errors}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    limits = {"max_waiting_requests": 8}
    with serving(tmp_path_factory.mktemp("serve"), {"limits": limits}) as server:
        yield server


def test_burst_of_ten_times_the_places_gives_each_call_one_answer(server):
    places = 16  # 8 rows and 8 that wait
    load = Load(server.target, [greedy(f"call {i}", 30) for i in range(10 * places)])
    load.join()
    codes = load.codes()
    refused = codes.count(grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert codes.count(grpc.StatusCode.OK) + refused == len(codes)
    assert codes.count(grpc.StatusCode.OK) >= places
    assert refused > 0
    for error in load.errors:
        details = error_details(error)
        assert details["ErrorInfo"].reason == "QUEUE_FULL"
        assert details["RetryInfo"].retry_delay.ToTimedelta().total_seconds() > 0
    for _, _, pieces in load.answers:
        assert pieces is None or len(joined_ids(pieces)) == 30
    # Refused at once, by the server's own clock: nothing was tokenised or queued.
    ends = [e for e in server.events("request_end") if e["code"] != "OK"]
    assert len(ends) == refused
    assert max(event["ms"] for event in ends) < 50
    assert ask_health(server.target) == SERVING


def test_nothing_is_compiled_by_requests_of_any_shape(server):
    for tokens in (1, 2, 7, 60, 130, 400):
        server.generate(greedy("w" * tokens, 3))
    load = Load(server.target, [greedy(f"{i} " * i, 5 + i) for i in range(1, 9)])
    load.join()
    assert set(load.codes()) == {grpc.StatusCode.OK}
    assert server.metrics()["jchameleon_compiles_after_warm_up_total"] == 0


def test_log_has_a_line_for_each_request_and_no_prompt(server):
    secret = "the eagle lands at dawn"
    server.generate(greedy(secret, 3, request_id="spoken-of"))
    with pytest.raises(grpc.RpcError):
        server.generate(
            greedy(secret, 3, adapter_id="nobody", request_id="refused"),
            metadata=(("authorization", "Bearer hush"),),
        )
    wait_until(lambda: any("refused" in line for line in server.lines))
    ends = {e.get("request_id"): e for e in server.events("request_end")}
    assert ends["spoken-of"]["code"] == "OK"
    assert ends["spoken-of"]["tokens"] == 3
    assert ends["refused"]["code"] == "NOT_FOUND"
    for line in server.lines:
        facts = json.loads(line)
        assert {"time", "level", "event"} <= set(facts)
        assert "eagle" not in line and "hush" not in line


def test_sigterm_under_load_loses_nothing_and_ends_with_0(server):
    before = server.metrics()[ADMITTED]
    load = Load(server.target, [greedy(f"call {i}", 400) for i in range(16)])
    wait_until(lambda: server.metrics()[ADMITTED] == before + 16)
    server.signal(signal.SIGTERM)
    assert server.wait_for("draining")["open"] > 0
    # Until the last one has ended the port answers, and says why not.
    with pytest.raises(grpc.RpcError) as late:
        server.generate(greedy("too late"))
    assert late.value.code() is grpc.StatusCode.UNAVAILABLE
    assert error_details(late.value)["ErrorInfo"].reason == "DRAINING"
    assert ask_health(server.target) == NOT_SERVING
    load.join()
    assert set(load.codes()) == {grpc.StatusCode.OK}
    for _, _, pieces in load.answers:
        assert len(joined_ids(pieces)) == 400
    assert server.end() == 0
    assert server.events("drained")[0]["left"] == 0


def dumps(server):
    messages = [event["message"] for event in server.events("log")]
    return [message for message in messages if "threads" in message]


def test_registration_from_a_disk_that_hangs_does_not_hold_up_the_end(tmp_path):
    write_version(tmp_path / "hangs", 0)
    table = {"adapters": {"root": str(tmp_path), "dynamic": True}}
    with serving(tmp_path, table, faulty=True) as server:
        with grpc.insecure_channel(server.target) as channel:
            register = channel.unary_unary(
                "/jchameleon.v1.AdapterService/RegisterAdapter"
            )
            request = RegisterAdapterRequest(adapter_id="a", source_path="hangs")
            pending = register.future(request.SerializeToString())
            [output] = server.generate(greedy("beside it", 5)).outputs
            assert len(output.token_ids) == 5 and not pending.done()
            server.signal(signal.SIGTERM)
            assert server.end() == 0
            assert pending.code() is grpc.StatusCode.UNAVAILABLE


def test_engine_that_hangs_is_reported_recovers_and_its_death_ends_all(tmp_path):
    table = {"server": {"step_timeout_s": 2.0}}
    with serving(tmp_path, table, faulty=True) as server:
        load = Load(server.target, [greedy(f"call {i}", 300) for i in range(4)])
        wait_until(lambda: load.started)
        server.signal(signal.SIGUSR2)
        server.wait_for("engine_stuck")
        assert ask_health(server.target) == NOT_SERVING
        assert ask_health(server.target, "") == SERVING
        wait_until(lambda: dumps(server))
        [dump] = dumps(server)
        assert "faulty_iterate" in dump  # where it hangs
        # What the engine said last is still there.
        assert server.metrics()["jchameleon_ready"] == 0
        server.signal(signal.SIGUSR2)
        server.wait_for("engine_fine")
        assert ask_health(server.target) == SERVING
        load.join()
        assert set(load.codes()) == {grpc.StatusCode.OK}

        load = Load(server.target, [greedy(f"call {i}", 400) for i in range(12)])
        wait_until(lambda: load.started)
        start_s = time.monotonic()
        server.signal(signal.SIGUSR1)
        load.join()
        assert time.monotonic() - start_s < 5
        assert set(load.codes()) == {grpc.StatusCode.UNAVAILABLE}
        assert reasons_of(load) == {"ENGINE_DEAD"}
        assert server.end() == 1
        assert server.events("engine_dead")


def test_engine_that_hangs_ends_the_process_if_so_configured(tmp_path):
    table = {"server": {"step_timeout_s": 2.0, "exit_when_stuck": True}}
    with serving(tmp_path, table, faulty=True) as server:
        load = Load(server.target, [greedy("hello", 300)])
        wait_until(lambda: load.started)
        server.signal(signal.SIGUSR2)
        load.join()
        assert load.codes() == [grpc.StatusCode.UNAVAILABLE]
        assert reasons_of(load) == {"ENGINE_DEAD"}
        assert server.end() == 1


def test_front_process_that_dies_ends_the_server(tmp_path):
    with serving(tmp_path) as server:
        load = Load(server.target, [greedy(f"call {i}", 400) for i in range(4)])
        wait_until(lambda: load.started)
        os.kill(front_of(server.process.pid), signal.SIGKILL)
        load.join()
        assert set(load.codes()) == {grpc.StatusCode.UNAVAILABLE}
        assert server.end() == 1
        [event] = server.events("front_lost")
        assert event["level"] == "error"


def front_of(pid):
    """Return the only child of a server."""
    [child] = Path(f"/proc/{pid}/task/{pid}/children").read_text("utf-8").split()
    return int(child)


def test_killed_server_starts_again_and_a_second_signal_ends_it_at_once(tmp_path):
    with serving(tmp_path) as server:
        load = Load(server.target, [greedy(f"call {i}", 400) for i in range(4)])
        wait_until(lambda: load.started)
        front = front_of(server.process.pid)
        server.signal(signal.SIGKILL)
        load.join()
        wait_until(lambda: not Path(f"/proc/{front}").exists())
        assert set(load.codes()) == {grpc.StatusCode.UNAVAILABLE}
        port = int(server.target.rpartition(":")[2])
    with serving(tmp_path, {"server": {"port": port}}) as server:
        [output] = server.generate(greedy("again", 5)).outputs
        assert len(output.token_ids) == 5
        load = Load(server.target, [greedy(f"call {i}", 400) for i in range(12)])
        wait_until(lambda: load.started)
        server.signal(signal.SIGINT)
        server.wait_for("draining")
        server.signal(signal.SIGINT)
        load.join()
        assert grpc.StatusCode.UNAVAILABLE in load.codes()
        assert reasons_of(load) == {"DRAINING"}
        assert server.end() == 130
