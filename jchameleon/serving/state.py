"""What a server can do now: starting, ready, draining or dead."""

from typing import Literal

from jchameleon.llm import LLM
from jchameleon.serving.status import unavailable

Phase = Literal["starting", "ready", "draining", "dead"]


class ServerState:
    """The model once it is there, and whether requests are taken; event loop only.

    Attributes:
      phase: "starting" until all programs are compiled; "draining" from the first
        signal on; "dead" when the engine has ended by itself.
    """

    def __init__(self) -> None:
        self.phase: Phase = "starting"
        self._llm: LLM | None = None

    def ready(self, llm: LLM) -> None:
        """Take requests from now on."""
        self._llm = llm
        if self.phase == "starting":
            self.phase = "ready"

    @property
    def llm(self) -> LLM | None:
        """The model, whatever the phase; None until it is loaded."""
        return self._llm

    def open_llm(self) -> LLM:
        """Return the model for a new request.

        Raises:
          StatusError: UNAVAILABLE, requests are not taken now.
        """
        if self.phase == "ready" and self._llm is not None:
            return self._llm
        reason, message = _REFUSALS[self.phase]
        raise unavailable(reason, message)


_REFUSALS = {
    "ready": ("STARTING", "the server is starting"),
    "starting": ("STARTING", "the server is starting"),
    "draining": ("DRAINING", "the server is shutting down"),
    "dead": ("ENGINE_DEAD", "the engine has failed"),
}
