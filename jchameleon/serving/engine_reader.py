"""The engine's totals, for callers that must not wait for an engine that hangs.

Reading asks the engine's thread, which answers between two iterations.
"""

import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Callable

from jchameleon.errors import EngineDeadError
from jchameleon.llm import LLM
from jchameleon.outputs import AdapterInfo, EngineStats

READ_TIMEOUT_S = 1.0
"""A scraper gives up after some seconds; the rest of the metrics must reach it."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """An engine's totals and adapters at one moment of the monotonic clock."""

    stats: EngineStats
    adapters: tuple[AdapterInfo, ...]
    taken_s: float


class EngineReader:
    """Takes snapshots, one at a time for all that ask; any thread."""

    def __init__(self, llm: Callable[[], LLM | None]) -> None:
        """`llm` returns the model once it is loaded."""
        self._llm = llm
        self._lock = threading.Lock()
        self._reading: concurrent.futures.Future[Snapshot] | None = None
        self._latest: Snapshot | None = None

    def read(self) -> "concurrent.futures.Future[Snapshot]":
        """Return the snapshot that is being taken, or a new one.

        It is an EngineDeadError where there is no engine any more, or none yet.
        """
        with self._lock:
            if self._reading is None or self._reading.done():
                self._reading = concurrent.futures.Future()
                # A daemon: it may wait for a hanging engine for ever. One, however
                # often somebody asks.
                threading.Thread(
                    target=self._read,
                    args=(self._reading,),
                    name="engine-reader",
                    daemon=True,
                ).start()
            return self._reading

    def latest(self, timeout_s: float = READ_TIMEOUT_S) -> Snapshot | None:
        """Return a new snapshot, or the last one where that takes too long."""
        concurrent.futures.wait([self.read()], timeout_s)
        return self._latest

    def _read(self, reading: "concurrent.futures.Future[Snapshot]") -> None:
        try:
            llm = self._llm()
            if llm is None:
                raise EngineDeadError("the engine is not there yet")
            self._latest = Snapshot(
                stats=llm.stats(),
                adapters=tuple(llm.list_adapters()),
                taken_s=time.monotonic(),
            )
        except BaseException as error:  # whoever asked must hear of it
            reading.set_exception(error)
        else:
            reading.set_result(self._latest)
