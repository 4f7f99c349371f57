"""Adapter loads under way: where they go and which requests wait for them."""

import logging
import time
from collections.abc import Callable

from jchameleon.runtime.executor import Executor
from jchameleon.runtime.live import LiveRequest
from jchameleon.runtime.policy.events import LoadDone
from jchameleon.runtime.policy.plan import Load
from jchameleon.runtime.transfer import AdapterLoader

logger = logging.getLogger(__name__)


class AdapterLoads:
    """Starts the loads of plans and commits what has arrived. Engine thread only."""

    def __init__(
        self,
        loader: AdapterLoader,
        executor: Executor,
        *,
        on_lost_pool: Callable[[], None],
    ) -> None:
        """`on_lost_pool` hears when a commit failed: the pool may be gone with it."""
        self._loader = loader
        self._executor = executor
        self._on_lost_pool = on_lost_pool
        self._pages: dict[str, tuple[int, ...]] = {}
        self._waiters: dict[str, list[LiveRequest]] = {}

    @property
    def in_flight(self) -> int:
        """Loads started and not yet finished."""
        return self._loader.in_flight

    @property
    def waiters(self) -> int:
        """Admitted requests whose adapter is not resident yet."""
        return sum(map(len, self._waiters.values()))

    def start(self, load: Load) -> None:
        """Begin to copy an adapter into the pages that the plan names."""
        self._pages[load.uid] = load.pages
        self._loader.start(load.uid, load.pages)

    def wait(self, live: LiveRequest) -> None:
        """Tell an admitted request when its adapter, on its way, has arrived."""
        uid = live.submission.adapter_uid
        if uid is not None:
            self._waiters.setdefault(uid, []).append(live)

    def forget(self, live: LiveRequest) -> None:
        """Do not tell a request any more; one that does not wait is ignored."""
        uid = live.submission.adapter_uid
        waiters = [] if uid is None else self._waiters.get(uid, [])
        if uid is not None and live in waiters:
            waiters.remove(live)
            if not waiters:
                del self._waiters[uid]

    def finish(self) -> list[LoadDone]:
        """Commit what has arrived; return what arrived and what failed."""
        done = []
        for load in self._loader.poll():
            pages = self._pages.pop(load.uid)
            error = load.error
            if error is None:
                try:
                    self._executor.commit(load.uid, pages, load.pieces)
                except Exception as failure:
                    logger.exception("adapter %s failed to load", load.uid[:12])
                    error = f"{type(failure).__name__}: {failure}"
                    self._on_lost_pool()
            if error is None:
                done.append(LoadDone(load.uid))
            else:
                why = f"adapter could not be loaded: {error}"
                done.append(LoadDone(load.uid, why, load.fault))
            now_s = time.monotonic()
            for live in self._waiters.pop(load.uid, ()):
                live.adapter_arrived(now_s)
        return done

    def close(self) -> None:
        """Drop the loads under way."""
        self._loader.close()
