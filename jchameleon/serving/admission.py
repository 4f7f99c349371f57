"""Places for requests: a bound on what is open, and an answer at once where it is full.

Event loop only. Counted here, before tokenising: a queue that is bounded elsewhere lets
work pile up in front of it.
"""

import asyncio
import time
from types import TracebackType
from typing import Self

import grpc

from jchameleon.sampling import MAX_N
from jchameleon.serving.status import StatusError

LEAST_RETRY_S, MOST_RETRY_S = 0.1, 10.0


class Ticket:
    """One open request's place; a context manager that gives it back."""

    def __init__(self, admission: "Admission", completions: int) -> None:
        """Of `Admission.enter`."""
        self._admission = admission
        self._completions = completions
        self._waiting_tokens = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.started()
        self._admission.leave(self._completions)

    def wait_with(self, prompt_tokens: int) -> None:
        """Count a prompt until its first output.

        Raises:
          StatusError: RESOURCE_EXHAUSTED, too many tokens wait.
        """
        self._admission.add_tokens(prompt_tokens)
        self._waiting_tokens = prompt_tokens

    def started(self) -> None:
        """The first output is there: the prompt does not wait any more."""
        self._admission.remove_tokens(self._waiting_tokens)
        self._waiting_tokens = 0


class Admission:
    """Counts open requests and the prompt tokens that wait.

    Attributes:
      open_requests: that have a ticket; each completion counts, as in the engine.
      waiting_tokens: of prompts without output so far.
      refused: requests that found it full, since the start.
    """

    def __init__(self, *, max_requests: int, max_waiting_tokens: int) -> None:
        """`max_requests` are open at once, running ones included."""
        self._max_requests = max_requests
        self._max_waiting_tokens = max_waiting_tokens
        self.open_requests = 0
        self.waiting_tokens = 0
        self.refused = 0
        self._left_s: float | None = None
        self._left = asyncio.Event()
        self._interval_s = LEAST_RETRY_S

    def enter(self, completions: int = 1) -> Ticket:
        """Return a place for a request.

        Args:
          completions: as the request says, not checked yet.

        Raises:
          StatusError: RESOURCE_EXHAUSTED, with the time after which to try again.
        """
        completions = min(max(1, completions), MAX_N)
        # One request always passes: else one with many completions never could.
        if self.open_requests and (
            self.open_requests + completions > self._max_requests
        ):
            raise self._full(f"{self.open_requests} requests are open")
        self.open_requests += completions
        return Ticket(self, completions)

    def leave(self, completions: int) -> None:
        """Take places back; when the next one may follow is learnt from it."""
        self.open_requests -= completions
        self._left.set()
        now_s = time.monotonic()
        if self._left_s is not None:
            self._interval_s += 0.1 * (now_s - self._left_s - self._interval_s)
        self._left_s = now_s

    async def idle(self) -> None:
        """Wait until no request is open."""
        while self.open_requests:
            self._left.clear()
            await self._left.wait()

    def add_tokens(self, count: int) -> None:
        """See `Ticket.wait_with`."""
        # One prompt always passes: else one longer than the limit never could.
        if self.waiting_tokens and (
            self.waiting_tokens + count > self._max_waiting_tokens
        ):
            raise self._full(f"prompts of {self.waiting_tokens} tokens wait")
        self.waiting_tokens += count

    def remove_tokens(self, count: int) -> None:
        """See `Ticket.started`."""
        self.waiting_tokens -= count

    def _full(self, why: str) -> StatusError:
        self.refused += 1
        return StatusError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "QUEUE_FULL",
            f"{why}, and the server takes no more now; try again later",
            retry_after_s=min(MOST_RETRY_S, max(LEAST_RETRY_S, self._interval_s)),
        )
