"""The client for asyncio."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Self, TypeVar, Unpack

import grpc

from jchameleon.client import calls, values
from jchameleon.client.base import DEFAULT_TIMEOUT_S, ClientBase
from jchameleon.client.calls import Call
from jchameleon.client.connection import CHANNEL_OPTIONS, Tls
from jchameleon.client.errors import call_error
from jchameleon.client.messages import (
    Messages,
    Request,
    generate_request,
    pieces,
)
from jchameleon.client.retry import Attempts, RetryPolicy
from jchameleon.serving.proto.jchameleon.v1 import inference_pb2 as pb

T = TypeVar("T")


class AsyncClient(ClientBase):
    """`Client` with coroutines: its methods, arguments and errors.

    One event loop may use it, the one that runs when it is made.
    """

    def __init__(
        self,
        target: str,
        *,
        token: str | None = None,
        tls: Tls | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        retry: RetryPolicy | None = None,
    ) -> None:
        """See `Client`."""
        super().__init__(token, timeout_s, retry)
        if tls is None:
            self._channel = grpc.aio.insecure_channel(target, CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(
                target, tls.credentials(), (*CHANNEL_OPTIONS, *tls.options())
            )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls under way end as cancelled."""
        await self._channel.close()

    async def generate(
        self,
        prompt: str | None = None,
        *,
        timeout_s: float | None = None,
        **fields: Unpack[Request],
    ) -> values.Generation:
        """Return the whole answer to a prompt; see `Client.generate`."""
        call = calls.generate(generate_request(prompt, fields))
        return await self._run(call, timeout_s)

    def stream(
        self,
        prompt: str | None = None,
        *,
        timeout_s: float | None = None,
        **fields: Unpack[Request],
    ) -> AsyncGenerator[values.Piece, None]:
        """Return an async generator of pieces, sent for by its first step.

        Closing it (`aclose`, or `contextlib.aclosing`) cancels the request; a `break`
        alone does so only when the loop finds it dropped.
        """
        request = generate_request(prompt, fields)
        return self._pieces(request, self._attempts(timeout_s, repeatable=True))

    async def tokenize(
        self, prompt: str | None = None, *, messages: Messages | None = None
    ) -> values.Tokens:
        """Return what `generate` would read for a prompt."""
        return await self._run(calls.tokenize(prompt, messages))

    async def register_adapter(
        self,
        adapter_id: str,
        source_path: str,
        *,
        expected_uid: str = "",
        pin: bool = False,
        validate_only: bool = False,
        replace: bool = False,
    ) -> values.Adapter:
        """Register an adapter directory; see `Client.register_adapter`."""
        return await self._run(
            calls.register_adapter(
                adapter_id,
                source_path,
                expected_uid=expected_uid,
                pin=pin,
                validate_only=validate_only,
                replace=replace,
            )
        )

    async def unregister_adapter(
        self,
        adapter_id: str,
        *,
        force: bool = False,
        timeout_s: float | None = None,
    ) -> values.Adapter:
        """Forget an adapter; see `Client.unregister_adapter`."""
        call = calls.unregister_adapter(adapter_id, force=force)
        return await self._run(call, timeout_s)

    async def get_adapter(self, adapter_id: str) -> values.Adapter:
        """Return one adapter."""
        return await self._run(calls.get_adapter(adapter_id))

    async def list_adapters(
        self, prefix: str = "", *, page_size: int = 0
    ) -> tuple[values.Adapter, ...]:
        """Return all adapters whose ids begin with `prefix`, by id."""
        found: list[values.Adapter] = []
        page_token = ""
        while True:
            call = calls.list_adapters(prefix, page_token, page_size)
            page, page_token = await self._run(call)
            found += page
            if not page_token:
                return tuple(found)

    async def pin_adapter(self, adapter_id: str) -> values.Adapter:
        """Load an adapter and keep it on the device."""
        return await self._run(calls.pin_adapter(adapter_id))

    async def unpin_adapter(self, adapter_id: str) -> values.Adapter:
        """Let an adapter be evicted again."""
        return await self._run(calls.unpin_adapter(adapter_id))

    async def server_info(self) -> values.ServerInfo:
        """Return what the server is."""
        return await self._run(calls.server_info())

    async def stats(self) -> values.ServerStats:
        """Return what the server does now, and its counters."""
        return await self._run(calls.stats())

    async def abort(self, *request_ids: str) -> None:
        """End requests with what they have; ids not in flight are passed over."""
        await self._run(calls.abort(request_ids))

    async def health(self, service: str = calls.INFERENCE_SERVICE) -> str:
        """Return how the server is; see `Client.health`."""
        return await self._try(calls.health(service), self._only_attempt())

    async def _run(self, call: Call[T], timeout_s: float | None = None) -> T:
        attempts = self._attempts(timeout_s, repeatable=call.repeatable)
        return await self._try(call, attempts)

    async def _try(self, call: Call[T], attempts: Attempts) -> T:
        method = self._channel.unary_unary(
            call.method,
            type(call.request).SerializeToString,
            call.reply_type.FromString,
        )
        while True:
            try:
                reply = await method(
                    call.request, timeout=attempts.left_s, metadata=self._metadata
                )
            except grpc.aio.AioRpcError as error:
                await asyncio.sleep(attempts.wait_s(call_error(error)))
            else:
                return call.convert(reply)

    async def _pieces(
        self, request: pb.GenerateRequest, attempts: Attempts
    ) -> AsyncGenerator[values.Piece, None]:
        method = self._channel.unary_stream(
            calls.GENERATE_STREAM,
            pb.GenerateRequest.SerializeToString,
            pb.GenerateResponse.FromString,
        )
        has_begun = False
        while True:
            replies = method(request, timeout=attempts.left_s, metadata=self._metadata)
            try:
                async for reply in replies:
                    has_begun = True
                    for piece in pieces(reply):
                        yield piece
                return
            except grpc.aio.AioRpcError as error:
                failed = call_error(error)
            finally:
                replies.cancel()  # nothing happens to one that has ended
            if has_begun:
                raise failed
            await asyncio.sleep(attempts.wait_s(failed))
