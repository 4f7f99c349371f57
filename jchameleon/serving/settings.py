"""A server's configuration: what it serves, where, to whom and how much at once."""

import dataclasses
import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from jchameleon.config import (
    EngineConfig,
    check_keys,
    is_number,
    load_toml,
    preset_names,
)
from jchameleon.errors import ConfigError
from jchameleon.serving.logs import LOG_FORMATS, LogFormat

DEFAULT_PORT = 50051
DEFAULT_METRICS_PORT = 9464


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ListenConfig:
    """Where the server listens, and how it treats connections.

    Attributes:
      host: address to bind; anything but loopback needs TLS, or `allow_insecure`.
      port: 0 takes a free one.
      metrics_host: address of Prometheus' HTTP endpoint, which is plain and open to
        whoever reaches it.
      metrics_port: its port; 0 takes a free one,
        None has no endpoint.
      allow_insecure: bind other addresses than loopback without TLS.
      max_message_bytes, max_reply_bytes: larger messages are refused.
      max_concurrent_rpcs: more are refused by gRPC itself, streams of health and
        reflection included.
      stall_timeout_s: a reader that takes nothing for so long is given up.
      shutdown_timeout_s: running requests get so long to end after SIGTERM.
      step_timeout_s: an engine that has work and shows no progress for so long is
        reported as not serving.
      exit_when_stuck: end the process then, instead of waiting for the step.
      log_format: of the lines on standard error, "json" or "text".
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = DEFAULT_METRICS_PORT
    allow_insecure: bool = False
    max_message_bytes: int = 4 << 20
    max_reply_bytes: int = 16 << 20
    max_concurrent_rpcs: int = 10_000
    stall_timeout_s: float = 60.0
    shutdown_timeout_s: float = 30.0
    step_timeout_s: float = 30.0
    exit_when_stuck: bool = False
    log_format: LogFormat = "json"

    def __post_init__(self) -> None:
        for field in ("host", "metrics_host"):
            if not isinstance(value := getattr(self, field), str) or not value:
                raise ConfigError(f"server.{field}={value!r} must be an address")
        for field in ("port", "metrics_port"):
            value = getattr(self, field)
            if value is None and field == "metrics_port":
                continue
            if type(value) is not int or not 0 <= value < 1 << 16:
                raise ConfigError(f"server.{field}={value!r} must be from 0 to 65535")
        bounds = ("max_message_bytes", "max_reply_bytes", "max_concurrent_rpcs")
        _check_positive("server", self, bounds)
        for field in bounds:
            if (value := getattr(self, field)) >= 1 << 31:  # gRPC's are i32
                raise ConfigError(f"server.{field}={value} must be below 2^31")
        for field in ("stall_timeout_s", "shutdown_timeout_s", "step_timeout_s"):
            value = getattr(self, field)
            if not (is_number(value) and value > 0):
                raise ConfigError(
                    f"server.{field}={value!r} must be a positive, finite number"
                )
        _check_switches("server", self, ("allow_insecure", "exit_when_stuck"))
        if self.log_format not in LOG_FORMATS:
            raise ConfigError(
                f"server.log_format={self.log_format!r} must be 'json' or 'text'"
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SecurityConfig:
    """Who may call.

    Attributes:
      tls_cert, tls_key: PEM files of the server; both or none.
      tls_client_ca: PEM file; clients must show a certificate that it signed (mTLS).
      token_file: one bearer token a line; a call must bring one of them. None lets
        everybody call.
      admin_token_file: likewise for AdapterService and EngineService, whose tokens are
        good for everything. None leaves them to whoever may call.
    """

    tls_cert: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    token_file: str | None = None
    admin_token_file: str | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (value is None or (isinstance(value, str) and value)):
                raise ConfigError(
                    f"security.{field.name}={value!r} must be the path of a file"
                )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("security.tls_cert and security.tls_key go together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ConfigError("security.tls_client_ca needs security.tls_cert")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """Which adapters there are and may come.

    Attributes:
      root: folder that all adapters lie below, links resolved.
      preload: id -> path below `root`, registered at start.
      dynamic: RegisterAdapter and UnregisterAdapter are allowed.
      manifest: file that remembers what was registered at run time, for the next start;
        None forgets it.
      max_adapters: registered at once.
      max_adapter_bytes: size of an adapter's weights file.
      max_pinned_bytes: device memory that pinned adapters may take together; None
        leaves it to what the pool allows.
    """

    root: str | None = None
    preload: Mapping[str, str] = dataclasses.field(default_factory=dict)
    dynamic: bool = False
    manifest: str | None = None
    max_adapters: int = 1000
    max_adapter_bytes: int = 4 << 30
    max_pinned_bytes: int | None = None

    def __post_init__(self) -> None:
        for field in ("root", "manifest"):
            value = getattr(self, field)
            if not (value is None or (isinstance(value, str) and value)):
                raise ConfigError(f"adapters.{field}={value!r} must be a path")
        if not isinstance(self.preload, Mapping) or not all(
            isinstance(item, str) for pair in self.preload.items() for item in pair
        ):
            raise ConfigError(
                f"adapters.preload={self.preload!r:.80} must map ids to paths"
            )
        _check_switches("adapters", self, ("dynamic",))
        _check_positive("adapters", self, ("max_adapters", "max_adapter_bytes"))
        if self.max_pinned_bytes is not None:
            _check_positive("adapters", self, ("max_pinned_bytes",))
        if self.root is None and (self.preload or self.dynamic):
            raise ConfigError("adapters.root must be set: adapters lie below it")
        if len(self.preload) > self.max_adapters:
            raise ConfigError(
                f"adapters.preload names {len(self.preload)} adapters, "
                f"max_adapters={self.max_adapters} allows no more"
            )
        if self.manifest is not None and not self.dynamic:
            raise ConfigError("adapters.manifest needs adapters.dynamic")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LimitConfig:
    """How much may wait.

    Attributes:
      max_waiting_requests: open beyond those that run; one more is refused at once.
      max_waiting_tokens: of prompts that have no output yet.
    """

    max_waiting_requests: int = 1024
    max_waiting_tokens: int = 1 << 20

    def __post_init__(self) -> None:
        _check_positive("limits", self, ("max_waiting_requests", "max_waiting_tokens"))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """All of it; a TOML file has a table for each part.

    Attributes:
      model: preset name, GGUF file or directory.
    """

    model: str = "smollm2-135m"
    server: ListenConfig = dataclasses.field(default_factory=ListenConfig)
    security: SecurityConfig = dataclasses.field(default_factory=SecurityConfig)
    adapters: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    limits: LimitConfig = dataclasses.field(default_factory=LimitConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ConfigError(f"model={self.model!r} must be a name or a path")
        listen = self.server
        if not (listen.is_loopback or listen.allow_insecure or self.security.tls_cert):
            raise ConfigError(
                f"server.host={listen.host!r} can be reached from other machines: set "
                "security.tls_cert and tls_key, or server.allow_insecure"
            )

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Self:
        """Build from a plain table; an unknown key names the nearest field."""
        check_keys(cls, table)
        parts: dict[str, Any] = dict(table)
        for name, kind in _PARTS.items():
            if name in parts:
                if not isinstance(parts[name], Mapping):
                    raise ConfigError(f"{name}={parts[name]!r:.80} must be a table")
                parts[name] = _part(kind, parts[name])
        return cls(**parts)

    @classmethod
    def load(
        cls, path: Path | None, *, overrides: Mapping[str, Any] | None = None
    ) -> Self:
        """Read a TOML file; paths in it are relative to its folder.

        Args:
          path: None is an empty file.
          overrides: a table of the same form, whose values go before the file's.

        Raises:
          ConfigError: it cannot be read, or a value is wrong.
        """
        if path is None:
            return cls.from_dict(overrides or {})
        table = load_toml(path)
        _resolve_paths(table, path.parent)
        for part, value in (overrides or {}).items():
            before = table.get(part)
            if isinstance(before, dict) and isinstance(value, dict):
                value = {**before, **value}
            table[part] = value
        try:
            return cls.from_dict(table)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


_PARTS: dict[str, Any] = {
    "server": ListenConfig,
    "security": SecurityConfig,
    "adapters": AdapterConfig,
    "limits": LimitConfig,
    "engine": EngineConfig,
}

_PATHS = (
    ("security", "tls_cert"),
    ("security", "tls_key"),
    ("security", "tls_client_ca"),
    ("security", "token_file"),
    ("security", "admin_token_file"),
    ("adapters", "root"),
    ("adapters", "manifest"),
    ("engine", "plan_log"),
)


def _resolve_paths(table: dict[str, Any], folder: Path) -> None:
    """Let the paths of a file's table begin at its folder; names stay names."""
    for part, field in _PATHS:
        section = table.get(part)
        if isinstance(section, dict) and isinstance(section.get(field), str):
            section[field] = str(folder / section[field])
    engine, model = table.get("engine"), table.get("model")
    if isinstance(engine, dict) and str(engine.get("policy")).endswith(".toml"):
        engine["policy"] = str(folder / engine["policy"])
    if isinstance(model, str) and model not in preset_names():
        table["model"] = str(folder / model)


def _part(kind: Any, table: Mapping[str, Any]) -> Any:
    if kind is EngineConfig:
        return EngineConfig.from_dict(table)
    check_keys(kind, table)
    return kind(**table)


def _check_positive(part: str, config: Any, fields: tuple[str, ...]) -> None:
    for field in fields:
        value = getattr(config, field)
        if type(value) is not int or value <= 0:
            raise ConfigError(f"{part}.{field}={value!r} must be a positive integer")


def _check_switches(part: str, config: Any, fields: tuple[str, ...]) -> None:
    for field in fields:
        value = getattr(config, field)
        if type(value) is not bool:
            raise ConfigError(f"{part}.{field}={value!r} must be true or false")
