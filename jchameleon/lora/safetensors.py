"""Strict reader of safetensors files: every byte is accounted for, or refused.

Layout of a file: 8 bytes, the header's length N in little-endian; N bytes of JSON, one
entry {"dtype", "shape", "data_offsets"} per tensor and optionally "__metadata__"; then
the tensors' bytes, back to back. Nothing is allocated for data before the header has
been checked against the size of the file.
"""

import dataclasses
import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from jchameleon.errors import AdapterError, AdapterReadError

MAX_HEADER_BYTES = 100_000_000
"""Longest header that the format's own implementation reads."""

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Element types of adapters; any other is refused."""

_MAX_DIMS = 8

_NOT_THERE = frozenset(
    {
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENXIO,
        errno.EACCES,
        errno.EPERM,
    }
)
"""What an operating system says of a file that no later attempt will read either."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """One tensor of a header.

    Attributes:
      dtype: numpy type of the elements.
      shape: extents, outermost first.
      start_bytes, end_bytes: its range within the data behind the header.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    start_bytes: int
    end_bytes: int


def read_failure(what: str, error: OSError | ValueError) -> AdapterError:
    """Return the error to raise where the operating system lets us not read.

    An `AdapterReadError` unless there is nothing to read; ValueError is what Python
    raises for a path with a null character.
    """
    message = f"cannot read {what}: {getattr(error, 'strerror', None) or error}"
    if isinstance(error, OSError) and error.errno not in _NOT_THERE:
        return AdapterReadError(message)
    return AdapterError(message)


def open_regular(path: Path, *, max_bytes: int) -> tuple[BinaryIO, int]:
    """Open a regular file for reading; return it and its size in bytes.

    A pipe or device is refused without waiting for its other end.

    Raises:
      AdapterError: missing, no regular file, or over `max_bytes`.
      AdapterReadError: it is there and cannot be read now.
    """
    try:
        # O_NONBLOCK: opening a FIFO would otherwise wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise read_failure(path.name, error) from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise AdapterError(f"{path.name} must be a regular file")
    if status.st_size > max_bytes:
        os.close(fd)
        raise AdapterError(
            f"{path.name} has {status.st_size} bytes, limit is {max_bytes}"
        )
    return open(fd, "rb", buffering=0), status.st_size


def read_exactly(file: BinaryIO, buffer: memoryview, *, name: str) -> None:
    """Fill `buffer` from `file`.

    Raises:
      AdapterError: the file ended early.
      AdapterReadError: it cannot be read now.
    """
    done = 0
    while done < len(buffer):
        try:
            count = file.readinto(buffer[done:])  # type: ignore[attr-defined]
        except OSError as error:
            raise read_failure(name, error) from error
        if not count:
            raise AdapterError(f"{name} ended after {done} of {len(buffer)} bytes")
        done += count


def parse_json(data: bytes, *, name: str) -> dict[str, Any]:
    """Parse one JSON object strictly: no duplicate keys, NaN or Infinity.

    Raises:
      AdapterError: not UTF-8, not JSON, too deep, or no object.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_pairs,
            parse_constant=_refuse_constant,
        )
    except RecursionError as error:
        raise AdapterError(f"{name} is nested too deeply") from error
    except ValueError as error:
        raise AdapterError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{name} must hold a JSON object, not {short(value)}")
    return value


def short(value: object) -> str:
    """Return `value` as one line of at most 80 characters, for error messages."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def parse_header(
    data: bytes, *, data_bytes: int, name: str = "header"
) -> dict[str, TensorEntry]:
    """Parse and check a header; return its tensors in file order.

    Arguments:
      data: the JSON, without the length before it.
      data_bytes: bytes that follow the header in the file.

    Raises:
      AdapterError: malformed JSON, unknown dtype, a shape that does not fill its range,
        ranges that overlap, leave a hole or do not end where the file does.
    """
    if not data.startswith(b"{"):
        raise AdapterError(f"{name}: header must begin with '{{'")
    table = parse_json(data, name=f"{name}: header")
    _check_metadata(table.pop("__metadata__", {}), name=name)
    entries = {key: _parse_entry(key, value, name) for key, value in table.items()}
    order = sorted(
        entries, key=lambda k: (entries[k].start_bytes, entries[k].end_bytes)
    )
    end_bytes = 0
    for key in order:
        start_bytes = entries[key].start_bytes
        if start_bytes != end_bytes:
            fault = "overlaps" if start_bytes < end_bytes else "leaves a hole after"
            raise AdapterError(
                f"{name}: tensor {short(key)} {fault} the tensor before it: it starts "
                f"at byte {start_bytes}, expected {end_bytes}"
            )
        end_bytes = entries[key].end_bytes
    if end_bytes != data_bytes:
        raise AdapterError(
            f"{name}: tensors end at byte {end_bytes} but the file holds {data_bytes} "
            "bytes of data"
        )
    return {key: entries[key] for key in order}


def read_safetensors(path: Path, *, max_bytes: int) -> dict[str, np.ndarray]:
    """Read every tensor of a safetensors file, in file order.

    Returns read-only arrays that share one buffer.

    Raises:
      AdapterError: the file is not exactly what the format says, holds a dtype that is
        none of `DTYPES`, or is larger than `max_bytes`.
    """
    file, file_bytes = open_regular(path, max_bytes=max_bytes)
    with file:
        prefix = bytearray(8)
        if file_bytes < 8:
            raise AdapterError(f"{path.name} has {file_bytes} bytes, at least 8 needed")
        read_exactly(file, memoryview(prefix), name=path.name)
        header_bytes = int.from_bytes(prefix, "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise AdapterError(
                f"{path.name}: header of {header_bytes} bytes exceeds "
                f"{MAX_HEADER_BYTES}"
            )
        data_bytes = file_bytes - 8 - header_bytes
        if data_bytes < 0:
            raise AdapterError(
                f"{path.name}: header of {header_bytes} bytes does not fit in a file "
                f"of {file_bytes} bytes"
            )
        header = bytearray(header_bytes)
        read_exactly(file, memoryview(header), name=path.name)
        entries = parse_header(bytes(header), data_bytes=data_bytes, name=path.name)
        data = np.empty(data_bytes, np.uint8)
        read_exactly(file, data.data, name=path.name)
    data.flags.writeable = False
    return {key: _view(data, entry) for key, entry in entries.items()}


def _view(data: np.ndarray, entry: TensorEntry) -> np.ndarray:
    piece = data[entry.start_bytes : entry.end_bytes]
    if entry.start_bytes % entry.dtype.itemsize:
        # A narrow tensor of odd length may precede a wide one.
        piece = piece.copy()
        piece.flags.writeable = False
    return piece.view(entry.dtype).reshape(entry.shape)


def _parse_entry(key: str, value: Any, name: str) -> TensorEntry:
    where = f"{name}: tensor {short(key)}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise AdapterError(f"{where} must have exactly dtype, shape and data_offsets")
    dtype_name = value["dtype"]
    dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        raise AdapterError(
            f"{where} has dtype {short(dtype_name)}, must be one of {', '.join(DTYPES)}"
        )
    shape = _sizes(value["shape"], where=f"{where} shape")
    if len(shape) > _MAX_DIMS:
        raise AdapterError(f"{where} has {len(shape)} dimensions, limit is {_MAX_DIMS}")
    offsets = _sizes(value["data_offsets"], where=f"{where} data_offsets")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise AdapterError(
            f"{where} data_offsets={short(value['data_offsets'])} must be [start, end] "
            "with start <= end"
        )
    needed_bytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != needed_bytes:
        raise AdapterError(
            f"{where} of shape {short(list(shape))} and dtype {dtype_name} needs "
            f"{needed_bytes} bytes, data_offsets span {offsets[1] - offsets[0]}"
        )
    return TensorEntry(
        dtype=dtype, shape=shape, start_bytes=offsets[0], end_bytes=offsets[1]
    )


def _sizes(value: Any, *, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(
        type(x) is int and 0 <= x < 2**63 for x in value
    ):
        raise AdapterError(
            f"{where}={short(value)} must be a list of integers from 0 to 2**63 - 1"
        )
    return tuple(value)


def _check_metadata(value: Any, *, name: str) -> None:
    if not isinstance(value, dict) or not all(
        isinstance(text, str) for text in value.values()
    ):
        raise AdapterError(
            f"{name}: __metadata__={short(value)} must map strings to strings"
        )


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"duplicate key {short(key)}")
            seen.add(key)
    return table


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")
