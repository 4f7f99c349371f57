"""TLS and mTLS from PEM files that may be renewed while the server runs."""

import dataclasses
import logging
import os
import ssl
import time

import grpc

from jchameleon.errors import ConfigError
from jchameleon.serving.settings import SecurityConfig

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class _Files:
    """What the files held at one moment; `stamps` tells one moment from another."""

    stamps: tuple[tuple[int, int], ...]
    credentials: grpc.ServerCertificateConfiguration


def server_credentials(config: SecurityConfig) -> grpc.ServerCredentials | None:
    """Return the credentials that a configuration names, None without TLS.

    Each new connection looks whether the files have changed. New ones that are no good
    are logged, and the old ones stay in use.

    Raises:
      ConfigError: a file cannot be read, certificate and key do not fit, or one has
        expired.
    """
    if config.tls_cert is None:
        return None
    files = _read(config)

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal files
        try:
            if _stamps(config) == files.stamps:
                return None
            files = _read(config)
        except (ConfigError, OSError) as error:
            logger.error("TLS files have changed and are no good: %s", error)
            return None
        logger.info("TLS files were renewed")
        return files.credentials

    return grpc.dynamic_ssl_server_credentials(
        files.credentials,
        renewed,
        require_client_authentication=config.tls_client_ca is not None,
    )


def _paths(config: SecurityConfig) -> list[str]:
    paths = (config.tls_cert, config.tls_key, config.tls_client_ca)
    return [path for path in paths if path is not None]


def _stamps(config: SecurityConfig) -> tuple[tuple[int, int], ...]:
    found = [os.stat(path) for path in _paths(config)]
    return tuple((status.st_mtime_ns, status.st_size) for status in found)


def _read(config: SecurityConfig) -> _Files:
    assert config.tls_cert is not None and config.tls_key is not None
    try:
        stamps = _stamps(config)
        contents = []
        for path in _paths(config):
            with open(path, "rb") as file:
                contents.append(file.read())
    except OSError as error:
        raise ConfigError(f"security: {error}") from error
    _check(config)
    cert, key, *ca = contents
    credentials = grpc.ssl_server_certificate_configuration(
        [(key, cert)], root_certificates=ca[0] if ca else None
    )
    return _Files(stamps, credentials)


def _check(config: SecurityConfig) -> None:
    """Refuse what gRPC would take now and fail with at every handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A password would be asked for on the terminal.
        context.load_cert_chain(
            config.tls_cert,  # type: ignore[arg-type]
            config.tls_key,
            password=lambda: "",
        )
    except (ssl.SSLError, OSError, ValueError) as error:
        raise ConfigError(
            f"security.tls_cert={config.tls_cert!r} and tls_key={config.tls_key!r} are "
            f"no certificate and its key: {error}"
        ) from error
    try:
        _shake_hands(context, config.tls_cert)  # type: ignore[arg-type]
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(
            f"security.tls_cert={config.tls_cert!r} would be refused by every client: "
            f"{error.verify_message}"
        ) from error
    if config.tls_client_ca is not None:
        try:
            context.load_verify_locations(config.tls_client_ca)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(
                f"security.tls_client_ca={config.tls_client_ca!r} holds no "
                f"certificates: {error}"
            ) from error
        ends_s = [
            ssl.cert_time_to_seconds(str(one["notAfter"]))
            for one in context.get_ca_certs()
        ]
        if ends_s and max(ends_s) < time.time():
            raise ConfigError(
                f"security.tls_client_ca={config.tls_client_ca!r} has expired"
            )


def _shake_hands(server: ssl.SSLContext, cert: str) -> None:
    """Let a client in memory that trusts just this certificate connect.

    The standard library reads no dates of a certificate but those of a peer.

    Raises:
      SSLCertVerificationError: it is not valid now, or not for servers.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(cert)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = (
        client.wrap_bio(back, there),
        server.wrap_bio(there, back, server_side=True),
    )
    for _ in range(4):  # more flights than any handshake has
        for side in sides:
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                pass
