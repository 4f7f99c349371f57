"""The Llama forward pass over whole sequences: dense attention, one dense adapter.

Serving reads keys, values and adapters from pages; here they are plain arrays, every
function is pure, and gradients flow to the adapter. Training uses it, and it is the
other way to compute what serving computes.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jchameleon.config import PROJECTIONS, ModelConfig
from jchameleon.errors import InvalidRequestError
from jchameleon.lora.adapter import HostAdapter
from jchameleon.lora.layout import GROUPS
from jchameleon.models.llama import (
    Adapt,
    Llama,
    LlamaLayer,
    no_adapter,
    rms_norm,
)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("a", "b"), meta_fields=("scale",)
)
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DensePair:
    """The two factors of one module: y += scale * B @ (A @ x).

    Attributes:
      a: f[r, d_in].
      b: f[d_out, r].
      scale: part of the tree's structure, so that an optimiser leaves it alone.
    """

    a: jax.Array
    b: jax.Array
    scale: float


DenseAdapter = Sequence[Mapping[str, DensePair]]
"""Factors by layer and projection; a projection without an entry is the base's."""


def init_adapter(
    config: ModelConfig,
    key: jax.Array,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
) -> list[dict[str, DensePair]]:
    """Return a fresh f32 adapter that changes nothing yet, as PEFT initialises one.

    A is uniform within sqrt(3) * gain / sqrt(d_in) at gain = sqrt(2 / (1 + 5)), which
    is 1 / sqrt(d_in) (He et al. 2015 with a = sqrt(5)); B is zero.
    """
    layers = []
    for layer_key in jax.random.split(key, config.num_layers):
        pairs = {}
        for projection in targets:
            d_in, d_out = config.projection_shape(projection)
            bound = d_in**-0.5
            pairs[projection] = DensePair(
                a=jax.random.uniform(
                    jax.random.fold_in(layer_key, PROJECTIONS.index(projection)),
                    (rank, d_in),
                    jnp.float32,
                    minval=-bound,
                    maxval=bound,
                ),
                b=jnp.zeros((d_out, rank), jnp.float32),
                scale=alpha / rank,
            )
        layers.append(pairs)
    return layers


def from_host(adapter: HostAdapter, config: ModelConfig) -> list[dict[str, DensePair]]:
    """Return a loaded adapter in f32."""
    layers: list[dict[str, DensePair]] = [{} for _ in range(config.num_layers)]
    for (layer, projection), pair in adapter.modules.items():
        layers[layer][projection] = DensePair(
            a=jnp.asarray(pair.a, jnp.float32),
            b=jnp.asarray(pair.b, jnp.float32),
            scale=pair.scale,
        )
    return layers


def hidden_states(
    params: Mapping[str, Any],
    tokens: jax.Array,  # i32[B, T]
    *,
    config: ModelConfig,
    adapter: DenseAdapter | None = None,
    positions: jax.Array | None = None,  # i32[B, T]
    segments: jax.Array | None = None,  # i32[B, T]
    remat: bool = False,
) -> jax.Array:  # f[D, B * T]
    """Return the residual stream after the last layer, row after row of the batch.

    A token attends to itself and to earlier tokens of its row and segment, so padding
    behind a text needs no mask.

    Args:
      params: the tree of `jchameleon.models.params`, as jax arrays.
      positions: for RoPE; each row counts from 0 where absent.
      segments: texts that share a row carry different numbers; one text where absent.
      remat: keep only each layer's input for the backward pass and compute the layer
        again, a third more work for a fraction of the memory.

    Raises:
      InvalidRequestError: rows are longer than the model's sliding window.
    """
    rows, length = tokens.shape
    if config.sliding_window is not None and length > config.sliding_window:
        raise InvalidRequestError(
            f"rows of {length} tokens exceed the model's sliding window of "
            f"{config.sliding_window}; attention beyond it is not supported"
        )
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(length)[None], (rows, length))
    visible = jnp.tril(jnp.ones((length, length), bool))[None]
    if segments is not None:
        visible = visible & (segments[:, :, None] == segments[:, None, :])
    model = Llama(config, params)
    rope = model.rope(positions.reshape(-1))
    x = model.embed_tokens(tokens.reshape(-1))
    layer = jax.checkpoint(_layer, static_argnums=(5,)) if remat else _layer
    for i, layer_params in enumerate(params["layers"]):
        pairs = {} if adapter is None else adapter[i]
        x = layer(layer_params, x, rope, visible, pairs, config)
    return x


def dense_logits(
    params: Mapping[str, Any],
    tokens: jax.Array,  # i32[B, T]
    *,
    config: ModelConfig,
    adapter: DenseAdapter | None = None,
) -> jax.Array:  # f32[B, T, V]
    """Return the logits of every token of a batch of texts."""
    x = hidden_states(params, tokens, config=config, adapter=adapter)
    logits = Llama(config, params).logits(x).T.astype(jnp.float32)
    return logits.reshape(*tokens.shape, config.vocab_size)


def completion_loss(
    adapter: DenseAdapter,
    params: Mapping[str, Any],
    tokens: jax.Array,  # i32[B, T]
    positions: jax.Array,  # i32[B, T]
    segments: jax.Array,  # i32[B, T]
    sources: jax.Array,  # i32[N], indices into the B * T tokens
    labels: jax.Array,  # i32[N], the token after each of them; -1 pads
    *,
    config: ModelConfig,
    remat: bool = False,
) -> jax.Array:  # f32[]
    """Return the mean cross-entropy of `labels`.

    Logits exist for `sources` only: the output head is a fifth of a small model.
    """
    x = hidden_states(
        params,
        tokens,
        config=config,
        adapter=adapter,
        positions=positions,
        segments=segments,
        remat=remat,
    )
    h = rms_norm(x[:, sources], params["final_norm"], config.rms_norm_eps)  # [D, N]
    head = params["embed" if config.tie_embeddings else "lm_head"]
    totals = jax.nn.logsumexp((head @ h).astype(jnp.float32), axis=0)
    # Not picked from the logits: the gradient of that is a scatter into [V, N].
    picked = jnp.einsum(
        "nd,dn->n",
        head[jnp.maximum(labels, 0)],
        h,
        preferred_element_type=jnp.float32,
    )
    counted = labels >= 0
    count = jnp.maximum(jnp.sum(counted), 1).astype(jnp.float32)
    return jnp.sum(totals - picked, where=counted) / count


@functools.partial(jax.jit, static_argnums=(5,))
def _layer(
    params: Mapping[str, jax.Array],
    x: jax.Array,  # f[D, B * T]
    rope: tuple[jax.Array, jax.Array],
    visible: jax.Array,  # bool[B or 1, T, T]
    pairs: Mapping[str, DensePair],
    config: ModelConfig,
) -> jax.Array:  # f[D, B * T]
    layer = LlamaLayer(config, params)
    adapt = adapt_with(pairs, config) if pairs else no_adapter
    attend = attend_within(visible)
    return layer(
        x, attend=lambda qkv: attend(*layer.split_heads(qkv, rope)), adapt=adapt
    )


def attend_within(
    visible: jax.Array,  # bool[B or 1, T, T], a query's keys along the last axis
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Return dense attention over rows of T tokens, of what `split_heads` returns."""
    length = visible.shape[-1]
    # Keys go along the second axis from the end, so that features come first in every
    # product, as outside.
    bias = jnp.where(visible, 0.0, -1e30).astype(jnp.float32).mT  # [B or 1, S, T]

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        num_heads, head_dim, _ = q.shape
        kv_heads = k.shape[0]
        group = num_heads // kv_heads
        q = (q * head_dim**-0.5).reshape(kv_heads, group, head_dim, -1, length)
        k = k.reshape(kv_heads, head_dim, -1, length)
        v = v.reshape(kv_heads, head_dim, -1, length)
        # [B, KVH, HD, G, T], the group's queries side by side
        q = q.transpose(3, 0, 2, 1, 4).reshape(-1, kv_heads, head_dim, group * length)
        scores = (k.transpose(2, 0, 3, 1) @ q).astype(jnp.float32)
        scores = scores.reshape(-1, kv_heads, length, group, length)
        weights = jax.nn.softmax(scores + bias[:, None, :, None], axis=2)
        weights = weights.astype(v.dtype).reshape(-1, kv_heads, length, group * length)
        out = v.transpose(2, 0, 1, 3) @ weights  # [B, KVH, HD, G * T]
        out = out.reshape(-1, kv_heads, head_dim, group, length)
        return out.transpose(1, 3, 2, 0, 4).reshape(num_heads, head_dim, -1)

    return attend


def adapt_with(pairs: Mapping[str, DensePair], config: ModelConfig) -> Adapt:
    """Return the LoRA products of one layer, as `LlamaLayer` calls them."""

    def adapt(group: str, x: jax.Array, y: jax.Array) -> jax.Array:
        projections = GROUPS[group]
        if not any(projection in pairs for projection in projections):
            return y
        return y + jnp.concatenate([product(p, x, y) for p in projections])

    def product(projection: str, x: jax.Array, y: jax.Array) -> jax.Array:
        if projection not in pairs:
            d_out = config.projection_shape(projection)[1]
            return jnp.zeros((d_out, y.shape[1]), y.dtype)
        pair = pairs[projection]
        low = pair.a.astype(x.dtype) @ x  # [r, B * T]
        return (pair.b * pair.scale).astype(x.dtype) @ low

    return adapt
