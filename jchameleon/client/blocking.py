"""The client for programs without an event loop."""

import time
from collections.abc import Iterator
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


class Client(ClientBase):
    """Calls a server and blocks until it answers; threads may share one.

    Every method raises `CallError` for an answer other than OK, and InvalidRequestError
    for what cannot be sent. Calls of which nothing was run are tried again as the
    `RetryPolicy` says, and never after output has come.
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
        """Return at once; the connection is made by the first call.

        Args:
          target: host:port.
          token: that the server asks for.
          tls: None speaks plain text.
          timeout_s: deadline of a call with all its tries; None has none. Each method
            takes its own.

        Raises:
          ConfigError: token or TLS files are wrong.
        """
        super().__init__(token, timeout_s, retry)
        if tls is None:
            self._channel = grpc.insecure_channel(target, CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(
                target, tls.credentials(), (*CHANNEL_OPTIONS, *tls.options())
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls under way end as cancelled."""
        self._channel.close()

    def generate(
        self,
        prompt: str | None = None,
        *,
        timeout_s: float | None = None,
        **fields: Unpack[Request],
    ) -> values.Generation:
        """Return the whole answer to a prompt.

        Args:
          prompt: a text; or instead, in `fields`, token_ids or messages.
          timeout_s: instead of the client's.
          fields: of `Request`: adapter, max_tokens, temperature, ...
        """
        call = calls.generate(generate_request(prompt, fields))
        return self._run(call, timeout_s)

    def stream(
        self,
        prompt: str | None = None,
        *,
        timeout_s: float | None = None,
        **fields: Unpack[Request],
    ) -> Iterator[values.Piece]:
        """Return a generator of pieces, sent for by its first `next`.

        Takes what `generate` takes. Closing it, or dropping it, cancels the request.
        """
        request = generate_request(prompt, fields)
        return self._pieces(request, self._attempts(timeout_s, repeatable=True))

    def tokenize(
        self, prompt: str | None = None, *, messages: Messages | None = None
    ) -> values.Tokens:
        """Return what `generate` would read for a prompt."""
        return self._run(calls.tokenize(prompt, messages))

    def register_adapter(
        self,
        adapter_id: str,
        source_path: str,
        *,
        expected_uid: str = "",
        pin: bool = False,
        validate_only: bool = False,
        replace: bool = False,
    ) -> values.Adapter:
        """Register an adapter directory below the server's adapter root.

        Args:
          expected_uid: refuse other content than that of this uid.
          pin: load it and keep it on the device.
          validate_only: check everything, register nothing.
          replace: let the id stand for this content from now on.
        """
        return self._run(
            calls.register_adapter(
                adapter_id,
                source_path,
                expected_uid=expected_uid,
                pin=pin,
                validate_only=validate_only,
                replace=replace,
            )
        )

    def unregister_adapter(
        self,
        adapter_id: str,
        *,
        force: bool = False,
        timeout_s: float | None = None,
    ) -> values.Adapter:
        """Forget an adapter once its requests have ended; return what it was last.

        Args:
          force: end its requests instead of waiting for them.
          timeout_s: how long to wait for them, instead of the client's.
        """
        return self._run(calls.unregister_adapter(adapter_id, force=force), timeout_s)

    def get_adapter(self, adapter_id: str) -> values.Adapter:
        """Return one adapter."""
        return self._run(calls.get_adapter(adapter_id))

    def list_adapters(
        self, prefix: str = "", *, page_size: int = 0
    ) -> tuple[values.Adapter, ...]:
        """Return all adapters whose ids begin with `prefix`, by id.

        Args:
          page_size: adapters that are fetched at once; 0 leaves it to the server.
        """
        found: list[values.Adapter] = []
        page_token = ""
        while True:
            call = calls.list_adapters(prefix, page_token, page_size)
            page, page_token = self._run(call)
            found += page
            if not page_token:
                return tuple(found)

    def pin_adapter(self, adapter_id: str) -> values.Adapter:
        """Load an adapter and keep it on the device."""
        return self._run(calls.pin_adapter(adapter_id))

    def unpin_adapter(self, adapter_id: str) -> values.Adapter:
        """Let an adapter be evicted again."""
        return self._run(calls.unpin_adapter(adapter_id))

    def server_info(self) -> values.ServerInfo:
        """Return what the server is."""
        return self._run(calls.server_info())

    def stats(self) -> values.ServerStats:
        """Return what the server does now, and its counters."""
        return self._run(calls.stats())

    def abort(self, *request_ids: str) -> None:
        """End requests with what they have; ids not in flight are passed over."""
        self._run(calls.abort(request_ids))

    def health(self, service: str = calls.INFERENCE_SERVICE) -> str:
        """Return "serving", "not_serving", "unknown" or "service_unknown".

        Asks once: a server that is not there is a CallError.

        Args:
          service: empty asks whether the process is alive.
        """
        return self._try(calls.health(service), self._only_attempt())

    def _run(self, call: Call[T], timeout_s: float | None = None) -> T:
        return self._try(call, self._attempts(timeout_s, repeatable=call.repeatable))

    def _try(self, call: Call[T], attempts: Attempts) -> T:
        method = self._channel.unary_unary(
            call.method,
            type(call.request).SerializeToString,
            call.reply_type.FromString,
        )
        while True:
            try:
                reply = method(
                    call.request, timeout=attempts.left_s, metadata=self._metadata
                )
            except grpc.RpcError as error:
                time.sleep(attempts.wait_s(call_error(error)))
            else:
                return call.convert(reply)

    def _pieces(
        self, request: pb.GenerateRequest, attempts: Attempts
    ) -> Iterator[values.Piece]:
        method = self._channel.unary_stream(
            calls.GENERATE_STREAM,
            pb.GenerateRequest.SerializeToString,
            pb.GenerateResponse.FromString,
        )
        has_begun = False
        while True:
            replies = method(request, timeout=attempts.left_s, metadata=self._metadata)
            try:
                for reply in replies:
                    has_begun = True
                    yield from pieces(reply)
                return
            except grpc.RpcError as error:
                failed = call_error(error)
            finally:
                replies.cancel()  # nothing happens to one that has ended
            if has_begun:
                raise failed
            time.sleep(attempts.wait_s(failed))
