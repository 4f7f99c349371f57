"""What a server, or the way to it, answers instead of a result."""

from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from jchameleon.errors import JChameleonError

DETAILS_KEY = "grpc-status-details-bin"


class CallError(JChameleonError, RuntimeError):
    """A call ended with a status other than OK.

    Attributes:
      code: gRPC's status code.
      reason: stable, in capitals, such as "QUEUE_FULL"; empty where gRPC itself
        answered: no connection, a deadline that passed here, a message too large.
      message: one line for people.
      retry_after_s: the same call may succeed after so long; None where the server does
        not say so.
      field: path of the field of the request that is wrong.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        *,
        retry_after_s: float | None = None,
        field: str | None = None,
    ) -> None:
        super().__init__(f"{code.name}{reason and ' ' + reason}: {message}")
        self.code = code
        self.reason = reason
        self.message = message
        self.retry_after_s = retry_after_s
        self.field = field

    @property
    def may_be_retried(self) -> bool:
        """Whether nothing was run: the server is not there, or is full for now."""
        if self.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return self.retry_after_s is not None
        return self.code is grpc.StatusCode.UNAVAILABLE


def call_error(error: Any) -> CallError:
    """Return the CallError of grpc's own error.

    Args:
      error: grpc.RpcError of a call, or grpc.aio.AioRpcError.
    """
    reason, retry_after_s, field = "", None, None
    for detail in _details(error):
        if isinstance(detail, error_details_pb2.ErrorInfo):
            reason = detail.reason
        elif isinstance(detail, error_details_pb2.RetryInfo):
            retry_after_s = detail.retry_delay.ToNanoseconds() / 1e9
        elif detail.field_violations:
            field = detail.field_violations[0].field
    message = " ".join((error.details() or "").split())
    return CallError(
        error.code(), reason, message, retry_after_s=retry_after_s, field=field
    )


_KINDS: Any = (
    error_details_pb2.ErrorInfo,
    error_details_pb2.RetryInfo,
    error_details_pb2.BadRequest,
)


def _details(error: Any) -> list[Any]:
    """Return the google.rpc details of a status that are of a known kind."""
    found = []
    for key, value in error.trailing_metadata() or ():
        if key != DETAILS_KEY:
            continue
        try:
            status = status_pb2.Status.FromString(value)
            for packed in status.details:
                for kind in _KINDS:
                    detail = kind()
                    if packed.Unpack(detail):
                        found.append(detail)
        except DecodeError:  # of a proxy, perhaps; code and message are there
            continue
    return found
