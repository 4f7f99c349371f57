"""A question to the engine thread: an action to run there, and its result."""

import concurrent.futures
from collections.abc import Callable
from typing import Any

from jchameleon.errors import EngineDeadError


class Question:
    """Asked on one thread, answered on another."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self._action = action
        self._future: concurrent.futures.Future = concurrent.futures.Future()

    def wait(self) -> Any:
        """Return what the action returned, or raise what it raised."""
        return self._future.result()

    def answer(self) -> None:
        """Run the action; only what ends a thread is raised here too."""
        try:
            self._future.set_result(self._action())
        except Exception as error:  # belongs to who asked, not to the engine
            self._future.set_exception(error)
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
            self._future.set_exception(EngineDeadError(reason))
            raise

    def refuse(self, reason: str) -> None:
        """Raise EngineDeadError where it was asked."""
        self._future.set_exception(EngineDeadError(reason))
