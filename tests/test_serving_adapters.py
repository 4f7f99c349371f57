"""AdapterService and EngineService over loopback."""

import json
import os
import shutil
import sys
import threading

import grpc
import pytest
from adapter_versions import write_version
from google.protobuf.message import Message
from server_harness import (
    check_baseline,
    error_details,
    greedy,
    joined_ids,
    neighbours,
    refusal,
    running_server,
)

from jchameleon.llm import LLM
from jchameleon.sampling import SamplingParams
from jchameleon.serving.proto.jchameleon.v1 import adapter_pb2 as pb
from jchameleon.serving.proto.jchameleon.v1 import engine_pb2
from jchameleon.serving.proto.jchameleon.v1 import inference_pb2 as inference

Code = grpc.StatusCode
VERSIONS = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for number in range(VERSIONS):
        write_version(root / f"v{number}", number, rank=8 + 8 * (number % 3))
    return root


@pytest.fixture(scope="module")
def expected(root):
    """Return greedy tokens of each version, from engines of one adapter each."""
    found = {}
    for number in range(VERSIONS):
        with LLM(
            "tiny",
            adapters={"only": root / f"v{number}"},
            max_running=8,
            max_batch_tokens=64,
            max_model_len=512,
        ) as llm:
            [output] = llm.generate(
                ["hello"],
                "only",
                SamplingParams(max_tokens=40, temperature=0, ignore_eos=True),
            )
            found[number] = list(output.token_ids)
    assert len({tuple(ids) for ids in found.values()}) == VERSIONS
    return found


def table(root, **adapters):
    return {"adapters": {"root": str(root), "dynamic": True, **adapters}}


@pytest.fixture(scope="module")
def server(root):
    with running_server(table(root)) as server:
        yield server


@pytest.fixture(autouse=True)
def leave_nothing(request):
    """Unregister all adapters of the shared server after a test."""
    yield
    if "server" in request.fixturenames:
        server = request.getfixturevalue("server")
        for adapter in listed(server):
            call(server, "UnregisterAdapter", adapter_id=adapter.adapter_id)
        check_baseline(server)


def call(server, method, *, timeout=60, **fields) -> Message:
    """Call a method of AdapterService."""
    request = getattr(pb, f"{method}Request")(**fields)
    reply = getattr(pb, f"{method}Response")
    return server.unary("AdapterService", method, request, reply, timeout=timeout)


def register(server, adapter_id, source_path, **fields):
    reply = call(
        server,
        "RegisterAdapter",
        adapter_id=adapter_id,
        source_path=source_path,
        **fields,
    )
    return reply.adapter


def listed(server, **fields):
    return list(call(server, "ListAdapters", **fields).adapters)


def tokens_of(server, adapter_id):
    return joined_ids(server.stream(greedy("hello", 40, adapter_id=adapter_id)))


def assert_code(code, reason, action):
    error = refusal(action)
    assert error.code() is code, error.details()
    assert error_details(error)["ErrorInfo"].reason == reason
    return error


def test_registered_adapter_answers_with_its_own_tokens(server, expected):
    adapter = register(server, "one", "v1")
    assert adapter.state == pb.ADAPTER_STATE_HOST
    assert (adapter.rank, adapter.source_path) == (16, "v1")
    assert adapter.registered_at.seconds > 1e9 and not adapter.HasField("last_used_at")
    assert tokens_of(server, "one") == expected[1]
    found = call(server, "GetAdapter", adapter_id="one").adapter
    assert found.state == pb.ADAPTER_STATE_DEVICE
    assert (found.misses, found.uid) == (1, adapter.uid)
    assert found.HasField("last_used_at")


def test_same_content_again_is_ok_and_other_content_a_conflict(server, expected):
    first = register(server, "one", "v0")
    assert register(server, "one", "v0") == first
    assert_code(
        Code.ALREADY_EXISTS,
        "ADAPTER_CONFLICT",
        lambda: register(server, "one", "v1"),
    )
    assert register(server, "one", "v1", replace=True).uid != first.uid
    assert tokens_of(server, "one") == expected[1]


def test_running_requests_finish_on_the_content_they_began_with(server, expected):
    register(server, "one", "v0")
    stream = server.stream(greedy("hello", 40, adapter_id="one"))
    first = next(stream)
    register(server, "one", "v1", replace=True)
    assert tokens_of(server, "one") == expected[1]
    assert joined_ids([first, *stream]) == expected[0]


def test_expected_uid_guards_against_other_content(server):
    adapter = register(server, "one", "v0")
    for only_checks in (False, True):
        assert_code(
            Code.DATA_LOSS,
            "OTHER_CONTENT",
            lambda only_checks=only_checks: register(
                server,
                "two",
                "v1",
                expected_uid=adapter.uid,
                validate_only=only_checks,
            ),
        )
    assert register(server, "two", "v0", expected_uid=adapter.uid).uid == adapter.uid


def test_validate_only_registers_nothing(server):
    checked = register(server, "one", "v2", validate_only=True)
    assert checked.rank == 24 and checked.size_bytes > 0
    assert listed(server) == []
    assert register(server, "one", "v2").uid == checked.uid


def test_list_has_pages_and_prefixes(server):
    for name in ("a-2", "a-1", "b-1"):
        register(server, name, "v0")
    first = call(server, "ListAdapters", page_size=2)
    assert [one.adapter_id for one in first.adapters] == ["a-1", "a-2"]
    second = call(server, "ListAdapters", page_size=2, page_token=first.next_page_token)
    assert [one.adapter_id for one in second.adapters] == ["b-1"]
    assert second.next_page_token == ""
    assert [one.adapter_id for one in listed(server, prefix="b")] == ["b-1"]


def test_pin_loads_and_holds_until_unpin(server):
    register(server, "one", "v0")
    assert call(server, "PinAdapter", adapter_id="one").adapter.pinned
    stats = server.unary(
        "EngineService",
        "GetStats",
        engine_pb2.GetStatsRequest(),
        engine_pb2.GetStatsResponse,
    )
    assert stats.cache.pinned_bytes > 0
    assert not call(server, "UnpinAdapter", adapter_id="one").adapter.pinned


def test_pin_budget_is_kept(root):
    with running_server(table(root)) as server:
        size = register(server, "one", "v0").size_bytes
    with running_server(table(root, max_pinned_bytes=size)) as server:
        register(server, "one", "v0", pin=True)
        register(server, "two", "v3")
        for action in (
            lambda: call(server, "PinAdapter", adapter_id="two"),
            lambda: register(server, "three", "v3", pin=True),
        ):
            assert_code(Code.RESOURCE_EXHAUSTED, "PIN_BUDGET", action)
        call(server, "UnpinAdapter", adapter_id="one")
        call(server, "PinAdapter", adapter_id="two")


def test_unregister_waits_until_the_deadline_and_goes_on_draining(server, expected):
    register(server, "one", "v0")
    stream = server.stream(greedy("hello", 400, adapter_id="one"))
    next(stream)
    error = refusal(
        lambda: call(server, "UnregisterAdapter", adapter_id="one", timeout=0.3)
    )
    assert error.code() is Code.DEADLINE_EXCEEDED
    assert_code(
        Code.FAILED_PRECONDITION, "ADAPTER_DRAINING", lambda: tokens_of(server, "one")
    )
    assert len(joined_ids(stream)) == 399
    check_baseline(server)
    assert_code(Code.NOT_FOUND, "UNKNOWN_ADAPTER", lambda: tokens_of(server, "one"))


def test_forced_unregister_cancels_its_requests_only(server):
    register(server, "one", "v0")
    with neighbours(server):
        stream = server.stream(greedy("hello", 400, adapter_id="one"))
        next(stream)
        call(server, "UnregisterAdapter", adapter_id="one", force=True)
        assert_code(Code.CANCELLED, "ADAPTER_UNREGISTERED", lambda: list(stream))


def test_dynamic_registration_is_off_unless_enabled(root):
    with running_server(table(root, dynamic=False, preload={"one": "v0"})) as server:
        for action in (
            lambda: register(server, "two", "v1"),
            lambda: call(server, "UnregisterAdapter", adapter_id="one"),
        ):
            assert_code(Code.FAILED_PRECONDITION, "ADAPTERS_ARE_FIXED", action)
        assert [one.adapter_id for one in listed(server)] == ["one"]


def test_number_of_adapters_is_bounded(root):
    with running_server(table(root, max_adapters=2)) as server:
        register(server, "one", "v0")
        register(server, "two", "v1")
        assert_code(
            Code.RESOURCE_EXHAUSTED,
            "TOO_MANY_ADAPTERS",
            lambda: register(server, "three", "v2"),
        )
        call(server, "UnregisterAdapter", adapter_id="one")
        register(server, "three", "v2")


@pytest.mark.parametrize(
    "adapter_id", ["../x", "/etc", "a/../../b", "%2e%2e", "a\0b", "x" * 10_000, "", "é"]
)
def test_malformed_adapter_ids_are_invalid_everywhere(server, adapter_id):
    calls = [
        lambda: register(server, adapter_id, "v0"),
        lambda: call(server, "GetAdapter", adapter_id=adapter_id),
        lambda: call(server, "UnregisterAdapter", adapter_id=adapter_id),
        lambda: call(server, "PinAdapter", adapter_id=adapter_id),
    ]
    if adapter_id:
        calls.append(lambda: tokens_of(server, adapter_id))
    for action in calls:
        assert refusal(action).code() is Code.INVALID_ARGUMENT


def test_unknown_adapters_are_not_found(server):
    for action in (
        lambda: tokens_of(server, "nobody"),
        lambda: call(server, "GetAdapter", adapter_id="nobody"),
        lambda: call(server, "UnregisterAdapter", adapter_id="nobody"),
        lambda: call(server, "PinAdapter", adapter_id="nobody"),
    ):
        assert_code(Code.NOT_FOUND, "UNKNOWN_ADAPTER", action)


OPENED: list[str] | None = None


def watch_opens(event, args):
    if OPENED is not None and event == "open":
        OPENED.append(str(args[0]))


sys.addaudithook(watch_opens)


def test_nothing_outside_the_root_is_opened(server, root, tmp_path):
    global OPENED
    write_version(tmp_path / "outside", 9)
    links = {
        "link": lambda at: at.symlink_to(tmp_path / "outside"),
        "half": lambda at: (
            shutil.copytree(root / "v0", at),
            (at / "adapter_model.safetensors").unlink(),
            (at / "adapter_model.safetensors").symlink_to(
                tmp_path / "outside/adapter_model.safetensors"
            ),
        ),
    }
    for name, make in links.items():
        make(root / name)
    paths = [
        *("../x", "/etc", str(tmp_path / "outside"), "v0/../../outside", "a\0b"),
        *("x" * 10_000, "", ".", "./v0", "v0/", "%2e%2e/outside", *links),
    ]
    OPENED = []
    try:
        for path in paths:
            error = refusal(lambda path=path: register(server, "one", path))
            assert error.code() is Code.INVALID_ARGUMENT, path
        assert [path for path in OPENED if str(tmp_path) in path] == []
    finally:
        OPENED = None
        (root / "link").unlink()
        shutil.rmtree(root / "half")
    assert listed(server) == []


def test_pipes_and_large_files_are_refused_without_reading(root, tmp_path):
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


def damage(folder, how):
    file = folder / "adapter_model.safetensors"
    data = file.read_bytes()
    config = folder / "adapter_config.json"
    if how == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif how == "header beyond the file":
        file.write_bytes((2**40).to_bytes(8, "little") + data[8:])
    elif how == "pickle only":
        file.unlink()
        (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    elif how == "no weights":
        file.unlink()
    else:
        field, value = how.split("=")
        table = json.loads(config.read_text())
        config.write_text(json.dumps({**table, field: json.loads(value)}))


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        "header beyond the file",
        "pickle only",
        "no weights",
        "r=0",
        "r=100000",
        "use_dora=true",
        'bias="all"',
        'modules_to_save=["lm_head"]',
        'init_lora_weights="pissa"',
        'target_modules=["nothing"]',
    ],
)
def test_damaged_or_unsupported_adapters_are_refused(server, root, how):
    bad = root / "bad"
    shutil.copytree(root / "v0", bad)
    try:
        damage(bad, how)
        with neighbours(server, 40):
            error = refusal(lambda: register(server, "one", "bad"))
            assert error.code() is Code.INVALID_ARGUMENT
            assert "bad" in error.details()
        assert listed(server) == []
    finally:
        shutil.rmtree(bad)


def test_half_written_adapter_is_accepted_once_it_is_whole(server, root, expected):
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


def test_files_that_vanish_fail_that_adapter_until_it_is_registered_again(
    root, expected
):
    shutil.copytree(root / "v4", root / "gone")
    # No host memory to speak of: every load reads from disk.
    with running_server({**table(root), "engine": {"host_cache_bytes": 1}}) as server:
        register(server, "gone", "gone")
        register(server, "here", "v1")
        shutil.rmtree(root / "gone")
        with neighbours(server):
            assert_code(
                Code.FAILED_PRECONDITION,
                "ADAPTER_FAILED",
                lambda: tokens_of(server, "gone"),
            )
            assert tokens_of(server, "here") == expected[1]
        adapter = call(server, "GetAdapter", adapter_id="gone").adapter
        assert adapter.state == pb.ADAPTER_STATE_FAILED and adapter.reason
        assert_code(
            Code.FAILED_PRECONDITION,
            "ADAPTER_FAILED",
            lambda: tokens_of(server, "gone"),
        )
        shutil.copytree(root / "v4", root / "gone")
        try:
            register(server, "gone", "gone")
            assert tokens_of(server, "gone") == expected[4]
        finally:
            shutil.rmtree(root / "gone")


def test_eviction_storm_gives_every_request_its_own_adapter(root, expected):
    """A pool for two adapters or so, all of them in use at once."""
    with running_server({**table(root), "engine": {"pool_bytes": 42 * 8192}}) as server:
        for number in range(VERSIONS):
            register(server, f"n{number}", f"v{number}")
        problems = []

        def client(seed):
            for i in range(12):
                number = (seed * 5 + i) % VERSIONS
                if tokens_of(server, f"n{number}") != expected[number]:
                    problems.append(number)

        threads = [threading.Thread(target=client, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert problems == []
        assert server.server.state.llm.stats().evictions > 10
        check_baseline(server)


def test_manifest_brings_back_what_was_registered(root, tmp_path, expected):
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
def test_last_good_manifest_is_used(root, tmp_path, expected, damage):
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


def test_server_info_and_stats_say_what_is_so(server):
    info = server.unary(
        "EngineService",
        "GetServerInfo",
        engine_pb2.GetServerInfoRequest(),
        engine_pb2.GetServerInfoResponse,
    )
    assert (info.model, info.max_model_len, info.max_running) == ("tiny", 512, 8)
    assert (info.backend, info.dtype, info.vocab_size) == ("cpu", "float32", 259)
    assert list(info.lora_targets) == ["q", "k", "v", "o"]
    assert info.dynamic_adapters and info.has_tokenizer and info.pool_bytes > 0
    assert info.policy == "chameleon-nosched"
    stats = server.unary(
        "EngineService",
        "GetStats",
        engine_pb2.GetStatsRequest(),
        engine_pb2.GetStatsResponse,
    )
    assert stats.engine.programs == 18
    assert stats.cache.capacity_bytes >= stats.cache.idle_bytes > 0


def test_abort_ends_requests_with_what_they_have(server):
    def abort(*ids):
        server.unary(
            "EngineService",
            "AbortRequests",
            engine_pb2.AbortRequestsRequest(request_ids=ids),
            engine_pb2.AbortRequestsResponse,
        )

    with neighbours(server):
        request = greedy("hello", 400, request_id="mine")
        request.sampling.temperature, request.sampling.n = 1, 2
        stream = server.stream(request)
        pieces = [next(stream)]
        abort("nobody", "mine")
        error = refusal(lambda: pieces.extend(stream))
        assert error.code() is Code.CANCELLED
        finishes = [o.finish for p in pieces for o in p.outputs if o.HasField("finish")]
        assert {f.reason for f in finishes} == {inference.FINISH_REASON_ABORTED}
    abort("mine")
