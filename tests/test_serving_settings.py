"""A server's configuration file: where its paths begin, and what it refuses."""

import pytest

from jchameleon.errors import ConfigError
from jchameleon.serving.settings import ServerConfig

FILE = """\
model = "{model}"
[security]
tls_cert = "tls/a.pem"
tls_key = "/etc/a.key"
[adapters]
root = "adapters"
[engine]
plan_log = "plans.jsonl"
policy = "{policy}"
"""


def load(folder, model, policy):
    path = folder / "serve.toml"
    path.write_text(FILE.format(model=model, policy=policy), "utf-8")
    return ServerConfig.load(path)


def test_paths_begin_at_the_files_folder(tmp_path):
    config = load(tmp_path, "models/mine", "own.toml")
    assert config.model == str(tmp_path / "models/mine")
    assert config.engine.policy == str(tmp_path / "own.toml")
    assert config.engine.plan_log == str(tmp_path / "plans.jsonl")
    assert config.adapters.root == str(tmp_path / "adapters")
    assert config.security.tls_cert == str(tmp_path / "tls/a.pem")
    assert config.security.tls_key == "/etc/a.key"


def test_names_stay_names(tmp_path):
    config = load(tmp_path, "tiny", "s-lora")
    assert (config.model, config.engine.policy) == ("tiny", "s-lora")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"servr": {}}, "servr"),
        ({"server": {"prot": 1}}, "prot"),
        ({"server": {"port": 65536}}, "server.port=65536"),
        ({"server": {"max_reply_bytes": 2**31}}, "server.max_reply_bytes=2147483648"),
        ({"server": {"stall_timeout_s": 0}}, "server.stall_timeout_s=0"),
        ({"limits": {"max_waiting_tokens": 0}}, "limits.max_waiting_tokens=0"),
        ({"adapters": {"dynamic": True}}, "adapters.root"),
        ({"adapters": {"root": ".", "manifest": "m"}}, "adapters.manifest"),
        ({"security": {"tls_cert": "a"}}, "security.tls_key"),
        ({"engine": {"max_running": -1}}, "max_running=-1"),
        ({"server": 3}, "server=3"),
    ],
)
def test_wrong_values_are_named(table, message):
    with pytest.raises(ConfigError, match=message):
        ServerConfig.from_dict(table)
