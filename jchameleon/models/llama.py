"""Llama and its variants as Flax NNX modules over feature-major activations.

Mistral is Llama with another context rule, which the engine's limits keep; Qwen2 adds
biases to q, k and v; Qwen3 norms queries and keys per head. What a variant adds is in
the program only where its configuration says so.

A layer does not know where keys, values or adapters live: the caller passes `attend`
and `adapt`. Serving passes paged attention and multi-LoRA over the pool
(`runtime/programs.py`); training passes dense causal attention and one dense adapter
(`models/dense.py`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jchameleon.config import ModelConfig, RopeScaling
from jchameleon.pallas.product import Product, matmul

Attend = Callable[[jax.Array], jax.Array]
"""(qkv f[N, T], before norms and rotation: `LlamaLayer.split_heads`) -> f[H, HD, T]."""

Adapt = Callable[[str, jax.Array, jax.Array], jax.Array]
"""(group name, x f[d_in, T], y f[N, T]) -> y plus the group's LoRA product; y is the
base product, for "o" and "down" with the residual stream."""


def no_adapter(group: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the base model's product unchanged."""
    del group, x
    return y


class LlamaLayer(nnx.Module):
    """One pre-norm decoder layer with fused q|k|v and gate|up projections.

    Attributes:
      attn_norm, mlp_norm: f[D].
      qkv: f[(H + 2 KVH) HD, D], rows q | k | v.
      o: f[D, H HD].
      gate_up: f[2 F, D], rows gate | up.
      down: f[D, F].
      qkv_bias: f[(H + 2 KVH) HD], o_bias: f[D]; None without such biases.
      q_norm, k_norm: f[HD]; None without such norms.
    """

    def __init__(self, config: ModelConfig, params: Mapping[str, Any]):
        self.config = config
        self.attn_norm = nnx.Param(params["attn_norm"])
        self.qkv = nnx.Param(params["qkv"])
        self.o = nnx.Param(params["o"])
        self.mlp_norm = nnx.Param(params["mlp_norm"])
        self.gate_up = nnx.Param(params["gate_up"])
        self.down = nnx.Param(params["down"])
        self.qkv_bias = nnx.Param(params["qkv_bias"]) if config.qkv_bias else None
        self.o_bias = nnx.Param(params["o_bias"]) if config.o_bias else None
        self.q_norm = nnx.Param(params["q_norm"]) if config.qk_norm else None
        self.k_norm = nnx.Param(params["k_norm"]) if config.qk_norm else None

    def __call__(
        self,
        x: jax.Array,  # f[D, T]
        *,
        attend: Attend,
        adapt: Adapt = no_adapter,
        product: Product = matmul,
    ) -> jax.Array:  # f[D, T]
        """Return the residual stream after this layer."""
        config = self.config
        num_tokens = x.shape[1]
        with jax.named_scope("attention"):
            h = rms_norm(x, self.attn_norm[...], config.rms_norm_eps)
            y = add_bias(product(self.qkv[...], h), self.qkv_bias)
            qkv = adapt("qkv", h, y)  # [q_dim + 2 kv_dim, T]
            out = attend(qkv).reshape(config.q_dim, num_tokens)
            # The stream goes in: a form may add it while it writes the product.
            y = add_bias(product(self.o[...], out, x), self.o_bias)
            x = adapt("o", out, y)
        with jax.named_scope("mlp"):
            h = rms_norm(x, self.mlp_norm[...], config.rms_norm_eps)
            gate_up = adapt("gate_up", h, product(self.gate_up[...], h))  # [2 F, T]
            gate, up = jnp.split(gate_up, 2, axis=0)
            h = jax.nn.silu(gate) * up
            return adapt("down", h, product(self.down[...], h, x))

    def split_heads(
        self,
        qkv: jax.Array,  # f[N, T]
        rope: tuple[jax.Array, jax.Array],  # cos, sin: f32[HD / 2, T]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return q f[H, HD, T], k and v f[KVH, HD, T], as attention takes them."""
        config = self.config
        q, k, v = jnp.split(qkv, (config.q_dim, config.q_dim + config.kv_dim), axis=0)
        q = q.reshape(config.num_heads, config.head_dim, -1)
        k = k.reshape(config.num_kv_heads, config.head_dim, -1)
        if self.q_norm is not None and self.k_norm is not None:
            q = head_norm(q, self.q_norm[...], config.rms_norm_eps)
            k = head_norm(k, self.k_norm[...], config.rms_norm_eps)
        v = v.reshape(config.num_kv_heads, config.head_dim, -1)
        return apply_rope(q, rope), apply_rope(k, rope), v


class Llama(nnx.Module):
    """Embedding, layers, final norm and output head.

    Attributes:
      embed: f[V, D].
      final_norm: f[D].
      lm_head: f[V, D], or None when the embedding is tied.
    """

    def __init__(self, config: ModelConfig, params: Mapping[str, Any]):
        """Wrap a parameter tree (`models/loader.py`); nothing is copied or cast."""
        self.config = config
        self.embed = nnx.Param(params["embed"])
        self.layers = nnx.List(
            [LlamaLayer(config, layer) for layer in params["layers"]]
        )
        self.final_norm = nnx.Param(params["final_norm"])
        self.lm_head = None if config.tie_embeddings else nnx.Param(params["lm_head"])

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """Return f[D, T] for tokens i32[T]; ids must lie inside the vocabulary."""
        return self.embed[...].at[tokens].get(mode="promise_in_bounds").T

    def rope(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return (cos, sin), each f32[HD / 2, T], for positions i32[T]."""
        angles = (
            rope_frequencies(self.config)[:, None]
            * positions.astype(jnp.float32)[None, :]
        )
        return jnp.cos(angles), jnp.sin(angles)

    def logits(self, x: jax.Array, *, product: Product = matmul) -> jax.Array:
        """Return f[V, T] for the residual stream f[D, T] after the last layer."""
        h = rms_norm(x, self.final_norm[...], self.config.rms_norm_eps)
        head = self.embed if self.lm_head is None else self.lm_head
        return product(head[...], h)


@jax.named_scope("rms_norm")
def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Return x f[D, T] scaled to unit root mean square per token, times weight f[D]."""
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=0, keepdims=True) + eps)
    return weight[:, None] * (wide * scale).astype(x.dtype)


def head_norm(
    x: jax.Array,  # f[heads, HD, T]
    weight: jax.Array,  # f[HD]
    eps: float,
) -> jax.Array:  # f[heads, HD, T]
    """Norm every head by itself; all share one weight."""
    return jax.vmap(lambda head: rms_norm(head, weight, eps))(x)


def add_bias(y: jax.Array, bias: nnx.Param | None) -> jax.Array:
    """Return y f[N, T] plus bias f[N] in every column, y itself without one."""
    return y if bias is None else y + bias[...][:, None]


def rope_frequencies(config: ModelConfig) -> jax.Array:
    """Return f32[HD / 2], the rotary frequency of each pair of features.

    Su et al. 2021, `theta ** (-2 i / HD)`, stretched as `RopeScaling` says.
    """
    half = config.head_dim // 2
    exponent = jnp.arange(half, dtype=jnp.float32) / half
    frequencies = 1.0 / (jnp.float32(config.rope_theta) ** exponent)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    return _llama3_frequencies(frequencies, scaling)


def _llama3_frequencies(frequencies: jax.Array, scaling: RopeScaling) -> jax.Array:
    # Llama 3.1 release: wavelengths longer than original / low_freq_factor are
    # stretched by factor, shorter than original / high_freq_factor kept, and the
    # frequencies between blend linearly.
    turns = scaling.original_max_position * frequencies / (2 * jnp.pi)
    keep = jnp.clip(
        (turns - scaling.low_freq_factor)
        / (scaling.high_freq_factor - scaling.low_freq_factor),
        0.0,
        1.0,
    )
    return frequencies * (keep + (1.0 - keep) / scaling.factor)


def apply_rope(
    x: jax.Array,  # f[heads, HD, T]
    rope: tuple[jax.Array, jax.Array],  # cos, sin: f32[HD / 2, T]
) -> jax.Array:  # f[heads, HD, T]
    """Rotate feature i with feature i + HD / 2 (Hugging Face's convention)."""
    cos, sin = (table[None].astype(x.dtype) for table in rope)
    first, second = jnp.split(x, 2, axis=1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=1
    )
