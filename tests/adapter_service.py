"""Calls to AdapterService, and what they must be refused with."""

import time

from google.protobuf.message import Message
from server_harness import error_details, greedy, joined_ids, refusal

from jchameleon.serving.proto.jchameleon.v1 import adapter_pb2 as pb

VERSIONS = 6
"""Adapters v0, v1, ... below the root, of ranks 8, 16, 24, 8, 16, 24."""

LONG = 3900
"""Output tokens of a request that runs while other things happen."""


def table(root, **adapters):
    """Return a configuration with a dynamic root and room for long requests."""
    return {
        "adapters": {"root": str(root), "dynamic": True, **adapters},
        "engine": {"max_model_len": 4096},
    }


def call(server, method, *, timeout=60, **fields) -> Message:
    """Call a method of AdapterService."""
    request = getattr(pb, f"{method}Request")(**fields)
    reply = getattr(pb, f"{method}Response")
    return server.unary("AdapterService", method, request, reply, timeout=timeout)


def register(server, adapter_id, source_path, *, timeout=60, **fields):
    reply = call(
        server,
        "RegisterAdapter",
        timeout=timeout,
        adapter_id=adapter_id,
        source_path=source_path,
        **fields,
    )
    return reply.adapter


def get(server, adapter_id):
    return call(server, "GetAdapter", adapter_id=adapter_id).adapter


def listed(server, **fields):
    return list(call(server, "ListAdapters", **fields).adapters)


def long_stream(server, adapter_id):
    """Begin a long request; return its stream and first piece."""
    stream = server.stream(greedy("hello", LONG, adapter_id=adapter_id))
    return stream, next(stream)


def tokens_of(server, adapter_id):
    request = greedy("hello", 40, adapter_id=adapter_id)
    return joined_ids(server.stream(request, timeout=100))


def assert_code(code, reason, action):
    error = refusal(action)
    assert error.code() is code, error.details()
    assert error_details(error)["ErrorInfo"].reason == reason
    return error


def wait_for(condition):
    """Wait until something holds that does so sooner or later."""
    end_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end_s, "it never came"
        time.sleep(0.01)
