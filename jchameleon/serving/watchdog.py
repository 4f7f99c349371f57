"""Notices an engine that has ended, or that hangs.

It reads the engine's heartbeat, which never waits, from the event loop. An engine that
waits for requests or for a disk is at rest; one that compiles does not exist after
warm-up; so one that is busy without finishing an iteration hangs.
"""

import asyncio
import contextlib
import faulthandler
import logging
import tempfile
import threading
from collections.abc import Callable
from typing import Literal, Protocol

from jchameleon.runtime.heartbeat import Heartbeat

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.5
"""Finds a dead engine well within five seconds, and costs nothing."""

Condition = Literal["fine", "stuck", "dead"]


class HasHeartbeat(Protocol):
    """What is watched."""

    def heartbeat(self) -> Heartbeat:
        """Return signs of life."""


class Watchdog:
    """Watches one engine.

    Attributes:
      condition: as it was found last.
    """

    def __init__(
        self,
        engine: HasHeartbeat,
        *,
        step_timeout_s: float,
        on_change: Callable[[Condition], None],
    ) -> None:
        """Start watching; `on_change` is called on this event loop.

        Args:
          step_timeout_s: an iteration that takes longer hangs.
        """
        self.condition: Condition = "fine"
        self._engine = engine
        self._step_timeout_s = step_timeout_s
        self._on_change = on_change
        self._task = asyncio.get_running_loop().create_task(self._watch())

    def close(self) -> None:
        """Stop watching."""
        self._task.cancel()

    async def _watch(self) -> None:
        every_s = min(LOOK_EVERY_S, self._step_timeout_s / 4)
        while self.condition != "dead":
            found = self._look()
            if found != self.condition:
                self.condition = found
                # First: threads of a pool may all wait for the engine.
                self._on_change(found)
                if found == "stuck":
                    threading.Thread(target=log_threads, daemon=True).start()
            await asyncio.sleep(every_s)

    def _look(self) -> Condition:
        heartbeat = self._engine.heartbeat()
        if not heartbeat.alive:
            return "dead"
        return "stuck" if heartbeat.stalled_s > self._step_timeout_s else "fine"


def log_threads() -> None:
    """Log where every thread is."""
    with contextlib.suppress(OSError):  # a full disk is no reason to stop watching
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            dump = file.read().decode(errors="replace")
        logger.error("the engine hangs; where the threads are:\n%s", dump)
