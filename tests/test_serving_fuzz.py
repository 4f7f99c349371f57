"""Random messages to every method: always a status of ours, never a dead process."""

import grpc
import pytest
from adapter_versions import write_version
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_harness import check_baseline, greedy, joined_ids, running_server

from jchameleon.serving.proto.jchameleon.v1 import (
    adapter_pb2,
    engine_pb2,
    inference_pb2,
)

FUZZ = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
ALLOWED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.CANCELLED,
}
FILES = (inference_pb2, adapter_pb2, engine_pb2)
METHODS = [
    (f"/{service.full_name}/{method.name}", method)
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    write_version(root / "tiny", 0, rank=8)
    table = {"adapters": {"root": str(root), "dynamic": True}}
    with running_server(table) as server:
        server.expected = joined_ids(server.stream(greedy()))
        yield server


def scalar(field):
    """Return values of a field: small, likely and extreme ones."""
    integers = {"u": (0, 2), "i": (-(2**31), 2**31 - 1)}
    kinds = {
        field.TYPE_DOUBLE: st.floats(),
        field.TYPE_FLOAT: st.floats(width=32),
        field.TYPE_BOOL: st.booleans(),
        field.TYPE_STRING: st.one_of(
            st.text(max_size=40), st.sampled_from(["tiny", "user", "../x", "\0"])
        ),
        field.TYPE_BYTES: st.binary(max_size=40),
        field.TYPE_UINT32: st.one_of(st.integers(0, 300), st.integers(0, 2**32 - 1)),
        field.TYPE_UINT64: st.one_of(st.integers(0, 300), st.integers(0, 2**64 - 1)),
        field.TYPE_INT32: st.one_of(st.integers(-3, 3), st.integers(*integers["i"])),
        field.TYPE_ENUM: st.integers(0, 9),
    }
    return kinds[field.type]


@st.composite
def messages(draw, descriptor, depth=0):
    """Return a message with a random choice of fields set."""
    message = descriptor._concrete_class()
    for field in descriptor.fields:
        if not draw(st.booleans()):
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            key, value = field.message_type.fields
            pairs = draw(st.dictionaries(scalar(key), scalar(value), max_size=3))
            getattr(message, field.name).update(pairs)
        elif field.is_repeated:
            value = scalar(field) if field.message_type is None else None
            if value is None:
                value = messages(field.message_type, depth + 1)
            getattr(message, field.name).extend(draw(st.lists(value, max_size=4)))
        elif field.message_type is not None:
            inner = draw(messages(field.message_type, depth + 1))
            getattr(message, field.name).CopyFrom(inner)
        else:
            setattr(message, field.name, draw(scalar(field)))
    return message


def code_of(server, path, method, data):
    """Return the status of a call with raw bytes."""
    kind = "unary_stream" if method.server_streaming else "unary_unary"
    try:
        answer = getattr(server.channel, kind)(path)(data, timeout=10)
        if method.server_streaming:
            list(answer)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize(("path", "method"), METHODS, ids=[path for path, _ in METHODS])
def test_random_messages_get_a_status_of_ours(server, path, method):
    seen = set()

    @FUZZ
    @given(messages(method.input_type))
    def run(message):
        code = code_of(server, path, method, message.SerializeToString())
        assert code in ALLOWED, code
        seen.add(code)

    run()
    if method.name in ("Generate", "GenerateStream", "RegisterAdapter"):
        assert len(seen) > 1, "all random messages were answered alike"
    check_baseline(server)
    assert joined_ids(server.stream(greedy())) == server.expected


@pytest.mark.parametrize(("path", "method"), METHODS, ids=[path for path, _ in METHODS])
def test_random_bytes_get_a_status_of_ours(server, path, method):
    @FUZZ
    @given(st.binary(max_size=200))
    def run(data):
        assert code_of(server, path, method, data) in ALLOWED

    run()
    check_baseline(server)
    assert joined_ids(server.stream(greedy())) == server.expected
