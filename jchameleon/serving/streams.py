"""From the engine's thread to the event loop's readers.

The engine sends a delta for every row of every step. All of them together wake the loop
once: a wake-up costs a write to a pipe and a turn of the loop, more than the deltas.
"""

import asyncio
import collections

from jchameleon.runtime.outbox import Delta, Outbox
from jchameleon.serving.status import StatusError


class Stream:
    """Deltas of one call's requests; event loop only.

    At most one delta waits per request, a further one is merged into it: a slow reader
    costs no more memory than the output itself.

    Attributes:
      unfinished: ids of requests whose last delta has not come yet.
    """

    def __init__(self, outbox: "LoopOutbox", request_ids: tuple[str, ...]) -> None:
        """Of `LoopOutbox.open`."""
        self._outbox = outbox
        self._places = {name: place for place, name in enumerate(request_ids)}
        self.unfinished = set(request_ids)
        self._submitted: set[str] = set()
        self._waiting: dict[str, Delta] = {}
        self._reader: asyncio.Future[None] | None = None
        self._failure: StatusError | None = None

    @property
    def request_ids(self) -> list[str]:
        """The engine's ids of its requests, in order."""
        return list(self._places)

    def submitted(self, request_id: str) -> None:
        """Note that the engine has a request, and will answer it."""
        self._submitted.add(request_id)

    def put(self, request_id: str, delta: Delta) -> None:
        """Add a delta and wake the reader."""
        before = self._waiting.get(request_id)
        self._waiting[request_id] = delta if before is None else before.then(delta)
        if delta.finish_reason is not None:
            self.unfinished.discard(request_id)
        self._wake()

    def fail(self, error: StatusError) -> None:
        """Let the reader raise `error`, now and whatever comes."""
        self._failure = error
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def get(self) -> list[tuple[int, Delta]]:
        """Wait for deltas; return all that wait, by place of the request in the call.

        One reader at a time.

        Raises:
          StatusError: that of `fail`.
        """
        if not self._waiting and self._failure is None:
            assert self.unfinished, "nothing will come any more"
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        if self._failure is not None:
            raise self._failure
        waiting, self._waiting = self._waiting, {}
        return [(self._places[name], delta) for name, delta in waiting.items()]

    def close(self) -> None:
        """Let later deltas be dropped.

        The ids of what the engine has not answered stay taken until it has: its last
        words must not reach the next call of that id.
        """
        self._outbox.drop(self._places, self.unfinished & self._submitted)


class LoopOutbox(Outbox):
    """Deltas of all requests on their way to one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._loop = loop
        self._arrived: collections.deque[tuple[str, Delta]] = collections.deque()
        self._is_coming = False
        self._streams: dict[str, Stream] = {}
        self._leaving: set[str] = set()

    def open(self, request_ids: tuple[str, ...]) -> Stream:
        """Return where the deltas of these requests come out (event loop)."""
        stream = Stream(self, request_ids)
        for name in request_ids:
            assert name not in self._streams, f"{name} is open"
            self._streams[name] = stream
        return stream

    @property
    def open_ids(self) -> list[str]:
        """Requests that have a reader (event loop)."""
        return list(self._streams)

    def fail_all(self, error: StatusError) -> None:
        """Let all open streams end with `error`, whatever the engine does (event loop).

        Their readers cancel what still runs.
        """
        for stream in set(self._streams.values()):
            stream.fail(error)

    def requests_of(self, request_id: str) -> list[str]:
        """Return the engine's ids of a call's completions; none if it is not open."""
        stream = self._streams.get(request_id)
        return [] if stream is None else stream.request_ids

    def is_open(self, request_id: str) -> bool:
        """Return whether an id is taken (event loop)."""
        return request_id in self._streams or request_id in self._leaving

    def drop(self, request_ids: dict[str, int], unanswered: set[str]) -> None:
        """Forget the reader of these requests (event loop)."""
        for name in request_ids:
            self._streams.pop(name, None)
        self._leaving |= unanswered

    def put(self, request_id: str, delta: Delta) -> None:
        """Add a delta (engine thread)."""
        self._arrived.append((request_id, delta))
        # Set here and cleared there before it looks: a delta that is put while the
        # loop hands out is either seen by it or wakes it again.
        if not self._is_coming:
            self._is_coming = True
            try:
                self._loop.call_soon_threadsafe(self._hand_out)
            except RuntimeError:  # the loop is closed: nobody reads any more
                self._arrived.clear()

    def _hand_out(self) -> None:
        self._is_coming = False
        while self._arrived:
            request_id, delta = self._arrived.popleft()
            stream = self._streams.get(request_id)
            if stream is not None:
                stream.put(request_id, delta)
            elif delta.finish_reason is not None:
                self._leaving.discard(request_id)
