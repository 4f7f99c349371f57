"""Signs of life of an engine, for whoever watches it from another thread."""

import dataclasses
import time


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """How an engine is at one moment.

    Attributes:
      alive: it has not ended, neither closed nor died.
      open_requests: taken in and not answered yet.
      stalled_s: seconds since its thread last finished an iteration; 0 while it waits
        for requests or loads, and after its end. It never compiles: an engine for which
        this is large hangs.
    """

    alive: bool
    open_requests: int
    stalled_s: float


class Pulse:
    """When the engine thread last showed progress; any thread may read it."""

    def __init__(self) -> None:
        """Start at rest."""
        # One field, so that a reader never sees half of a change.
        self._busy_since_s: float | None = None

    def beat(self) -> None:
        """Note progress: the next piece of work begins."""
        self._busy_since_s = time.monotonic()

    def rest(self) -> None:
        """Note that the thread waits for something to do."""
        self._busy_since_s = None

    def stalled_s(self) -> float:
        """Return the seconds since the last beat, 0 at rest."""
        since_s = self._busy_since_s
        return 0.0 if since_s is None else time.monotonic() - since_s
