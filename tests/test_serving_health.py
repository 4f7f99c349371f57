"""Health and reflection over loopback."""

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from server_harness import refusal, running_server

INFERENCE = "jchameleon.v1.InferenceService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


@pytest.fixture
def server():
    with running_server({}, loads=False) as server:
        yield server


def check(server, service):
    return server.channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )(health_pb2.HealthCheckRequest(service=service)).status


def watch(server, service):
    call = server.channel.unary_stream(
        "/grpc.health.v1.Health/Watch",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )(health_pb2.HealthCheckRequest(service=service), timeout=60)
    return call, (reply.status for reply in call)


def test_server_is_live_from_the_start_and_ready_when_loaded(server):
    assert check(server, "") == SERVING
    assert check(server, INFERENCE) == NOT_SERVING
    _, states = watch(server, INFERENCE)
    assert next(states) == NOT_SERVING
    server.on_loop(server.server.load())
    assert check(server, INFERENCE) == SERVING
    assert next(states) == SERVING


def test_watchers_hear_each_change_and_end_with_the_server(server):
    health = server.server.health
    calls = [watch(server, name) for name in ("", INFERENCE)]
    assert [next(states) for _, states in calls] == [SERVING, NOT_SERVING]

    async def set_ready(ready):
        health.set_ready(ready=ready)

    for ready in (True, False, True):
        server.on_loop(set_ready(ready))
        assert next(calls[1][1]) == (SERVING if ready else NOT_SERVING)

    async def refuse():
        server.server.refuse()
        health.set_ready(ready=True)  # too late to count

    server.on_loop(refuse())
    assert next(calls[1][1]) == NOT_SERVING
    assert check(server, "") == SERVING  # it drains, and is not to be killed for it

    async def end():
        health.end()

    server.on_loop(end())
    for (call, states), left in zip(calls, ([NOT_SERVING], []), strict=True):
        assert list(states) == left
        assert call.code() is grpc.StatusCode.OK


def test_unknown_service_is_not_found_by_check_and_watched_as_unknown(server):
    error = refusal(lambda: check(server, "nonsense"))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    call, states = watch(server, "nonsense")
    assert next(states) == SERVICE_UNKNOWN
    call.cancel()


def test_reflection_names_services_and_describes_them(server):
    ask = server.channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=INFERENCE),
    ]
    services, files = ask(iter(requests))
    names = {service.name for service in services.list_services_response.service}
    assert {INFERENCE, "grpc.health.v1.Health"} <= names
    [file] = files.file_descriptor_response.file_descriptor_proto
    assert b"GenerateStream" in file
