"""Starts of the serving process that must fail, and files it must survive."""

import json
import shutil
import signal
import socket

import grpc
import pytest
from serve_process import fails_to_serve, serving
from server_harness import greedy

from jchameleon.cli import main
from jchameleon.serving.proto.jchameleon.v1 import inference_pb2 as pb


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a model directory with tokenizer and chat template."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    assert main(["export", "--model", "tiny", "--out", str(path)]) == 0
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    return path


@pytest.fixture
def copy(model, tmp_path):
    return shutil.copytree(model, tmp_path / "copy")


def assert_one_line(outcome, *words):
    code, error = outcome
    assert code == 2, error
    [line] = error.splitlines()
    assert line.startswith("jchameleon: error: ")
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"model": "/nowhere/model"}, ["/nowhere/model"]),
        ({"server": {"prot": 1}}, ["serve.toml", "prot", "did you mean 'port'"]),
        ({"server": {"port": 70_000}}, ["server.port=70000"]),
        ({"server": {"host": "0.0.0.0"}}, ["0.0.0.0", "allow_insecure"]),
        ({"server": {"log_format": "xml"}}, ["server.log_format='xml'"]),
        ({"engine": {"policy": "nonsense"}}, ["nonsense"]),
    ],
)
def test_wrong_configuration_is_one_line_and_code_2(tmp_path, table, words):
    assert_one_line(fails_to_serve(tmp_path, table), *words)


def test_flags_go_before_the_file(tmp_path):
    outcome = fails_to_serve(tmp_path, {}, "--model", "/nowhere/else")
    assert_one_line(outcome, "/nowhere/else")
    # Wrong alone, right together: what counts is the whole.
    outcome = fails_to_serve(
        tmp_path,
        {"server": {"host": "0.0.0.0"}, "engine": {"policy": "nonsense"}},
        "--allow-insecure",
    )
    assert_one_line(outcome, "nonsense")


@pytest.mark.parametrize("field", ["port", "metrics_port"])
def test_port_in_use_is_one_line_and_code_2(tmp_path, field):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        outcome = fails_to_serve(tmp_path, {"server": {field: port}})
        assert_one_line(outcome, str(port))


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("config.json", "{", "config.json"),
        ("tokenizer.json", '{"model": {"type": "Nonsense"}}', "tokenizer.json"),
        ("chat_template.jinja", "{% for %}", "template"),
    ],
)
def test_damaged_model_files_are_one_line_and_code_2(
    tmp_path, copy, name, content, word
):
    (copy / name).write_text(content, encoding="utf-8")
    assert_one_line(fails_to_serve(tmp_path, {"model": str(copy)}), word)


def test_cache_folder_that_cannot_be_written_is_code_2(tmp_path):
    home = tmp_path / "home"
    home.write_text("a file", encoding="utf-8")
    code, error = fails_to_serve(tmp_path, {}, JCHAMELEON_HOME=str(home))
    assert code == 2
    # The port was open by then, which the log says before.
    *events, line = error.splitlines()
    assert [json.loads(event)["event"] for event in events] == ["listening"]
    assert line.startswith("jchameleon: error: cannot write the compilation cache")


def test_hostile_template_and_damaged_cache_do_no_harm(tmp_path, copy):
    canary = tmp_path / "canary"
    hostile = (
        "{{ cycler.__init__.__globals__.os.system('touch " + str(canary) + "') }}"
        "{{ messages[0].content }}"
    )
    (copy / "chat_template.jinja").write_text(hostile, encoding="utf-8")
    few_programs = {"max_running": 1, "max_batch_tokens": 33, "max_model_len": 64}
    table = {"model": str(copy), "engine": few_programs}
    home = tmp_path / "home"
    answers = []
    for _ in range(2):
        with serving(tmp_path, table, JCHAMELEON_HOME=str(home)) as server:
            chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hi")])
            with pytest.raises(grpc.RpcError) as caught:
                server.generate(pb.GenerateRequest(chat=chat))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            [output] = server.generate(greedy("hello", 8)).outputs
            answers.append(list(output.token_ids))
            server.signal(signal.SIGTERM)
            assert server.end() == 0
        cached = [path for path in home.rglob("*") if path.is_file()]
        assert {"xla", "numba"} <= {path.relative_to(home).parts[0] for path in cached}
        # Each kind of damage often, and the second start need not compile everything.
        for number, path in enumerate(sorted(cached)[::3]):
            data = path.read_bytes()
            path.write_bytes([b"", data[: len(data) // 2], b"garbage"][number % 3])
    assert not canary.exists()
    assert answers[0] == answers[1]
