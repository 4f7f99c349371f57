"""Plan logs: what a planner was told and what it planned, one line per iteration.

A log is a gzip file of JSON lines. The first is the header, an object; every other is
`[now_s, [events], plan]`. Events, plans and what they hold are objects of their class's
name, under "is", and the fields that are not at their default. Floats come back as they
were, to the last bit; those without a JSON form are written Infinity and NaN. A log has
lengths, ids and times of requests, and none of their tokens: keys of the prefix cache
are digests, equal where requests begin alike.
"""

import contextlib
import dataclasses
import gzip
import json
import math
import typing
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jchameleon.config import check_keys
from jchameleon.errors import ConfigError
from jchameleon.runtime.policy.events import Event
from jchameleon.runtime.policy.limits import PlannerConfig
from jchameleon.runtime.policy.plan import Load, Plan, PrefillChunk
from jchameleon.runtime.policy.presets import PolicyConfig, load_policy
from jchameleon.runtime.policy.request import Request

FORMAT = "jchameleon-plan-log"
VERSION = 3

FLUSH_S = 1.0
"""Iterations of the last second, by their own clock, may be lost when a process dies.

Each flush costs a few bytes of compression.
"""

# An engine writes while its device waits: level 1 takes a quarter of the time of the
# default and makes files half as large again.
_COMPRESS_LEVEL = 1

_EVENTS: tuple[type, ...] = typing.get_args(Event)
_CLASSES = {cls.__name__: cls for cls in (*_EVENTS, Request, Plan, PrefillChunk, Load)}
_FIELDS = {
    cls: [(field.name, field.default) for field in dataclasses.fields(cls)]
    for cls in _CLASSES.values()
}


class PlanLogWriter:
    """Writes one log; for the thread that owns the planner."""

    def __init__(
        self, path: str | Path, planner: PlannerConfig, policy: PolicyConfig
    ) -> None:
        """Create `path`, or replace it, and write the header.

        Raises:
          ConfigError: the file cannot be written, or a policy's options are such that
            a file cannot hold them.
        """
        header = {
            "format": FORMAT,
            "version": VERSION,
            "planner": dataclasses.asdict(planner),
            "policy": policy.to_dict(),
        }
        try:
            line = json.dumps(header).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"plan log {str(path)!r} cannot hold policy {policy.source}: {error}"
            ) from error
        self._flushed_s = -math.inf
        try:
            # Without name and time in it, equal runs make equal files.
            self._file = open(path, "wb")
            with contextlib.ExitStack() as on_error:
                on_error.callback(self._file.close)
                self._gzip = gzip.GzipFile(
                    "", "wb", _COMPRESS_LEVEL, self._file, mtime=0
                )
                self._gzip.write(line)
                self._gzip.flush()
                on_error.pop_all()
        except (OSError, ValueError) as error:  # ValueError: a null character
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(
                f"plan log {str(path)!r} cannot be written: {reason}"
            ) from error

    def append(self, now_s: float, events: Sequence[Event], plan: Plan) -> None:
        """Write one call of `Planner.plan` and what it returned.

        All calls must be written, in their order. What was written reaches the file
        at the first call FLUSH_S after the last that did.

        Raises:
          OSError: the file cannot be written.
        """
        self._gzip.write(encode([now_s, events, plan]).encode() + b"\n")
        if now_s - self._flushed_s >= FLUSH_S:
            self._gzip.flush()
            self._flushed_s = now_s

    def close(self) -> None:
        """Finish the file; a second call does nothing."""
        try:
            self._gzip.close()
        finally:
            self._file.close()


class PlanLog:
    """Reads one log; iterate it, once, for (now_s, events, plan).

    Attributes:
      planner, policy: how to build its planner.
      cut_off: after the last iteration: whether the file ends early, as when its
        process was killed; all whole lines of it have been read.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a log and read its header.

        Raises:
          ConfigError: the file cannot be read, is no log, has another version, or its
            planner or policies are not such as this release has.
        """
        self._path = str(path)
        self.cut_off = False
        self._lines = self._read_lines()
        first = next(self._lines, None)
        if first is None:
            raise ConfigError(f"plan log {self._path!r} holds no header")
        try:
            self.planner, self.policy = _header(first)
        except (ValueError, TypeError, RecursionError) as error:
            raise self._damaged(1, error) from error

    def __iter__(self) -> Iterator[tuple[float, tuple[Event, ...], Plan]]:
        """Yield the iterations in order.

        Raises:
          ConfigError: a line is damaged; names the line and what is wrong.
        """
        for number, line in enumerate(self._lines, start=2):
            try:
                now_s, events, plan = decode(line)
                if type(now_s) not in (int, float) or type(events) is not tuple:
                    raise ValueError("must be [now_s, [events], plan]")
                for value, kinds in [(plan, (Plan,)), *((e, _EVENTS) for e in events)]:
                    if type(value) not in kinds:
                        names = ", ".join(kind.__name__ for kind in kinds)
                        raise ValueError(f"has {value!r:.80} where one of {names} goes")
            except (ValueError, TypeError, RecursionError) as error:
                raise self._damaged(number, error) from error
            yield now_s, events, plan

    def _read_lines(self) -> Iterator[bytes]:
        number = 1  # of the line that is read next
        try:
            with gzip.open(self._path, "rb") as file:
                for line in file:
                    yield line
                    number += 1
        except EOFError:
            self.cut_off = True
        except (gzip.BadGzipFile, zlib.error) as error:
            raise self._damaged(number, error) from error
        except OSError as error:
            raise ConfigError(
                f"plan log {self._path!r} cannot be read: {error.strerror}"
            ) from error

    def _damaged(self, number: int, error: Exception) -> ConfigError:
        return ConfigError(f"plan log {self._path!r}, line {number}: {error}")


def read_plan_log(path: str | Path) -> PlanLog:
    """Open a log and read its header; errors as `PlanLog`."""
    return PlanLog(path)


def encode(value: Any) -> str:
    """Return the one JSON form of events, plans, and tuples of them.

    Values are the same to the last bit exactly where their forms are.

    Raises:
      TypeError: a value of no class that logs hold.
    """
    return _ENCODER.encode(value)


def decode(text: str | bytes) -> Any:
    """Return what `encode` wrote; all sequences become tuples.

    Raises:
      ValueError, TypeError: not what `encode` writes.
    """
    return _tuples(json.loads(text, object_hook=_object))


def _header(line: bytes) -> tuple[PlannerConfig, PolicyConfig]:
    header = json.loads(line)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"must be an object with format {FORMAT!r}")
    if header.get("version") != VERSION:
        raise ValueError(
            f"version={header.get('version')!r} must be {VERSION}, the only one that "
            "this release reads"
        )
    for key in ("planner", "policy"):
        if not isinstance(header.get(key), dict):
            raise ValueError(f"{key} must be an object")
    check_keys(PlannerConfig, header["planner"])
    return PlannerConfig(**header["planner"]), load_policy(header["policy"])


def _fields(value: Any) -> Any:
    """Return what JSON knows instead of a value that it does not."""
    if isinstance(value, np.generic):  # a policy's own arithmetic
        return value.item()
    fields = _FIELDS.get(type(value))
    if fields is None:
        raise TypeError(f"a plan log cannot hold {type(value).__name__}: {value!r:.80}")
    out = {"is": type(value).__name__}  # a keyword of Python, so no field's name
    for name, default in fields:
        item = getattr(value, name)
        # The repr tells 0.0 from 0, False and -0.0.
        if item is not default and (item != default or repr(item) != repr(default)):
            out[name] = item
    return out


_ENCODER = json.JSONEncoder(
    separators=(",", ":"), check_circular=False, default=_fields
)


def _object(fields: dict[str, Any]) -> Any:
    name = fields.pop("is", None)
    cls = _CLASSES.get(name)
    if cls is None:
        raise ValueError(f"is={name!r} is none of {', '.join(sorted(_CLASSES))}")
    for field, default in _FIELDS[cls]:
        if type(default) is tuple and type(fields.get(field, [])) is not list:
            raise ValueError(f"{name}.{field} must be a list")
    return cls(**{field: _tuples(value) for field, value in fields.items()})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if type(value) is list else value
