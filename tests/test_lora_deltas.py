"""Delta weights of adapters on disk, against those that PEFT computes from them."""

import json

import numpy as np
import pytest
from peft_files import MODEL, PREFIX, load, make_config, quiet, write_adapter

from jchameleon.errors import AdapterError
from jchameleon.lora.targets import linear_modules

pytest_plugins = ["peft_fixtures"]


def save_random_adapter(oracle, folder, **config):
    """Train nothing: give every factor random values and save as PEFT saves."""
    with quiet():
        model = oracle.peft.get_peft_model(
            oracle.base(), oracle.peft.LoraConfig(**config)
        )
        generator = oracle.torch.Generator().manual_seed(1)
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.data.normal_(generator=generator)
        model.save_pretrained(folder)


def peft_deltas(oracle, folder):
    """Return {(layer, projection): delta weight} after loading `folder` with PEFT."""
    with quiet():
        model = oracle.peft.PeftModel.from_pretrained(oracle.base(), folder)
    linear = linear_modules(MODEL)
    return {
        linear[name.removeprefix(PREFIX)]: module.get_delta_weight("default")
        .detach()
        .numpy()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def assert_same_deltas(oracle, folder, *, max_rank=64):
    adapter = load(folder, max_rank=max_rank)
    expected = peft_deltas(oracle, folder)
    assert set(adapter.modules) == set(expected)
    for key, pair in adapter.modules.items():
        a, b = pair.a.astype(np.float32), pair.b.astype(np.float32)
        found = np.float32(pair.scale) * (b @ a)
        largest = np.abs(expected[key]).max()
        assert largest > 0.01
        np.testing.assert_allclose(found, expected[key], rtol=0, atol=1e-6 * largest)
    return adapter


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["o_proj"], "r": 1, "lora_alpha": 3},
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "r": 17},
        {"target_modules": "all-linear", "r": 64, "lora_alpha": 128},
        {"target_modules": r".*\.(gate|up)_proj", "lora_alpha": 0.5},
        {"target_modules": r"model\.layers\.[02]\.(mlp|self_attn)\..*_proj"},
        {"target_modules": ["self_attn.k_proj", "2.mlp.down_proj"]},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj", "1.mlp"]},
        {"target_modules": "all-linear", "exclude_modules": ["0.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*\.1\..*"},
        {"target_modules": ["q_proj"], "r": 17, "lora_alpha": 5, "use_rslora": True},
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "r": 8,
            "rank_pattern": {"down_proj": 2, r"layers\.1\..*": 17, "v_proj": 3},
            "alpha_pattern": {r"layers\.[01]\.mlp\.down_proj": 40, "proj": 99},
        },
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "lora_alpha": 12,
            "rank_pattern": {"model.layers.0.self_attn.q_proj": 1, "up_proj": 5},
            "alpha_pattern": {"q_proj": 2, ".*2.*": 7},
        },
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1},
        {
            "target_modules": ["up_proj"],
            "layers_to_transform": [1],
            "layers_pattern": ["blocks", "layers"],
        },
        {
            "target_modules": ["model.layers.2.mlp.up_proj", "q_proj"],
            "layers_to_transform": [0],
        },
        {"target_modules": ["q_proj"], "fan_in_fan_out": True},
        {"target_modules": ["k_proj"], "init_lora_weights": "gaussian"},
        {"target_modules": ["k_proj"], "init_lora_weights": "orthogonal"},
        {"target_modules": ["k_proj"], "init_lora_weights": False, "lora_dropout": 0.5},
        {"target_modules": ["k_proj"], "task_type": "CAUSAL_LM"},
        {"target_modules": None},
    ],
)
def test_load_computes_the_delta_weights_of_peft(oracle, tmp_path, config):
    save_random_adapter(oracle, tmp_path, **config)
    assert_same_deltas(oracle, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"fan_in_fan_out": True},
        {"target_modules": "all-linear"},
        {"target_modules": "ALL-Linear"},
        {"target_modules": r".*\.[a-z]+_proj"},
        {"layers_to_transform": [], "layers_pattern": ""},
        {"use_rslora": True},
        {"lora_alpha": -2.5},
        # Both match: the order in the file decides, and PEFT itself sorts on saving.
        {"alpha_pattern": {"self_attn.q_proj": 3, "q_proj": 4, "k.proj": 5}},
        {"alpha_pattern": {"q_proj": 4, "self_attn.q_proj": 3, "k|q_proj": 6}},
        {"alpha_pattern": {r"layers\.1": 4, r".*\.1\..*": 3, r"a)|(model.*": 6}},
        {"loftq_config": None, "modules_to_save": [], "runtime_config": {}},
        {"future_key": None, "exclude_modules": ["lm_head"]},
    ],
)
def test_load_edited_config_means_what_peft_reads(oracle, tmp_path, changes):
    save_random_adapter(oracle, tmp_path, r=6, target_modules="all-linear")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert_same_deltas(oracle, tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_load_narrow_file_computes_the_delta_weights_of_peft(oracle, tmp_path, dtype):
    save_random_adapter(oracle, tmp_path, r=5, target_modules="all-linear")
    path = tmp_path / "adapter_model.safetensors"
    tensors = oracle.safetensors.load_file(path)
    narrow = {k: v.to(getattr(oracle.torch, dtype)) for k, v in tensors.items()}
    oracle.safetensors.save_file(narrow, path)
    adapter = assert_same_deltas(oracle, tmp_path)
    assert {pair.a.dtype.name for pair in adapter.modules.values()} == {dtype}


def test_load_keys_with_the_adapter_name_load_as_in_peft(oracle, tmp_path):
    save_random_adapter(oracle, tmp_path, target_modules=["q_proj", "up_proj"])
    plain = load(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = oracle.safetensors.load_file(path)
    named = {k.replace(".weight", ".default.weight"): v for k, v in tensors.items()}
    oracle.safetensors.save_file(named, path)
    assert assert_same_deltas(oracle, tmp_path).uid == plain.uid


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["norm"]},
        {"target_modules": ".*self_attn"},
        {"target_modules": "nothing"},
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "r": 0},
        {"target_modules": "all-linear", "layers_to_transform": [0]},
        {"target_modules": ["q_proj"], "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal", "r": 3},
        {"target_modules": ["q_proj"], "init_lora_weights": "Orthogonal"},
        {"target_modules": ["q_proj"], "rank_pattern": {"(?i)q": 2}},
    ],
)
def test_what_peft_itself_refuses_is_refused(oracle, tmp_path, config):
    with quiet(), pytest.raises(Exception):  # noqa: B017 - of many types
        oracle.peft.get_peft_model(oracle.base(), oracle.peft.LoraConfig(**config))
    write_adapter(tmp_path, config=make_config(**config))
    with pytest.raises(AdapterError):
        load(tmp_path)
