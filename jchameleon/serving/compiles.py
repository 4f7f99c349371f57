"""Counts what jax compiles: after warm-up there must be nothing."""

import threading
from typing import Any

import jax


class CompileCounter:
    """Hears of every compile in this process, of whatever model."""

    def __init__(self) -> None:
        """Listen from now on; `close` ends it."""
        self._lock = threading.Lock()
        self._count = 0
        self._warm_count: int | None = None
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def warm(self) -> None:
        """Count from here on: what a step may need is compiled now."""
        with self._lock:
            self._warm_count = self._count

    @property
    def after_warm_up(self) -> int:
        """Compiles since `warm`; 0 before it."""
        with self._lock:
            return 0 if self._warm_count is None else self._count - self._warm_count

    def close(self) -> None:
        """Hear nothing more."""
        jax.monitoring.unregister_event_duration_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **_: Any) -> None:
        # What jax calls it whether XLA compiles or a cache has the program.
        if "backend_compile" in event:
            with self._lock:
                self._count += 1
