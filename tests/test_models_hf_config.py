"""config.json: read, refused and written, against transformers."""

import itertools
import json
import random

import pytest
from model_files import LLAMA3_ROPE, tiny_tensors, write_hf, write_json

from jchameleon.config import ModelConfig, RopeScaling
from jchameleon.errors import ModelLoadError
from jchameleon.models.hf_config import hf_config_table, load_hf_config


def test_config_plain_llama_translates(tmp_path):
    config = load_hf_config(write_hf(tmp_path / "my-model"))
    assert config.name == "my-model"
    assert (config.vocab_size, config.hidden_size, config.head_dim) == (96, 32, 8)
    assert (config.num_heads, config.num_kv_heads, config.num_layers) == (4, 2, 2)
    assert config.intermediate_size == 64
    assert config.max_position_embeddings == 128
    assert config.rms_norm_eps == 1e-5
    assert config.rope_scaling is None
    assert config.bos_token_id == 1
    assert config.eos_token_ids == (2,)
    assert not config.tie_embeddings


def test_config_optional_fields_absent_take_llama_defaults(tmp_path):
    directory = write_hf(
        tmp_path,
        num_key_value_heads=None,
        rope_theta=None,
        rms_norm_eps=None,
        max_position_embeddings=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    config = load_hf_config(directory)
    assert config.num_kv_heads == 4
    assert config.rope_theta == 10000.0
    assert config.rms_norm_eps == 1e-6
    assert config.max_position_embeddings == 2048
    assert config.bos_token_id is None
    assert config.eos_token_ids == ()


def test_config_head_dim_given_goes_before_division(tmp_path):
    assert load_hf_config(write_hf(tmp_path, head_dim=16)).head_dim == 16


@pytest.mark.parametrize(
    ("fields", "theta", "scaling"),
    [
        ({"rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0}, 500000.0, "llama3"),
        ({"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5}}, 500000.0, "llama3"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 10000.0, "linear"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}},
            123.0,
            None,
        ),
        ({"rope_parameters": {"rope_theta": 7.0}, "rope_theta": None}, 7.0, None),
    ],
)
def test_config_rope_spellings_translate(tmp_path, fields, theta, scaling):
    config = load_hf_config(write_hf(tmp_path, **fields))
    assert config.rope_theta == theta
    if scaling == "llama3":
        assert config.rope_scaling == RopeScaling(
            kind="llama3",
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position=8192,
        )
    elif scaling == "linear":
        assert config.rope_scaling == RopeScaling(kind="linear", factor=2.0)
    else:
        assert config.rope_scaling is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "gemma"}, ["model_type", "gemma", "mistral, qwen2, qwen3"]),
        ({"model_type": ["llama"]}, ["model_type", "['llama']"]),
        ({"architectures": ["LlamaModel"]}, ["architectures", "LlamaForCausalLM"]),
        ({"attention_bias": 1}, ["attention_bias", "1"]),
        ({"mlp_bias": True}, ["mlp_bias", "True"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"pretraining_tp": 2}, ["pretraining_tp", "2"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantization_", "awq"]),
        ({"sliding_window": 4096}, ["sliding_window", "4096"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, ["yarn"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["dynamic"]),
        ({"rope_parameters": {"full_attention": {}}}, ["full_attention"]),
        ({"rope_scaling": {"type": "linear"}}, ["factor", "None"]),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, ["factor", "0.5"]),
        ({"rope_scaling": {**LLAMA3_ROPE, "attention_factor": 2}}, ["attention_fac"]),
        ({"rope_scaling": [1]}, ["rope_scaling"]),
        ({"hidden_size": "32"}, ["hidden_size", "'32'"]),
        ({"num_hidden_layers": 0}, ["num_layers", "0"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers=1000000000", "10000"]),
        ({"num_attention_heads": 5}, ["num_attention_heads", "5"]),
        ({"num_attention_heads": 0}, ["num_attention_heads", "0"]),
        ({"num_key_value_heads": 3}, ["num_kv_heads", "3"]),
        ({"num_key_value_heads": "2"}, ["num_kv_heads"]),
        ({"intermediate_size": None}, ["intermediate_size"]),
        ({"eos_token_id": 96}, ["96"]),
        ({"eos_token_id": "2"}, ["eos_token_id"]),
        ({"bos_token_id": 1.5}, ["bos_token_id"]),
        ({"tie_word_embeddings": 1}, ["tie_word_embeddings"]),
        ({"rms_norm_eps": "x"}, ["rms_norm_eps"]),
    ],
)
def test_config_unsupported_value_is_refused_by_name(tmp_path, fields, words):
    tensors = tiny_tensors()
    with pytest.raises(ModelLoadError) as raised:
        load_hf_config(write_hf(tmp_path, tensors=tensors, **fields))
    assert "\n" not in str(raised.value)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("content", ["", "[1]", "{", "\xff", "[" * 100_000])
def test_config_unreadable_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelLoadError, match="config.json"):
        load_hf_config(tmp_path)


@pytest.mark.parametrize(
    ("config_eos", "generation", "expected"),
    [
        ([2, 3], None, (2, 3)),
        (2, {"eos_token_id": [5, 6, 5]}, (5, 6)),
        (2, {"eos_token_id": 7}, (7,)),
        (2, {}, (2,)),
    ],
)
def test_config_eos_generation_config_goes_first(
    tmp_path, config_eos, generation, expected
):
    write_hf(tmp_path, eos_token_id=config_eos)
    if generation is not None:
        write_json(tmp_path / "generation_config.json", generation)
    assert load_hf_config(tmp_path).eos_token_ids == expected


# Fields of `CONFIG` beyond those that change from family to family.
SHAPE = {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def variant(tmp_path, family, **fields):
    """Return the ModelConfig of a config.json with these fields."""
    write_json(
        tmp_path / "config.json",
        {
            "model_type": family,
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 64,
            **SHAPE,
            **fields,
        },
    )
    return load_hf_config(tmp_path)


@pytest.mark.parametrize(
    ("family", "fields", "traits"),
    [
        ("llama", {}, (False, False, False)),
        ("llama", {"attention_bias": True}, (True, True, False)),
        ("mistral", {}, (False, False, False)),
        ("mistral", {"architectures": ["MistralForCausalLM"]}, (False, False, False)),
        ("qwen2", {}, (True, False, False)),
        ("qwen2", {"attention_bias": True}, (True, False, False)),
        ("qwen3", {}, (False, False, True)),
        ("qwen3", {"attention_bias": True}, (True, True, True)),
        ("qwen3", {"attention_bias": None}, (False, False, True)),
    ],
)
def test_variant_biases_and_norms_follow_the_family(tmp_path, family, fields, traits):
    config = variant(tmp_path, family, **fields)
    assert config.family == family
    assert (config.qkv_bias, config.o_bias, config.qk_norm) == traits


ALL = (0, 1, 2)


@pytest.mark.parametrize(
    ("family", "fields", "window", "layers"),
    [
        ("mistral", {}, 4096, ALL),
        ("mistral", {"sliding_window": 7}, 7, ALL),
        ("mistral", {"sliding_window": None}, None, ()),
        ("mistral", {"layer_types": ["sliding_attention"] * 3}, 4096, ALL),
        ("qwen2", {"sliding_window": 7}, None, ()),
        ("qwen2", {"sliding_window": 7, "use_sliding_window": False}, None, ()),
        ("qwen2", {"sliding_window": 7, "use_sliding_window": True}, None, ()),
        (
            "qwen2",
            {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1},
            7,
            (1, 2),
        ),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}, 4096, ALL),
        ("qwen3", {"use_sliding_window": True, "sliding_window": None}, None, ()),
        ("qwen3", {"layer_types": ["full_attention"] * 3}, None, ()),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": [
                    "full_attention",
                    "sliding_attention",
                    "full_attention",
                ],
            },
            9,
            (1,),
        ),
        ("llama", {"layer_types": ["full_attention"] * 3}, None, ()),
    ],
)
def test_variant_window_is_that_of_transformers(
    tmp_path, family, fields, window, layers
):
    config = variant(tmp_path, family, **fields)
    assert (config.sliding_window, config.sliding_layers) == (window, layers)
    assert config.max_exact_tokens == min(
        window or config.max_position_embeddings, config.max_position_embeddings
    )
    transformers = pytest.importorskip(
        "transformers", reason="oracle: Python 3.11 only"
    )
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    slides = getattr(theirs, "sliding_window", None) is not None
    assert slides == (window is not None) or not layers
    if family.startswith("qwen"):
        assert layers == tuple(
            i for i, kind in enumerate(theirs.layer_types) if "sliding" in kind
        )
    if window is not None:
        assert theirs.sliding_window == window


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_variant_absent_fields_take_the_familys_defaults(tmp_path, family):
    transformers = pytest.importorskip(
        "transformers", reason="oracle: Python 3.11 only"
    )
    fields = {"num_attention_heads": 32, "hidden_size": 128}
    if family != "qwen3":
        fields["head_dim"] = None
    else:
        fields["head_dim"] = 128
    config = variant(tmp_path, family, num_key_value_heads=8, **fields)
    assert config.head_dim == (128 if family == "qwen3" else 4)
    table = json.loads((tmp_path / "config.json").read_text())
    for field in ("num_key_value_heads", "head_dim"):
        del table[field]
    write_json(tmp_path / "config.json", table)
    config = load_hf_config(tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.num_kv_heads == theirs.num_key_value_heads
    assert config.max_position_embeddings == theirs.max_position_embeddings
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert config.tie_embeddings == theirs.tie_word_embeddings
    assert config.head_dim == (128 if family == "qwen3" else 4)


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [
        ("mistral", {"attention_bias": True}, ["attention_bias=True", "mistral"]),
        ("mistral", {"use_sliding_window": False}, ["use_sliding_window=False"]),
        ("mistral", {"sliding_window": 0}, ["sliding_window=0", "positive"]),
        ("mistral", {"sliding_window": "7"}, ["sliding_window='7'", "integer"]),
        ("mistral", {"layer_types": ["full_attention"] * 3}, ["layer_types", "4096"]),
        ("mistral", {"architectures": ["LlamaForCausalLM"]}, ["MistralForCausalLM"]),
        ("mistral", {"architectures": "Mistral"}, ["architectures='Mistral'"]),
        ("mistral", {"num_hidden_layers": 10**9}, ["num_hidden_layers", "10000"]),
        ("qwen2", {"attention_bias": False}, ["attention_bias=False", "qwen2"]),
        ("qwen2", {"use_sliding_window": 1}, ["use_sliding_window=1", "true or false"]),
        ("qwen2", {"mlp_bias": True}, ["mlp_bias=True"]),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, ["yarn"]),
        ("qwen2", {"rope_scaling": {"mrope_section": [1, 1]}}, ["mrope_section"]),
        ("qwen3", {"layer_types": ["full_attention"]}, ["layer_types", "3"]),
        ("qwen3", {"layer_types": "full"}, ["layer_types='full'"]),
        ("qwen3", {"layer_types": ["a", "b", {}]}, ["layer_types has 'a'"]),
        (
            "qwen3",
            {"layer_types": ["sliding_attention"] * 3},
            ["layer_types", "contradicts sliding_window=None"],
        ),
        (
            "qwen3",
            {"use_sliding_window": True, "max_window_layers": None},
            ["max_window_layers=None"],
        ),
        ("qwen3", {"num_experts": 8}, ["num_experts=8"]),
        ("qwen3_moe", {}, ["qwen3_moe", "llama, mistral, qwen2, qwen3"]),
        ("mixtral", {}, ["mixtral", "llama, mistral, qwen2, qwen3"]),
    ],
)
def test_variant_contradictions_are_refused_by_name(tmp_path, family, fields, words):
    with pytest.raises(ModelLoadError) as raised:
        variant(tmp_path, family, **fields)
    assert "\n" not in str(raised.value)
    for word in ["config.json", *words]:
        assert word in str(raised.value)


def written_configs() -> list[ModelConfig]:
    """Return configurations of all families with every field at two values or more."""
    shape = {
        "name": "m",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
    }
    llama3 = RopeScaling(kind="llama3", factor=32.0, original_max_position=64)
    picks = random.Random(3)
    configs = []
    for family, ropes in itertools.product(
        [
            {"family": "llama"},
            {"family": "llama", "qkv_bias": True, "o_bias": True},
            {"family": "mistral"},
            {"family": "mistral", "sliding_window": 9, "sliding_layers": ALL},
            {"family": "qwen2", "qkv_bias": True},
            {
                "family": "qwen2",
                "qkv_bias": True,
                "sliding_window": 5,
                "sliding_layers": (0, 2),
            },
            {"family": "qwen3", "qk_norm": True},
            {"family": "qwen3", "qk_norm": True, "qkv_bias": True, "o_bias": True},
        ],
        [None, RopeScaling(kind="linear", factor=2.0), llama3],
    ):
        configs.append(
            ModelConfig(
                **shape,
                **family,
                rope_scaling=ropes,
                rope_theta=picks.choice([1e4, 5e5]),
                rms_norm_eps=picks.choice([1e-5, 1e-6]),
                max_position_embeddings=picks.choice([77, 4096]),
                tie_embeddings=picks.choice([True, False]),
                bos_token_id=picks.choice([None, 1]),
                eos_token_ids=picks.choice([(), (2,), (2, 5)]),
            )
        )
    return configs


@pytest.mark.parametrize("config", written_configs())
def test_written_config_is_read_back_and_by_transformers(tmp_path, config):
    directory = tmp_path / config.name
    directory.mkdir()
    table = hf_config_table(config, dtype="bfloat16")
    write_json(directory / "config.json", table)
    assert load_hf_config(directory) == config
    transformers = pytest.importorskip(
        "transformers", reason="oracle: Python 3.11 only"
    )
    theirs = transformers.AutoConfig.from_pretrained(directory)
    assert type(theirs).__name__ == f"{table['architectures'][0][:-11]}Config"
    assert str(theirs.dtype) == "torch.bfloat16"
    theirs.save_pretrained(tmp_path / "again" / config.name)
    assert load_hf_config(tmp_path / "again" / config.name) == config
