"""The parameter tree: names, shapes, and where each checkpoint tensor lands in it.

{"embed": [V, D], "final_norm": [D], "lm_head": [V, D] unless tied,
 "layers": [{"attn_norm": [D], "qkv": [q_dim + 2 * kv_dim, D] (rows q | k | v),
             "o": [D, q_dim], "mlp_norm": [D], "gate_up": [2F, D] (rows gate | up),
             "down": [D, F]}, ...]}

Variants add to each layer "qkv_bias" [q_dim + 2 * kv_dim], "o_bias" [D], "q_norm" and
"k_norm" [HD]. Matrices are [out, in]. Tensor names are those of Hugging Face Llama,
Mistral, Qwen2 and Qwen3 checkpoints.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from jchameleon.config import ModelConfig
from jchameleon.errors import ConfigError

Params = dict[str, Any]

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def numpy_dtype(name: str) -> np.dtype:
    """Return the numpy dtype of a parameter dtype name.

    Raises:
      ConfigError: neither "float32" nor "bfloat16".
    """
    if name not in DTYPES:
        raise ConfigError(f"dtype={name!r} must be 'float32' or 'bfloat16'")
    return DTYPES[name]


def tensor_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (checkpoint tensor name, shape) for every tensor that `config` needs.

    Lazy, so that a config with absurd counts fails at its first missing tensor.
    """
    d = config.hidden_size
    yield "model.embed_tokens.weight", (config.vocab_size, d)
    yield "model.norm.weight", (d,)
    if not config.tie_embeddings:
        yield "lm_head.weight", (config.vocab_size, d)
    shapes = layer_tensor_shapes(config)
    for i in range(config.num_layers):
        for name, shape in shapes.items():
            yield f"model.layers.{i}.{name}", shape


def layer_tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return shape by name behind "model.layers.<i>." for the tensors of a layer."""
    d, f = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (config.q_dim, d),
        "self_attn.k_proj.weight": (config.kv_dim, d),
        "self_attn.v_proj.weight": (config.kv_dim, d),
        "self_attn.o_proj.weight": (d, config.q_dim),
        "post_attention_layernorm.weight": (d,),
        "mlp.gate_proj.weight": (f, d),
        "mlp.up_proj.weight": (f, d),
        "mlp.down_proj.weight": (d, f),
    }
    if config.qkv_bias:
        shapes["self_attn.q_proj.bias"] = (config.q_dim,)
        shapes["self_attn.k_proj.bias"] = (config.kv_dim,)
        shapes["self_attn.v_proj.bias"] = (config.kv_dim,)
    if config.o_bias:
        shapes["self_attn.o_proj.bias"] = (d,)
    if config.qk_norm:
        shapes["self_attn.q_norm.weight"] = (config.head_dim,)
        shapes["self_attn.k_norm.weight"] = (config.head_dim,)
    return shapes


def num_parameters(config: ModelConfig) -> int:
    """Return the number of parameters, tied ones once."""
    layer = sum(map(math.prod, layer_tensor_shapes(config).values()))
    outside = itertools.takewhile(
        lambda item: not item[0].startswith("model.layers."), tensor_shapes(config)
    )
    return sum(math.prod(shape) for _, shape in outside) + config.num_layers * layer


def param_shapes(config: ModelConfig) -> dict[str, Any]:
    """Return the parameter tree with a shape in the place of every array."""
    d, f = config.hidden_size, config.intermediate_size
    qkv_rows = config.q_dim + 2 * config.kv_dim
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (d,),
        "qkv": (qkv_rows, d),
        "o": (d, config.q_dim),
        "mlp_norm": (d,),
        "gate_up": (2 * f, d),
        "down": (d, f),
    }
    if config.qkv_bias:
        layer["qkv_bias"] = (qkv_rows,)
    if config.o_bias:
        layer["o_bias"] = (d,)
    if config.qk_norm:
        layer["q_norm"] = layer["k_norm"] = (config.head_dim,)
    shapes: dict[str, Any] = {
        "embed": (config.vocab_size, d),
        "final_norm": (d,),
        "layers": [dict(layer) for _ in range(config.num_layers)],
    }
    if not config.tie_embeddings:
        shapes["lm_head"] = (config.vocab_size, d)
    return shapes


ALIGNMENT_BYTES = 64
"""On a CPU jax takes an array as it is, without a copy, if it begins at a multiple of
this (XLA's `MinAlign`)."""


def allocate(config: ModelConfig, dtype: np.dtype) -> Params:
    """Return the parameter tree with every array allocated and none filled."""
    shapes = param_shapes(config)
    layers = shapes.pop("layers")
    params: Params = {name: _empty(shape, dtype) for name, shape in shapes.items()}
    params["layers"] = [
        {name: _empty(shape, dtype) for name, shape in layer.items()}
        for layer in layers
    ]
    return params


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an array that begins where a device array on a CPU may begin."""
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(num_bytes + ALIGNMENT_BYTES, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT_BYTES
    return memory[start : start + num_bytes].view(dtype).reshape(shape)


def tensor_views(config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """Return, by checkpoint tensor name, the writable view of `params` it fills."""
    views = {
        "model.embed_tokens.weight": params["embed"],
        "model.norm.weight": params["final_norm"],
    }
    if not config.tie_embeddings:
        views["lm_head.weight"] = params["lm_head"]
    k_start, v_start = config.q_dim, config.q_dim + config.kv_dim
    heads = {
        "q": slice(None, k_start),
        "k": slice(k_start, v_start),
        "v": slice(v_start, None),
    }
    up_start = config.intermediate_size
    for i, layer in enumerate(params["layers"]):
        name = f"model.layers.{i}."
        views[name + "input_layernorm.weight"] = layer["attn_norm"]
        for head, rows in heads.items():
            views[f"{name}self_attn.{head}_proj.weight"] = layer["qkv"][rows]
        views[name + "self_attn.o_proj.weight"] = layer["o"]
        views[name + "post_attention_layernorm.weight"] = layer["mlp_norm"]
        views[name + "mlp.gate_proj.weight"] = layer["gate_up"][:up_start]
        views[name + "mlp.up_proj.weight"] = layer["gate_up"][up_start:]
        views[name + "mlp.down_proj.weight"] = layer["down"]
        if config.qkv_bias:
            for head, rows in heads.items():
                views[f"{name}self_attn.{head}_proj.bias"] = layer["qkv_bias"][rows]
        if config.o_bias:
            views[name + "self_attn.o_proj.bias"] = layer["o_bias"]
        if config.qk_norm:
            views[name + "self_attn.q_norm.weight"] = layer["q_norm"]
            views[name + "self_attn.k_norm.weight"] = layer["k_norm"]
    return views


def random_params(config: ModelConfig, dtype: np.dtype, *, seed: int) -> Params:
    """Return a random tree.

    Norms are 1, biases 0, matrices normal with variance 1 / columns.
    """
    params = allocate(config, dtype)
    rng = np.random.default_rng(seed)
    for name, view in tensor_views(config, params).items():
        if view.ndim == 1:
            view[...] = 0.0 if name.endswith("bias") else 1.0
        else:
            values = rng.standard_normal(view.shape, dtype=np.float32)
            view[...] = (values / np.sqrt(np.float32(view.shape[1]))).astype(dtype)
    return params
