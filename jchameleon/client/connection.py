"""How a client reaches its server: address, TLS, token."""

import dataclasses
from pathlib import Path

import grpc

from jchameleon.errors import ConfigError

CHANNEL_OPTIONS = (
    # A lost server is looked for again soon; gRPC itself waits up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # A peer that is gone without a word is found in 20 + 10 s, also during a prefill.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", -1),
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tls:
    """PEM files of a connection by TLS.

    Attributes:
      root_cert: what the server's certificate is checked against; None takes the
        system's roots.
      client_cert, client_key: what the client shows; both or none.
      server_name: that the certificate must name, where it is not the address.
    """

    root_cert: str | Path | None = None
    client_cert: str | Path | None = None
    client_key: str | Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.client_cert is None) != (self.client_key is None):
            raise ConfigError("client_cert and client_key go together")

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files.

        Raises:
          ConfigError: one cannot be read.
        """
        return grpc.ssl_channel_credentials(
            _read(self.root_cert), _read(self.client_key), _read(self.client_cert)
        )

    def options(self) -> tuple[tuple[str, str], ...]:
        """Return the channel options that it needs."""
        if self.server_name is None:
            return ()
        return (("grpc.ssl_target_name_override", self.server_name),)


def metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """Return what each call brings along.

    Raises:
      ConfigError: the token is empty, or cannot stand in a header.
    """
    if token is None:
        return ()
    if not token or not all("!" <= character <= "~" for character in token):
        raise ConfigError("the token must be printable ASCII without spaces")
    return (("authorization", f"Bearer {token}"),)


def read_token(path: Path) -> str:
    """Return the token in a file's first line that is not empty.

    Raises:
      ConfigError: there is none, or the file cannot be read.
    """
    data = _read(path)
    assert data is not None
    for line in data.decode("utf-8", errors="replace").splitlines():
        if line.strip():
            return line.strip()
    raise ConfigError(f"{path} holds no token")


def _read(path: str | Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
