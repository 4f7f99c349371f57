"""What kernels move: against Pallas' interpreter, which runs them, and by hand."""

import collections
import contextlib
import dataclasses
import math

import aot_floor
import aot_moved
import aot_programs
import aot_target
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax._src.pallas import primitives as pallas_primitives
from jax._src.state import primitives as state_primitives
from jax.experimental import pallas as pl

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
    pages = aot_floor.batch_pages(batch)
    pools = [jnp.zeros((pages, p.shape[1]), p.dtype) for p in shapes.pools]
    found = aot_moved.step_moved(shapes, batch)
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
    assert {name: one.executed_bytes for name, one in found.items()} == interpreted
    assert kernels <= set(found)


def moved_by(kernel, *args, grid=(1,), out=(8,), **options):
    """Return what one launch of a kernel moves, i32 in and out."""
    call = _compat.triton_call(
        kernel,
        name="toy",
        grid=grid,
        out_shape=jax.ShapeDtypeStruct(out, jnp.int32),
        num_warps=1,
        num_stages=1,
        interpret=True,
        **options,
    )
    traced = jax.make_jaxpr(call)(*args)
    (found,) = aot_moved.count_moved(traced, [np.asarray(arg)[None] for arg in args])
    return found


EIGHT = np.arange(8, dtype=np.int32)


def test_load_by_several_programs_is_executed_often_and_distinct_once():
    def kernel(x_ref, out_ref):
        out_ref[pl.program_id(0)] = x_ref[...].sum()

    found = moved_by(kernel, EIGHT, grid=(5,))
    assert found.executed_bytes == 4 * (5 * 8 + 5)
    assert found.distinct_bytes == 4 * (8 + 5)


def test_grid_of_more_programs_than_run_side_by_side_is_counted_whole():
    def kernel(x_ref, out_ref):
        at = pl.program_id(0) * np.int32(3) + pl.program_id(1)
        out_ref[at] = x_ref[at]

    many = np.arange(900, dtype=np.int32)
    found = moved_by(kernel, many, grid=(300, 3), out=(900,))
    assert found.executed_bytes == found.distinct_bytes == 4 * 2 * 900


def test_loop_runs_each_programs_own_turns():
    def kernel(x_ref, out_ref):
        program = pl.program_id(0)

        def turn(i, total):
            return total + x_ref[i]

        out_ref[program] = lax.fori_loop(np.int32(0), x_ref[program], turn, np.int32(0))

    found = moved_by(kernel, EIGHT, grid=(8,))
    # Program p reads its count, then that many elements, and stores one.
    assert found.executed_bytes == 4 * (8 + sum(range(8)) + 8)


def test_value_that_leaves_a_loop_is_each_programs_own():
    def kernel(_, out_ref):
        program = pl.program_id(0)
        total = lax.fori_loop(
            np.int32(0), program, lambda _, total: total + np.int32(1), np.int32(0)
        )
        out_ref[total] = program

    assert moved_by(kernel, EIGHT, grid=(8,)).distinct_bytes == 4 * 8


def test_branch_is_run_by_those_programs_alone_that_take_it():
    def kernel(x_ref, out_ref):
        program = pl.program_id(0)

        @pl.when(x_ref[program] >= np.int32(6))
        def _():
            lane = jnp.arange(4, dtype=jnp.int32)
            mask = lane < np.int32(3)
            value = _compat.load(x_ref.at[lane], mask=mask, other=np.int32(0))
            out_ref[program] = value.sum()

    found = moved_by(kernel, EIGHT, grid=(8,))
    # All read what they decide by; programs 6 and 7 load three and store one.
    assert found.executed_bytes == 4 * (8 + 2 * (3 + 1))


def test_masked_elements_do_not_count_and_may_lie_anywhere():
    def kernel(x_ref, out_ref):
        lane = jnp.arange(16, dtype=jnp.int32)
        mask = lane < np.int32(3)
        place = lane * np.int32(100)
        place = jnp.where(mask, lane, place)
        value = _compat.load(x_ref.at[place], mask=mask, other=np.int32(0))
        _compat.store(out_ref.at[place], value, mask=mask)

    assert moved_by(kernel, EIGHT).executed_bytes == 4 * (3 + 3)


def test_aliased_arrays_are_one_memory():
    def kernel(x_ref, out_ref):
        low = pl.ds(0, 4)
        out_ref[pl.ds(2, 4)] = x_ref[low] + out_ref[low]

    found = moved_by(kernel, EIGHT, input_output_aliases={0: 0})
    assert found.executed_bytes == 4 * (4 + 4 + 4)
    assert found.distinct_bytes == 4 * (4 + 4)  # loaded and stored


def test_element_beyond_an_array_is_an_error():
    def kernel(x_ref, out_ref):
        out_ref[0] = x_ref[x_ref[7] + np.int32(1)]

    with pytest.raises(
        IndexError, match=r"toy, operand 0: elements 8\.\.8 of an array"
    ):
        moved_by(kernel, EIGHT)


def test_address_that_depends_on_a_float_is_an_error():
    def kernel(x_ref, out_ref):
        out_ref[0] = x_ref[x_ref[0].astype(jnp.float32).astype(jnp.int32)]

    with pytest.raises(ValueError, match="an address depends on a value"):
        moved_by(kernel, EIGHT)
