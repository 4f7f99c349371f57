"""What is counted of each kernel, against what Pallas' interpreter moves."""

import collections
import contextlib
import dataclasses
import math

import aot_floor
import aot_programs
import aot_target
import jax
import jax.numpy as jnp
import pytest
from jax._src.pallas import primitives as pallas_primitives
from jax._src.state import primitives as state_primitives

from jchameleon.config import EngineConfig, ModelConfig
from jchameleon.pallas import _compat
from jchameleon.pallas.operations import pallas_operations
from jchameleon.runtime.programs import model_step

DECODE = {"paged_attention_decode", "paged_attention_merge", "rope_write"}
PREFILL = {"paged_attention_prefill", "rope_write"}
LORA = {f"lora_{k}_{g}" for k in ("shrink", "expand") for g in ("qkv", "o")}


@contextlib.contextmanager
def counting_interpreter(monkeypatch):
    """Yield [(kernel, bytes)], to which Pallas' interpreter adds each access.

    A callback behind each load and store reports the elements of its mask that are
    true, each time the interpreter gets there.
    """
    accesses = []  # appended to by several threads at once
    traced = []
    triton_call = _compat.triton_call

    def named_call(kernel, *, name, **options):
        def named(*refs, **statics):
            traced.append(name)
            kernel(*refs, **statics)
            traced.pop()

        return triton_call(named, name=name, **options)

    def report(primitive, find_mask):
        bind = primitive.bind

        def counted(*args, **params):
            out = bind(*args, **params)
            if not traced:
                return out  # the interpreter rewrites what it has counted already
            mask = find_mask(args, params)
            lanes = math.prod(out.shape) if mask is None else mask.sum()
            name, item_bytes = traced[-1], out.dtype.itemsize

            def add(lanes):
                accesses.append((name, int(lanes) * item_bytes))

            jax.debug.callback(add, jnp.asarray(lanes, jnp.int32))
            return out

        patch.setattr(primitive, "bind", counted)

    def mask_place(place):
        return lambda args, params: params["args_tree"].unflatten(args)[place]

    with monkeypatch.context() as patch:
        patch.setattr(_compat, "triton_call", named_call)
        report(pallas_primitives.load_p, mask_place(2))
        report(pallas_primitives.swap_p, mask_place(3))
        report(state_primitives.get_p, lambda *_: None)
        yield accesses
        jax.effects_barrier()


@pytest.fixture(scope="module")
def shapes():
    """Return the tiny model's engine, of one layer, over interpreted kernels."""
    target = aot_target.read_target("a40")
    config = EngineConfig(
        dtype="bfloat16",
        max_running=8,
        max_model_len=256,
        max_batch_tokens=128,
        max_lora_rank=40,
    )
    return aot_programs.describe_engine(
        dataclasses.replace(ModelConfig.preset("tiny"), num_layers=1),
        target,
        jax.devices()[0],
        config,
        pallas_operations(None, interpret=True),
    )


@pytest.mark.parametrize(
    ("prefill", "tokens", "context", "ranks", "kernels"),
    [
        (False, 4, 75, (8, 40, 24), DECODE | LORA),
        (True, 64, 32, (8, 40), PREFILL | LORA),
    ],
)
def test_moved_bytes_are_those_that_the_interpreter_moves(
    monkeypatch, shapes, prefill, tokens, context, ranks, kernels
):
    traffic = aot_floor.Traffic(context_tokens=context, ranks=ranks)
    batch = aot_floor.traffic_batch(shapes, tokens, traffic, prefill=prefill)
    leaves = tuple(jnp.zeros(leaf.shape, leaf.dtype) for leaf in shapes.params.leaves)
    pages = 1 + max(batch.page_table.max(), batch.lora.pages.max())
    pools = [jnp.zeros((pages, p.shape[1]), p.dtype) for p in shapes.pools]
    found = aot_floor.kernel_traffic(shapes, batch)
    # Another name: what is traced with callbacks in it must serve nothing else.
    ops = dataclasses.replace(shapes.ops, name="counted")
    with counting_interpreter(monkeypatch) as accesses:
        model_step(
            leaves,
            pools,
            batch,
            treedef=shapes.params.treedef,
            layout=shapes.layout,
            block_tokens=shapes.config.kv_block_tokens,
            ops=ops,
        )
    interpreted = collections.Counter()
    for name, num_bytes in accesses:
        interpreted[name] += num_bytes
    assert {name: one.moved_bytes for name, one in found.items()} == interpreted
    assert kernels <= set(found)
