"""Frames over a socket between the two processes of a server.

A frame has a kind, the number of a call, and bytes. What is sent in one turn of the
event loop goes out in one write, and what has come together is handed on together.
"""

import asyncio
import struct
from collections.abc import Callable
from typing import Any

_HEAD = struct.Struct("<IBQ")
"""Bytes that follow, kind, number of the call."""

# From the front process: what its clients do.
CALL = 1
"""A request: `CALL_HEAD`, then the message."""
GONE = 2
"""The caller has left, or its deadline has passed: nobody wants more."""
TAKEN = 3
"""So many bytes of messages went out to the caller: `TAKEN_BODY`."""

# From the server's own process: what it answers.
MESSAGE = 11
"""A message of a stream, or the only reply."""
END = 12
"""The call has ended with OK."""
STATUS = 13
"""The call ends with another status: a pickled tuple of the code's number, the details
and the trailing metadata."""

# About the front process itself.
START = 21
BOUND = 22
"""It listens: `PORT_BODY`."""
FAILED = 23
"""It cannot listen: why, as text."""
STOP = 24
"""End all calls after a time of grace: `GRACE_BODY`."""
STOPPED = 25

CALL_HEAD = struct.Struct("<Hd")
"""Number of the method, seconds until the deadline; infinite without one."""
TAKEN_BODY = struct.Struct("<Q")
PORT_BODY = struct.Struct("<I")
GRACE_BODY = struct.Struct("<d")

WINDOW_BYTES = 16 << 10
"""Of a stream's messages, so many may be on their way to a caller who does not read
them; then its sender waits, as it would for gRPC itself."""

MESSAGE_BYTES = 64
"""What a message takes beside its content: many small ones count too."""


class Pipe(asyncio.Protocol):
    """One end of the socket; event loop only."""

    def __init__(
        self, receive: Callable[[int, int, bytes], None], lost: Callable[[], None]
    ) -> None:
        """Create an end for `loop.create_unix_connection`.

        Args:
          receive: takes the kind, the number and the content of each frame.
          lost: is called once, when the other end is gone or this one is closed.
        """
        self._receive = receive
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None  # uvloop's is of no class of asyncio
        self._waiting: list[bytes] = []
        self._rest = bytearray()
        self._resumed: asyncio.Event | None = None  # while the other end is behind

    def send(self, kind: int, call: int = 0, content: bytes = b"") -> None:
        """Send a frame with what else is sent in this turn; nothing once it is lost."""
        if not self._waiting:
            self._loop.call_soon(self._flush)
        self._waiting += (_HEAD.pack(len(content), kind, call), content)

    async def room(self) -> None:
        """Wait while the other end does not take what was sent."""
        while self._resumed is not None:
            await self._resumed.wait()

    def close(self) -> None:
        """End the connection once all has been sent."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting and self._transport is not None:
            self._transport.write(b"".join(waiting))

    # asyncio.Protocol.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._transport = None
        self.resume_writing()
        self._lost()

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`."""
        self._resumed = asyncio.Event()

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        if self._resumed is not None:
            self._resumed.set()
            self._resumed = None

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        source: bytes | bytearray = data
        if self._rest:
            self._rest += data
            source = self._rest
        at, end = 0, len(source)
        while end - at >= _HEAD.size:
            length, kind, call = _HEAD.unpack_from(source, at)
            start = at + _HEAD.size
            if end - start < length:
                break
            at = start + length
            self._receive(kind, call, bytes(source[start:at]))
        if source is data:
            self._rest += data[at:]
        else:
            del self._rest[:at]
