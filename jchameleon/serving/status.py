"""What an error is called on the wire: a gRPC code, a reason and when to try again."""

import dataclasses
import re

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from jchameleon.errors import (
    AdapterBusyError,
    AdapterConflictError,
    AdapterContentError,
    AdapterDrainingError,
    AdapterError,
    AdapterReadError,
    CapacityError,
    DuplicateRequestError,
    EngineDeadError,
    InvalidRequestError,
    QueueFullError,
    UnknownAdapterError,
)
from jchameleon.runtime.faults import Fault

DOMAIN = "jchameleon"
DETAILS_KEY = "grpc-status-details-bin"
MAX_MESSAGE_CHARS = 1000
"""Statuses travel in HTTP/2 trailers, which peers limit to 8 KiB."""

REQUEST_FIELDS = {
    "n": "sampling.n",
    "max_tokens": "stopping.max_new_tokens",
    "min_tokens": "stopping.min_new_tokens",
    "temperature": "sampling.temperature",
    "top_k": "sampling.top_k",
    "top_p": "sampling.top_p",
    "min_p": "sampling.min_p",
    "repetition_penalty": "sampling.repetition_penalty",
    "presence_penalty": "sampling.presence_penalty",
    "frequency_penalty": "sampling.frequency_penalty",
    "logit_bias": "sampling.logit_bias",
    "seed": "sampling.seed",
    "stop": "stopping.stop",
    "stop_token_ids": "stopping.stop_token_ids",
    "logprobs": "response.logprobs",
    "prompt_logprobs": "response.prompt_logprobs",
    "time_limit_s": "stopping.time_limit_seconds",
    "expected_tokens": "predicted_output_tokens",
    "priority": "priority",
    "prompt": "prompt",
    "cache_salt": "cache_salt",
    "request_id": "request_id",
    "truncate_prompt_tokens": "truncate_prompt_tokens",
}
"""The library's name of a field -> its path in a GenerateRequest."""

_LEADING_FIELD = re.compile(r"^([a-z_]+)(?=[=\[ ])")


@dataclasses.dataclass(eq=False)
class StatusError(Exception):
    """An answer other than OK.

    Attributes:
      reason: stable, in capitals; what clients may branch on besides the code.
      retry_after_s: set where the same call may succeed later.
      field: path of the field of the request that is wrong.
    """

    code: grpc.StatusCode
    reason: str
    message: str
    retry_after_s: float | None = None
    field: str | None = None

    def __str__(self) -> str:
        return self.message

    def metadata(self) -> tuple[tuple[str, bytes], ...]:
        """Return the trailing metadata that carries the details."""
        details = [error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN)]
        if self.field is not None:
            violation = error_details_pb2.BadRequest.FieldViolation(
                field=self.field, description=self.message
            )
            details.append(error_details_pb2.BadRequest(field_violations=[violation]))
        if self.retry_after_s is not None:
            delay = duration_pb2.Duration()
            delay.FromNanoseconds(int(self.retry_after_s * 1e9))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        return ((DETAILS_KEY, status.SerializeToString()),)


def invalid(field: str, message: str) -> StatusError:
    """Return INVALID_ARGUMENT for a field of the request."""
    return StatusError(
        grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", message, field=field
    )


def unavailable(reason: str, message: str) -> StatusError:
    """Return UNAVAILABLE: nothing was run, another server or a later try may do it."""
    return StatusError(grpc.StatusCode.UNAVAILABLE, reason, message, retry_after_s=1.0)


# The first class that fits counts.
_CODES: tuple[tuple[type[Exception], grpc.StatusCode, str], ...] = (
    (CapacityError, grpc.StatusCode.RESOURCE_EXHAUSTED, "NEVER_FITS"),
    (DuplicateRequestError, grpc.StatusCode.ALREADY_EXISTS, "DUPLICATE_REQUEST_ID"),
    (InvalidRequestError, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    (QueueFullError, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    (AdapterDrainingError, grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_DRAINING"),
    (UnknownAdapterError, grpc.StatusCode.NOT_FOUND, "UNKNOWN_ADAPTER"),
    (AdapterBusyError, grpc.StatusCode.DEADLINE_EXCEEDED, "ADAPTER_BUSY"),
    (AdapterConflictError, grpc.StatusCode.ALREADY_EXISTS, "ADAPTER_CONFLICT"),
    (AdapterContentError, grpc.StatusCode.DATA_LOSS, "OTHER_CONTENT"),
    (AdapterReadError, grpc.StatusCode.UNAVAILABLE, "ADAPTER_UNREADABLE"),
    (AdapterError, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ADAPTER"),
    (EngineDeadError, grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD"),
)


_RETRIED = (QueueFullError, EngineDeadError, AdapterReadError)


def status_of(error: Exception) -> StatusError | None:
    """Return the status of an error that the library raises on purpose, else None."""
    if isinstance(error, StatusError):
        return error
    for kind, code, reason in _CODES:
        if isinstance(error, kind):
            text = str(error)
            if kind is UnknownAdapterError:
                # Which others there are is not for every caller to know.
                text = text.partition("; registered are")[0]
            message, field = _in_terms_of_the_request(text)
            if code is not grpc.StatusCode.INVALID_ARGUMENT:
                field = None
            retry = 1.0 if kind in _RETRIED else None
            return StatusError(code, reason, message, retry, field)
    return None


def answer_to(error: Exception) -> StatusError:
    """Return the status that a call ends with because of `error`."""
    return status_of(error) or StatusError(
        grpc.StatusCode.INTERNAL,
        "INTERNAL",
        f"a fault of the server: {type(error).__name__}",
    )


_FAULTS: dict[str, tuple[grpc.StatusCode, str]] = {
    "adapter": (grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_FAILED"),
    "adapter_io": (grpc.StatusCode.UNAVAILABLE, "ADAPTER_UNREADABLE"),
    "capacity": (grpc.StatusCode.RESOURCE_EXHAUSTED, "NEVER_FITS"),
    "rejected": (grpc.StatusCode.RESOURCE_EXHAUSTED, "REJECTED"),
    "not_finite": (grpc.StatusCode.INTERNAL, "NOT_FINITE"),
    "closed": (grpc.StatusCode.UNAVAILABLE, "STOPPED"),
    "engine": (grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD"),
    "cancelled": (grpc.StatusCode.CANCELLED, "ABORTED"),
    "unregistered": (grpc.StatusCode.CANCELLED, "ADAPTER_UNREGISTERED"),
}


def status_of_fault(fault: Fault | None, message: str) -> StatusError:
    """Return the status of a request that the engine has ended without an answer."""
    code, reason = _FAULTS.get(
        fault or "internal", (grpc.StatusCode.INTERNAL, "INTERNAL")
    )
    retry_s = 1.0 if fault in ("adapter_io", "rejected", "engine", "closed") else None
    return StatusError(
        code, reason, " ".join(message.split())[:MAX_MESSAGE_CHARS], retry_s
    )


def _in_terms_of_the_request(message: str) -> tuple[str, str | None]:
    """Return a message, one line, with the request's own names, and its field."""
    message = " ".join(message.split())[:MAX_MESSAGE_CHARS]
    found = _LEADING_FIELD.match(message)
    field = None if found is None else REQUEST_FIELDS.get(found.group(1))
    if field is None:
        return message, None
    assert found is not None
    return field + message[found.end() :], field
