"""A TCP proxy on loopback that loses connections when told to."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any


class FlakyProxy:
    """Passes bytes on between clients and a server, or does not.

    Attributes:
      target: its own address.
      accepted: connections so far.
    """

    def __init__(self, upstream: str) -> None:
        host, _, port = upstream.rpartition(":")
        self._upstream = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.accepted = 0
        self._to_refuse = 0
        self._to_swallow = 0
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def refuse(self, connections: int) -> None:
        """Close so many of the next connections at once."""
        self._to_refuse = connections

    def swallow(self, connections: int) -> None:
        """Let requests through on so many of the next ones; cut at the answer."""
        self._to_swallow = connections

    def cut(self) -> None:
        """Lose all connections that are open."""
        with self._lock:
            for one in self._open:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            self._open.clear()

    def close(self) -> None:
        """Stop listening and lose everything."""
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        self.cut()
        while self._threads:
            self._threads.pop().join()
        self._listener.close()

    def _start(self, work: Callable[..., None], *args: Any) -> threading.Thread:
        thread = threading.Thread(target=work, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.accepted += 1
                self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        refuses, swallows = self._to_refuse > 0, self._to_swallow > 0
        self._to_refuse -= refuses
        with client:
            if refuses:
                return
            self._to_swallow -= swallows
            with socket.create_connection(self._upstream) as server:
                with self._lock:
                    self._open |= {client, server}
                requests = self._start(pump, client, server, False)
                pump(server, client, swallows)
                requests.join()
                with self._lock:
                    self._open -= {client, server}


def pump(source: socket.socket, sink: socket.socket, until_answer: bool) -> None:
    """Pass bytes on until the source ends, or an answer begins; then end both."""
    seen = b""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            seen += data if until_answer else b""
            if has_headers(seen):
                break
            sink.sendall(data)
    for one in (source, sink):
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


def has_headers(data: bytes) -> bool:
    """Return whether HTTP/2 frames (RFC 9113, section 4.1) have one of HEADERS."""
    while len(data) >= 9:
        if data[3] == 1:
            return True
        data = data[9 + int.from_bytes(data[:3]) :]
    return False


@contextlib.contextmanager
def flaky_proxy(upstream: str) -> Iterator[FlakyProxy]:
    """Run a proxy in front of a server."""
    proxy = FlakyProxy(upstream)
    try:
        yield proxy
    finally:
        proxy.close()
