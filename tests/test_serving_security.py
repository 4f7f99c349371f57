"""Tokens, TLS and mTLS over loopback, and files that are no good."""

import contextlib
import hmac
import logging
import os
import shutil

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from server_harness import error_details, greedy, refusal, running_server
from tls_files import make_certificate, make_certificates

from jchameleon.errors import ConfigError
from jchameleon.serving.auth import Tokens
from jchameleon.serving.proto.jchameleon.v1 import adapter_pb2, engine_pb2
from jchameleon.serving.proto.jchameleon.v1 import inference_pb2 as pb
from jchameleon.serving.settings import SecurityConfig, ServerConfig

Code = grpc.StatusCode
USER, OTHER = "user-token-0123456789", "other-token-012345678"
ADMIN = "admin-token-0123456"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "users").write_text(f"{USER}\n\n{OTHER}\n")
    (folder / "admins").write_text(f"{ADMIN}\n")
    return {
        "token_file": str(folder / "users"),
        "admin_token_file": str(folder / "admins"),
    }


@pytest.fixture(scope="module")
def server(tokens):
    with running_server({"security": tokens}) as server:
        yield server


def bearer(token):
    return (("authorization", f"Bearer {token}"),)


def info(server, **call):
    return server.unary(
        "EngineService",
        "GetServerInfo",
        engine_pb2.GetServerInfoRequest(),
        engine_pb2.GetServerInfoResponse,
        **call,
    )


def reflect(server, **call):
    """Return the services that reflection lists."""
    ask = server.channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    question = reflection_pb2.ServerReflectionRequest(list_services="*")
    [reply] = ask(iter([question]), **call)
    return [one.name for one in reply.list_services_response.service]


@pytest.mark.parametrize("token", [USER, OTHER, ADMIN])
def test_every_token_of_the_server_may_generate(server, token):
    assert server.generate(greedy(), metadata=bearer(token)).usage.output_tokens == 12
    stream = server.stream(greedy(), metadata=bearer(token))
    assert len(list(stream)) > 1


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        bearer("wrong"),
        bearer(""),
        bearer(USER[:-1]),
        bearer(USER + "x"),
        (("authorization", USER),),
        (("authorization", f"Basic {USER}"),),
        bearer(USER) + bearer(USER),
        (("x-authorization", f"Bearer {USER}"),),
    ],
)
def test_row_35_other_callers_are_unauthenticated_everywhere(server, metadata):
    for action in (
        lambda: server.generate(greedy(), metadata=metadata),
        lambda: list(server.stream(greedy(), metadata=metadata)),
        lambda: info(server, metadata=metadata),
    ):
        error = refusal(action)
        assert error.code() is Code.UNAUTHENTICATED
        assert error_details(error)["ErrorInfo"].reason in ("NO_TOKEN", "BAD_TOKEN")
        assert USER not in str(error)


ADMIN_METHODS = [
    (service.full_name, method.name)
    for messages in (adapter_pb2, engine_pb2)
    for service in messages.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


@pytest.mark.parametrize(("service", "method"), ADMIN_METHODS)
def test_row_35_user_tokens_do_not_administrate(server, service, method):
    call = server.channel.unary_unary(f"/{service}/{method}")
    error = refusal(lambda: call(b"", metadata=bearer(USER)))
    assert error.code() is Code.PERMISSION_DENIED
    assert refusal(lambda: call(b"")).code() is Code.UNAUTHENTICATED


def test_row_35_every_token_is_compared_in_constant_time(tokens, monkeypatch):
    compared = []
    compare = hmac.compare_digest

    def watch(given, token):
        compared.append(token)
        return compare(given, token)

    monkeypatch.setattr(hmac, "compare_digest", watch)
    checked = Tokens.read(SecurityConfig(**tokens))
    for given in (USER.encode(), ADMIN.encode(), b"wrong", b"", None):
        compared.clear()
        checked.refusal("jchameleon.v1.InferenceService", given)
        assert sorted(compared) == sorted(t.encode() for t in (USER, OTHER, ADMIN))


def test_admin_tokens_administrate(server):
    assert info(server, metadata=bearer(ADMIN)).model == "tiny"


def test_health_is_open_and_reflection_is_not(server):
    check = server.channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    assert check(health_pb2.HealthCheckRequest()).status == 1
    assert refusal(lambda: reflect(server)).code() is Code.UNAUTHENTICATED
    assert reflect(server, metadata=bearer(USER))


def test_row_35_tokens_are_never_logged(server, caplog):
    with caplog.at_level(logging.DEBUG):
        server.generate(greedy(), metadata=bearer(USER))
        refusal(lambda: server.generate(greedy(), metadata=bearer("wrong-" + USER)))
    assert USER not in caplog.text


def test_admin_tokens_alone_leave_generation_open(tokens):
    only = {"admin_token_file": tokens["admin_token_file"]}
    with running_server({"security": only}, loads=False) as server:
        assert refusal(lambda: server.generate(greedy())).code() is Code.UNAVAILABLE
        assert refusal(lambda: info(server)).code() is Code.UNAUTHENTICATED
        assert refusal(lambda: reflect(server)).code() is Code.UNAUTHENTICATED
        assert reflect(server, metadata=bearer(ADMIN))


@pytest.mark.parametrize("content", ["", "\n \n", "short\n", "with space 0123456789\n"])
def test_bad_token_files_end_the_start_without_showing_them(tmp_path, content):
    path = tmp_path / "tokens"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        with running_server({"security": {"token_file": str(path)}}, loads=False):
            pass
    assert "security.token_file" in str(caught.value)
    assert "0123456789" not in str(caught.value)


def test_other_addresses_than_loopback_need_tls_or_consent():
    with pytest.raises(ConfigError, match="can be reached from other machines"):
        ServerConfig.from_dict({"server": {"host": "0.0.0.0"}})
    ServerConfig.from_dict({"server": {"host": "0.0.0.0", "allow_insecure": True}})


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("tls"))


def secure(folder, **more):
    return {
        "security": {
            "tls_cert": str(folder / "server.pem"),
            "tls_key": str(folder / "server.key"),
            **more,
        }
    }


@contextlib.contextmanager
def secure_channel(server, folder, client=None, ca="ca"):
    read = [(folder / f"{ca}.pem").read_bytes(), None, None]
    if client is not None:
        read[1] = (folder / f"{client}.key").read_bytes()
        read[2] = (folder / f"{client}.pem").read_bytes()
    with grpc.secure_channel(server.target, grpc.ssl_channel_credentials(*read)) as one:
        yield one


def generate(channel):
    call = channel.unary_unary(
        "/jchameleon.v1.InferenceService/Generate",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=pb.GenerateResponse.FromString,
    )
    return call(greedy(), timeout=20)


def test_row_35_tls_serves_who_trusts_it_and_no_plain_text(certificates):
    with running_server(secure(certificates)) as server:
        with secure_channel(server, certificates) as channel:
            assert generate(channel).usage.output_tokens == 12
        with secure_channel(server, certificates, ca="stranger") as channel:
            assert refusal(lambda: generate(channel)).code() is Code.UNAVAILABLE
        assert refusal(lambda: server.generate(greedy())).code() is Code.UNAVAILABLE


def test_mtls_serves_whom_its_authority_has_signed(certificates):
    ca = str(certificates / "ca.pem")
    with running_server(secure(certificates, tls_client_ca=ca)) as server:
        with secure_channel(server, certificates, "client") as channel:
            assert generate(channel).usage.output_tokens == 12
        for client in (None, "stranger"):
            with secure_channel(server, certificates, client) as channel:
                assert refusal(lambda: generate(channel)).code() is Code.UNAVAILABLE


def test_renewed_certificates_are_used_and_bad_ones_are_not(certificates, tmp_path):
    folder = tmp_path / "renewed"
    shutil.copytree(certificates, folder)
    with running_server(secure(folder)) as server:
        with secure_channel(server, folder) as channel:
            generate(channel)
        make_certificate(folder, "ca2")
        pem, key = make_certificate(folder, "server2", "ca2")
        os.replace(key, folder / "server.key")
        with secure_channel(server, folder) as channel:  # half of the renewal
            assert generate(channel).usage.output_tokens == 12
        os.replace(pem, folder / "server.pem")
        with secure_channel(server, folder, ca="ca2") as channel:
            assert generate(channel).usage.output_tokens == 12


@pytest.mark.parametrize(
    "how",
    [
        "missing",
        "no certificate",
        "another key",
        "bad ca",
        "expired",
        "expired ca",
    ],
)
def test_row_34_bad_or_expired_tls_files_end_the_start(certificates, tmp_path, how):
    table = secure(certificates)["security"]
    if how == "missing":
        table["tls_cert"] = str(tmp_path / "nothing.pem")
    elif how == "another key":
        table["tls_key"] = str(certificates / "client.key")
    elif how.startswith("expired"):
        folder = shutil.copytree(certificates, tmp_path / "old")
        if how == "expired ca":
            authority = {"days": "-1", "extensions": "basicConstraints=CA:TRUE"}
            table["tls_client_ca"], _ = make_certificate(
                folder, "old", "ca", **authority
            )
        else:
            make_certificate(folder, "server", "ca", days="-1")
            table = secure(folder)["security"]
    else:
        (tmp_path / "bad.pem").write_text("nothing")
        field = "tls_cert" if how == "no certificate" else "tls_client_ca"
        table[field] = str(tmp_path / "bad.pem")
    with pytest.raises(ConfigError, match=r"^security[.:].*$") as caught:
        with running_server({"security": table}, loads=False):
            pass
    assert ("has expired" in str(caught.value)) == how.startswith("expired")
