"""The step program: tokens in, logits and an updated pool out.

Prefill and decode are one traced function at two tile widths. Layers are unrolled (a
scan over stacked weights copies every weight each step) and each is one inner `jit`,
so tracing cost does not grow with depth.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jchameleon.config import ModelConfig
from jchameleon.lora.layout import ChunkLayout
from jchameleon.models.llama import Llama
from jchameleon.models.params import Params, param_shapes
from jchameleon.pallas.operations import XLA, Operations, compile_operations


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepBatch:
    """Everything a step needs beside parameters and pool.

    Attributes:
      tokens: i32[T].
      positions: i32[T]; 0 for padding.
      kv_pages: i32[T], page that takes each token's key and value.
      page_table: i32[NT, NB], pages of each tile's request; 0 pads.
      context_tokens: i32[NT], last position of the tile + 1; 1 for padding.
      logit_tokens: i32[R], the tokens whose logits are wanted: one of each tile,
        and padding up to the rows of a sampler.
      lora: the adapters' work list, as the operations build it.
      blocks: i32[NT, 3], tiles that attention takes together; None where the operations
        have no use for them.
    """

    tokens: jax.Array
    positions: jax.Array
    kv_pages: jax.Array
    page_table: jax.Array
    context_tokens: jax.Array
    logit_tokens: jax.Array
    lora: Any
    blocks: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class ModelParams:
    """A model split into what a program is compiled for and what it is called with.

    Attributes:
      treedef: structure of the NNX module, and of each of its layers by itself.
      leaves: the parameter arrays, in the order of `treedef`. A flat tuple keeps
        dispatch cheap: no module is walked per step.
    """

    treedef: Any
    leaves: tuple[jax.Array, ...]

    @classmethod
    def from_model(cls, model: Llama) -> "ModelParams":
        """Split `model`; the arrays are shared, not copied."""
        graphdef, state = nnx.split(model)
        leaves, state_treedef = jax.tree.flatten(state)
        places = {id(leaf): place for place, leaf in enumerate(leaves)}
        layers = []
        # Once here: splitting a layer takes 5 ms, and every trace needs all of them.
        for layer in model.layers:
            layer_def, layer_state = nnx.split(layer)
            own, own_treedef = jax.tree.flatten(layer_state)
            layers.append((layer_def, own_treedef, [places[id(leaf)] for leaf in own]))
        return cls((graphdef, state_treedef, layers), tuple(leaves))

    @property
    def num_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(leaf.nbytes for leaf in self.leaves)


def merge_model(treedef: Any, leaves: Sequence[jax.Array]) -> Llama:
    """Rebuild the NNX module inside a traced function."""
    graphdef, state_treedef, _ = treedef
    return nnx.merge(graphdef, jax.tree.unflatten(state_treedef, leaves))


def host_params(params: ModelParams) -> Params:
    """Return the parameter tree as numpy arrays; on a CPU they share memory."""
    model = merge_model(params.treedef, params.leaves)
    names = param_shapes(model.config)
    layers = zip(model.layers, names.pop("layers"), strict=True)
    tree: Params = {name: np.asarray(getattr(model, name)[...]) for name in names}
    tree["layers"] = [
        {name: np.asarray(getattr(layer, name)[...]) for name in layer_names}
        for layer, layer_names in layers
    ]
    return tree


def model_step(
    leaves: tuple[jax.Array, ...],
    pools: list[jax.Array],  # L of f[P, E], donated
    batch: StepBatch,
    *,
    treedef: Any,
    layout: ChunkLayout,
    block_tokens: int,
    ops: Operations = XLA,
) -> tuple[jax.Array, list[jax.Array], jax.Array]:
    """Return logits f32[V, R] of `logit_tokens`, the new pools and the stream f[D, T].

    The residual stream after all layers is what prompt tokens are scored from.
    """
    model = merge_model(treedef, leaves)
    rope = model.rope(batch.positions)
    x = model.embed_tokens(batch.tokens)
    new_pools = []
    for (graphdef, state_treedef, places), pool in zip(treedef[2], pools, strict=True):
        x, pool = _layer_step(
            jax.tree.unflatten(state_treedef, [leaves[place] for place in places]),
            x,
            rope,
            pool,
            batch,
            graphdef=graphdef,
            layout=layout,
            block_tokens=block_tokens,
            ops=ops,
        )
        new_pools.append(pool)
    logits = model.logits(x[:, batch.logit_tokens], product=ops.product)
    return logits.astype(jnp.float32), new_pools, x


@functools.partial(
    jax.jit, static_argnames=("graphdef", "layout", "block_tokens", "ops")
)
def _layer_step(
    state: Any,
    x: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    pool: jax.Array,
    batch: StepBatch,
    *,
    graphdef: Any,
    layout: ChunkLayout,
    block_tokens: int,
    ops: Operations,
) -> tuple[jax.Array, jax.Array]:
    layer = nnx.merge(graphdef, state)
    config: ModelConfig = layer.config
    groups = {group.name: group for group in layout.groups}
    # One value of the pool is alive at a time, so XLA updates it in place: after
    # `attend` the adapters too are read from the pool that holds this step's keys.
    new_pool = pool
    blocks = {} if batch.blocks is None else {"blocks": batch.blocks}

    def write(qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return rotated queries f[H, HD, T] and the pool with keys and values."""
        slots = batch.positions % block_tokens
        if ops.rope_write is None:
            q, k, v = layer.split_heads(qkv, rope)
            return q, ops.write_kv(
                pool, k, v, batch.kv_pages, slots, block_tokens=block_tokens
            )
        return ops.rope_write(
            qkv,
            pool,
            rope,
            batch.kv_pages,
            slots,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            block_tokens=block_tokens,
            q_norm=None if layer.q_norm is None else layer.q_norm[...],
            k_norm=None if layer.k_norm is None else layer.k_norm[...],
            eps=config.rms_norm_eps,
        )

    def attend(qkv: jax.Array) -> jax.Array:
        nonlocal new_pool
        with jax.named_scope("write_kv"):
            q, new_pool = write(qkv)
        with jax.named_scope("paged_attention"):
            return ops.paged_attention(
                q,
                new_pool,
                batch.page_table,
                batch.positions,
                batch.context_tokens,
                kv_heads=config.num_kv_heads,
                block_tokens=block_tokens,
                **blocks,
            )

    def adapt(name: str, h: jax.Array, y: jax.Array) -> jax.Array:
        if name not in groups:
            return y
        with jax.named_scope("multi_lora"):
            return ops.multi_lora(y, h, new_pool, batch.lora, group=groups[name])

    x = layer(x, attend=attend, adapt=adapt, product=ops.product)
    return x, new_pool


def compile_step(
    params: ModelParams,
    pools: Sequence[Any],  # L of f[P, E]
    batch: StepBatch,
    *,
    layout: ChunkLayout,
    block_tokens: int,
    ops: Operations = XLA,
) -> Any:
    """Compile `model_step` for these shapes; arrays or what describes them will do.

    Called with (leaves, pools, batch) of the same shapes; the pools are donated.
    """
    step = functools.partial(
        model_step,
        treedef=params.treedef,
        layout=layout,
        block_tokens=block_tokens,
        ops=ops,
    )
    lowered = jax.jit(step, donate_argnums=1).lower(params.leaves, list(pools), batch)
    compile_operations(ops)  # from now on XLA looks for them
    return lowered.compile()


def compile_commit(
    pools: Sequence[Any],  # L of f[P, E]
    num_pages: int,
) -> Any:
    """Compile `commit_load` for pieces of `num_pages`; the pools are donated."""
    pool = pools[0]
    block = jax.ShapeDtypeStruct(
        (len(pools), num_pages, pool.shape[1]), pool.dtype, sharding=pool.sharding
    )
    return (
        jax.jit(commit_load, donate_argnums=0)
        .lower(list(pools), np.zeros(num_pages, np.int32), block)
        .compile()
    )


def commit_load(
    pools: list[jax.Array],  # L of f[P, E], donated
    pages: jax.Array,  # i32[N]
    block: jax.Array,  # f[L, N, E]
) -> list[jax.Array]:
    """Return the pools with a loaded piece of an adapter in its pages.

    Padding rows repeat a real row with its page, so writing them twice is harmless;
    that is why the indices are not declared unique.
    """
    return [
        pool.at[pages].set(block[layer], mode="promise_in_bounds")
        for layer, pool in enumerate(pools)
    ]
