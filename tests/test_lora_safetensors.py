"""The strict safetensors reader against hand-made files and the format's own writer."""

import json
import os
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jchameleon.errors import AdapterError
from jchameleon.lora.safetensors import (
    MAX_HEADER_BYTES,
    parse_header,
    parse_json,
    read_safetensors,
)

PLENTY = 2 * MAX_HEADER_BYTES

# Three tensors of 16, 6 and 6 bytes; the last starts where nothing wide could.
TENSORS = {
    "a": np.arange(4, dtype=np.float32).reshape(2, 2),
    "b": np.array([1.5, -2.0, 65504.0], np.float16),
    "c": np.array([[1.0], [-0.0], [3e38]], ml_dtypes.bfloat16),
}
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def entries_of(tensors):
    table, at = {}, 0
    for name, value in tensors.items():
        table[name] = {
            "dtype": NAMES[value.dtype.name],
            "shape": list(value.shape),
            "data_offsets": [at, at + value.nbytes],
        }
        at += value.nbytes
    return table


def file_bytes(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def good_file():
    data = b"".join(value.tobytes() for value in TENSORS.values())
    return file_bytes(entries_of(TENSORS), data)


def read_bytes(folder, raw):
    path = folder / "x.safetensors"
    path.write_bytes(raw)
    return read_safetensors(path, max_bytes=PLENTY)


def test_read_returns_what_the_formats_own_writer_wrote(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        f"t{i}": rng.standard_normal(shape).astype(dtype)
        for i, (shape, dtype) in enumerate(
            [((3, 5), "float32"), ((7,), "float16"), ((), "float32"), ((2, 0), "f4")]
        )
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    found = read_safetensors(path, max_bytes=PLENTY)
    assert sorted(found) == sorted(tensors)
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert found[name].tobytes() == value.tobytes()


def test_read_every_dtype_returns_the_bytes_read_only(tmp_path):
    found = read_bytes(tmp_path, good_file())
    assert list(found) == list(TENSORS)
    for name, value in TENSORS.items():
        assert found[name].dtype == value.dtype
        assert found[name].tobytes() == value.tobytes()
        assert not found[name].flags.writeable


def test_read_wide_tensor_behind_odd_one_is_aligned_and_exact(tmp_path):
    tensors = {"half": np.ones(3, np.float16), "wide": np.array([0.1, 7], np.float32)}
    data = b"".join(value.tobytes() for value in tensors.values())
    found = read_bytes(tmp_path, file_bytes(entries_of(tensors), data))
    assert found["wide"].flags.aligned
    assert not found["wide"].flags.writeable
    np.testing.assert_array_equal(found["wide"], tensors["wide"])


def test_read_header_order_other_than_data_order_is_accepted(tmp_path):
    data = b"".join(value.tobytes() for value in TENSORS.values())
    table = dict(reversed(entries_of(TENSORS).items()))
    found = read_bytes(tmp_path, file_bytes(table, data))
    assert found["b"].tobytes() == TENSORS["b"].tobytes()


def test_read_padded_header_and_metadata_are_accepted(tmp_path):
    table = {"__metadata__": {"format": "pt"}, **entries_of(TENSORS)}
    header = json.dumps(table).encode() + b"   "
    data = b"".join(value.tobytes() for value in TENSORS.values())
    assert set(read_bytes(tmp_path, file_bytes(header, data))) == set(TENSORS)


def test_read_any_truncation_is_refused(tmp_path):
    raw = good_file()
    for length in range(len(raw)):
        with pytest.raises(AdapterError):
            read_bytes(tmp_path, raw[:length])


def test_read_any_appended_byte_is_refused(tmp_path):
    raw = good_file()
    data_bytes = sum(value.nbytes for value in TENSORS.values())
    with pytest.raises(AdapterError, match=f"end at byte {data_bytes} .* {1 + 28} "):
        read_bytes(tmp_path, raw + b"\0")


def test_read_any_damaged_byte_is_refused_or_consistent(tmp_path):
    raw = bytearray(good_file())
    header_end = len(raw) - 28
    for at in range(header_end):
        for bit in (0, 4, 7):
            damaged = bytearray(raw)
            damaged[at] ^= 1 << bit
            try:
                found = read_bytes(tmp_path, bytes(damaged))
            except AdapterError as error:
                assert "\n" not in str(error)
                continue
            assert sum(value.nbytes for value in found.values()) == 28


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {
        "dtype": dtype,
        "shape": list(shape),
        "data_offsets": list(offsets),
        **more,
    }


@pytest.mark.parametrize(
    ("header", "data_bytes", "message"),
    [
        (b"[]", 0, "begin with '{'"),
        (b' {"a": 1}', 0, "begin with '{'"),
        (b"{", 0, "not valid JSON"),
        (b"{}x", 0, "not valid JSON"),
        (b'{"\xff": 1}', 0, "not valid JSON"),
        (b'{"a": 1, "a": 2}', 0, "duplicate key 'a'"),
        (b'{"__metadata__": {"x": "1", "x": "1"}}', 0, "duplicate key 'x'"),
        (b'{"a": NaN}', 0, "NaN is not a JSON number"),
        (b'{"a": -Infinity}', 0, "-Infinity is not a JSON number"),
        (b'{"a":' + b"[" * 100_000, 0, "nested too deeply"),
        ({"__metadata__": {"x": 1}}, 0, "__metadata__"),
        ({"__metadata__": None}, 0, "__metadata__"),
        ({"a": []}, 0, "exactly dtype, shape and data_offsets"),
        ({"a": entry(extra=1)}, 8, "exactly dtype, shape and data_offsets"),
        ({"a": entry(dtype="F64")}, 8, "'a' has dtype 'F64'"),
        ({"a": entry(dtype="I8")}, 8, "'a' has dtype 'I8'"),
        ({"a": entry(dtype=["F32"])}, 8, "has dtype"),
        ({"a": entry(shape=[-2])}, 8, r"shape=\[-2\]"),
        ({"a": entry(shape=[2.0])}, 8, r"shape=\[2.0\]"),
        ({"a": entry(shape=[True, 2])}, 8, r"shape=\[True, 2\]"),
        ({"a": entry(shape=[2**63])}, 8, "shape="),
        ({"a": entry(shape=[1] * 9, offsets=[0, 4])}, 4, "9 dimensions, limit is 8"),
        ({"a": entry(offsets=[8, 0])}, 8, "start <= end"),
        ({"a": entry(offsets=[0])}, 8, "start <= end"),
        ({"a": entry(offsets=[0, 8, 8])}, 8, "start <= end"),
        ({"a": entry(offsets=[-8, 0])}, 8, r"data_offsets=\[-8, 0\]"),
        ({"a": entry(offsets=[0, 8.0])}, 8, r"data_offsets=\[0, 8.0\]"),
        ({"a": entry(shape=[3])}, 8, "needs 12 bytes, data_offsets span 8"),
        ({"a": entry(dtype="F16")}, 8, "needs 4 bytes, data_offsets span 8"),
        ({"a": entry(shape=[2**40, 2**40])}, 8, f"needs {2**82} bytes"),
        ({"a": entry(offsets=[4, 12])}, 12, "'a' leaves a hole .* byte 4, expected 0"),
        ({"a": entry(), "b": entry(offsets=[4, 12])}, 12, "'b' overlaps"),
        ({"a": entry(), "b": entry()}, 8, "'b' overlaps .* byte 0, expected 8"),
        ({"a": entry(), "b": entry(offsets=[9, 17])}, 17, "'b' leaves a hole"),
        ({"a": entry()}, 9, "end at byte 8 but the file holds 9"),
        ({"a": entry()}, 7, "end at byte 8 but the file holds 7"),
        ({}, 1, "end at byte 0 but the file holds 1"),
    ],
)
def test_parse_header_malformed_is_refused(header, data_bytes, message):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    with pytest.raises(AdapterError, match=message):
        parse_header(raw, data_bytes=data_bytes)


def test_parse_header_enormous_number_is_refused():
    raw = b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000
    raw += b'], "data_offsets": [0, 8]}}'
    with pytest.raises(AdapterError):
        parse_header(raw, data_bytes=8)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda x: (
            st.lists(x, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["a", "dtype", "shape", "data_offsets", "__metadata__"]
                ),
                x,
                max_size=3,
            )
        ),
        max_leaves=12,
    ),
    st.integers(0, 64),
)
def test_parse_header_any_json_is_refused_or_fills_the_data(value, data_bytes):
    raw = json.dumps(value).encode()
    try:
        entries = parse_header(raw, data_bytes=data_bytes)
    except AdapterError:
        return
    assert max((e.end_bytes for e in entries.values()), default=0) == data_bytes


@given(st.binary(max_size=64))
def test_parse_json_any_bytes_raise_only_adapter_errors(data):
    try:
        assert isinstance(parse_json(data, name="x"), dict)
    except AdapterError:
        pass


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**50, 2**64 - 1])
def test_read_huge_header_is_refused_without_allocating(tmp_path, length):
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    tracemalloc.start()
    with pytest.raises(AdapterError, match=f"header of {length} bytes exceeds"):
        read_safetensors(path, max_bytes=PLENTY)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1_000_000


def test_read_header_beyond_file_is_refused_without_allocating(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes((90_000_000).to_bytes(8, "little") + b"{}")
    tracemalloc.start()
    with pytest.raises(AdapterError, match="header of 90000000 .* of 10 bytes"):
        read_safetensors(path, max_bytes=PLENTY)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1_000_000


def test_read_declared_petabyte_is_refused_without_allocating(tmp_path):
    header = {"a": entry(shape=[2**48], offsets=[0, 2**50])}
    tracemalloc.start()
    with pytest.raises(AdapterError, match=f"end at byte {2**50}"):
        read_bytes(tmp_path, file_bytes(header, b"12345678"))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1_000_000


def test_read_file_over_limit_is_refused_with_both_sizes(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.truncate(1001)
    with pytest.raises(AdapterError, match="has 1001 bytes, limit is 1000"):
        read_safetensors(path, max_bytes=1000)


def test_read_no_regular_file_is_refused_at_once(tmp_path):
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    loop = tmp_path / "loop.safetensors"
    loop.symlink_to(loop)
    for path, message in [
        (pipe, "pipe.safetensors must be a regular file"),
        (tmp_path, "must be a regular file"),
        (loop, "cannot read loop.safetensors"),
        (tmp_path / "absent", "cannot read absent: No such file"),
        (tmp_path / "nul\0", "cannot read"),
    ]:
        with pytest.raises(AdapterError, match=message):
            read_safetensors(path, max_bytes=PLENTY)


def test_read_refusals_leave_no_open_file(tmp_path):
    before = set(os.listdir("/proc/self/fd"))
    for raw in (b"", b"\1", good_file()[:40], good_file()):
        try:
            read_bytes(tmp_path, raw)
        except AdapterError:
            pass
    assert set(os.listdir("/proc/self/fd")) == before
