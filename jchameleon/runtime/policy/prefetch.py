"""Which adapters to load before a request that needs them is admitted."""

from collections.abc import Iterable
from typing import Protocol

from jchameleon.runtime.policy.request import Request


class PrefetchView(Protocol):
    """What a prefetch policy sees of one iteration, after admission."""

    @property
    def now_s(self) -> float:
        """Time of this iteration on the engine's clock."""

    @property
    def waiting(self) -> Iterable[Request]:
        """Requests that still wait, in arrival order."""

    @property
    def running(self) -> Iterable[Request]:
        """Admitted requests in admission order."""


class PrefetchPolicy(Protocol):
    """Names adapters worth having, best first."""

    def candidates(self, view: PrefetchView) -> Iterable[str]:
        """Yield uids of registered adapters.

        The planner asks only while the link has room and nothing waits for it, skips
        those on the device and those too large for the free pages, and evicts nothing.
        """


class NoPrefetch:
    """Load on demand only."""

    def candidates(self, view: PrefetchView) -> Iterable[str]:
        """Name nothing."""
        del view
        return ()
