"""The plan log of a running engine: what is served matters more than the log."""

import contextlib
import logging
from collections.abc import Sequence

from jchameleon.runtime.policy.events import Event
from jchameleon.runtime.policy.log import PlanLogWriter
from jchameleon.runtime.policy.plan import Plan

logger = logging.getLogger(__name__)


class EngineLog:
    """Writes a plan log, if one is asked for, until that fails. Engine thread only.

    An iteration whose plan raises is not in it.
    """

    def __init__(self, writer: PlanLogWriter | None) -> None:
        self._writer = writer

    @property
    def writes(self) -> bool:
        """Whether a log is being written."""
        return self._writer is not None

    def append(self, now_s: float, events: Sequence[Event], plan: Plan) -> None:
        """Write one iteration; a disk that refuses it ends the log, with an error."""
        if self._writer is None:
            return
        try:
            self._writer.append(now_s, events, plan)
        except OSError as error:
            logger.error("the plan log ends here: %s", error)
            self.close()

    def close(self) -> None:
        """Finish the file; a second call does nothing."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
            self._writer = None
