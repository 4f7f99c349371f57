"""Who hears what becomes of requests: metrics and logs, or nobody."""

from typing import Protocol

import grpc

from jchameleon.runtime.outbox import Delta


class RequestWatch(Protocol):
    """Hears of one call, in this order (event loop)."""

    def admitted(self, request_id: str, adapter_id: str, prompt_tokens: int) -> None:
        """It was checked and handed to the engine; a refused one never hears this."""

    def piece(self, num_tokens: int) -> None:
        """Output of one of its completions has come."""

    def finished(self, delta: Delta) -> None:
        """A completion has ended; the delta is its last."""

    def ended(self, code: grpc.StatusCode, reason: str) -> None:
        """The call has its answer; exactly once.

        Args:
          reason: as `StatusError.reason`; empty for OK and for a caller that left.
        """


class RequestObserver(Protocol):
    """Hears of every call that runs a prompt (event loop)."""

    def opened(self, request_id: str) -> RequestWatch:
        """Return who hears of a call that has come; its id is not checked yet."""


class Silence:
    """Hears nothing, of all calls and of one."""

    def opened(self, request_id: str) -> "Silence":
        """See `RequestObserver`."""
        return self

    def admitted(self, request_id: str, adapter_id: str, prompt_tokens: int) -> None:
        """See `RequestWatch`."""

    def piece(self, num_tokens: int) -> None:
        """See `RequestWatch`."""

    def finished(self, delta: Delta) -> None:
        """See `RequestWatch`."""

    def ended(self, code: grpc.StatusCode, reason: str) -> None:
        """See `RequestWatch`."""
