"""AdapterService and EngineService in memory: what a client of theirs is held to."""

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from jchameleon.serving.proto.jchameleon.v1 import adapter_pb2 as ad
from jchameleon.serving.proto.jchameleon.v1 import engine_pb2 as en
from jchameleon.serving.status import StatusError

PAGE = 2
TOKEN = "secret"


class FakeAdmin:
    """Keeps adapters by id; every call needs the token.

    Attributes:
      target: its address.
      received: requests, in order.
      failures: statuses that the next calls end with instead.
    """

    def __init__(self) -> None:
        self.adapters: dict[str, ad.Adapter] = {}
        self.received: list[Any] = []
        self.failures: list[StatusError] = []
        self._server = grpc.server(ThreadPoolExecutor(4))
        services = {
            "AdapterService": (
                (self.register, ad.RegisterAdapterRequest, "RegisterAdapter"),
                (self.unregister, ad.UnregisterAdapterRequest, "UnregisterAdapter"),
                (self.get, ad.GetAdapterRequest, "GetAdapter"),
                (self.list, ad.ListAdaptersRequest, "ListAdapters"),
                (self.pin, ad.PinAdapterRequest, "PinAdapter"),
                (self.unpin, ad.UnpinAdapterRequest, "UnpinAdapter"),
            ),
            "EngineService": (
                (self.info, en.GetServerInfoRequest, "GetServerInfo"),
                (self.stats, en.GetStatsRequest, "GetStats"),
                (self.abort, en.AbortRequestsRequest, "AbortRequests"),
            ),
        }
        for service, methods in services.items():
            handlers = {name: self._handler(m, kind) for m, kind, name in methods}
            self._server.add_generic_rpc_handlers(
                (
                    grpc.method_handlers_generic_handler(
                        f"jchameleon.v1.{service}", handlers
                    ),
                )
            )
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.target = f"127.0.0.1:{port}"
        self._server.start()

    def _handler(self, method: Any, kind: Any) -> Any:
        def handle(request: Any, context: Any) -> Any:
            self.received.append(request)
            sent = dict(context.invocation_metadata())
            if sent.get("authorization") != f"Bearer {TOKEN}":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
            try:
                if self.failures:
                    raise self.failures.pop(0)
                return method(request)
            except StatusError as error:
                context.set_trailing_metadata(error.metadata())
                context.abort(error.code, error.message)

        return grpc.unary_unary_rpc_method_handler(
            handle, kind.FromString, lambda reply: reply.SerializeToString()
        )

    def close(self) -> None:
        """Stop."""
        self._server.stop(None).wait()

    def register(self, request: Any) -> Any:
        """Answer RegisterAdapter."""
        adapter = ad.Adapter(
            adapter_id=request.adapter_id,
            uid="u" * 64,
            source_path=request.source_path,
            rank=8,
            target_modules=["q", "v"],
            size_bytes=1000,
            state=ad.ADAPTER_STATE_REGISTERED,
            pinned=request.pin,
        )
        adapter.registered_at.FromSeconds(int(time.time()))
        if not request.validate_only:
            self.adapters[request.adapter_id] = adapter
        return ad.RegisterAdapterResponse(adapter=adapter)

    def _find(self, request: Any) -> ad.Adapter:
        try:
            return self.adapters[request.adapter_id]
        except KeyError:
            raise StatusError(
                grpc.StatusCode.NOT_FOUND, "UNKNOWN_ADAPTER", "no such adapter"
            ) from None

    def unregister(self, request: Any) -> Any:
        """Answer UnregisterAdapter."""
        found = self._find(request)
        del self.adapters[request.adapter_id]
        found.state = ad.ADAPTER_STATE_DRAINING
        return ad.UnregisterAdapterResponse(adapter=found)

    def get(self, request: Any) -> Any:
        """Answer GetAdapter."""
        return ad.GetAdapterResponse(adapter=self._find(request))

    def list(self, request: Any) -> Any:
        """Answer ListAdapters, a few a page; the token is the last id."""
        size = min(request.page_size or PAGE, PAGE)
        ids = sorted(
            one
            for one in self.adapters
            if one.startswith(request.prefix) and one > request.page_token
        )
        return ad.ListAdaptersResponse(
            adapters=[self.adapters[one] for one in ids[:size]],
            next_page_token=ids[size - 1] if len(ids) > size else "",
        )

    def pin(self, request: Any) -> Any:
        """Answer PinAdapter."""
        found = self._find(request)
        found.pinned, found.state = True, ad.ADAPTER_STATE_DEVICE
        return ad.PinAdapterResponse(adapter=found)

    def unpin(self, request: Any) -> Any:
        """Answer UnpinAdapter."""
        found = self._find(request)
        found.pinned = False
        return ad.UnpinAdapterResponse(adapter=found)

    def info(self, request: Any) -> Any:
        """Answer GetServerInfo."""
        return en.GetServerInfoResponse(
            version="1", vocab_size=300, max_model_len=64, lora_targets=["q"]
        )

    def stats(self, request: Any) -> Any:
        """Answer GetStats."""
        return en.GetStatsResponse(
            cache=en.CacheStats(hits=3),
            queues=[
                en.QueueStats(index=0, wrs_min=0.0, wrs_max=2.5, waiting=4),
                en.QueueStats(index=1, wrs_min=2.5),
            ],
            engine=en.EngineStats(last_progress_age_seconds=0.5),
        )

    def abort(self, request: Any) -> Any:
        """Answer AbortRequests."""
        return en.AbortRequestsResponse()


@contextlib.contextmanager
def fake_admin() -> Iterator[FakeAdmin]:
    """Run one on a free port."""
    admin = FakeAdmin()
    try:
        yield admin
    finally:
        admin.close()
