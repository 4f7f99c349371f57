"""Which adapters to load before a request that needs them is admitted."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from jchameleon.errors import ConfigError
from jchameleon.runtime.policy.request import Request


class PrefetchView(Protocol):
    """What a prefetch policy sees of one iteration, after admission."""

    @property
    def now_s(self) -> float:
        """Time of this iteration on the engine's clock; it never goes back."""

    @property
    def waiting(self) -> Iterable[Request]:
        """Requests that still wait, without those admitted in this iteration.

        In arrival order, except that squashed ones come first.
        """

    @property
    def running(self) -> Iterable[Request]:
        """Admitted requests in admission order."""

    @property
    def arrived(self) -> Sequence[Request]:
        """Requests that joined the line since the last iteration, in arrival order."""

    @property
    def ended(self) -> Sequence[Request]:
        """Requests that left since the last iteration, waiting or running, in any way.

        Also those that admission rejected just now. One that arrived and left since
        the last iteration is in neither.
        """


class PrefetchPolicy(Protocol):
    """Names adapters worth having, best first.

    A policy may also have a method `observe(view) -> None`, called once per iteration,
    before `candidates`, whether or not the link has room; and an attribute `timed =
    True` where time alone changes its answer: then an idle engine asks again and again.
    A method `forget(uid: str)` is called when an adapter was unregistered, in the plan
    of that after all others.
    """

    def candidates(self, view: PrefetchView) -> Iterable[str]:
        """Yield uids of registered adapters; one that is not is passed over.

        The planner asks only while the link has room and nothing waits for it, and
        evicts no adapter. It skips those on the device and those too large for pages
        that are free or hold idle cached blocks, of which it keeps one for each row
        that may outgrow its own; and while somebody lacks pages to start, all but the
        adapters of those who do.
        """


class NoPrefetch:
    """Load on demand only."""

    def candidates(self, view: PrefetchView) -> Iterable[str]:
        """Name nothing."""
        del view
        return ()


class Queued:
    """Load what the head of the line will need (Chameleon, section 4.2).

    Options:
      lookahead_requests: waiting requests looked at in one iteration, so that a long
        line costs no more than a short one. The number is our choice.

    Raises:
      ConfigError: `lookahead_requests` is not a positive integer.
    """

    def __init__(self, *, lookahead_requests: int = 64) -> None:
        if type(lookahead_requests) is not int or lookahead_requests < 1:
            raise ConfigError(
                f"lookahead_requests={lookahead_requests!r} must be a positive integer"
            )
        self._lookahead_requests = lookahead_requests

    def candidates(self, view: PrefetchView) -> Iterator[str]:
        """Yield the first waiting requests' adapters in order, each once."""
        named: set[str] = set()
        for request in itertools.islice(view.waiting, self._lookahead_requests):
            uid = request.adapter_uid
            if uid is not None and uid not in named:
                named.add(uid)
                yield uid
