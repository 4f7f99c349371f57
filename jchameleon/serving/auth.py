"""Who may call what: bearer tokens, checked in one place before any handler."""

import hmac
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc

from jchameleon.errors import ConfigError
from jchameleon.serving.settings import SecurityConfig
from jchameleon.serving.status import StatusError

OPEN_SERVICES = ("grpc.health.v1.Health",)
"""Probes carry no tokens."""

REFLECTION = "grpc.reflection."
"""What describes the server needs a token wherever there are any."""

ADMIN_SERVICES = ("jchameleon.v1.AdapterService", "jchameleon.v1.EngineService")
MIN_TOKEN_CHARS = 16
MAX_TOKENS = 1000
_SCHEME = b"bearer "


class Tokens:
    """The tokens of users and administrators."""

    def __init__(self, users: tuple[bytes, ...], admins: tuple[bytes, ...]) -> None:
        self._users = users
        self._admins = admins

    @classmethod
    def read(cls, config: SecurityConfig) -> "Tokens":
        """Read the files that a configuration names.

        Raises:
          ConfigError: one cannot be read, or holds no or bad tokens; none is shown.
        """
        users = _read("token_file", config.token_file)
        admins = _read("admin_token_file", config.admin_token_file)
        return cls(users, admins)

    def __bool__(self) -> bool:
        """Whether there are any; without, everybody may call everything."""
        return bool(self._users or self._admins)

    def refusal(self, service: str, given: bytes | None) -> StatusError | None:
        """Return why a call with this token may not go on, or None.

        All tokens are compared, each in constant time.
        """
        if service in OPEN_SERVICES or not self:
            return None
        is_admin = _matches(given, self._admins)
        is_user = _matches(given, self._users)
        if service in ADMIN_SERVICES and self._admins:
            if is_admin:
                return None
            if is_user:
                return StatusError(
                    grpc.StatusCode.PERMISSION_DENIED,
                    "NOT_AN_ADMINISTRATOR",
                    f"{service} needs an administrator's token",
                )
        elif is_admin or is_user:
            return None
        elif not self._users and not service.startswith(REFLECTION):
            return None
        return StatusError(
            grpc.StatusCode.UNAUTHENTICATED,
            "BAD_TOKEN" if given is not None else "NO_TOKEN",
            "metadata `authorization` must be `Bearer` and a token of this server",
        )


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Stands before every service, so that none can be forgotten."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    async def intercept_service(
        self,
        continuation: Callable[[Any], Awaitable[Any]],
        handler_call_details: Any,
    ) -> Any:
        """Return the call's handler, or one that refuses it."""
        service = handler_call_details.method.strip("/").partition("/")[0]
        given = _token_of(handler_call_details.invocation_metadata)
        refusal = self._tokens.refusal(service, given)
        if refusal is None:
            return await continuation(handler_call_details)

        async def refuse(messages: Any, context: grpc.aio.ServicerContext) -> None:
            await context.abort(refusal.code, refusal.message, refusal.metadata())

        # Of the most general kind: it fits whatever the client sends.
        return grpc.stream_stream_rpc_method_handler(refuse)


def _token_of(metadata: Any) -> bytes | None:
    """Return the token that a call brings, None if there is none or more than one."""
    values = [value for key, value in metadata or () if key == "authorization"]
    if len(values) != 1:
        return None
    value = values[0].encode() if isinstance(values[0], str) else values[0]
    if value[: len(_SCHEME)].lower() != _SCHEME:
        return None
    return value[len(_SCHEME) :].strip()


def _matches(given: bytes | None, tokens: tuple[bytes, ...]) -> bool:
    found = False
    for token in tokens:
        found |= hmac.compare_digest(given or b"", token)
    return found


def _read(field: str, path: str | None) -> tuple[bytes, ...]:
    if path is None:
        return ()
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"security.{field}: {error}") from error
    tokens = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not 0 < len(tokens) <= MAX_TOKENS:
        raise ConfigError(
            f"security.{field}={path!r} must hold 1 to {MAX_TOKENS} tokens"
        )
    for number, token in enumerate(tokens, 1):
        if len(token) < MIN_TOKEN_CHARS or not token.isascii() or b" " in token:
            raise ConfigError(
                f"security.{field}={path!r}: token {number} must have at least "
                f"{MIN_TOKEN_CHARS} ASCII characters and no spaces"
            )
    return tokens
