"""Notices an engine that has ended, or that hangs.

A thread asks the engine something trivial again and again; the engine answers between
two iterations, also when it is idle or waits for a disk. So one that does not answer
hangs in a step (or in a policy), and one that refuses is dead. It needs no clock of the
engine's, and no work pending: the question is the work.
"""

import asyncio
import contextlib
import faulthandler
import logging
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, Protocol

from jchameleon.errors import EngineDeadError

logger = logging.getLogger(__name__)

ASK_EVERY_S = 0.5
"""A question is answered in microseconds when the engine is idle; one every half second
finds a dead engine well within five."""

Condition = Literal["fine", "stuck", "dead"]


class Answers(Protocol):
    """What is watched."""

    def on_engine_thread(self, action: Callable[[], Any]) -> Any:
        """Run `action` between two iterations; EngineDeadError when there are none."""


class Watchdog:
    """Watches one engine.

    Attributes:
      condition: as it was found last.
    """

    def __init__(
        self,
        engine: Answers,
        *,
        step_timeout_s: float,
        on_change: Callable[[Condition], None],
    ) -> None:
        """Start watching; `on_change` is called on this event loop.

        Args:
          step_timeout_s: an engine that does not answer for so long is stuck.
        """
        self.condition: Condition = "fine"
        self._engine = engine
        self._step_timeout_s = step_timeout_s
        self._on_change = on_change
        self._asked_s: float | None = None
        self._is_dead = False
        self._closing = threading.Event()
        # A daemon: it may wait for a hanging engine for ever.
        threading.Thread(target=self._ask, name="watchdog", daemon=True).start()
        self._task = asyncio.get_running_loop().create_task(self._watch())

    def close(self) -> None:
        """Stop watching."""
        self._closing.set()
        self._task.cancel()

    def _ask(self) -> None:
        """Ask, again and again (own thread)."""
        while not self._closing.is_set():
            self._asked_s = time.monotonic()
            try:
                self._engine.on_engine_thread(lambda: None)
            except EngineDeadError:
                self._is_dead = True
                return
            self._asked_s = None
            self._closing.wait(ASK_EVERY_S)

    async def _watch(self) -> None:
        every_s = min(ASK_EVERY_S, self._step_timeout_s / 4)
        while self.condition != "dead":
            await asyncio.sleep(every_s)
            found = self._look()
            if found != self.condition:
                self.condition = found
                if found == "stuck":
                    await asyncio.to_thread(log_threads)
                self._on_change(found)

    def _look(self) -> Condition:
        if self._is_dead:
            return "dead"
        asked_s = self._asked_s
        waits_s = 0.0 if asked_s is None else time.monotonic() - asked_s
        return "stuck" if waits_s > self._step_timeout_s else "fine"


def log_threads() -> None:
    """Log where every thread is."""
    with contextlib.suppress(OSError):  # a full disk is no reason to stop watching
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            dump = file.read().decode(errors="replace")
        logger.error("the engine does not answer; its threads:\n%s", dump)
