"""Counted loads and stores against counts made by hand."""

import functools

import aot_floor
import aot_moved
import aot_programs
import aot_target
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl

from jchameleon.config import EngineConfig, ModelConfig
from jchameleon.pallas import _compat
from jchameleon.pallas.operations import pallas_operations

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend:DeprecationWarning"
)


def walk_kernel(counts_ref, table_ref, pool_ref, out_ref, *, width):
    """Add up the rows of a list, the last of them in part; odd programs skip it."""
    i = pl.program_id(0)
    lanes = jnp.arange(width)

    @pl.when(i % 2 == 0)
    def _():
        def body(k, total):
            row = table_ref[i, k]
            mask = lanes < width - k
            return total + _compat.load(pool_ref.at[row, lanes], mask=mask, other=0)

        total = lax.fori_loop(0, counts_ref[i], body, jnp.zeros(width, jnp.float32))
        _compat.store(out_ref.at[i, lanes], total, mask=lanes < 5)


def test_loops_masks_branches_and_tables_are_run_for_real():
    width, programs = 16, 4
    counts = np.array([3, 9, 0, 7], np.int32)
    table = np.zeros((programs, 8), np.int32)
    call = _compat.triton_call(
        walk_kernel,
        name="walk",
        grid=(programs,),
        out_shape=jax.ShapeDtypeStruct((programs, width), jnp.float32),
        num_warps=1,
        num_stages=1,
        interpret=False,
        width=width,
    )
    pool = jax.ShapeDtypeStruct((10, width), jnp.float32)

    def layers(counts, table, pool):
        jitted = jax.jit(call)
        return jitted(counts + 0, table, pool) + jitted(counts, table, pool)

    found = aot_moved.count_step(layers, counts, table, pool)
    loaded = stored = 0
    for i in (0, 2):
        loaded += 4  # the count
        for k in range(counts[i]):
            loaded += 4 + 4 * (width - k)
        stored += 4 * 5
    assert found == {
        "walk": aot_moved.Traffic(loaded_bytes=loaded, stored_bytes=stored)
    }


def loaded_by_attention(context, *, heads=4, kv_heads=2, head_dim=64):
    """Return bytes that decode attention of two rows loads, pages of 16 tokens."""
    ops = pallas_operations("sm_86")
    pages = np.arange(2 * 64, dtype=np.int32).reshape(2, 64) + 2
    contexts = np.full(2, context, np.int32)
    found = aot_moved.count_step(
        functools.partial(ops.paged_attention, kv_heads=kv_heads, block_tokens=16),
        jax.ShapeDtypeStruct((heads, head_dim, 2), jnp.bfloat16),
        jax.ShapeDtypeStruct((400, 2 * kv_heads * 16 * head_dim), jnp.bfloat16),
        pages,
        contexts - 1,
        contexts,
    )
    assert "paged_attention_decode" in found
    return sum(one.loaded_bytes for one in found.values())


@pytest.mark.parametrize("context", [256, 512])
def test_decode_attention_loads_every_key_and_value_once(context):
    kv = 2 * context * 2 * 2 * 64 * 2  # rows, tokens, k and v, heads, width, bf16
    more = loaded_by_attention(2 * context) - loaded_by_attention(context)
    assert kv <= more <= 1.02 * kv  # beside page numbers


@pytest.fixture(scope="module")
def shapes():
    target = aot_target.read_target("a40")
    return aot_programs.describe_engine(
        ModelConfig.preset("smollm2-135m"),
        target,
        jax.devices()[0],
        EngineConfig(dtype="bfloat16", max_running=16, max_model_len=2048),
        aot_programs.choose_backend("pallas", target),
    )


def loaded_by_layer(shapes, rank, *, prefill=False):
    """Return bytes that each kernel loads for one token, or for one prompt."""
    traffic = aot_floor.Traffic(context_tokens=64, ranks=(rank,))
    tokens = 64 if prefill else 1
    batch = aot_floor.traffic_batch(shapes, tokens, traffic, prefill=prefill)
    found = aot_floor.kernel_traffic(shapes, batch)
    return {name: one.loaded_bytes for name, one in found.items()}


@pytest.mark.parametrize("prefill", [False, True])
def test_lora_loads_every_element_of_an_adapter_once(shapes, prefill):
    """64 ranks more: their rows of A, their columns of B, and little else."""
    few, many = (loaded_by_layer(shapes, rank, prefill=prefill) for rank in (64, 128))
    a_bytes, b_bytes = 64 * 3 * 576 * 2, 64 * (576 + 2 * 192) * 2
    # The tokens' x is read again for each piece of A, their h for each tile of B.
    tokens = 64 if prefill else 1
    x_bytes, h_bytes = 64 // 16 * tokens * 576 * 2, tokens * 64 * 3 * 4 * 9
    shrink = many["lora_shrink_qkv"] - few["lora_shrink_qkv"]
    assert a_bytes <= shrink <= 1.05 * (a_bytes + x_bytes)
    expand = many["lora_expand_qkv"] - few["lora_expand_qkv"]
    assert b_bytes <= expand <= 1.05 * (b_bytes + 4 * h_bytes)


def test_every_kernel_of_a_step_is_counted(shapes):
    assert loaded_by_layer(shapes, 8).keys() == {
        "lora_shrink_qkv",
        "lora_expand_qkv",
        "rope_write",
        "paged_attention_decode",
        "paged_attention_merge",
        "lora_shrink_o",
        "lora_expand_o",
    }
