"""The calls of the protocol as values: what is sent where, and what comes of it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from jchameleon.client import values
from jchameleon.client.messages import (
    Messages,
    enum_name,
    generation,
    set_prompt,
    value_of,
)
from jchameleon.serving.proto.jchameleon.v1 import adapter_pb2, engine_pb2
from jchameleon.serving.proto.jchameleon.v1 import inference_pb2 as pb

T = TypeVar("T")

INFERENCE_SERVICE = "jchameleon.v1.InferenceService"
GENERATE_STREAM = f"/{INFERENCE_SERVICE}/GenerateStream"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Call(Generic[T]):
    """One unary call.

    Attributes:
      convert: turns the reply into what the client returns.
      repeatable: that it was run, and the answer lost, does no harm.
    """

    method: str
    request: Message
    reply_type: type[Message]
    convert: Callable[[Any], T]
    repeatable: bool = True


def generate(request: pb.GenerateRequest) -> Call[values.Generation]:
    """Return the call of Generate."""
    return Call(
        method=f"/{INFERENCE_SERVICE}/Generate",
        request=request,
        reply_type=pb.GenerateResponse,
        convert=generation,
    )


def tokenize(prompt: str | None, messages: Messages | None) -> Call[values.Tokens]:
    """Return the call of Tokenize."""
    request = pb.TokenizeRequest()
    set_prompt(request, prompt, None, messages)
    return Call(
        method=f"/{INFERENCE_SERVICE}/Tokenize",
        request=request,
        reply_type=pb.TokenizeResponse,
        convert=lambda reply: value_of(values.Tokens, reply),
    )


def register_adapter(
    adapter_id: str, source_path: str, **options: Any
) -> Call[values.Adapter]:
    """Return the call of RegisterAdapter; `options` are fields of its request."""
    return _adapter_call(
        "RegisterAdapter", adapter_id=adapter_id, source_path=source_path, **options
    )


def unregister_adapter(adapter_id: str, *, force: bool) -> Call[values.Adapter]:
    """Return the call of UnregisterAdapter."""
    call = _adapter_call("UnregisterAdapter", adapter_id=adapter_id, force=force)
    # A second time it is NOT_FOUND, or takes what was registered in between.
    return dataclasses.replace(call, repeatable=False)


def get_adapter(adapter_id: str) -> Call[values.Adapter]:
    """Return the call of GetAdapter."""
    return _adapter_call("GetAdapter", adapter_id=adapter_id)


def pin_adapter(adapter_id: str) -> Call[values.Adapter]:
    """Return the call of PinAdapter."""
    return _adapter_call("PinAdapter", adapter_id=adapter_id)


def unpin_adapter(adapter_id: str) -> Call[values.Adapter]:
    """Return the call of UnpinAdapter."""
    return _adapter_call("UnpinAdapter", adapter_id=adapter_id)


def _adapter_call(name: str, **fields: Any) -> Call[values.Adapter]:
    """Return a call of AdapterService that answers with an adapter."""
    return Call(
        method=f"/jchameleon.v1.AdapterService/{name}",
        request=getattr(adapter_pb2, f"{name}Request")(**fields),
        reply_type=getattr(adapter_pb2, f"{name}Response"),
        convert=lambda reply: value_of(values.Adapter, reply.adapter),
    )


def list_adapters(
    prefix: str, page_token: str, page_size: int
) -> Call[tuple[list[values.Adapter], str]]:
    """Return the call for one page: adapters, and the next page's token."""
    return Call(
        method="/jchameleon.v1.AdapterService/ListAdapters",
        request=adapter_pb2.ListAdaptersRequest(
            prefix=prefix, page_token=page_token, page_size=page_size
        ),
        reply_type=adapter_pb2.ListAdaptersResponse,
        convert=lambda reply: (
            [value_of(values.Adapter, one) for one in reply.adapters],
            reply.next_page_token,
        ),
    )


def server_info() -> Call[values.ServerInfo]:
    """Return the call of GetServerInfo."""
    return Call(
        method="/jchameleon.v1.EngineService/GetServerInfo",
        request=engine_pb2.GetServerInfoRequest(),
        reply_type=engine_pb2.GetServerInfoResponse,
        convert=lambda reply: value_of(values.ServerInfo, reply),
    )


def stats() -> Call[values.ServerStats]:
    """Return the call of GetStats."""
    return Call(
        method="/jchameleon.v1.EngineService/GetStats",
        request=engine_pb2.GetStatsRequest(),
        reply_type=engine_pb2.GetStatsResponse,
        convert=lambda reply: value_of(values.ServerStats, reply),
    )


def abort(request_ids: Sequence[str]) -> Call[None]:
    """Return the call of AbortRequests."""
    return Call(
        method="/jchameleon.v1.EngineService/AbortRequests",
        request=engine_pb2.AbortRequestsRequest(request_ids=request_ids),
        reply_type=engine_pb2.AbortRequestsResponse,
        convert=lambda reply: None,
    )


def health(service: str) -> Call[str]:
    """Return the call of gRPC's own Health.Check."""
    return Call(
        method="/grpc.health.v1.Health/Check",
        request=health_pb2.HealthCheckRequest(service=service),
        reply_type=health_pb2.HealthCheckResponse,
        convert=lambda reply: enum_name(reply, "status"),
    )
