"""Weights of Hugging Face directories, against transformers."""

import json
from pathlib import Path

import ml_dtypes
import model_files
import numpy as np
import pytest
from model_files import LLAMA3_ROPE, tiny_tensors, write_hf, write_index, write_json
from safetensors.numpy import save_file

from jchameleon.errors import ModelLoadError
from jchameleon.models.hf import load_hf_params
from jchameleon.models.hf_config import load_hf_config
from jchameleon.models.params import tensor_views


def load_views(directory: Path, dtype: str) -> dict[str, np.ndarray]:
    config = load_hf_config(directory)
    return tensor_views(config, load_hf_params(directory, config, dtype=dtype))


def test_params_fused_rows_are_in_order(tmp_path):
    tensors = tiny_tensors()
    config = load_hf_config(write_hf(tmp_path, tensors=tensors))
    params = load_hf_params(tmp_path, config, dtype="float32")
    prefix = "model.layers.1."
    q, k, v = (tensors[f"{prefix}self_attn.{p}_proj.weight"] for p in "qkv")
    gate, up = (tensors[f"{prefix}mlp.{p}_proj.weight"] for p in ("gate", "up"))
    layer = params["layers"][1]
    np.testing.assert_array_equal(layer["qkv"], np.concatenate([q, k, v]))
    np.testing.assert_array_equal(layer["gate_up"], np.concatenate([gate, up]))
    np.testing.assert_array_equal(
        layer["mlp_norm"], tensors[prefix + "post_attention_layernorm.weight"]
    )
    np.testing.assert_array_equal(params["lm_head"], tensors["lm_head.weight"])
    assert set(params) == {"embed", "final_norm", "lm_head", "layers"}
    assert set(layer) == {"attn_norm", "qkv", "o", "mlp_norm", "gate_up", "down"}


def test_params_tied_have_no_head(tmp_path):
    write_hf(tmp_path, tie_word_embeddings=True)
    params = load_hf_params(tmp_path, load_hf_config(tmp_path), dtype="float32")
    assert "lm_head" not in params


def test_params_tied_with_stored_head_must_agree(tmp_path):
    tensors = tiny_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_hf(tmp_path, tensors=tensors, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_views(tmp_path, "float32")
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    write_hf(tmp_path, tensors=tensors, tie_word_embeddings=True)
    with pytest.raises(ModelLoadError, match="lm_head.weight differs"):
        load_views(tmp_path, "float32")


def test_params_rope_buffers_are_ignored(tmp_path):
    tensors = tiny_tensors()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    write_hf(tmp_path, tensors=tensors)
    assert len(load_views(tmp_path, "float32")) == len(tensors) - 1


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_params_dtypes_convert_as_numpy_does(tmp_path, stored, dtype):
    tensors = {name: t.astype(stored) for name, t in tiny_tensors().items()}
    write_hf(tmp_path, tensors=tensors)
    target = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    for name, view in load_views(tmp_path, dtype).items():
        assert view.dtype == target
        np.testing.assert_array_equal(view, tensors[name].astype(target))


def drop(tensors):
    del tensors["model.layers.1.mlp.down_proj.weight"]


def add(tensors):
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)


def reshape(tensors):
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)


def retype(tensors):
    tensors["model.norm.weight"] = np.ones(32, np.int32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop, ["model.layers.1.mlp.down_proj.weight", "missing"]),
        (add, ["q_proj.bias", "unexpected"]),
        (reshape, ["down_proj.weight", "[64, 32]", "[32, 64]"]),
        (retype, ["model.norm.weight", "I32"]),
    ],
)
def test_params_other_tensors_than_needed_are_refused(tmp_path, change, words):
    tensors = tiny_tensors()
    change(tensors)
    write_hf(tmp_path, tensors=tensors)
    with pytest.raises(ModelLoadError) as raised:
        load_views(tmp_path, "float32")
    for word in words:
        assert word in str(raised.value)


def test_params_pickled_only_is_refused_unread(tmp_path):
    write_hf(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"pytorch_model\.bin.*refused"):
        load_views(tmp_path, "float32")


def test_params_no_weights_is_refused(tmp_path):
    write_hf(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"model\.safetensors"):
        load_views(tmp_path, "float32")


@pytest.mark.parametrize("keep_bytes", [0, 7, 100, 20_000])
def test_params_truncated_file_is_refused(tmp_path, keep_bytes):
    write_hf(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep_bytes])
    with pytest.raises(ModelLoadError, match=r"cannot read .*model\.safetensors"):
        load_views(tmp_path, "float32")


def split_tensors() -> dict[str, dict[str, np.ndarray]]:
    tensors = tiny_tensors()
    names = sorted(tensors)
    return {
        "a.safetensors": {name: tensors[name] for name in names[::2]},
        "b.safetensors": {name: tensors[name] for name in names[1::2]},
    }


def test_index_two_shards_load(tmp_path):
    write_index(write_hf(tmp_path), split_tensors())
    views = load_views(tmp_path, "float32")
    for name, tensor in tiny_tensors().items():
        np.testing.assert_array_equal(views[name], tensor)


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/etc/a.safetensors", "x/a.safetensors", "a.bin", 3]
)
def test_index_file_outside_directory_is_refused(tmp_path, name):
    write_index(write_hf(tmp_path), split_tensors())
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = name
    write_json(path, index)
    with pytest.raises(ModelLoadError, match=r"lm_head.weight.*same directory"):
        load_views(tmp_path, "float32")


def test_index_tensor_in_two_shards_is_refused(tmp_path):
    shards = split_tensors()
    write_index(write_hf(tmp_path), shards)
    twice = {**shards["b.safetensors"], **dict([min(shards["a.safetensors"].items())])}
    save_file(twice, tmp_path / "b.safetensors")
    with pytest.raises(ModelLoadError, match=r"lm_head.weight.*not placed there"):
        load_views(tmp_path, "float32")


def test_index_tensor_absent_from_shard_is_refused(tmp_path):
    shards = split_tensors()
    write_index(write_hf(tmp_path), shards)
    del shards["a.safetensors"]["lm_head.weight"]
    save_file(shards["a.safetensors"], tmp_path / "a.safetensors")
    with pytest.raises(ModelLoadError, match=r"lm_head.weight.*missing"):
        load_views(tmp_path, "float32")


def test_index_shard_file_absent_is_refused(tmp_path):
    write_index(write_hf(tmp_path), split_tensors())
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"cannot read .*b\.safetensors"):
        load_views(tmp_path, "float32")


@pytest.mark.parametrize("weight_map", [None, {}, []])
def test_index_without_map_is_refused(tmp_path, weight_map):
    write_index(write_hf(tmp_path), split_tensors())
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": weight_map})
    with pytest.raises(ModelLoadError, match="weight_map"):
        load_views(tmp_path, "float32")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_params_saved_by_transformers_are_equal(tmp_path, tied, sharded, stored):
    transformers = pytest.importorskip(
        "transformers", reason="oracle: Python 3.11 only"
    )
    torch = pytest.importorskip("torch", reason="oracle: Python 3.11 only")
    torch.manual_seed(3)
    rope = {**LLAMA3_ROPE, "rope_theta": 5e5} if tied else None
    config = transformers.LlamaConfig(
        **{**model_files.CONFIG, "tie_word_embeddings": tied},
        head_dim=16,
        rope_parameters=rope,
    )
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, stored))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    shard = {"max_shard_size": "10KB"} if sharded else {}
    model.save_pretrained(tmp_path, **shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded

    ours = load_hf_config(tmp_path)
    assert ours.tie_embeddings == tied
    assert ours.head_dim == 16
    assert (ours.rope_scaling is not None) == tied
    state = model.state_dict()
    for dtype in ("float32", "bfloat16"):
        views = load_views(tmp_path, dtype)
        assert set(views) == set(state) - ({"lm_head.weight"} if tied else set())
        for name, view in views.items():
            expected = state[name].to(getattr(torch, dtype)).float().numpy()
            np.testing.assert_array_equal(view.astype(np.float32), expected)
