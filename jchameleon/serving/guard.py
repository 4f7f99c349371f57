"""Handlers that take raw bytes and always answer with a status of ours.

Bytes are parsed inside the guard, so that what does not parse is INVALID_ARGUMENT, what
the library refuses has its code, and a fault of ours is INTERNAL and logged.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from jchameleon.serving.front import Call
from jchameleon.serving.status import StatusError, answer_to, status_of

logger = logging.getLogger(__name__)

Unary = Callable[[Any, Call], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Streaming = Callable[[Any, Call, Send], Awaitable[None]]
_M = TypeVar("_M", bound=Message)


def unary(request_type: type[Message], method: Unary) -> grpc.RpcMethodHandler:
    """Return the handler of a method with one reply."""

    async def handle(data: bytes, context: Call) -> bytes:
        try:
            reply = await method(_parse(request_type, data), context)
            return reply.SerializeToString()
        except Exception as error:
            await _answer(error, context)
            raise AssertionError("abort returned") from error

    return grpc.unary_unary_rpc_method_handler(handle)


def streaming(
    request_type: type[Message], method: Streaming, *, stall_timeout_s: float
) -> grpc.RpcMethodHandler:
    """Return the handler of a method that sends a stream of replies.

    A method is no generator: each of them on the way to gRPC takes time for a reply.

    Args:
      stall_timeout_s: a reader that takes nothing for so long is given up.
    """

    async def handle(data: bytes, context: Call) -> None:
        try:
            request = _parse(request_type, data)
            patience = _Patience(stall_timeout_s)

            async def send(reply: Message) -> None:
                message = reply.SerializeToString()
                patience.begin()
                await context.write(message)
                patience.end()

            try:
                await method(request, context, send)
            except asyncio.CancelledError:
                if not patience.is_over():
                    raise
                raise StatusError(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    "STALLED_READER",
                    f"nothing was read for {stall_timeout_s:g} s",
                ) from None
            finally:
                patience.close()
        except Exception as error:
            await _answer(error, context)

    return grpc.unary_stream_rpc_method_handler(handle)


class _Patience:
    """Cancels the task of a stream when one of its writes takes too long.

    `asyncio.timeout` does it too, with a timer for each message, which costs more than
    everything else that is done for one.
    """

    def __init__(self, timeout_s: float) -> None:
        """For the current task."""
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._timeout_s = timeout_s
        self._began_s: float | None = None
        self._has_cancelled = False
        self._timer = self._loop.call_later(timeout_s, self._look)

    def begin(self) -> None:
        """A write begins."""
        self._began_s = self._loop.time()

    def end(self) -> None:
        """It has been done."""
        self._began_s = None

    def is_over(self) -> bool:
        """Return whether what has cancelled the task is this, and nothing else."""
        assert self._task is not None
        return self._has_cancelled and self._task.uncancel() == 0

    def close(self) -> None:
        """Look no more."""
        self._timer.cancel()

    def _look(self) -> None:
        now_s = self._loop.time()
        left_s = self._timeout_s
        if self._began_s is not None:
            left_s += self._began_s - now_s
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._look)
            return
        assert self._task is not None
        self._has_cancelled = True
        self._task.cancel()


def _parse(request_type: type[_M], data: bytes) -> _M:
    try:
        return request_type.FromString(data)
    except DecodeError as error:
        raise StatusError(
            grpc.StatusCode.INVALID_ARGUMENT,
            "MALFORMED_MESSAGE",
            f"the request is no {request_type.DESCRIPTOR.full_name}: {error}",
        ) from None


async def _answer(error: Exception, context: Call) -> None:
    """End the call with the status of `error`."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if status_of(error) is None:
        logger.error("a handler failed", exc_info=error)
    status = answer_to(error)
    await context.abort(status.code, status.message, status.metadata())
