"""What the kernels are held against: floors, and other forms of the same operations.

A floor is the larger of fewest bytes / bandwidth and operations / peak: every byte of
inputs and results crosses the bus once, true ranks alone count. The other forms are
XLA's own of each operation, and the two ways in which LoRA is batched without pages and
kernels: gather every token's adapter, or multiply by all adapters and mask.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from kernel_cases import (
    attention_inputs,
    attention_program,
    rope_program,
    split_and_rotate,
)
from kernel_timing import Program
from kernel_world import World, dense_slabs

from jchameleon.lora.layout import GroupLayout
from jchameleon.pallas.multi_lora import multi_lora
from jchameleon.pallas.paged_attention import paged_attention, write_kv

MOST_GATHERED_BYTES = 1 << 30
"""Gathered adapters beyond this are no baseline but an exhausted GPU."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Floor:
    """Fewest bytes and operations of one kernel."""

    bytes: int
    flops: int = 0

    def seconds(self, bandwidth_bytes_per_s: float, flops_per_s: float) -> float:
        """Return the least time at these peaks: bytes and operations overlap."""
        return max(self.bytes / bandwidth_bytes_per_s, self.flops / flops_per_s)


def lora_floor(world: World, group: GroupLayout, part: str) -> Floor:
    """Return the floor of "shrink", "expand" or "both".

    h (in the pool's type) crosses the bus between the two, not within both.
    """
    load, item = world.load, world.dtype.itemsize
    ranks = load.request_ranks
    columns = group.b_shape[1]
    a = len(group.projections) * group.d_in  # elements of a rank
    h = len(group.projections) * sum(ranks) * load.request_tokens
    x, y = load.tokens * group.d_in, load.tokens * columns
    elems = {
        "shrink": sum(ranks) * a + x + h,
        "expand": sum(ranks) * columns + h + 2 * y,
        "both": sum(ranks) * (a + columns) + x + 2 * y,
    }[part]
    width = {"shrink": a, "expand": columns, "both": a + columns}[part]
    return Floor(bytes=elems * item, flops=2 * sum(ranks) * load.request_tokens * width)


def attention_floor(world: World) -> Floor:
    """Return the floor of attention: each request's keys and values are read once."""
    model, load = world.model, world.load
    n, requests = load.context_tokens, len(load.request_ranks)
    seen = n if load.phase == "decode" else n * (n + 1) // 2
    elems = requests * n * model.kv_elems + 2 * load.tokens * model.q_dim
    return Floor(
        bytes=elems * world.dtype.itemsize, flops=4 * requests * seen * model.q_dim
    )


def rope_floor(world: World) -> Floor:
    """Return the floor of rotation and write: read q, k, v, cos, sin, write q, k, v."""
    model, tokens = world.model, world.load.tokens
    values = 2 * tokens * (model.q_dim + 2 * model.kv_dim) * world.dtype.itemsize
    return Floor(bytes=values + tokens * model.head_dim * 4)


def lora_program(form: Callable[..., Any]) -> Program:
    """Return the program of a form (pool, step, y, x) of the whole LoRA product."""

    def run(y: Any, inputs: Any) -> tuple[Any, Any]:
        pool, steps, arrays = inputs
        for step in steps:
            y = form(pool, step, y, arrays[1])
        return y, ()

    return run


def lora_forms(world: World, group: GroupLayout) -> dict[str, Callable[..., Any]]:
    """Return forms (pool, step, y, x) of the LoRA product, `step["slabs"]` being dense.

    The gathering form is left out where it would gather more than
    `MOST_GATHERED_BYTES`.
    """
    forms: dict[str, Callable[..., Any]] = {
        "xla": lambda pool, step, y, x: multi_lora(
            y, x, pool, step["xla_lora"], group=group
        ),
        "one-hot": lambda pool, step, y, x: _one_hot(step, y, x, group),
    }
    room = 8 * max(table.shape[0] for table in world.adapter_pages[0])
    width = len(group.projections) * group.d_in + group.b_shape[1]
    if world.load.tokens * room * width * world.dtype.itemsize <= MOST_GATHERED_BYTES:
        forms["gather"] = lambda pool, step, y, x: _gather(step, y, x, group)
    return forms


def add_slabs(world: World, group: GroupLayout) -> list[dict[str, Any]]:
    """Return the world's steps with each turn's adapters as dense arrays."""
    return [
        {**step, "slabs": dense_slabs(world, turn, group)}
        for turn, step in enumerate(world.steps)
    ]


def attention_baseline(world: World) -> tuple[Callable[..., Any], Program]:
    """Return XLA's form of attention (pool, step, q), and its program."""
    of = {"kv_heads": world.model.num_kv_heads, "block_tokens": world.block_tokens}

    def form(pool: jax.Array, step: Any, q: jax.Array) -> jax.Array:
        return paged_attention(q, pool, *attention_inputs(step), **of)

    return form, attention_program(form)


def rope_baseline(world: World) -> tuple[Callable[..., Any], Program]:
    """Return XLA's form of rotation and write, as the layer has it, and its program."""

    def form(pool: jax.Array, step: Any, arrays: Any) -> tuple[jax.Array, jax.Array]:
        q, k, v = split_and_rotate(world, arrays, world.dtype)
        pages, slots = step["kv_pages"], step["slots"]
        new = write_kv(pool, k, v, pages, slots, block_tokens=world.block_tokens)
        return q, new

    return form, rope_program(form)


def _add_parts(
    y: jax.Array, parts: list[jax.Array], group: GroupLayout
) -> jax.Array:  # f[N, T]
    for projection, part in zip(group.projections, parts, strict=True):
        start, size = group.out_columns[projection]
        y = y.at[start : start + size].add(part.astype(y.dtype))
    return y


def _gather(
    step: Any, y: jax.Array, x: jax.Array, group: GroupLayout
) -> jax.Array:  # f[N, T]
    """Add the product with one copy of A and B for every token."""
    a, b = step["slabs"]
    owner = step["token_adapter"]
    mine = (owner >= 0)[None, :]
    h = jnp.einsum("tprd,dt->ptr", a[owner], x)
    parts = []
    for p, projection in enumerate(group.projections):
        start, size = group.columns[projection]
        part = jnp.einsum("trn,tr->nt", b[owner][:, :, start : start + size], h[p])
        parts.append(jnp.where(mine, part, jnp.zeros((), part.dtype)))
    return _add_parts(y, parts, group)


def _one_hot(
    step: Any, y: jax.Array, x: jax.Array, group: GroupLayout
) -> jax.Array:  # f[N, T]
    """Add the product with all adapters, h of other tokens' adapters being zero."""
    a, b = step["slabs"]
    adapters = jnp.arange(a.shape[0], dtype=jnp.int32)
    mine = adapters[:, None] == step["token_adapter"][None, :]  # [S, T]
    h = jnp.einsum("sprd,dt->psrt", a, x)
    h = jnp.where(mine[None, :, None, :], h, jnp.zeros((), h.dtype))
    parts = []
    for p, projection in enumerate(group.projections):
        start, size = group.columns[projection]
        own = b[:, :, start : start + size]
        parts.append(jnp.einsum("srn,srt->nt", own, h[p]))
    return _add_parts(y, parts, group)
