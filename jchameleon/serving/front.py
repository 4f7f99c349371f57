"""The gRPC side of a server, in a process of its own.

gRPC's event loop and an engine's host work in one interpreter take turns at its lock,
and each makes the other slower: a burst of requests was accepted in twice the time, and
the engine's steps took nearly twice the CPU. So a front process accepts connections,
speaks TLS, compares tokens and knows of calls no more than their bytes; `Front` starts
it, runs the handlers of what it passes on, and sends back what they say. Neither
outlives the other.
"""

import asyncio
import logging
import math
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import grpc

from jchameleon.errors import ConfigError
from jchameleon.serving import pipe as wire
from jchameleon.serving.auth import Tokens
from jchameleon.serving.pipe import Pipe
from jchameleon.serving.settings import ServerConfig

logger = logging.getLogger(__name__)

END_S = 2.0
"""A front process that does not end its calls or itself is waited for so long."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Call:
    """A call that the front process has passed on: what a handler needs of it.

    In place of gRPC's `ServicerContext`, with those of its methods that are used here.
    """

    def __init__(self, number: int, left_s: float, pipe: Pipe) -> None:
        """Of `Front`; its deadline is `left_s` away."""
        self._number = number
        self._pipe = pipe
        self._deadline_s = time.monotonic() + left_s
        self._untaken_bytes = 0
        self._room: asyncio.Future[None] | None = None

    def time_remaining(self) -> float | None:
        """Return the seconds until the deadline, None without one."""
        if math.isinf(self._deadline_s):
            return None
        return max(0.0, self._deadline_s - time.monotonic())

    async def write(self, message: bytes) -> None:
        """Send a message; wait while the caller does not take what was sent before."""
        self._pipe.send(wire.MESSAGE, self._number, message)
        self._untaken_bytes += len(message) + wire.MESSAGE_BYTES
        if self._untaken_bytes > wire.WINDOW_BYTES:
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    def taken(self, num_bytes: int) -> None:
        """The caller has taken so much of it."""
        self._untaken_bytes -= num_bytes
        room = self._room
        if room is not None and self._untaken_bytes <= wire.WINDOW_BYTES:
            self._room = None
            if not room.done():
                room.set_result(None)

    async def abort(
        self,
        code: grpc.StatusCode,
        details: str = "",
        trailing_metadata: tuple[tuple[str, bytes], ...] = (),
    ) -> NoReturn:
        """End the call with a status; always raises AbortError."""
        status = pickle.dumps((code.value[0], details, trailing_metadata))
        self._pipe.send(wire.STATUS, self._number, status)
        raise grpc.aio.AbortError


class Front:
    """Starts the front process and runs the handlers of its calls; event loop only."""

    def __init__(
        self,
        config: ServerConfig,
        handlers: Mapping[str, grpc.RpcMethodHandler],
        *,
        tokens: Tokens | None = None,
        on_lost: Callable[[int | None], None],
    ) -> None:
        """Nothing runs yet.

        Args:
          tokens: that callers must bring; None for none.
          handlers: of bytes, by the method's full name; with one reply or many.
          on_lost: is called when the process has ended by itself, with its exit code
            (of a signal, its number below 0) if that is known yet.
        """
        self._config = config
        self._tokens = tokens or Tokens((), ())
        self._names = tuple(handlers)
        self._handlers = tuple(handlers.values())
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Pipe | None = None
        self._calls: dict[int, tuple[Call, asyncio.Task[None]]] = {}
        self._bound: asyncio.Future[int] = self._loop.create_future()
        self._stopped: asyncio.Future[None] = self._loop.create_future()
        self._is_ending = False

    @property
    def pid(self) -> int:
        """Id of the process."""
        assert self._process is not None
        return self._process.pid

    async def start(self) -> int:
        """Start the process; return the port that it listens on.

        Raises:
          ConfigError: it cannot be started, or the address cannot be bound.
        """
        methods = [
            (name, bool(handler.response_streaming))
            for name, handler in zip(self._names, self._handlers, strict=True)
        ]
        facts = pickle.dumps((self._config, self._tokens, methods))
        try:
            own, other = socket.socketpair()
            with other:
                self._process = _spawn(other.fileno())
        except OSError as error:
            raise ConfigError(f"cannot start the front process: {error}") from error
        try:
            _, self._pipe = await self._loop.create_unix_connection(
                lambda: Pipe(self._receive, self._lost), sock=own
            )
            self._pipe.send(wire.START, 0, facts)
            return await self._bound
        except BaseException:
            await self._end()
            raise

    async def stop(self, grace_s: float | None) -> None:
        """Take no new calls, give those that run `grace_s`, and end the process."""
        if self._pipe is not None:
            if not self._is_ending:
                self._is_ending = True
                grace = wire.GRACE_BODY.pack(0.0 if grace_s is None else grace_s)
                self._pipe.send(wire.STOP, 0, grace)
            await asyncio.wait({self._stopped}, timeout=(grace_s or 0.0) + END_S)
        await self._end()
        # Nobody is left to hear what they have to say; they were told so.
        if running := [task for _, task in self._calls.values()]:
            await asyncio.wait(running)

    async def _end(self) -> None:
        self._is_ending = True
        if self._pipe is not None:
            self._pipe.close()
        process = self._process
        if process is None:
            return

        def wait() -> None:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

        await asyncio.to_thread(wait)

    def _lost(self) -> None:
        """The process has ended, or the connection was closed here."""
        self._pipe = None
        for _, task in self._calls.values():
            task.cancel()
        if not self._stopped.done():
            self._stopped.set_result(None)
        assert self._process is not None
        if not self._bound.done():
            self._bound.set_exception(
                ConfigError("the front process ended before it could listen")
            )
        elif not self._is_ending:
            self._on_lost(self._process.poll())

    def _receive(self, kind: int, number: int, content: bytes) -> None:
        if kind == wire.CALL:
            self._open(number, content)
        elif kind == wire.TAKEN:
            if number in self._calls:
                self._calls[number][0].taken(*wire.TAKEN_BODY.unpack(content))
        elif kind == wire.GONE:
            if number in self._calls:
                self._calls[number][1].cancel()
        elif kind == wire.STOPPED:
            if not self._stopped.done():
                self._stopped.set_result(None)
        elif not self._bound.done():  # else nobody waits for it any more
            if kind == wire.BOUND:
                self._bound.set_result(*wire.PORT_BODY.unpack(content))
            else:
                assert kind == wire.FAILED, f"a frame of kind {kind}"
                self._bound.set_exception(ConfigError(content.decode()))

    def _open(self, number: int, content: bytes) -> None:
        assert self._pipe is not None
        method, left_s = wire.CALL_HEAD.unpack_from(content)
        call = Call(number, left_s, self._pipe)
        message = content[wire.CALL_HEAD.size :]
        task = self._loop.create_task(
            self._run(self._handlers[method], number, call, message)
        )
        self._calls[number] = call, task
        # Not by the task itself: one that is cancelled before it begins does nothing.
        task.add_done_callback(lambda _: self._calls.pop(number))

    async def _run(self, handler: Any, number: int, call: Call, message: bytes) -> None:
        """Run a handler of a call, and end the call as it ends."""
        try:
            if handler.response_streaming:
                await handler.unary_stream(message, call)
            else:
                reply = await handler.unary_unary(message, call)
                self._send(wire.MESSAGE, number, reply)
            self._send(wire.END, number)
        except grpc.aio.AbortError:
            pass  # its status is on its way
        except asyncio.CancelledError:
            # The caller has left, and hears no more of it; or the handler gave up.
            self._send(wire.STATUS, number, _CANCELLED)
        except Exception:
            logger.exception("a handler failed")
            self._send(wire.STATUS, number, _FAILED)

    def _send(self, kind: int, number: int, content: bytes = b"") -> None:
        if self._pipe is not None:
            self._pipe.send(kind, number, content)


def _spawn(connection: int) -> subprocess.Popen[bytes]:
    """Start the front process, with its end of the socket as the only argument."""
    program = (
        # The very modules that this process has, wherever it has them from.
        f"import sys; sys.path[:] = {sys.path!r}; "
        "from jchameleon.serving.front_process import main; main()"
    )
    # Signals are for this process, which drains first. Those of a terminal go to its
    # group only; others may reach the new process before it can ignore them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", program, str(connection)],
            pass_fds=(connection,),
            stdin=subprocess.DEVNULL,
            process_group=0,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_CANCELLED = pickle.dumps((grpc.StatusCode.CANCELLED.value[0], "", ()))
_FAILED = pickle.dumps((grpc.StatusCode.INTERNAL.value[0], "a fault of the server", ()))
