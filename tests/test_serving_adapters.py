"""AdapterService over loopback: what comes, goes, is pinned and listed."""

import shutil
import threading

import grpc
import pytest
from adapter_service import (
    LONG,
    VERSIONS,
    assert_code,
    call,
    get,
    listed,
    long_stream,
    register,
    table,
    tokens_of,
    wait_for,
)
from server_harness import (
    check_baseline,
    greedy,
    joined_ids,
    neighbours,
    refusal,
    running_server,
)
from slow_adapters import close_gate, open_gate, read_adapter

from jchameleon.errors import ConfigError, JChameleonError
from jchameleon.serving.proto.jchameleon.v1 import adapter_pb2 as pb
from jchameleon.serving.proto.jchameleon.v1 import engine_pb2
from jchameleon.serving.settings import ServerConfig

pytest_plugins = ["adapter_service_fixtures"]
Code = grpc.StatusCode
SMALL_POOL = {"pool_bytes": 42 * 8192}
"""Room for two adapters or so."""


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


def test_forced_unregister_cancels_its_requests_only(server):
    register(server, "one", "v0")
    with neighbours(server):
        stream, _ = long_stream(server, "one")
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
def test_row_9_malformed_adapter_ids_are_invalid_everywhere(server, adapter_id):
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


def test_row_8_unknown_adapters_are_not_found(server):
    for action in (
        lambda: tokens_of(server, "nobody"),
        lambda: call(server, "GetAdapter", adapter_id="nobody"),
        lambda: call(server, "UnregisterAdapter", adapter_id="nobody"),
        lambda: call(server, "PinAdapter", adapter_id="nobody"),
    ):
        assert_code(Code.NOT_FOUND, "UNKNOWN_ADAPTER", action)


def test_row_18_eviction_storm_gives_every_request_its_own_adapter(root, expected):
    """A pool for two adapters or so, all of them in use at once."""
    with running_server({**table(root), "engine": SMALL_POOL}) as server:
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


def test_row_17_an_id_is_registered_again_while_its_old_requests_drain(
    server, expected
):
    register(server, "one", "v0")
    alone = joined_ids(server.stream(greedy("hello", LONG, adapter_id="one")))
    stream, first = long_stream(server, "one")
    waiting = threading.Thread(
        target=lambda: call(server, "UnregisterAdapter", adapter_id="one")
    )
    waiting.start()
    wait_for(lambda: get(server, "one").state == pb.ADAPTER_STATE_DRAINING)
    fresh = register(server, "one", "v1")
    assert tokens_of(server, "one") == expected[1]
    assert waiting.is_alive(), "it waits for the old request"
    assert joined_ids([first, *stream]) == alone
    waiting.join(60)
    found = get(server, "one")
    assert (found.uid, found.source_path) == (fresh.uid, "v1")
    assert tokens_of(server, "one") == expected[1]


def test_unregister_waits_until_the_deadline_and_goes_on_draining(server):
    register(server, "one", "v0")
    streams = [long_stream(server, "one")[0] for _ in range(4)]

    def is_draining():
        error = refusal(
            lambda: call(server, "UnregisterAdapter", adapter_id="one", timeout=0.5)
        )
        assert error.code() is Code.DEADLINE_EXCEEDED
        return get(server, "one").state == pb.ADAPTER_STATE_DRAINING

    wait_for(is_draining)
    for action in (
        lambda: tokens_of(server, "one"),
        lambda: call(server, "PinAdapter", adapter_id="one"),
    ):
        assert_code(Code.FAILED_PRECONDITION, "ADAPTER_DRAINING", action)
    for stream in streams:
        stream.cancel()
    wait_for(lambda: listed(server) == [])
    assert_code(Code.NOT_FOUND, "UNKNOWN_ADAPTER", lambda: tokens_of(server, "one"))


def test_unregister_answers_with_the_adapter_as_it_was(server):
    register(server, "one", "v1")
    tokens_of(server, "one")
    before = get(server, "one")
    assert before.misses == 1 and before.HasField("last_used_at")
    assert call(server, "UnregisterAdapter", adapter_id="one").adapter == before


def test_row_16_registration_goes_on_without_its_caller_and_holds_up_no_other(
    server, root, expected
):
    host = server.server.state.llm._host
    shutil.copytree(root / "v3", root / "slow")
    close_gate(root / "slow")

    def read(path, real=host.read):
        read_adapter(path)  # waits at the gate
        return real(path)

    real, host.read = host.read, read
    try:
        error = refusal(lambda: register(server, "slow", "slow", timeout=1))
        assert error.code() is Code.DEADLINE_EXCEEDED
        register(server, "one", "v1")
        assert [one.adapter_id for one in listed(server)] == ["one"]
        open_gate(root / "slow")
        wait_for(lambda: len(listed(server)) == 2)
        assert get(server, "slow").source_path == "slow"
        assert tokens_of(server, "slow") == expected[3]
    finally:
        host.read = real
        shutil.rmtree(root / "slow")


def test_adapter_is_listed_once_all_of_it_is_known(server):
    llm = server.server.state.llm
    done, go = threading.Event(), threading.Event()

    def register_and_wait(*args, real=llm.register_adapter, **kw):
        info = real(*args, **kw)
        done.set()
        assert go.wait(60)
        return info

    llm.register_adapter = register_and_wait
    registering = threading.Thread(target=register, args=(server, "one", "v1"))
    try:
        registering.start()
        assert done.wait(60)
        assert [info.name for info in llm.list_adapters()] == ["one"]
        assert listed(server) == []
        assert_code(Code.NOT_FOUND, "UNKNOWN_ADAPTER", lambda: get(server, "one"))
    finally:
        go.set()
        registering.join(60)
        del llm.register_adapter
    (one,) = listed(server)
    assert one == get(server, "one") and one.source_path == "v1"
    assert one.HasField("registered_at") and one.rank == 16


def test_adapter_that_is_unregistered_while_the_engine_answers_is_still_found(server):
    register(server, "one", "v1")
    stream, _ = long_stream(server, "one")
    llm = server.server.state.llm
    done, go, found = threading.Event(), threading.Event(), []

    def list_and_wait(real=llm.list_adapters):
        infos = real()
        if not done.is_set():
            done.set()
            assert go.wait(60)
        return infos

    llm.list_adapters = list_and_wait
    getting = threading.Thread(target=lambda: found.append(get(server, "one")))
    try:
        getting.start()
        assert done.wait(60)
        error = refusal(
            lambda: call(server, "UnregisterAdapter", adapter_id="one", timeout=2)
        )
        assert error.code() is Code.DEADLINE_EXCEEDED  # it drains
    finally:
        go.set()
        getting.join(60)
        del llm.list_adapters
    assert [one.adapter_id for one in found] == ["one"]
    stream.cancel()
    wait_for(lambda: listed(server) == [])


def test_names_of_one_content_share_their_part_of_the_pin_budget(root):
    with running_server(table(root)) as server:
        size = register(server, "one", "v0").size_bytes
    with running_server(table(root, max_pinned_bytes=size)) as server:
        register(server, "one", "v0", pin=True)
        register(server, "two", "v0")
        pinned = call(server, "PinAdapter", adapter_id="two").adapter
        assert pinned.pinned and not pinned.HasField("last_used_at")


def test_row_19_pins_that_leave_no_room_are_refused_and_nothing_hangs(root, expected):
    with running_server({**table(root), "engine": SMALL_POOL}) as server:
        for number in range(VERSIONS):
            register(server, f"n{number}", f"v{number}")
        pinned = []
        for number in range(VERSIONS):
            try:
                call(server, "PinAdapter", adapter_id=f"n{number}")
                pinned.append(number)
            except grpc.RpcError as error:
                assert error.code() is Code.RESOURCE_EXHAUSTED
        assert 0 < len(pinned) < VERSIONS
        refused = []
        for number in range(VERSIONS):
            try:
                assert tokens_of(server, f"n{number}") == expected[number]
            except grpc.RpcError as error:
                assert error.code() is Code.RESOURCE_EXHAUSTED
                refused.append(number)
        # What is pinned runs; what the pins leave no room for is refused.
        assert refused and not set(refused) & set(pinned)
        check_baseline(server)


@pytest.mark.parametrize(
    ("adapters", "word"),
    [
        ({"preload": {"one": "nowhere"}}, "nowhere"),
        ({"preload": {"../x": "v0"}}, "adapters.preload: adapter_id='../x'"),
        ({"preload": {"one": "../v0"}}, "adapters.preload: source_path='../v0'"),
        ({"preload": {"one": "v0"}, "max_adapter_bytes": 9}, "max_adapter_bytes=9"),
    ],
)
def test_bad_preloaded_adapter_ends_the_start_with_one_line(root, adapters, word):
    with running_server(table(root, **adapters), loads=False) as server:
        with pytest.raises(JChameleonError) as caught:
            server.on_loop(server.server.load())
    assert word in str(caught.value) and "\n" not in str(caught.value)


def test_more_preloaded_adapters_than_are_allowed_are_refused(root):
    adapters = {"preload": {"one": "v0", "two": "v1"}, "max_adapters": 1}
    with pytest.raises(ConfigError, match="max_adapters=1 allows no more"):
        ServerConfig.from_dict(
            {"adapters": {"root": str(root), **adapters}, "model": "tiny"}
        )
