"""A TCP proxy on loopback that loses connections when told to."""

import contextlib
import socket
import threading
from collections.abc import Iterator


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
        threading.Thread(target=self._accept, daemon=True).start()

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
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.accepted += 1
                if self._to_refuse:
                    self._to_refuse -= 1
                    client.close()
                    continue
                swallows = self._to_swallow > 0
                self._to_swallow -= swallows
                server = socket.create_connection(self._upstream)
                with self._lock:
                    self._open |= {client, server}
                self._pump(client, server, until_answer=False)
                self._pump(server, client, until_answer=swallows)

    def _pump(
        self, source: socket.socket, sink: socket.socket, *, until_answer: bool
    ) -> None:
        def run() -> None:
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

        threading.Thread(target=run, daemon=True).start()


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
