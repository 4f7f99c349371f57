"""The clients' calls of AdapterService and EngineService, and the operator commands."""

import asyncio
import dataclasses
import datetime
import json

import grpc
import pytest
from fake_admin import TOKEN, fake_admin

from jchameleon.cli import main
from jchameleon.client import AsyncClient, CallError, Client, RetryPolicy, values
from jchameleon.client.messages import value_of
from jchameleon.serving.proto.jchameleon.v1 import adapter_pb2 as ad
from jchameleon.serving.proto.jchameleon.v1 import engine_pb2 as en
from jchameleon.serving.proto.jchameleon.v1 import inference_pb2 as pb
from jchameleon.serving.status import StatusError, unavailable


@pytest.fixture
def admin():
    with fake_admin() as admin:
        yield admin


@pytest.fixture
def client(admin):
    policy = RetryPolicy(attempts=3, first_s=0.01)
    with Client(admin.target, token=TOKEN, retry=policy) as client:
        yield client


@pytest.mark.parametrize(
    "kind, message",
    [
        (values.Adapter, ad.Adapter),
        (values.ServerInfo, en.GetServerInfoResponse),
        (values.ServerStats, en.GetStatsResponse),
        (values.CacheStats, en.CacheStats),
        (values.QueueStats, en.QueueStats),
        (values.KvStats, en.KvStats),
        (values.EngineStats, en.EngineStats),
        (values.Usage, pb.Usage),
        (values.Tokens, pb.TokenizeResponse),
    ],
)
def test_values_have_the_fields_of_their_messages(kind, message):
    fields = [field.name for field in dataclasses.fields(kind)]
    assert fields == [field.name for field in message.DESCRIPTOR.fields]
    assert isinstance(value_of(kind, message()), kind)


def test_state_of_a_newer_server_is_no_fault():
    adapter = ad.Adapter.FromString(b"\x38\x63")  # field 7, 99
    assert value_of(values.Adapter, adapter).state == "unknown_99"


def test_adapters_come_and_go(admin, client):
    adapter = client.register_adapter("json", "some/json", pin=True, expected_uid="u")
    assert admin.received[-1] == ad.RegisterAdapterRequest(
        adapter_id="json", source_path="some/json", pin=True, expected_uid="u"
    )
    assert (adapter.adapter_id, adapter.rank, adapter.pinned) == ("json", 8, True)
    assert adapter.target_modules == ("q", "v") and adapter.state == "registered"
    age = datetime.datetime.now(datetime.UTC) - adapter.registered_at
    assert abs(age) < datetime.timedelta(minutes=1)
    assert adapter.last_used_at is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        adapter.rank = 9
    assert client.get_adapter("json") == adapter
    assert client.pin_adapter("json").state == "device"
    assert not client.unpin_adapter("json").pinned
    assert client.unregister_adapter("json", force=True).state == "draining"
    assert admin.received[-1].force
    with pytest.raises(CallError) as caught:
        client.get_adapter("json")
    assert caught.value.code is grpc.StatusCode.NOT_FOUND
    assert caught.value.reason == "UNKNOWN_ADAPTER"


def test_list_takes_all_pages(admin, client):
    for index in range(5):
        client.register_adapter(f"a{index}", "x")
    client.register_adapter("b", "x")
    ids = [adapter.adapter_id for adapter in client.list_adapters()]
    assert ids == ["a0", "a1", "a2", "a3", "a4", "b"]
    assert len(client.list_adapters("a", page_size=1)) == 5
    assert sum(isinstance(one, ad.ListAdaptersRequest) for one in admin.received) == 8
    assert client.list_adapters("nothing") == ()


def test_server_info_stats_and_abort(admin, client):
    info = client.server_info()
    assert (info.version, info.vocab_size, info.lora_targets) == ("1", 300, ("q",))
    stats = client.stats()
    assert stats.cache.hits == 3 and stats.engine.last_progress_age_seconds == 0.5
    assert [queue.wrs_max for queue in stats.queues] == [2.5, None]
    assert stats.queues[0].waiting == 4 and stats.kv.used_bytes == 0
    client.abort("one", "two")
    assert list(admin.received[-1].request_ids) == ["one", "two"]


def test_asyncio_client_makes_the_same_calls(admin, client):
    for name in ("a", "b", "c"):
        client.register_adapter(name, "x")

    async def ask():
        async with AsyncClient(admin.target, token=TOKEN) as other:
            await other.register_adapter("d", "x", replace=True)
            assert admin.received[-1].replace
            assert (await other.pin_adapter("d")).pinned
            assert not (await other.unpin_adapter("d")).pinned
            await other.abort("one")
            assert list(admin.received[-1].request_ids) == ["one"]
            found = (
                await other.list_adapters(),
                await other.get_adapter("a"),
                await other.server_info(),
                await other.stats(),
            )
            await other.unregister_adapter("d")
            return found

    listed, got, info, stats = asyncio.run(ask())
    assert [adapter.adapter_id for adapter in listed] == ["a", "b", "c", "d"]
    assert client.list_adapters() == listed[:3]
    assert (got, info, stats) == (listed[0], client.server_info(), client.stats())


def test_token_is_needed(admin):
    with Client(admin.target) as client, pytest.raises(CallError) as caught:
        client.server_info()
    assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED


def test_lost_answer_of_unregister_is_not_asked_for_again(admin, client):
    lost = StatusError(grpc.StatusCode.UNAVAILABLE, "", "lost")
    client.register_adapter("a", "x")
    admin.failures = [lost]
    with pytest.raises(CallError, match="lost"):
        client.unregister_adapter("a")
    assert "a" in admin.adapters
    # Where the server says that it did nothing, and for what may be done twice.
    starting = unavailable("STARTING", "wait")
    starting.retry_after_s = 0.01
    admin.failures = [starting]
    client.unregister_adapter("a")
    admin.failures = [lost, lost]
    client.register_adapter("a", "x")
    assert admin.adapters.keys() == {"a"} and not admin.failures


@pytest.fixture
def command(admin, tmp_path, capsys):
    """Run an operator command; return exit code, output and errors."""
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN + "\n")

    def run(*words):
        options = ["--server", admin.target, "--token-file", str(token_file)]
        code = main(["adapters", *words, *options])
        return code, *capsys.readouterr()

    return run


def test_operator_commands(admin, command):
    code, out, _ = command("register", "json", "some/json", "--pin")
    assert code == 0 and "source_path" in out and "some/json" in out
    assert admin.received[-1].pin and not admin.received[-1].replace
    code, out, _ = command("get", "json", "--json")
    facts = json.loads(out)
    assert facts["adapter_id"] == "json" and facts["target_modules"] == ["q", "v"]
    assert facts["last_used_at"] is None
    assert datetime.datetime.fromisoformat(facts["registered_at"])
    assert command("unpin", "json")[0] == 0
    assert not admin.adapters["json"].pinned
    assert command("pin", "json")[0] == 0
    for index in range(3):
        command("register", f"a{index}", "x")
    code, out, _ = command("list")
    lines = out.splitlines()
    assert lines[0].split()[:4] == ["adapter_id", "rank", "state", "pinned"]
    assert [line.split()[0] for line in lines[1:]] == ["a0", "a1", "a2", "json"]
    assert lines[4].split()[1:4] == ["8", "device", "yes"]
    code, out, _ = command("list", "a", "--json")
    assert [one["adapter_id"] for one in json.loads(out)] == ["a0", "a1", "a2"]
    assert command("unregister", "json", "--force")[0] == 0
    assert admin.received[-1].force and "json" not in admin.adapters
    code, out, err = command("get", "json")
    assert code == 2 and not out
    assert err.count("\n") == 1 and "NOT_FOUND UNKNOWN_ADAPTER" in err


def test_register_only_validates_where_asked(admin, command):
    assert command("register", "a", "x", "--validate-only", "--replace")[0] == 0
    request = admin.received[-1]
    assert request.validate_only and request.replace and not admin.adapters
