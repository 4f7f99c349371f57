"""Block sizes that were measured: a table for each kind of device.

A table lies in `configs/tuned/`, written by `tools/tune.py`. An entry holds for exactly
its operation, phase, element type and shape; everything else is left to heuristics. It
is checked as a whole when it is read, so that a wrong file stops an engine at its start
and not a step in the middle. Tables compare and hash by content: programs are cached by
what they were compiled with.
"""

import dataclasses
import json
import re
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jchameleon.errors import ConfigError
from jchameleon.resources import configs_dir

Extent = int | tuple[int, ...]

DTYPES = ("bfloat16", "float32")


class Key(NamedTuple):
    """What a configuration was measured for.

    Attributes:
      op: a name of `gpu_tunables.TUNABLES`.
      phase: "decode", "prefill", or "any" where the kernel is the same in both.
      dtype: of the pool.
      shape: (name, extent) pairs in order of name.
    """

    op: str
    phase: str
    dtype: str
    shape: tuple[tuple[str, Extent], ...]


def make_key(op: str, *, phase: str, dtype: Any, **shape: Extent) -> Key:
    """Return the key of a call; `dtype` as numpy's or by name."""
    return Key(op, phase, getattr(dtype, "name", dtype), tuple(sorted(shape.items())))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TunableOp:
    """An operation with a configuration that tables may hold.

    Attributes:
      config: the frozen dataclass of its block sizes.
      phases: those it has.
      shape: names of the extents of its keys; those of `lists` are tuples.
      check: raises ValueError where a configuration does not fit a shape.
    """

    config: type
    phases: tuple[str, ...]
    shape: tuple[str, ...]
    lists: tuple[str, ...] = ()
    check: Callable[[Any, Mapping[str, Any]], None] = lambda config, shape: None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TunedTable:
    """What was measured on one kind of device; empty where nothing was."""

    device: str = ""
    entries: tuple[tuple[Key, Any], ...] = ()

    def find(self, key: Key) -> Any | None:
        """Return the configuration of a call, or None."""
        return dict(self.entries).get(key)


UNTUNED = TunedTable()


def table_path(device: str, folder: Path | None = None) -> Path:
    """Return the file of a device ("NVIDIA A40": nvidia-a40.json), there or not."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return (folder or configs_dir() / "tuned") / f"{name}.json"


def read_table(path: Path, device: str, ops: Mapping[str, TunableOp]) -> TunedTable:
    """Return a table.

    Raises:
      ConfigError: the file is no table of this device, or an entry names what does not
        exist or what its operation refuses. The message names file, entry and rule.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    _check_names(f"{path}", content, required=("device", "entries"))
    if content["device"] != device:
        raise ConfigError(f"{path}: device={content['device']!r} must be {device!r}")
    if not isinstance(content["entries"], list):
        raise ConfigError(f"{path}: entries must be a list")
    found: dict[Key, Any] = {}
    for i, entry in enumerate(content["entries"]):
        where = f"{path}: entries[{i}]"
        key, config = read_entry(where, entry, ops)
        if key in found:
            raise ConfigError(f"{where}: {key.op} has an entry of this shape already")
        found[key] = config
    return TunedTable(device=device, entries=tuple(found.items()))


def read_entry(where: str, entry: Any, ops: Mapping[str, TunableOp]) -> tuple[Key, Any]:
    """Return an entry's key and configuration; ConfigError as of `read_table`."""
    required = ("op", "phase", "dtype", "shape", "config")
    _check_names(where, entry, required=required, known=("jax", "us", "default_us"))
    op = ops.get(entry["op"]) if isinstance(entry["op"], str) else None
    if op is None:
        names = ", ".join(sorted(ops))
        raise ConfigError(f"{where}.op={entry['op']!r} must be one of {names}")
    for name, allowed in (("phase", op.phases), ("dtype", DTYPES)):
        if entry[name] not in allowed:
            raise ConfigError(
                f"{where}.{name}={entry[name]!r} must be one of {', '.join(allowed)}"
            )
    _check_names(f"{where}.shape", entry["shape"], required=op.shape)
    shape: dict[str, Extent] = {}
    for name, value in entry["shape"].items():
        values = value if name in op.lists else [value]
        if not isinstance(values, list) or not all(_is_count(v) for v in values):
            kind = "a list of integers" if name in op.lists else "an integer"
            raise ConfigError(f"{where}.shape.{name}={value!r} must be {kind} >= 0")
        shape[name] = tuple(values) if name in op.lists else value
    config = _read_config(f"{where}.config", entry["config"], op.config)
    try:
        op.check(config, shape)
    except ValueError as error:
        raise ConfigError(f"{where}.config: {error}") from error
    key = make_key(entry["op"], phase=entry["phase"], dtype=entry["dtype"], **shape)
    return key, config


def write_entry(key: Key, config: Any, **evidence: Any) -> dict[str, Any]:
    """Return an entry as JSON has it; `evidence` is what was measured, and how."""
    return {
        "op": key.op,
        "phase": key.phase,
        "dtype": key.dtype,
        "shape": {n: list(v) if isinstance(v, tuple) else v for n, v in key.shape},
        "config": dataclasses.asdict(config),
        **evidence,
    }


def _read_config(where: str, fields: Any, kind: type) -> Any:
    hints = typing.get_type_hints(kind)
    _check_names(where, fields, required=tuple(hints))
    for name, value in fields.items():
        choices = typing.get_args(hints[name])
        if choices and value not in choices:
            rule = f"one of {', '.join(map(repr, choices))}"
            raise ConfigError(f"{where}.{name}={value!r} must be {rule}")
        if not choices and not _is_count(value):
            raise ConfigError(f"{where}.{name}={value!r} must be an integer >= 0")
    try:
        return kind(**fields)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def _check_names(
    where: str, found: Any, *, required: tuple[str, ...], known: tuple[str, ...] = ()
) -> None:
    if not isinstance(found, dict):
        raise ConfigError(f"{where} must be an object, got {found!r:.60}")
    unknown = sorted(set(found) - {*required, *known})
    missing = sorted(set(required) - set(found))
    if unknown or missing:
        what = f"has unknown {unknown}" if unknown else f"lacks {missing}"
        raise ConfigError(f"{where} {what}; it needs {', '.join(required)}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
