"""The kernels of a step as cases: what runs, with which block sizes, and what is right.

A case's program runs its kernel once for every turn of the world. Where a kernel's
result can be the next one's input it is (y, queries, the pool), so that turns cannot
overlap; shrink's results are all returned instead.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kernel_timing import Program
from kernel_world import QUERY_SCALE, World

from jchameleon.lora.layout import GroupLayout
from jchameleon.models.llama import apply_rope
from jchameleon.pallas import reference
from jchameleon.pallas.gpu_attention import (
    decode_config,
    decode_key,
    paged_attention_gpu,
)
from jchameleon.pallas.gpu_kv import kv_config, rope_write_gpu, rope_write_key
from jchameleon.pallas.gpu_lora import expand_call, multi_lora_gpu, shrink_call
from jchameleon.pallas.gpu_lora_config import (
    choose_expand,
    choose_shrink,
    expand_key,
    shrink_key,
)
from jchameleon.pallas.gpu_pages import power_of_two
from jchameleon.pallas.gpu_prefill_attention import (
    attention_block_tiles,
    prefill_config,
    prefill_key,
)
from jchameleon.pallas.tuned import Key

TOLERANCE = {"bfloat16": 0.02, "float32": 1e-3}
"""Of the largest magnitude of a result. bfloat16 rounds to 0.004 of a value, weights
and sums of products more than once; float32 products are no TF32 in kernels, but
exponentials are approximate."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A kernel with its inputs.

    Inputs are arguments of programs: constants would be compiled into them.

    Attributes:
      name: the operation's, with the group's where there are several.
      key: what a table of block sizes knows it by.
      chosen: the configuration without a table.
      make_arrays: inputs beside the pool and the steps.
      make_state: what the first call of a program takes.
      program: configuration -> program over (state, (pool, steps, arrays)).
      values: configuration -> function (pool, step, arrays) -> the kernel's results.
      reference: the same function by plain operations.
      group: of a LoRA case.
    """

    name: str
    key: Key
    chosen: Any
    make_arrays: Callable[[], Any]
    make_state: Callable[[], Any]
    program: Callable[[Any], Program]
    values: Callable[[Any], Callable[..., Any]]
    reference: Callable[..., Any]
    group: GroupLayout | None = None


def all_cases(world: World) -> list[Case]:
    """Return every kernel with block sizes that a step of this world runs."""
    return [*lora_cases(world), attention_case(world), rope_case(world)]


def worst_error(found: Any, expected: Any) -> float:
    """Return the largest error, in units of the largest magnitude; NaN counts."""
    worst = 0.0
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for one, other in pairs:
        one, other = (np.asarray(a).astype(np.float64) for a in (one, other))
        error = np.abs(one - other).max() / max(np.abs(other).max(), 1e-6)
        worst = max(worst, float(error)) if np.isfinite(error) else float("inf")
    return worst


def lora_inputs(world: World, group: GroupLayout) -> tuple[jax.Array, jax.Array]:
    """Return y f[N, T] and x f[d_in, T]."""
    rows = max(sum(group.out_columns[p]) for p in group.projections)
    tokens = world.load.tokens
    return world.random(rows, tokens, seed=2), world.random(group.d_in, tokens, seed=3)


def lora_cases(world: World) -> Iterator[Case]:
    """Return shrink and expand of each group."""
    for group in world.layout.groups:
        yield from _lora_group(world, group)


def _lora_group(world: World, group: GroupLayout) -> Iterator[Case]:
    work = world.steps[0]["lora"]
    page_elems = world.layout.page_elems
    items, blocks = work.items.shape[1], work.blocks.shape[1]
    prefill = world.load.phase == "prefill"
    of_key: dict[str, Any] = {"prefill": prefill, "dtype": world.dtype}
    of_key["num_tokens"] = world.load.tokens
    of_choice: dict[str, Any] = {
        "prefill": prefill,
        "elem_bytes": world.dtype.itemsize,
        "arch": world.arch,
    }
    shrink = choose_shrink(group, page_elems, num_items=items, **of_choice)
    expand = choose_expand(group, page_elems, num_blocks=blocks, **of_choice)
    of_call: dict[str, Any] = {"group": group, "interpret": world.interpret}

    def shrink_program(config: Any) -> Program:
        def run(state: Any, inputs: Any) -> tuple[Any, Any]:
            pool, steps, _ = inputs
            call = functools.partial(shrink_call, config=config, **of_call)
            # Every h is returned: XLA drops what nobody takes.
            return state, [call(state, pool, step["lora"]) for step in steps]

        return run

    def expand_program(config: Any) -> Program:
        def run(state: Any, inputs: Any) -> tuple[Any, Any]:
            pool, steps, _ = inputs
            y, h = state
            for step in steps:
                y = expand_call(y, h, pool, step["lora"], config=config, **of_call)
            return (y, h), ()

        return run

    def expand_state() -> Any:
        y, x = lora_inputs(world, group)
        call = functools.partial(shrink_call, config=shrink, **of_call)
        h = jax.eval_shape(call, x.T, world.pool, work)
        return jnp.array(y.T), world.random(*h.shape, seed=4).astype(h.dtype)

    def both(**configs: Any) -> Callable[..., Any]:
        configs = {"shrink": shrink, "expand": expand, **configs}
        return lambda pool, step, arrays: multi_lora_gpu(
            *arrays, pool, step["lora"], **of_call, **configs
        )

    def by_reference(pool: jax.Array, step: Any, arrays: Any) -> jax.Array:
        lora = step["xla_lora"]
        return reference.multi_lora_reference(*arrays, pool, lora, group=group)

    common: dict[str, Any] = {
        "make_arrays": lambda: lora_inputs(world, group),
        "reference": by_reference,
        "group": group,
    }
    yield Case(
        name=f"lora_shrink {group.name}",
        key=shrink_key(group, page_elems, num_items=items, **of_key),
        chosen=shrink,
        make_state=lambda: jnp.array(lora_inputs(world, group)[1].T),
        program=shrink_program,
        values=lambda config: both(shrink=config),
        **common,
    )
    yield Case(
        name=f"lora_expand {group.name}",
        key=expand_key(group, page_elems, num_blocks=blocks, **of_key),
        chosen=expand,
        make_state=expand_state,
        program=expand_program,
        values=lambda config: both(expand=config),
        **common,
    )


def attention_inputs(step: Any) -> tuple[Any, ...]:
    """Return what all forms of attention take after queries and pool."""
    return step["table"], step["positions"], step["context"]


def attention_program(form: Callable[..., Any]) -> Program:
    """Return the program of a form (pool, step, q) of attention."""

    def run(q: Any, inputs: Any) -> tuple[Any, Any]:
        pool, steps, _ = inputs
        for step in steps:
            q = form(pool, step, q)
        return q, ()

    return run


def attention_case(world: World) -> Case:
    """Return attention of the world's phase."""
    model, load = world.model, world.load
    heads, kv_heads, head_dim = model.num_heads, model.num_kv_heads, model.head_dim
    of: dict[str, Any] = {"kv_heads": kv_heads, "block_tokens": world.block_tokens}

    def queries() -> jax.Array:
        return world.random(heads, head_dim, load.tokens, scale=QUERY_SCALE, seed=5)

    if load.phase == "decode":
        key = decode_key(
            load.tokens,
            heads,
            kv_heads,
            head_dim,
            block_tokens=world.block_tokens,
            max_context_tokens=world.max_context_tokens,
            dtype=world.dtype,
        )
        chosen: Any = decode_config(
            load.tokens, kv_heads, head_dim, world.max_context_tokens, arch=world.arch
        )
    else:
        tile = load.tokens // len(world.steps[0]["table"])
        query_tokens = tile * attention_block_tiles(
            heads, kv_heads, head_dim, world.dtype, tile_tokens=tile
        )
        key = prefill_key(
            load.tokens,
            query_tokens,
            heads,
            kv_heads,
            head_dim,
            block_tokens=world.block_tokens,
            dtype=world.dtype,
        )
        rows = query_tokens * power_of_two(heads // kv_heads)
        chosen = prefill_config(rows, head_dim, world.dtype, arch=world.arch)

    def form(config: Any) -> Callable[..., Any]:
        return lambda pool, step, q: paged_attention_gpu(
            q,
            pool,
            *attention_inputs(step),
            blocks=step["blocks"],
            config=config,
            interpret=world.interpret,
            **of,
        )

    return Case(
        name=key.op,
        key=key,
        chosen=chosen,
        make_arrays=queries,
        make_state=queries,
        program=lambda config: attention_program(form(config)),
        values=form,
        reference=lambda pool, step, q: reference.paged_attention_reference(
            q, pool, *attention_inputs(step), **of
        ),
    )


def rope_inputs(world: World) -> dict[str, Any]:
    """Return qkv f[N, T] and the tables of rotation, cos and sin f32[HD / 2, T]."""
    model, tokens = world.model, world.load.tokens
    heads = model.num_heads + 2 * model.num_kv_heads
    half = model.head_dim // 2
    angles = jax.random.uniform(jax.random.key(6), (half, tokens), maxval=6.0)
    return {
        "qkv": world.random(heads * model.head_dim, tokens, seed=7),
        "rope": (jnp.cos(angles), jnp.sin(angles)),
    }


def rope_program(form: Callable[..., Any]) -> Program:
    """Return the program of a form (pool, step, arrays) -> (q, pool)."""

    def run(pool: Any, inputs: Any) -> tuple[Any, Any]:
        _, steps, arrays = inputs
        queries = []
        for step in steps:
            q, pool = form(pool, step, arrays)
            queries.append(q)
        return pool, queries

    return run


def split_and_rotate(
    world: World, inputs: dict[str, Any], dtype: Any
) -> tuple[jax.Array, ...]:
    """Return q, k and v of `rope_inputs`, computed in `dtype`, as the layer does it."""
    model = world.model
    heads = inputs["qkv"].reshape(-1, model.head_dim, world.load.tokens).astype(dtype)
    k_end = model.num_heads + model.num_kv_heads
    q, k, v = heads[: model.num_heads], heads[model.num_heads : k_end], heads[k_end:]
    rope = inputs["rope"]
    rotated = (apply_rope(q, rope), apply_rope(k, rope), v)
    return tuple(x.astype(world.dtype) for x in rotated)


def rope_case(world: World) -> Case:
    """Return rotation with the write of keys and values; without norms."""
    model, tokens = world.model, world.load.tokens
    heads, kv_heads = model.num_heads, model.num_kv_heads
    of: dict[str, Any] = {"block_tokens": world.block_tokens}

    def form(config: Any) -> Callable[..., Any]:
        return lambda pool, step, arrays: rope_write_gpu(
            arrays["qkv"],
            pool,
            arrays["rope"],
            step["kv_pages"],
            step["slots"],
            heads=heads,
            kv_heads=kv_heads,
            interpret=world.interpret,
            config=config,
            **of,
        )

    def by_reference(
        pool: jax.Array, step: Any, arrays: Any
    ) -> tuple[jax.Array, jax.Array]:
        q, k, v = split_and_rotate(world, arrays, jnp.float32)
        pages, slots = step["kv_pages"], step["slots"]
        return q, reference.write_kv_reference(pool, k, v, pages, slots, **of)

    return Case(
        name="rope_write",
        key=rope_write_key(
            tokens,
            heads,
            kv_heads,
            model.head_dim,
            norms=False,
            dtype=world.dtype,
            **of,
        ),
        chosen=kv_config(tokens, heads + 2 * kv_heads),
        make_arrays=lambda: rope_inputs(world),
        make_state=lambda: jnp.array(world.pool),
        program=lambda config: rope_program(form(config)),
        values=form,
        reference=by_reference,
    )
