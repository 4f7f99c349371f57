"""What a server registered at run time, and what the next one makes of it."""

import shutil

import grpc
import pytest
from adapter_service import (
    assert_code,
    call,
    get,
    listed,
    register,
    table,
    tokens_of,
)
from server_harness import running_server

from jchameleon.errors import ConfigError
from jchameleon.serving.manifest import Manifest, ManifestEntry
from jchameleon.serving.proto.jchameleon.v1 import adapter_pb2 as pb

pytest_plugins = ["adapter_service_fixtures"]
Code = grpc.StatusCode


def test_row_32_manifest_brings_back_what_was_registered(root, tmp_path, expected):
    config = table(root, manifest=str(tmp_path / "adapters.json"))
    shutil.copytree(root / "v5", root / "changing")
    try:
        with running_server(config) as server:
            register(server, "one", "v1", pin=True)
            register(server, "two", "v2")
            register(server, "late", "changing")
            call(server, "UnregisterAdapter", adapter_id="two")
        shutil.rmtree(root / "changing")
        shutil.copytree(root / "v0", root / "changing")
        with running_server(config) as server:
            found = {one.adapter_id: one for one in listed(server)}
            assert found.keys() == {"one", "late"}
            assert found["one"].pinned
            assert found["late"].state == pb.ADAPTER_STATE_FAILED
            assert tokens_of(server, "one") == expected[1]
            assert_code(
                Code.FAILED_PRECONDITION,
                "ADAPTER_FAILED",
                lambda: tokens_of(server, "late"),
            )
    finally:
        shutil.rmtree(root / "changing")


def test_remembered_adapter_that_is_gone_stays_failed_beside_a_twin(root, tmp_path):
    config = table(root, manifest=str(tmp_path / "adapters.json"))
    shutil.copytree(root / "v5", root / "twin")
    with running_server(config) as server:
        register(server, "a", "twin")
        register(server, "b", "v5")
    shutil.rmtree(root / "twin")
    with running_server(config) as server:
        found = {one.adapter_id: one for one in listed(server)}
        assert found["a"].state == pb.ADAPTER_STATE_FAILED and found["a"].reason
        assert found["b"].state != pb.ADAPTER_STATE_FAILED
        assert_code(
            Code.FAILED_PRECONDITION, "ADAPTER_FAILED", lambda: tokens_of(server, "a")
        )


@pytest.mark.parametrize("damage", ["torn", "missing"])
def test_row_32_last_good_manifest_is_used(root, tmp_path, expected, damage):
    path = tmp_path / "adapters.json"
    with running_server(table(root, manifest=str(path))) as server:
        register(server, "one", "v1")
        register(server, "two", "v2")
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:-40])
    else:
        path.unlink()
    with running_server(table(root, manifest=str(path))) as server:
        assert [one.adapter_id for one in listed(server)] == ["one"]
        assert tokens_of(server, "one") == expected[1]


def test_row_32_foreign_manifest_ends_the_start(root, tmp_path):
    path = tmp_path / "adapters.json"
    path.write_text('{"adapters": []}\n', encoding="utf-8")
    with running_server(table(root, manifest=str(path)), loads=False) as server:
        with pytest.raises(ConfigError, match="adapters.manifest cannot be read"):
            server.on_loop(server.server.load())
    assert path.read_text("utf-8") == '{"adapters": []}\n'


def test_row_32_lost_adapters_can_be_unpinned_and_unregistered(root, tmp_path):
    config = table(root, manifest=str(tmp_path / "adapters.json"))
    shutil.copytree(root / "v5", root / "lost")
    with running_server(config) as server:
        register(server, "one", "lost", pin=True)
    shutil.rmtree(root / "lost")
    with running_server(config) as server:
        adapter = get(server, "one")
        assert adapter.state == pb.ADAPTER_STATE_FAILED
        assert "lost" in adapter.reason
        call(server, "UnpinAdapter", adapter_id="one")
        last = call(server, "UnregisterAdapter", adapter_id="one").adapter
        assert last.state == pb.ADAPTER_STATE_FAILED
        assert listed(server) == []


def test_manifest_does_not_hold_what_the_configuration_names(root, tmp_path):
    manifest = str(tmp_path / "adapters.json")
    with running_server(
        table(root, manifest=manifest, preload={"named": "v0"})
    ) as server:
        register(server, "one", "v1")
    with running_server(table(root, manifest=manifest)) as server:
        assert [one.adapter_id for one in listed(server)] == ["one"]


def entries(*names):
    return [
        ManifestEntry(adapter_id=name, source_path=name, uid="0" * 64, pinned=False)
        for name in names
    ]


def test_row_32_manifest_cut_off_anywhere_gives_the_one_before(tmp_path):
    path = tmp_path / "adapters.json"
    manifest = Manifest(str(path))
    assert manifest.read() == []
    manifest.write(entries("a"))
    manifest.write(entries("a", "b"))
    whole = path.read_bytes()
    assert manifest.read() == entries("a", "b")
    for length in range(len(whole) - 1):  # the last byte is a newline
        path.write_bytes(whole[:length])
        assert manifest.read() == entries("a"), length


def test_row_32_torn_manifest_does_not_take_the_place_of_the_good_one(tmp_path):
    path = tmp_path / "adapters.json"
    manifest = Manifest(str(path))
    manifest.write(entries("a"))
    manifest.write(entries("a", "b"))
    path.write_bytes(path.read_bytes()[:-9])
    manifest.write(entries("c"))
    assert manifest.read() == entries("c")
    path.unlink()
    assert manifest.read() == entries("a")
