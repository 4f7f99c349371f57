"""Which waiting requests start to run."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Protocol

from jchameleon.runtime.policy.estimator import Estimator
from jchameleon.runtime.policy.request import Request


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """What all requests share; changes with the adapters registered and pinned.

    Attributes:
      pages: of the pool, without the reserved ones and without those of pinned
        adapters.
      block_tokens: tokens whose KV entries fill one page.
      max_running: requests admitted at once.
      max_rank: largest rank among registered adapters, 0 without any.
    """

    pages: int
    block_tokens: int
    max_running: int
    max_rank: int


class AdmissionView(Protocol):
    """What an admission policy sees of one iteration.

    A policy that orders requests in its own way keeps its own queues up to date from
    `arrived`, `ended` and `requeued` and needs no scan of `waiting`.
    """

    @property
    def now_s(self) -> float:
        """Time of this iteration on the engine's clock."""

    @property
    def waiting(self) -> Iterable[Request]:
        """Requests that wait, without those admitted meanwhile.

        Lower priorities first; within one, squashed requests and then the others in
        arrival order.
        """

    @property
    def running(self) -> Iterable[Request]:
        """Admitted requests in admission order, this iteration's included."""

    @property
    def num_running(self) -> int:
        """How many `running` holds."""

    @property
    def arrived(self) -> Sequence[Request]:
        """Requests that joined the line since the last call, in arrival order."""

    @property
    def ended(self) -> Sequence[Request]:
        """Requests that left since the last call, waiting or running, in any way.

        All of them left before the first of `arrived` came, so an id may come again.
        One that arrived and left since the last call is in neither.
        """

    @property
    def requeued(self) -> Sequence[Request]:
        """Requests squashed since the last call, except by this policy itself.

        All that ran are, youngest first, where the device has lost what it held.
        """

    @property
    def outgrown(self) -> Sequence[Request]:
        """Running requests that produced more than predicted, since the last call.

        Their prediction has been doubled (up to max_tokens), so each may come again.
        """

    @property
    def capacity(self) -> Capacity:
        """What all requests share."""

    @property
    def estimator(self) -> Estimator:
        """Run times learnt from this engine's steps and loads."""

    def predicted_tokens(self, request: Request) -> int:
        """Return the output expected of a waiting or running request, 1 .. max_tokens.

        A request that has not run yet is predicted anew whenever others have ended
        since the last time. An outgrown prediction is doubled.
        """

    def produced_tokens(self, request: Request) -> int:
        """Return how many tokens a waiting or running request has produced so far."""

    def squashes(self, request: Request) -> int:
        """Return how often a waiting or running request has been squashed."""

    def adapter_pages(self, request: Request) -> int:
        """Return the pages of the request's adapter; 0 for the base model."""

    def adapter_rank(self, request: Request) -> int:
        """Return the rank of the request's adapter; 0 for the base model."""

    def adapter_absent(self, request: Request) -> bool:
        """Return whether its adapter is neither on the device nor on its way there."""

    def missing_pages(self, request: Request, without: Sequence[Request] = ()) -> int:
        """Return the pages that a waiting request lacks; 0 where its pages fit.

        Counts KV entries and an absent adapter, after evicting all idle adapters, and
        as if those running that `without` names had been squashed. A copy that is under
        way goes on without them, and its pages stay taken.
        """

    def wait_for_pages_s(self, pages: int) -> float:
        """Return the predicted seconds until `pages` more are free or evictable.

        They come from running requests that end and copies ahead that arrive; infinite
        where both are not enough.
        """

    def try_admit(
        self,
        request: Request,
        *,
        lane: int | None = None,
        wrs: float | None = None,
        passing: Request | None = None,
    ) -> bool:
        """Admit a waiting request if its pages and a row are to be had.

        Takes pages for its KV entries and, together with them, for its adapter when
        that is not on the device, evicting idle adapters as far as needed. False
        changes nothing; it is also the answer for a request squashed in this very call.
        `lane`, `wrs` (give both or neither) and `passing`, the head of
        the line that it overtakes by a bypass, are reported with the request.

        Raises:
          ValueError: `request` does not wait.
        """

    def can_squash(self, request: Request) -> bool:
        """Return whether `squash` would work.

        Not for a request admitted in this very call, or squashed as often as the engine
        allows.

        Raises:
          ValueError: `request` does not run.
        """

    def squash(self, request: Request, reason: str) -> bool:
        """Send a running request back to wait; its tokens are recomputed later.

        Return False, and change nothing, where `can_squash` says so. It is not reported
        in `requeued`.

        Raises:
          ValueError: `request` does not run.
        """

    def reject(self, request: Request, reason: str) -> None:
        """End a waiting request with an error; it is reported in no later `ended`.

        Raises:
          ValueError: `request` does not wait.
        """


class AdmissionPolicy(Protocol):
    """Decides who starts, in which order.

    A policy may also have a method `lanes() -> Sequence[LaneStats]`, which the engine
    reports, and a method `forget(uid: str)`, called when an adapter was unregistered.
    """

    def admit(self, view: AdmissionView) -> None:
        """Call `view.try_admit` for the requests that shall start now."""


class Fifo:
    """Admit in arrival order within a priority; if the first does not fit, all wait."""

    def admit(self, view: AdmissionView) -> None:
        """Admit from the head of the line until one does not fit."""
        for request in view.waiting:
            if not view.try_admit(request):
                return
