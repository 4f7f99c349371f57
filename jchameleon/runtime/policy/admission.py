"""Which waiting requests start to run."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from jchameleon.runtime.policy.request import Request


class AdmissionView(Protocol):
    """What an admission policy sees of one iteration.

    A policy that orders requests in its own way keeps its own queues up to date from
    `arrived` and `ended` and needs no scan of `waiting`.
    """

    @property
    def now_s(self) -> float:
        """Time of this iteration on the engine's clock."""

    @property
    def waiting(self) -> Iterable[Request]:
        """Requests that wait, in arrival order, without those admitted meanwhile."""

    @property
    def running(self) -> Iterable[Request]:
        """Admitted requests in admission order, this iteration's included."""

    @property
    def arrived(self) -> Sequence[Request]:
        """Requests that joined the line since the last call, in arrival order."""

    @property
    def ended(self) -> Sequence[Request]:
        """Requests that left since the last call, waiting or running, in any way."""

    def predicted_tokens(self, request: Request) -> int:
        """Return how many tokens the length predictor expects of `request`."""

    def try_admit(self, request: Request) -> bool:
        """Admit a waiting request if its pages and a row are to be had.

        Takes pages for its KV entries and, together with them, for its adapter when
        that is not on the device, evicting idle adapters as far as needed. False
        changes nothing.

        Raises:
          ValueError: `request` does not wait.
        """


class AdmissionPolicy(Protocol):
    """Decides who starts, in which order."""

    def admit(self, view: AdmissionView) -> None:
        """Call `view.try_admit` for the requests that shall start now."""


class Fifo:
    """Admit in arrival order; when the oldest does not fit, everyone waits."""

    def admit(self, view: AdmissionView) -> None:
        """Admit from the head of the line until one does not fit."""
        for request in view.waiting:
            if not view.try_admit(request):
                return
