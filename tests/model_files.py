"""Tiny checkpoints on disk, written without the code under test."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def tiny_tensors(
    seed: int = 0, *, tied: bool = False, qkv_bias: bool = False, qk_norm: bool = False
) -> dict[str, np.ndarray]:
    """Return random f32 tensors of `CONFIG` by Hugging Face name."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (96, 32), "model.norm.weight": (32,)}
    if not tied:
        shapes["lm_head.weight"] = (96, 32)
    for i in range(2):
        for name, shape in {
            "input_layernorm": (32,),
            "post_attention_layernorm": (32,),
            "self_attn.q_proj": (32, 32),
            "self_attn.k_proj": (16, 32),
            "self_attn.v_proj": (16, 32),
            "self_attn.o_proj": (32, 32),
            "mlp.gate_proj": (64, 32),
            "mlp.up_proj": (64, 32),
            "mlp.down_proj": (32, 64),
        }.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
        if qkv_bias:
            for head, size in {"q": 32, "k": 16, "v": 16}.items():
                shapes[f"model.layers.{i}.self_attn.{head}_proj.bias"] = (size,)
        if qk_norm:
            for head in "qk":
                shapes[f"model.layers.{i}.self_attn.{head}_norm.weight"] = (8,)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write_hf(
    directory: Path,
    *,
    tensors: dict[str, np.ndarray] | None = None,
    **overrides: Any,
) -> Path:
    """Write config.json and model.safetensors; an override of None drops the field."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **overrides}
    write_json(
        directory / "config.json", {k: v for k, v in config.items() if v is not None}
    )
    if tensors is None:
        tensors = tiny_tensors(tied=config["tie_word_embeddings"])
    save_file(tensors, directory / "model.safetensors")
    return directory


def write_index(directory: Path, shards: dict[str, dict[str, np.ndarray]]) -> None:
    """Replace model.safetensors by `shards` and the index that describes them."""
    (directory / "model.safetensors").unlink()
    for name, tensors in shards.items():
        save_file(tensors, directory / name)
    weight_map = {t: name for name, tensors in shards.items() for t in tensors}
    write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": 0}, "weight_map": weight_map},
    )


GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""What GGUF calls the tensors of a layer."""

GGUF_FIELDS: dict[str, Any] = {
    "llama.block_count": 2,
    "llama.context_length": 128,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": 8,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def gguf_name(name: str) -> str:
    """Translate a Hugging Face tensor name."""
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    _, _, layer, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{GGUF_NAMES[module]}.{kind}"


def interleave(matrix: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder the rows of a q or k matrix from HF's order to GGUF's, head by head."""
    heads = []
    for head in np.split(matrix, num_heads):
        first, second = np.split(head, 2)
        rows = [row for pair in zip(first, second, strict=True) for row in pair]
        heads.append(np.stack(rows))
    return np.concatenate(heads)


def write_gguf(
    path: Path,
    *,
    tensors: dict[str, np.ndarray] | None = None,
    types: dict[str, gguf.GGMLQuantizationType] | None = None,
    extra: dict[str, Any] | None = None,
    architecture: str = "llama",
    **fields: Any,
) -> Path:
    """Write a GGUF of HF-named `tensors`.

    Args:
      types: by HF name, how to quantise; F32 where absent.
      extra: further tensors under their GGUF names: an array, or (blocks, type).
      architecture: only Llama files hold q and k rows interleaved.
      fields: metadata with "__" for "."; None drops a field.
    """
    tensors = tiny_tensors() if tensors is None else tensors
    writer = gguf.GGUFWriter(path, architecture)
    given = {key.replace("__", "."): value for key, value in fields.items()}
    fields = {
        key.replace("llama.", f"{architecture}."): value
        for key, value in GGUF_FIELDS.items()
    }
    for key, value in {**fields, **given}.items():
        if value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        if architecture == "llama" and "q_proj" in name:
            tensor = interleave(tensor, 4)
        elif architecture == "llama" and "k_proj" in name:
            tensor = interleave(tensor, 2)
        kind = (types or {}).get(name, gguf.GGMLQuantizationType.F32)
        data = gguf.quants.quantize(tensor, kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
    for name, tensor in (extra or {}).items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
