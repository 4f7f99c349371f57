"""The parameter tree: names, shapes, and where each checkpoint tensor lands in it.

{"embed": [V, D], "final_norm": [D], "lm_head": [V, D] unless tied,
 "layers": [{"attn_norm": [D], "qkv": [q_dim + 2 * kv_dim, D] (rows q | k | v),
             "o": [D, q_dim], "mlp_norm": [D], "gate_up": [2F, D] (rows gate | up),
             "down": [D, F]}, ...]}

Matrices are [out, in]. Tensor names are those of Hugging Face Llama checkpoints.
"""

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
    d, f = config.hidden_size, config.intermediate_size
    yield "model.embed_tokens.weight", (config.vocab_size, d)
    yield "model.norm.weight", (d,)
    if not config.tie_embeddings:
        yield "lm_head.weight", (config.vocab_size, d)
    for i in range(config.num_layers):
        layer = f"model.layers.{i}."
        yield layer + "input_layernorm.weight", (d,)
        yield layer + "self_attn.q_proj.weight", (config.q_dim, d)
        yield layer + "self_attn.k_proj.weight", (config.kv_dim, d)
        yield layer + "self_attn.v_proj.weight", (config.kv_dim, d)
        yield layer + "self_attn.o_proj.weight", (d, config.q_dim)
        yield layer + "post_attention_layernorm.weight", (d,)
        yield layer + "mlp.gate_proj.weight", (f, d)
        yield layer + "mlp.up_proj.weight", (f, d)
        yield layer + "mlp.down_proj.weight", (d, f)


def allocate(config: ModelConfig, dtype: np.dtype) -> Params:
    """Return the parameter tree with every array allocated and none filled."""
    d, f = config.hidden_size, config.intermediate_size

    def layer() -> dict[str, np.ndarray]:
        return {
            "attn_norm": np.empty(d, dtype),
            "qkv": np.empty((config.q_dim + 2 * config.kv_dim, d), dtype),
            "o": np.empty((d, config.q_dim), dtype),
            "mlp_norm": np.empty(d, dtype),
            "gate_up": np.empty((2 * f, d), dtype),
            "down": np.empty((d, f), dtype),
        }

    params: Params = {
        "embed": np.empty((config.vocab_size, d), dtype),
        "final_norm": np.empty(d, dtype),
        "layers": [layer() for _ in range(config.num_layers)],
    }
    if not config.tie_embeddings:
        params["lm_head"] = np.empty((config.vocab_size, d), dtype)
    return params


def tensor_views(config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """Return, by checkpoint tensor name, the writable view of `params` it fills."""
    views = {
        "model.embed_tokens.weight": params["embed"],
        "model.norm.weight": params["final_norm"],
    }
    if not config.tie_embeddings:
        views["lm_head.weight"] = params["lm_head"]
    k_start, v_start = config.q_dim, config.q_dim + config.kv_dim
    for i, layer in enumerate(params["layers"]):
        name = f"model.layers.{i}."
        views[name + "input_layernorm.weight"] = layer["attn_norm"]
        views[name + "self_attn.q_proj.weight"] = layer["qkv"][:k_start]
        views[name + "self_attn.k_proj.weight"] = layer["qkv"][k_start:v_start]
        views[name + "self_attn.v_proj.weight"] = layer["qkv"][v_start:]
        views[name + "self_attn.o_proj.weight"] = layer["o"]
        views[name + "post_attention_layernorm.weight"] = layer["mlp_norm"]
        views[name + "mlp.gate_proj.weight"] = layer["gate_up"][
            : config.intermediate_size
        ]
        views[name + "mlp.up_proj.weight"] = layer["gate_up"][
            config.intermediate_size :
        ]
        views[name + "mlp.down_proj.weight"] = layer["down"]
    return views


def random_params(config: ModelConfig, dtype: np.dtype, *, seed: int) -> Params:
    """Return a random tree: norms are 1, matrices normal with variance 1 / columns."""
    params = allocate(config, dtype)
    rng = np.random.default_rng(seed)
    for view in tensor_views(config, params).values():
        if view.ndim == 1:
            view[...] = 1.0
        else:
            values = rng.standard_normal(view.shape, dtype=np.float32)
            view[...] = (values / np.sqrt(np.float32(view.shape[1]))).astype(dtype)
    return params
