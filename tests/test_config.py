"""Configurations: what is refused, and where presets come from."""

import dataclasses
import math
from pathlib import Path
from types import MappingProxyType

import pytest

from jchameleon.config import (
    PREFILL_TILE_TOKENS,
    EngineConfig,
    ModelConfig,
    RopeScaling,
    check_keys,
    default_max_model_len,
    load_toml,
    preset_names,
)
from jchameleon.errors import ConfigError, UnknownModelError
from jchameleon.resources import configs_dir, demo_adapters

# Parameters as published with each model, in units of 10^6, embeddings once when tied.
PUBLISHED_MILLION_PARAMETERS = {
    "llama-7b": 6738.4,
    "llama-13b": 13015.9,
    "llama-30b": 32528.9,
    "llama-3-8b": 8030.3,
    "smollm2-135m": 134.5,
}


def tiny(**changes):
    return dataclasses.replace(ModelConfig.preset("tiny"), **changes)


def num_parameters(config):
    """Count the parameters of a Llama decoder from its published equations."""
    d = config.hidden_size
    shapes = [config.projection_shape(p) for p in ("q", "k", "v", "o")]
    shapes += [config.projection_shape(p) for p in ("gate", "up", "down")]
    layer = sum(d_in * d_out for d_in, d_out in shapes) + 2 * d
    tables = config.vocab_size * d * (1 if config.tie_embeddings else 2)
    return config.num_layers * layer + tables + d


@pytest.mark.parametrize("name", PUBLISHED_MILLION_PARAMETERS)
def test_preset_has_the_published_number_of_parameters(name):
    millions = num_parameters(ModelConfig.preset(name)) / 1e6
    assert millions == pytest.approx(PUBLISHED_MILLION_PARAMETERS[name], abs=0.06)


def test_presets_are_found_and_valid():
    assert set(preset_names()) == {*PUBLISHED_MILLION_PARAMETERS, "tiny"}
    for name in preset_names():
        config = ModelConfig.preset(name)
        assert config.name == name
        assert config.eos_token_ids
        assert 16 <= default_max_model_len(config) <= 4096


def test_unknown_preset_lists_those_there_are():
    with pytest.raises(UnknownModelError, match=r"'smollm'.*smollm2-135m"):
        ModelConfig.preset("smollm")


@pytest.mark.parametrize("name", ["../models/tiny", "", ".", "tiny.toml"])
def test_preset_name_is_no_path(name):
    with pytest.raises(UnknownModelError):
        ModelConfig.preset(name)


def test_projection_shapes_are_inputs_by_outputs():
    config = tiny(
        hidden_size=48, num_heads=3, num_kv_heads=1, head_dim=10, intermediate_size=70
    )
    assert {p: config.projection_shape(p) for p in ("q", "k", "v", "o")} == {
        "q": (48, 30),
        "k": (48, 10),
        "v": (48, 10),
        "o": (30, 48),
    }
    assert config.projection_shape("gate") == config.projection_shape("up") == (48, 70)
    assert config.projection_shape("down") == (70, 48)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"num_layers": 2.0}, "num_layers=2.0"),
        ({"vocab_size": "9"}, "vocab_size='9'"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads=4 .* num_kv_heads=3"),
        ({"head_dim": 15}, "head_dim=15 must be even"),
        ({"rope_theta": 0.0}, "rope_theta=0.0"),
        ({"rope_theta": math.nan}, "rope_theta=nan"),
        ({"eos_token_ids": (259,)}, "259 is outside the vocabulary of 259"),
        ({"bos_token_id": -1}, "-1 is outside"),
    ],
)
def test_wrong_model_value_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**changes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "yarn", "factor": 2.0}, "kind='yarn'"),
        ({"kind": "linear", "factor": 0.5}, "factor=0.5"),
        ({"kind": "linear", "factor": math.nan}, "factor=nan"),
        ({"kind": "llama3", "factor": math.inf}, "factor=inf"),
        ({"kind": "llama3", "factor": 8.0, "low_freq_factor": 4.0}, "low_freq_factor"),
    ],
)
def test_wrong_rope_scaling_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        RopeScaling(**values)


def test_rope_scaling_reads_from_a_table():
    table = dataclasses.asdict(tiny()) | {
        "rope_scaling": {"kind": "llama3", "factor": 8.0},
        "eos_token_ids": [1, 2],
    }
    config = ModelConfig.from_dict(table)
    assert config.rope_scaling == RopeScaling(kind="llama3", factor=8.0)
    assert config.eos_token_ids == (1, 2)
    table["rope_scaling"] = {"kind": "llama3", "factr": 8.0}
    with pytest.raises(ConfigError, match="'factr' in RopeScaling; .* 'factor'"):
        ModelConfig.from_dict(table)


def test_unknown_key_names_the_nearest_field():
    with pytest.raises(ConfigError, match="'max_runing'.*did you mean 'max_running'"):
        check_keys(EngineConfig, {"max_runing": 4})
    with pytest.raises(ConfigError, match=r"'zzz' in EngineConfig$"):
        EngineConfig.from_dict({"zzz": 4})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"max_running": 0}, "max_running=0"),
        ({"max_waiting": -1}, "max_waiting=-1"),
        ({"max_model_len": 0}, "max_model_len=0"),
        ({"pool_bytes": 1.5}, "pool_bytes=1.5"),
        ({"max_lora_rank": math.nan}, "max_lora_rank=nan"),
        ({"kv_block_tokens": 24}, "kv_block_tokens=24 must be a power of two"),
        ({"lora_targets": ("q", "w")}, "lora_targets has 'w'"),
        ({"host_cache_bytes": 0}, "host_cache_bytes=0 must be a positive"),
        ({"host_cache_bytes": 1e9}, "host_cache_bytes=1000000000.0"),
        ({"link_bytes_per_s": 0}, "link_bytes_per_s=0 must be a positive"),
        ({"link_bytes_per_s": -2.5}, "link_bytes_per_s=-2.5"),
        ({"link_bytes_per_s": math.inf}, "link_bytes_per_s=inf"),
        ({"link_bytes_per_s": "1e9"}, "link_bytes_per_s='1e9'"),
        ({"link_bytes_per_s": True}, "link_bytes_per_s=True"),
        ({"link_bytes_per_s": 1.0, "link_latency_s": -1e-3}, "link_latency_s=-0.001"),
        ({"link_bytes_per_s": 1.0, "link_latency_s": math.nan}, "link_latency_s=nan"),
        ({"link_latency_s": None}, "link_latency_s=None"),
        ({"link_latency_s": 0.01}, "link_latency_s=0.01 must come with link_bytes"),
        ({"policy": 5}, "policy=5 must be the name of a preset"),
        ({"policy": None}, "policy=None must be"),
        ({"policy": ["chameleon"]}, r"policy=\['chameleon'\] must be"),
        ({"plan_log": 3}, "plan_log=3 must be the path"),
        ({"plan_log": ""}, "plan_log='' must be the path"),
    ],
)
def test_wrong_engine_value_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**changes)


def test_iteration_must_hold_all_rows_and_one_prompt_tile():
    rows = 64
    EngineConfig(max_running=rows, max_batch_tokens=rows + PREFILL_TILE_TOKENS)
    with pytest.raises(ConfigError, match="max_batch_tokens=95 must be at least"):
        EngineConfig(max_running=rows, max_batch_tokens=rows + PREFILL_TILE_TOKENS - 1)


def test_engine_config_reads_from_a_table():
    config = EngineConfig.from_dict({"lora_targets": ["q", "v"], "max_running": 8})
    assert config.lora_targets == ("q", "v")
    assert config == EngineConfig(lora_targets=("q", "v"), max_running=8)


def test_link_is_emulated_only_when_asked_for():
    assert EngineConfig().link_bytes_per_s is None
    config = EngineConfig(link_bytes_per_s=1, link_latency_s=0.5)
    assert (config.link_bytes_per_s, config.link_latency_s) == (1, 0.5)


def test_policy_table_is_kept_apart_from_the_callers():
    table = {
        "preset": "chameleon",
        "admission": {"slo_s": 3.0},
        "kv": MappingProxyType({}),
    }
    config = EngineConfig(policy=table)
    table["admission"]["slo_s"] = -1.0
    table["preset"] = "lru"
    expected = {"preset": "chameleon", "admission": {"slo_s": 3.0}, "kv": {}}
    assert config.policy == expected
    # Results embed configurations, and engines start from changed copies of them.
    assert dataclasses.asdict(config)["policy"] == expected
    assert dataclasses.replace(config, max_running=2).policy == expected
    assert config == EngineConfig(policy=expected)


@pytest.mark.parametrize("value", ["no-such-preset", Path("x.toml"), {}])
def test_content_of_a_policy_is_not_looked_at(value):
    assert EngineConfig(policy=value).policy == value


@pytest.mark.parametrize("content", [b"a = ", b"\xff\xfe", None])
def test_unreadable_toml_names_the_file(tmp_path, content):
    path = tmp_path / "x.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="x.toml"):
        load_toml(path)


def test_resources_lie_beside_the_code():
    assert (configs_dir() / "models" / "tiny.toml").is_file()
    folder = configs_dir() / "demo" / "adapters"
    names = ["capitals", "json", "tag"]
    assert demo_adapters() == {name: folder / name for name in names}


SHAPE = {
    "name": "m",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
WINDOW = {"family": "mistral", "sliding_window": 64, "sliding_layers": (0, 1)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"family": "gpt2"}, "family='gpt2'.*llama, mistral, qwen2, qwen3"),
        ({"family": "qwen2"}, "qkv_bias=False.*qwen2"),
        ({"family": "mistral", "qkv_bias": True}, "qkv_bias=True.*mistral"),
        ({"qk_norm": True}, "qk_norm=True.*llama"),
        ({"sliding_window": 64, "sliding_layers": (0, 1)}, "no layer of a llama"),
        ({**WINDOW, "sliding_layers": (0,)}, "every layer of a mistral"),
        ({**WINDOW, "sliding_layers": ()}, "sliding_layers"),
        ({**WINDOW, "sliding_layers": (0, 2)}, "sliding_layers.*below 2"),
        ({**WINDOW, "sliding_layers": (1, 0)}, "ascending"),
        ({**WINDOW, "sliding_window": 0}, "sliding_window=0"),
        ({**WINDOW, "sliding_window": None}, "sliding_window=None"),
    ],
)
def test_model_that_no_family_computes_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**SHAPE, **fields)


def test_context_of_a_sliding_model_is_its_window():
    model = ModelConfig(**SHAPE, **WINDOW)
    assert model.max_exact_tokens == default_max_model_len(model) == 64
    assert ModelConfig.from_dict({**SHAPE, **WINDOW, "sliding_layers": [0, 1]}) == model
