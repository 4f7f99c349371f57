"""Adapter files over loopback: hostile, damaged, unsupported, changed and lost ones."""

import ctypes
import dataclasses
import errno
import json
import os
import pickle
import shutil
import struct
import sys
from pathlib import Path

import grpc
import pytest
from adapter_service import (
    assert_code,
    get,
    listed,
    register,
    table,
    tokens_of,
)
from adapter_versions import TINY, write_version
from random_adapters import write_random_adapter
from server_harness import greedy, neighbours, refusal, running_server

from jchameleon.serving.catalog import AdapterCatalog, CatalogEntry
from jchameleon.serving.proto.jchameleon.v1 import adapter_pb2 as pb
from jchameleon.serving.status import StatusError

pytest_plugins = ["adapter_service_fixtures"]
Code = grpc.StatusCode


def test_row_15_half_written_adapter_is_accepted_once_it_is_whole(
    server, root, expected
):
    half = root / "half-written"
    half.mkdir()
    shutil.copy(root / "v0/adapter_config.json", half)
    try:
        assert refusal(lambda: register(server, "one", half.name))
        shutil.copy(root / "v0/adapter_model.safetensors", half)
        register(server, "one", half.name)
        assert tokens_of(server, "one") == expected[0]
    finally:
        shutil.rmtree(half)


def test_row_9_pipes_and_large_files_are_refused_without_reading(root, tmp_path):
    os.mkdir(root / "pipe")
    shutil.copy(root / "v0/adapter_config.json", root / "pipe")
    os.mkfifo(root / "pipe/adapter_model.safetensors")
    try:
        with running_server(table(root, max_adapter_bytes=1000)) as server:
            for path in ("pipe", "v0"):
                error = refusal(lambda path=path: register(server, "one", path))
                assert error.code() is Code.INVALID_ARGUMENT
    finally:
        shutil.rmtree(root / "pipe")


class OpenedFiles:
    """What the kernel says was opened in a folder, whatever path led there."""

    IN_OPEN = 0x20  # inotify(7)

    def __init__(self, folder):
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK)
        assert self._fd >= 0
        watch = libc.inotify_add_watch(self._fd, os.fsencode(folder), self.IN_OPEN)
        assert watch >= 0

    def any(self):
        """Return whether something was opened since the last question."""
        try:
            return bool(os.read(self._fd, 1 << 16))
        except BlockingIOError:
            return False

    def close(self):
        os.close(self._fd)


@pytest.fixture
def outside(tmp_path):
    """An adapter outside the root, and who opens its files."""
    folder = write_version(tmp_path / "outside", 4, rank=16)
    opened = OpenedFiles(folder)
    (folder / "adapter_config.json").read_bytes()
    assert opened.any(), "the watch does not work"
    yield folder, opened
    opened.close()


OPENED: list[str] | None = None


def watch_opens(event, args):
    if OPENED is not None and event == "open":
        OPENED.append(os.path.realpath(str(args[0])))


sys.addaudithook(watch_opens)


def test_row_9_nothing_outside_the_root_is_opened(server, root, outside):
    global OPENED
    folder, opened = outside
    (root / "link").symlink_to(folder)
    shutil.copytree(root / "v0", root / "half")
    weights = root / "half/adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(folder / weights.name)
    paths = [
        *("../x", "/etc", str(folder), "v0/../../outside", "a\0b", "x" * 10_000, ""),
        *(".", "./v0", "v0/", "%2e%2e/outside", "link", "half"),
    ]
    OPENED = []
    try:
        for path in paths:
            error = refusal(lambda path=path: register(server, "one", path))
            assert error.code() is Code.INVALID_ARGUMENT, path
        seen, OPENED = OPENED, None
        assert not opened.any()
        assert [one for one in seen if one.startswith(("/etc", str(folder)))] == []
    finally:
        OPENED = None
        (root / "link").unlink()
        shutil.rmtree(root / "half")
    assert listed(server) == []


LOSSES = {
    "deleted": lambda root, outside: None,
    "other content": lambda root, outside: shutil.copytree(root / "v0", root / "lost"),
    "cut off": lambda root, outside: damaged(root, "lost", "truncated"),
    "a link out of the root": lambda root, outside: (root / "lost").symlink_to(outside),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_row_14_lost_files_fail_that_adapter_until_it_is_registered_again(
    root, expected, outside, loss
):
    folder, opened = outside
    shutil.copytree(root / "v4", root / "lost")
    # No host memory to speak of: every load reads from disk.
    no_memory = {"host_cache_bytes": 1, "max_model_len": 512}
    with running_server({**table(root), "engine": no_memory}) as server:
        register(server, "lost", "lost")
        register(server, "alias", "lost")
        register(server, "here", "v1")
        shutil.rmtree(root / "lost")
        LOSSES[loss](root, folder)
        opened.any()  # what it took to get there
        with neighbours(server):
            waiting = [server.stream(greedy(adapter_id="lost")) for _ in range(3)]
            for stream in waiting:
                assert_code(
                    Code.FAILED_PRECONDITION, "ADAPTER_FAILED", lambda s=stream: list(s)
                )
            assert tokens_of(server, "here") == expected[1]
        assert not opened.any()
        for name in ("lost", "alias"):
            adapter = get(server, name)
            assert adapter.state == pb.ADAPTER_STATE_FAILED and adapter.reason
            assert_code(
                Code.FAILED_PRECONDITION,
                "ADAPTER_FAILED",
                lambda name=name: tokens_of(server, name),
            )
        lost = root / "lost"
        lost.unlink() if lost.is_symlink() else shutil.rmtree(lost, ignore_errors=True)
        shutil.copytree(root / "v4", lost)
        try:
            register(server, "lost", "lost")
            assert tokens_of(server, "lost") == expected[4]
            assert tokens_of(server, "alias") == expected[4]
        finally:
            shutil.rmtree(lost)


def test_row_16_disk_error_is_unavailable_and_passes(root, expected, monkeypatch):
    no_memory = {"host_cache_bytes": 1, "max_model_len": 512}
    with running_server({**table(root), "engine": no_memory}) as server:
        register(server, "one", "v1")
        real = os.open

        def failing_open(path, *args, **kwargs):
            if str(path).startswith(str(root)):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(path, *args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(os, "open", failing_open)
            with neighbours(server):
                for action in (
                    lambda: tokens_of(server, "one"),
                    lambda: register(server, "two", "v2"),
                ):
                    assert_code(Code.UNAVAILABLE, "ADAPTER_UNREADABLE", action)
        assert get(server, "one").state != pb.ADAPTER_STATE_FAILED
        assert tokens_of(server, "one") == expected[1]


def test_loss_of_old_content_leaves_the_name_that_moved_on():
    catalog = AdapterCatalog()
    for name, uid in (("moved", "new"), ("stayed", "old")):
        catalog.entries[name] = CatalogEntry(
            source_path=name, uid=uid, registered_s=0.0
        )
    catalog.note_lost("old", "gone")
    catalog.use("moved")
    with pytest.raises(StatusError, match="gone"):
        catalog.use("stayed")


def damaged(root, name, how, value=None):
    """Write adapter v0 with a fault; return its folder."""
    folder = shutil.copytree(root / "v0", root / name)
    file = folder / "adapter_model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, tensors = json.loads(data[8 : 8 + size]), data[8 + size :]
    first, second, *_ = sorted(header.keys() - {"__metadata__"})

    def write(text, content=tensors):
        raw = text.encode()
        file.write_bytes(len(raw).to_bytes(8, "little") + raw + content)

    if how == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif how == "header beyond the file":
        file.write_bytes((2**40).to_bytes(8, "little") + data[8:])
    elif how == "overlap":
        header[second]["data_offsets"] = header[first]["data_offsets"]
        header[second]["shape"] = header[first]["shape"]
        write(json.dumps(header))
    elif how == "duplicate key":
        text = json.dumps(header)
        write(text[:-1] + f", {json.dumps(first)}: {json.dumps(header[first])}}}")
    elif how == "dtype":
        header[first]["dtype"] = "I32"
        write(json.dumps(header))
    elif how == "petabyte":
        last = max(header, key=lambda key: header[key].get("data_offsets", [0]))
        start = header[last]["data_offsets"][0]
        header[last] |= {"shape": [2**48], "data_offsets": [start, start + 2**50]}
        write(json.dumps(header))
    elif how == "first value":
        write(json.dumps(header), struct.pack("<f", value) + tensors[4:])
    elif how == "bit":
        write(json.dumps(header), bytes([tensors[0] ^ 1]) + tensors[1:])
    elif how == "pickle only":
        file.unlink()
        (folder / "adapter_model.bin").write_bytes(pickle.dumps(Canary(value)))
    elif how == "config":
        config = folder / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **value}))
    else:
        raise AssertionError(how)
    return folder


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return os.mkdir, (str(self._path),)


def assert_refused(server, root, word, how, value=None):
    folder = damaged(root, "bad", how, value)
    try:
        before = resident_bytes()
        with neighbours(server, 40):
            error = refusal(lambda: register(server, "one", "bad"))
            assert error.code() is Code.INVALID_ARGUMENT
            assert word in error.details().split("/bad'", 1)[1], error.details()
        assert resident_bytes() - before < 64 << 20
        assert listed(server) == []
    finally:
        shutil.rmtree(folder)


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("how", "word"),
    [
        ("truncated", "bytes"),
        ("header beyond the file", "header of"),
        ("overlap", "overlaps"),
        ("duplicate key", "duplicate key"),
        ("dtype", "dtype 'I32'"),
        ("petabyte", "tensors end at byte 112589990"),
    ],
)
def test_row_10_damaged_weights_are_refused(server, root, how, word):
    assert_refused(server, root, word, how)


def test_row_10_flipped_bit_is_data_loss_where_the_content_is_known(server, root):
    uid = register(server, "one", "v0").uid
    folder = damaged(root, "bad", "bit")
    try:
        assert_code(
            Code.DATA_LOSS,
            "OTHER_CONTENT",
            lambda: register(server, "two", "bad", expected_uid=uid),
        )
        assert [one.adapter_id for one in listed(server)] == ["one"]
    finally:
        shutil.rmtree(folder)


def test_row_11_pickles_are_refused_and_not_executed(server, root, tmp_path):
    canary = tmp_path / "canary"
    assert_refused(server, root, "pickle", "pickle only", canary)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists(), "the payload is harmless"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_row_13_weights_that_are_not_finite_are_refused(server, root, value):
    assert_refused(server, root, "NaN or Inf", "first value", value)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 0},
        {"r": 100_000},
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "corda"},
        {"alora_invocation_tokens": [1]},
        {"target_parameters": ["mlp.experts"]},
        {"layer_replication": [[0, 1]]},
        {"trainable_token_indices": [1]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["nothing"]},
        {"brand_new_field": 1},
    ],
    ids=str,
)
def test_row_12_unsupported_configurations_are_refused_by_field(server, root, config):
    [field] = config
    assert_refused(server, root, field, "config", config)


def test_row_12_adapter_of_another_base_is_refused(server, root):
    other = dataclasses.replace(TINY, hidden_size=2 * TINY.hidden_size)
    folder = write_random_adapter(
        root / "bad", other, rank=8, targets=("q",), seed=0, dtype="float32"
    )
    try:
        error = refusal(lambda: register(server, "one", "bad"))
        assert error.code() is Code.INVALID_ARGUMENT
        assert "has shape" in error.details()
    finally:
        shutil.rmtree(folder)
