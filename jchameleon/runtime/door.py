"""The callers' side of an engine: its inbox, the ids that are open, and its end."""

import dataclasses
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from jchameleon.errors import DuplicateRequestError, EngineDeadError, QueueFullError
from jchameleon.runtime.question import Question
from jchameleon.runtime.submission import Submission


class Door:
    """Takes what callers want from any thread; the engine thread picks it up.

    Attributes:
      inbox: messages for the engine thread; None wakes it up.
    """

    def __init__(self, *, max_waiting: int, max_running: int) -> None:
        """Open a door for `max_waiting` requests beyond `max_running`."""
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._max_waiting = max_waiting
        self._max_running = max_running
        self._lock = threading.Lock()
        self._open_ids: set[str] = set()
        self._death: str | None = None

    # Any thread.

    @property
    def num_open(self) -> int:
        """Requests taken in and not answered yet; takes no lock."""
        return len(self._open_ids)

    @property
    def is_shut(self) -> bool:
        """Whether the engine has ended; takes no lock."""
        return self._death is not None

    def submit(self, submission: Submission) -> None:
        """Take in a request; errors as `Engine.submit`."""
        request_id = submission.request_id
        with self._lock:
            self.check_alive()
            if request_id in self._open_ids:
                raise DuplicateRequestError(f"request_id={request_id!r} is in flight")
            limit = self._max_waiting + self._max_running
            if len(self._open_ids) >= limit:
                raise QueueFullError(
                    f"{limit} requests are open already; max_waiting="
                    f"{self._max_waiting} allows no more"
                )
            self._open_ids.add(request_id)
            if submission.lease is not None:
                submission.lease.submit()
            # Inside the lock: after it a dying engine answers all open requests.
            self.inbox.put(dataclasses.replace(submission, arrival_s=time.monotonic()))

    def ask(self, action: Callable[[], Any]) -> Any:
        """Have the engine thread run `action`, and return its result."""
        question = Question(action)
        with self._lock:
            self.check_alive()
            self.inbox.put(question)
        return question.wait()

    def check_alive(self) -> None:
        """Raise EngineDeadError when the engine has ended."""
        if self._death is not None:
            raise EngineDeadError(self._death)

    # Engine thread.

    def note_answered(self, request_id: str) -> None:
        """Let an id be used again."""
        with self._lock:
            self._open_ids.discard(request_id)

    def shut(self, reason: str) -> list[Any]:
        """Take nothing any more, and return the messages that nobody has picked up."""
        with self._lock:
            self._death = reason
        messages = []
        while True:
            try:
                messages.append(self.inbox.get_nowait())
            except queue.Empty:
                return messages
