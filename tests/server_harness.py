"""A real server on loopback in this process, and plain gRPC calls to it."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import uvloop
from google.rpc import error_details_pb2, status_pb2

from jchameleon.serving.observer import RequestObserver
from jchameleon.serving.proto.jchameleon.v1 import inference_pb2 as pb
from jchameleon.serving.server import Server
from jchameleon.serving.settings import ServerConfig

SMALL_ENGINE = {"max_running": 8, "max_batch_tokens": 64, "max_model_len": 512}


class RunningServer:
    """A server in a thread of its own.

    Attributes:
      server: the server; only its own loop may touch most of it, see `on_loop`.
      target: its address.
      channel: a channel to it.
    """

    def __init__(
        self,
        config: ServerConfig,
        *,
        loads: bool = True,
        observer: RequestObserver | None = None,
    ) -> None:
        self.loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.server = self.on_loop(self._make(config, observer))
        self.on_loop(self.server.bind())
        if loads:
            self.on_loop(self.server.load())
        self.target = f"127.0.0.1:{self.server.port}"
        self.channel = grpc.insecure_channel(self.target)

    async def _make(
        self, config: ServerConfig, observer: RequestObserver | None
    ) -> Server:
        return Server(config, observer)

    def on_loop(self, coroutine: Any, timeout_s: float = 120.0) -> Any:
        """Run a coroutine on the server's loop and return its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_s)

    def close(self, grace_s: float | None = None) -> None:
        """Stop server and thread."""
        self.channel.close()
        self.on_loop(self.server.stop(grace_s))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def unary(self, service: str, method: str, request: Any, reply: Any, **call: Any):
        """Call a method of `jchameleon.v1`; `call` are grpc's options."""
        return self.channel.unary_unary(
            f"/jchameleon.v1.{service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=reply.FromString,
        )(request, **call)

    def generate(self, request: pb.GenerateRequest, **call: Any) -> pb.GenerateResponse:
        """Call Generate."""
        return self.unary(
            "InferenceService", "Generate", request, pb.GenerateResponse, **call
        )

    def stream(self, request: pb.GenerateRequest, **call: Any) -> Any:
        """Call GenerateStream; returns grpc's call object, an iterator of replies."""
        return self.channel.unary_stream(
            "/jchameleon.v1.InferenceService/GenerateStream",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=pb.GenerateResponse.FromString,
        )(request, **call)


@contextlib.contextmanager
def running_server(table: dict[str, Any], **options: Any) -> Iterator[RunningServer]:
    """Run a server of the tiny model on a free port, configured by a table."""
    table = {
        "model": "tiny",
        **table,
        "server": {"port": 0, "metrics_port": None, **table.get("server", {})},
        "engine": {**SMALL_ENGINE, **table.get("engine", {})},
    }
    running = RunningServer(ServerConfig.from_dict(table), **options)
    try:
        yield running
    finally:
        running.close()


def error_details(error: grpc.RpcError) -> dict[str, Any]:
    """Return the google.rpc details of a status by their type's short name."""
    found = {}
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for packed in status_pb2.Status.FromString(value).details:
                kind = packed.TypeName().rpartition(".")[2]
                detail = getattr(error_details_pb2, kind)()
                packed.Unpack(detail)
                found[kind] = detail
    return found


def greedy(text: str = "hello", tokens: int = 12, **fields: Any) -> pb.GenerateRequest:
    """Return a request whose tokens are always the same."""
    return pb.GenerateRequest(
        text=text,
        sampling=pb.SamplingParams(temperature=0),
        stopping=pb.StoppingCriteria(max_new_tokens=tokens, ignore_eos=True),
        response=pb.ResponseOptions(token_ids=True),
        **fields,
    )


def joined_ids(pieces: Any) -> list[int]:
    """Return the token ids of a stream of one completion."""
    return [i for piece in pieces for output in piece.outputs for i in output.token_ids]


def check_baseline(running: RunningServer, *, timeout_s: float = 20.0) -> None:
    """Assert that soon nothing is held: places, tokens, rows, pages, claims."""
    llm, admission = running.server.state.llm, running.server.admission
    end_s = time.monotonic() + timeout_s
    while True:
        stats = llm.stats()
        held = {
            "open": admission.open_requests,
            "waiting tokens": admission.waiting_tokens,
            "running": stats.running,
            "waiting": stats.waiting,
            "kv pages": stats.kv_pages,
            "claims": sum(info.requests for info in llm.list_adapters()),
            "streams": len(running.server.outbox.open_ids),
        }
        if not any(held.values()):
            llm.engine.check()
            return
        assert time.monotonic() < end_s, held
        time.sleep(0.01)


@contextlib.contextmanager
def neighbours(running: RunningServer, tokens: int = 150) -> Iterator[None]:
    """Run two requests beside what happens inside; their tokens must not change."""
    requests = [greedy("a neighbour", tokens), greedy("another one", tokens)]
    expected = [joined_ids(running.stream(request)) for request in requests]
    streams = [running.stream(request) for request in requests]
    firsts = [next(stream) for stream in streams]
    yield
    for stream, first, ids in zip(streams, firsts, expected, strict=True):
        assert joined_ids([first, *stream]) == ids
    check_baseline(running)


def refusal(call: Any) -> grpc.RpcError:
    """Return the status that a call must end with."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value
