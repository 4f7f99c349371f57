"""The front process: accepts gRPC calls and passes them on as bytes.

Started by `jchameleon.serving.front`, with its end of a socket as the only argument;
ends when the other end does.
"""

import asyncio
import collections
import contextlib
import gc
import logging
import math
import os
import pickle
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from typing import Any

import grpc
import uvloop
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection

from jchameleon.errors import ConfigError
from jchameleon.serving import pipe as wire
from jchameleon.serving.auth import TokenInterceptor, Tokens
from jchameleon.serving.front import END_S
from jchameleon.serving.logs import LineWriter, start_logs
from jchameleon.serving.pipe import Pipe
from jchameleon.serving.proto.jchameleon.v1 import (
    adapter_pb2,
    engine_pb2,
    inference_pb2,
)
from jchameleon.serving.settings import ServerConfig
from jchameleon.serving.status import unavailable
from jchameleon.serving.tls import server_credentials

logger = logging.getLogger(__name__)

Methods = Sequence[tuple[str, bool]]
"""Full names, and whether there are many replies; a call names its method by place."""

DESCRIBED = (inference_pb2, adapter_pb2, engine_pb2, health_pb2)
"""Imported so that reflection can describe them."""

LAST_WORDS_S = 0.5
"""For statuses on their way when the other process has ended."""

_CODES = {code.value[0]: code for code in grpc.StatusCode}


def main() -> None:
    """Serve until the other process ends or says so."""
    # The other one hears them, and drains first. They were blocked until here.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    uvloop.run(_serve(socket.socket(fileno=int(sys.argv[1]))))


async def _serve(connection: socket.socket) -> None:
    process = _Process()
    loop = asyncio.get_running_loop()
    await loop.create_unix_connection(
        lambda: process.connect(Pipe(process.receive, process.lost.set)),
        sock=connection,
    )
    await process.lost.wait()
    # It holds the port: whatever hangs here, it must not stay.
    last = threading.Timer(LAST_WORDS_S + END_S, os._exit, (1,))
    last.daemon = True
    last.start()
    await process.end_calls()
    process.close_logs()
    os._exit(0)  # what is left would be cancelled, and be told so


class Status(Exception):
    """What a call is to end with."""

    def __init__(
        self, code: grpc.StatusCode, details: str, metadata: tuple[Any, ...] = ()
    ) -> None:
        super().__init__(details)
        self.code, self.details, self.metadata = code, details, metadata


class _Call:
    """A client's call, until it has its answer."""

    def __init__(self) -> None:
        self._frames: collections.deque[tuple[int, bytes]] = collections.deque()
        self._reader: asyncio.Future[None] | None = None
        self.has_ended = False
        self.taken_bytes = 0

    def put(self, kind: int, content: bytes) -> None:
        """Add a frame and wake the reader."""
        self._frames.append((kind, content))
        self.has_ended = kind != wire.MESSAGE
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def next(self) -> bytes | None:
        """Return the next message, or None at the end.

        Raises:
          Status: it ends so.
        """
        if not self._frames:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        kind, content = self._frames.popleft()
        if kind == wire.MESSAGE:
            return content
        if kind == wire.END:
            return None
        code, details, metadata = pickle.loads(content)
        raise Status(_CODES[code], details, metadata)


class _Process:
    """A gRPC server whose handlers are elsewhere; event loop only.

    Attributes:
      lost: the other process has ended.
    """

    def __init__(self) -> None:
        self.lost = asyncio.Event()
        self._pipe: Pipe | None = None
        self._server: grpc.aio.Server | None = None
        self._calls: dict[int, _Call] = {}
        self._opened = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._logs: LineWriter | None = None

    def connect(self, pipe: Pipe) -> Pipe:
        """Take the connection to the other process, and return it."""
        self._pipe = pipe
        return pipe

    def receive(self, kind: int, number: int, content: bytes) -> None:
        """Take a frame from the other process."""
        if kind == wire.START:
            self._begin(self._start(*pickle.loads(content)))
        elif kind == wire.STOP:
            self._begin(self._stop(*wire.GRACE_BODY.unpack(content)))
        elif number in self._calls:  # else its caller has left meanwhile
            self._calls[number].put(kind, content)

    def _begin(self, coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _send(self, kind: int, number: int = 0, content: bytes = b"") -> None:
        assert self._pipe is not None
        self._pipe.send(kind, number, content)

    def close_logs(self) -> None:
        """Write what is left to write."""
        if self._logs is not None:
            self._logs.close()

    async def _start(
        self, config: ServerConfig, tokens: Tokens, methods: Methods
    ) -> None:
        """Listen; what is wrong with that goes to the other process."""
        self._logs = start_logs(config.server.log_format, sys.stderr)
        try:
            port = await self._bind(config, tokens, methods)
        except Exception as error:
            if not isinstance(error, ConfigError):
                logger.exception("cannot listen")
            self._send(wire.FAILED, 0, (str(error) or repr(error)).encode())
            return
        gc.collect()
        gc.freeze()
        self._send(wire.BOUND, 0, wire.PORT_BODY.pack(port))

    async def _bind(
        self, config: ServerConfig, tokens: Tokens, methods: Methods
    ) -> int:
        credentials = server_credentials(config.security)
        self._server = server = grpc.aio.server(
            # Where there are no tokens to compare, it would cost every call its turn.
            interceptors=[TokenInterceptor(tokens)] if tokens else [],
            options=_options(config),
            maximum_concurrent_rpcs=config.server.max_concurrent_rpcs,
        )
        server.add_generic_rpc_handlers((_Handlers(self, methods),))
        services = dict.fromkeys(name.split("/")[1] for name, _ in methods)
        reflection.enable_server_reflection(
            (*services, reflection.SERVICE_NAME), server
        )
        listen = config.server
        host = f"[{listen.host}]" if ":" in listen.host else listen.host
        address = f"{host}:{listen.port}"
        try:
            if credentials is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {address}: {error}") from error
        if not port:
            raise ConfigError(f"cannot listen on {address}")
        await server.start()
        return port

    async def end_calls(self) -> None:
        """Tell all callers that there is nobody any more to answer them."""
        error = unavailable("ENGINE_DEAD", "the server has ended")
        status = (error.code.value[0], error.message, error.metadata())
        for call in self._calls.values():
            call.put(wire.STATUS, pickle.dumps(status))
        if self._server is not None:
            await self._server.stop(LAST_WORDS_S)

    async def _stop(self, grace_s: float) -> None:
        if self._server is not None:
            await self._server.stop(grace_s or None)
        self._send(wire.STOPPED)

    @contextlib.asynccontextmanager
    async def opened(self, method: int, message: bytes, context: Any) -> Any:
        """Pass a call on; the other process hears of it when the caller leaves.

        Who leaves while that process is behind is never heard of there.
        """
        assert self._pipe is not None
        await self._pipe.room()
        number = self._opened = self._opened + 1
        call = self._calls[number] = _Call()
        left_s = context.time_remaining()
        head = wire.CALL_HEAD.pack(method, math.inf if left_s is None else left_s)
        self._send(wire.CALL, number, head + message)
        try:
            yield number, call
        finally:
            del self._calls[number]
            if not call.has_ended:
                self._send(wire.GONE, number)

    def took(self, number: int, call: _Call, message: bytes) -> None:
        """Note that a message went out; say so now and then."""
        call.taken_bytes += len(message) + wire.MESSAGE_BYTES
        if call.taken_bytes > wire.WINDOW_BYTES // 2:
            self._send(wire.TAKEN, number, wire.TAKEN_BODY.pack(call.taken_bytes))
            call.taken_bytes = 0


class _Handlers(grpc.GenericRpcHandler):
    """Handlers of the methods that are passed on."""

    def __init__(self, process: _Process, methods: Methods) -> None:
        make = {True: self._many, False: self._single}
        self._process = process
        self._handlers = {
            name: make[is_streaming](place)
            for place, (name, is_streaming) in enumerate(methods)
        }

    def service(self, handler_call_details: Any) -> grpc.RpcMethodHandler | None:
        """See `grpc.GenericRpcHandler`."""
        return self._handlers.get(handler_call_details.method)

    def _many(self, method: int) -> grpc.RpcMethodHandler:
        process = self._process

        async def handle(message: bytes, context: Any) -> None:
            async with process.opened(method, message, context) as (number, call):
                try:
                    while (reply := await call.next()) is not None:
                        await context.write(reply)
                        process.took(number, call, reply)
                except Exception as error:
                    await end_call(error, context)

        return grpc.unary_stream_rpc_method_handler(handle)

    def _single(self, method: int) -> grpc.RpcMethodHandler:
        process = self._process

        async def handle(message: bytes, context: Any) -> bytes:
            async with process.opened(method, message, context) as (_number, call):
                try:
                    reply = await call.next()
                    assert reply is not None, "an end without a reply"
                    await call.next()  # the end
                except Status as status:
                    await end_call(status, context)
                return reply

        return grpc.unary_unary_rpc_method_handler(handle)


async def end_call(error: Exception, context: Any) -> None:
    """End a call with a status other than OK."""
    status = error
    if not isinstance(status, Status):
        status = Status(grpc.StatusCode.INTERNAL, "a reply could not be sent")
    try:
        await context.abort(status.code, status.details, status.metadata)
    except grpc.aio.AbortError:
        if status is not error:  # and the caller is still there
            logger.error("a reply could not be sent", exc_info=error)
        raise
    except grpc.aio.InternalError:
        # The call ended meanwhile, as at its deadline, and there is nobody to tell.
        raise asyncio.CancelledError from None


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    """Return gRPC's channel arguments."""
    listen = config.server
    return [
        ("grpc.max_receive_message_length", listen.max_message_bytes),
        ("grpc.max_send_message_length", listen.max_reply_bytes),
        # Two servers on one port would share its calls without a word.
        ("grpc.so_reuseport", 0),
        # Clients may ping through a long prefill; gRPC's default of 300 s would end
        # their connections. vLLM's server allows the same.
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # A client that is gone without a word is found in 20 + 10 s.
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
    ]
