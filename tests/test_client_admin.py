"""The clients' calls of AdapterService and EngineService, and the operator commands."""

import asyncio
import dataclasses
import datetime
import json

import grpc
import pytest
from adapter_versions import write_version
from flaky_proxy import flaky_proxy
from server_harness import check_baseline, running_server
from tls_files import make_certificates

from jchameleon.cli import main
from jchameleon.client import (
    AsyncClient,
    CallError,
    Client,
    RetryPolicy,
    Tls,
    values,
)
from jchameleon.client.messages import value_of
from jchameleon.serving.proto.jchameleon.v1 import adapter_pb2 as ad
from jchameleon.serving.proto.jchameleon.v1 import engine_pb2 as en
from jchameleon.serving.proto.jchameleon.v1 import inference_pb2 as pb

USER, ADMIN = "user-token-of-some-length", "admin-token-of-some-length"
RANKS = {"v0": 8, "v1": 16, "v2": 24}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for number, (name, rank) in enumerate(RANKS.items()):
        write_version(root / name, number, rank=rank)
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "users").write_text(USER + "\n")
    (folder / "admins").write_text(ADMIN + "\n")
    table = {
        "adapters": {"root": str(root), "dynamic": True},
        "security": {
            "token_file": str(folder / "users"),
            "admin_token_file": str(folder / "admins"),
        },
    }
    with running_server(table) as server:
        yield server


@pytest.fixture
def client(server):
    with Client(server.target, token=ADMIN) as client:
        yield client
        for adapter in client.list_adapters():
            client.unregister_adapter(adapter.adapter_id)


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


def test_adapters_come_and_go(client):
    adapter = client.register_adapter("json", "v0", pin=True)
    assert (adapter.adapter_id, adapter.rank, adapter.pinned) == ("json", 8, True)
    assert adapter.source_path == "v0" and len(adapter.uid) == 64
    assert adapter.state in ("loading", "device") and adapter.size_bytes > 0
    age = datetime.datetime.now(datetime.UTC) - adapter.registered_at
    assert abs(age) < datetime.timedelta(minutes=1)
    assert adapter.last_used_at is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        adapter.rank = 9
    assert client.get_adapter("json").uid == adapter.uid
    assert not client.unpin_adapter("json").pinned
    assert client.pin_adapter("json").pinned
    for _ in range(2):
        answer = client.generate("hello", adapter="json", max_tokens=4)
    assert answer.completions[0].timing.adapter_cache_hit is True
    used = client.get_adapter("json")
    assert used.state == "device" and used.hits + used.misses == 2
    assert used.last_used_at >= used.registered_at
    with pytest.raises(CallError) as caught:
        client.register_adapter("json", "v1")
    assert caught.value.code is grpc.StatusCode.ALREADY_EXISTS
    with pytest.raises(CallError) as caught:
        client.register_adapter("other", "v1", expected_uid=adapter.uid)
    assert caught.value.code is grpc.StatusCode.DATA_LOSS
    assert client.register_adapter("json", "v1", replace=True).rank == 16
    assert client.register_adapter("new", "v2", validate_only=True).rank == 24
    assert client.unregister_adapter("json").adapter_id == "json"
    with pytest.raises(CallError) as caught:
        client.get_adapter("json")
    assert caught.value.code is grpc.StatusCode.NOT_FOUND
    assert caught.value.reason == "UNKNOWN_ADAPTER"


def test_list_takes_all_pages(client):
    for name in ("c", "a0", "b", "a1"):
        client.register_adapter(name, "v0")
    for page_size in (0, 1, 3):
        found = client.list_adapters(page_size=page_size)
        assert [adapter.adapter_id for adapter in found] == ["a0", "a1", "b", "c"]
    found = client.list_adapters("a", page_size=1)
    assert [adapter.adapter_id for adapter in found] == ["a0", "a1"]
    assert client.list_adapters("nothing") == ()


def test_unregister_waits_until_its_deadline_unless_forced(client):
    client.register_adapter("json", "v0")
    pieces = client.stream("x", adapter="json", max_tokens=450, ignore_eos=True)
    next(pieces)
    with pytest.raises(CallError) as caught:
        client.unregister_adapter("json", timeout_s=0.05)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert client.get_adapter("json").state == "draining"
    assert client.unregister_adapter("json", force=True).adapter_id == "json"
    with pytest.raises(CallError) as caught:
        list(pieces)
    assert (caught.value.code, caught.value.reason) == (
        grpc.StatusCode.CANCELLED,
        "ADAPTER_UNREGISTERED",
    )


def test_server_info_stats_and_abort(server, client):
    info = client.server_info()
    model = server.server.state.llm.model_config
    assert (info.model, info.vocab_size) == (model.name, model.vocab_size)
    assert info.max_model_len == 512 and info.dynamic_adapters
    stats = client.stats()
    assert 0 < stats.cache.capacity_bytes <= info.pool_bytes
    assert stats.engine.compiles_after_warm_up == 0
    pieces = client.stream("x", request_id="mine", max_tokens=450, ignore_eos=True)
    next(pieces)
    assert client.stats().engine.running == 1
    client.abort("mine", "unknown")
    with pytest.raises(CallError) as caught:
        list(pieces)
    assert caught.value.reason == "ABORTED"
    check_baseline(server)


def test_asyncio_client_makes_the_same_calls(server, client):
    for name in ("a", "b", "c"):
        client.register_adapter(name, "v0")

    async def ask():
        async with AsyncClient(server.target, token=ADMIN) as other:
            assert (await other.register_adapter("d", "v1")).rank == 16
            assert (await other.pin_adapter("d")).pinned
            assert not (await other.unpin_adapter("d")).pinned
            await other.abort("one")
            found = (
                await other.list_adapters(page_size=2),
                await other.get_adapter("a"),
                await other.server_info(),
                await other.stats(),
            )
            await other.unregister_adapter("d")
            return found

    listed, got, info, stats = asyncio.run(ask())
    assert [adapter.adapter_id for adapter in listed] == ["a", "b", "c", "d"]
    assert client.list_adapters() == listed[:3]
    assert (got, info) == (listed[0], client.server_info())
    assert stats.cache.capacity_bytes == client.stats().cache.capacity_bytes


def test_tokens_are_sent(server):
    def refusal(call):
        with pytest.raises(CallError) as caught:
            call()
        return caught.value.code

    with Client(server.target) as nobody:
        assert refusal(lambda: nobody.generate("x")) is (
            grpc.StatusCode.UNAUTHENTICATED
        )
        assert nobody.health() == "serving"
    with Client(server.target, token=USER) as user:
        assert user.generate("x", max_tokens=2).token_ids
        assert refusal(user.server_info) is grpc.StatusCode.PERMISSION_DENIED


def test_tls_clients_show_and_check_certificates(tmp_path):
    files = make_certificates(tmp_path / "tls")
    security = {
        "tls_cert": str(files / "server.pem"),
        "tls_key": str(files / "server.key"),
        "tls_client_ca": str(files / "ca.pem"),
    }
    shown = {"client_cert": files / "client.pem", "client_key": files / "client.key"}
    with running_server({"security": security}) as server:
        tls = Tls(root_cert=files / "ca.pem", server_name="localhost", **shown)
        with Client(server.target, tls=tls) as client:
            assert client.health() == "serving"

        async def ask():
            async with AsyncClient(server.target, tls=tls) as client:
                return await client.health()

        assert asyncio.run(ask()) == "serving"
        once = RetryPolicy(attempts=1)
        for wrong in (
            None,
            Tls(root_cert=files / "stranger.pem", **shown),
            Tls(root_cert=files / "ca.pem"),
        ):
            with Client(server.target, tls=wrong, retry=once) as client:
                with pytest.raises(CallError) as caught:
                    client.generate("x", timeout_s=20)
                assert caught.value.code is grpc.StatusCode.UNAVAILABLE


def test_lost_answer_of_unregister_is_not_asked_for_again(server, client):
    fast = RetryPolicy(attempts=5, first_s=0.05, most_s=0.2)
    with flaky_proxy(server.target) as proxy:
        proxy.swallow(1)
        with Client(proxy.target, token=ADMIN, retry=fast) as other:
            # It was registered, and is again: the same content is no conflict.
            assert other.register_adapter("a", "v0").rank == 8
            assert proxy.accepted == 2
    with flaky_proxy(server.target) as proxy:
        proxy.swallow(1)
        with Client(proxy.target, token=ADMIN, retry=fast) as other:
            with pytest.raises(CallError) as caught:
                other.unregister_adapter("a")
            assert caught.value.code is grpc.StatusCode.UNAVAILABLE
            assert proxy.accepted == 1
    assert client.list_adapters() == ()


@pytest.fixture
def command(server, client, tmp_path, capsys):
    """Run an operator command; return exit code, output and errors."""
    token_file = tmp_path / "token"
    token_file.write_text(ADMIN + "\n")

    def run(*words):
        options = ["--server", server.target, "--token-file", str(token_file)]
        code = main(["adapters", *words, *options])
        return code, *capsys.readouterr()

    return run


def test_operator_commands(client, command):
    code, out, _ = command("register", "json", "v1", "--pin")
    assert code == 0 and "source_path" in out and "v1" in out
    code, out, _ = command("get", "json", "--json")
    facts = json.loads(out)
    assert (facts["adapter_id"], facts["rank"], facts["pinned"]) == ("json", 16, True)
    assert facts["last_used_at"] is None and isinstance(facts["target_modules"], list)
    assert datetime.datetime.fromisoformat(facts["registered_at"])
    assert command("unpin", "json")[0] == 0
    assert not client.get_adapter("json").pinned
    assert command("pin", "json")[0] == 0
    for name in ("a0", "a1"):
        assert command("register", name, "v0")[0] == 0
    assert command("register", "a2", "v0", "--validate-only")[0] == 0
    code, out, _ = command("list")
    lines = out.splitlines()
    assert lines[0].split()[:4] == ["adapter_id", "rank", "state", "pinned"]
    assert [line.split()[0] for line in lines[1:]] == ["a0", "a1", "json"]
    assert lines[3].split()[1:4] == ["16", "device", "yes"]
    code, out, _ = command("list", "a", "--json")
    assert [one["adapter_id"] for one in json.loads(out)] == ["a0", "a1"]
    code, _, err = command("register", "json", "v0")
    assert code == 2 and "ALREADY_EXISTS" in err
    assert command("register", "json", "v0", "--replace")[0] == 0
    assert command("unregister", "json", "--force", "--timeout", "30")[0] == 0
    code, out, err = command("get", "json")
    assert code == 2 and not out
    assert err.count("\n") == 1 and "NOT_FOUND UNKNOWN_ADAPTER" in err


def test_bench_finds_adapters_and_ranks_by_itself(server, client, tmp_path, capsys):
    for name in RANKS:
        client.register_adapter(name, name)
    token_file, report_path = tmp_path / "token", tmp_path / "report.json"
    token_file.write_text(ADMIN)
    options = ["--server", server.target, "--token-file", str(token_file)]
    options += ["--rate", "inf", "--num-requests", "12", "--input-len", "4"]
    options += ["--output-len", "3", "--json", str(report_path)]
    assert main(["bench", "serve", *options]) == 0
    report = json.loads(report_path.read_text())
    assert report["completed"] == 12 and report["adapters"] == 3
    assert set(report["rank_mix"]) == {"8", "16", "24"}
    assert set(report["rank_classes"]) == {"8", "16", "24"}
    assert 0 <= report["adapter_cache_hit_rate"] <= 1
    assert report["server_info"]["model"] and report["device"]
    out, _ = capsys.readouterr()
    assert "adapter cache hits" in out
    assert main(["bench", "serve", *options, "--adapters", "nobody"]) == 2
    assert "'nobody' is not registered" in capsys.readouterr().err
