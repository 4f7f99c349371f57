"""Paged keys, values and attention against a loop over tokens, in poisoned pools."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from paged_cases import (
    Part,
    Shape,
    attend_densely,
    check_attention,
    make_step,
    put,
)

from jchameleon.config import PROJECTIONS, TRASH_PAGE, ModelConfig
from jchameleon.lora.layout import ChunkLayout
from jchameleon.models.llama import Llama
from jchameleon.models.params import random_params
from jchameleon.pallas.cpu_attention import paged_attention_cpu
from jchameleon.pallas.multi_lora import LoraWork, build_lora_work, max_work_items
from jchameleon.pallas.operations import CPU, XLA, compile_operations
from jchameleon.pallas.paged_attention import (
    CONTEXT_TOKENS_PER_STEP,
    paged_attention,
    write_kv,
)
from jchameleon.pallas.reference import (
    paged_attention_reference,
    write_kv_reference,
)
from jchameleon.runtime.programs import ModelParams, StepBatch, compile_step

compile_operations(CPU)

FORMS = {
    "xla": (write_kv, paged_attention),
    "cpu": (write_kv, paged_attention_cpu),
    "reference": (write_kv_reference, paged_attention_reference),
}


def forms(shape):
    """Return the names of the forms that serve an element type."""
    return [form for form in FORMS if form != "cpu" or shape.dtype == "float32"]


# Both sides of a block's edge, of a loop turn's edge, and several turns.
CONTEXTS = (1, 15, 16, 17, 127, 128, 129, 300)


@functools.cache
def compiled(form, shape):
    write, attend = FORMS[form]

    def step(pool, q, k, v, kv_pages, table, positions, context):
        slots = positions % shape.block_tokens
        pool = write(pool, k, v, kv_pages, slots, block_tokens=shape.block_tokens)
        out = attend(
            q,
            pool,
            table,
            positions,
            context,
            kv_heads=shape.kv_heads,
            block_tokens=shape.block_tokens,
        )
        return pool, out

    return jax.jit(step)


def check_step(shape, parts, **layout):
    """Run a step of `parts` in all forms and hold it to the loop over tokens."""
    step = make_step(shape, parts, **layout)
    after = step.after
    bits = f"u{after.dtype.itemsize}"
    inputs = (step.q, step.k, step.v)
    inputs += (step.kv_pages, step.table, step.positions, step.context)
    for form in forms(shape):
        new_pool, out = compiled(form, shape)(step.pool, *inputs)
        check_attention(out, step, form)
        new_pool = np.array(new_pool)
        new_pool[TRASH_PAGE] = after[TRASH_PAGE]
        assert (new_pool.view(bits) == after.view(bits)).all(), form


SHAPES = [
    Shape(heads=2, kv_heads=2, head_dim=16),
    Shape(heads=3, kv_heads=1, head_dim=80),
    Shape(heads=6, kv_heads=2, head_dim=64),
    Shape(heads=8, kv_heads=1, head_dim=128),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_decode_contexts_around_edges_match_token_loop(shape):
    parts = [Part(context - 1, 1) for context in CONTEXTS]
    check_step(shape, parts, num_tokens=16, tile=1)
    check_step(shape, parts[::-1], num_tokens=16, tile=1, seed=1)


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_prefill_of_several_requests_matches_token_loop(shape):
    ends = [  # the last tile of the step is padding
        Part(0, 32),
        Part(97, 32),
        Part(111, 17),
        Part(299, 1),
        Part(0, 15),
    ]
    check_step(shape, ends, num_tokens=192, tile=32)
    tiles = [Part(0, 79), Part(96, 33)]
    check_step(shape, tiles, num_tokens=192, tile=32, seed=1)
    check_step(shape, [Part(127, 129), Part(16, 1)], num_tokens=192, tile=32, seed=2)


@pytest.mark.parametrize("context", CONTEXTS)
def test_decode_of_one_row_matches_token_loop(context):
    check_step(SHAPES[0], [Part(context - 1, 1)], num_tokens=1, tile=1)


@pytest.mark.parametrize("block_tokens", [1, 64, 256])
def test_block_of_any_power_of_two_matches_token_loop(block_tokens):
    shape = Shape(heads=2, kv_heads=1, head_dim=6, block_tokens=block_tokens)
    edges = (1, block_tokens, block_tokens + 1, CONTEXT_TOKENS_PER_STEP, 300)
    parts = [Part(context - 1, 1) for context in edges]
    check_step(shape, parts, num_tokens=8, tile=1)


@pytest.mark.parametrize("block_tokens", [1, 24, 64])
def test_prefill_in_blocks_of_any_size_matches_token_loop(block_tokens):
    shape = Shape(heads=4, kv_heads=2, head_dim=6, block_tokens=block_tokens)
    parts = [Part(0, 79), Part(111, 17), Part(63, 34)]
    check_step(shape, parts, num_tokens=192, tile=32)


def test_table_shorter_than_a_loop_turn_matches_token_loop():
    shape = Shape(heads=2, kv_heads=1, head_dim=6)
    parts = [Part(0, 1), Part(33, 1), Part(47, 1)]
    check_step(shape, parts, num_tokens=4, tile=1, max_context=48)


def test_shared_first_blocks_match_token_loop():
    decode = [Part(40, 1), Part(35, 1, shared=2), Part(129, 1, shared=1)]
    check_step(SHAPES[0], decode, num_tokens=16, tile=1)
    prefill = [Part(32, 40), Part(32, 64, shared=2)]
    check_step(SHAPES[0], prefill, num_tokens=192, tile=32)


def test_bfloat16_matches_token_loop():
    shape = Shape(heads=6, kv_heads=2, head_dim=16, dtype="bfloat16")
    parts = [Part(context - 1, 1) for context in CONTEXTS]
    check_step(shape, parts, num_tokens=16, tile=1)


def test_large_scores_neither_overflow_nor_underflow():
    shape = SHAPES[0]
    rng = np.random.default_rng(0)
    pool = np.zeros((24, shape.page_elems), np.float32)
    pages = np.arange(2, 21, dtype=np.int32)
    keys = rng.standard_normal((300, 2, 16), dtype=np.float32)
    keys *= np.linspace(-300, 300, 300, dtype=np.float32)[:, None, None]
    values = rng.standard_normal((300, 2, 16), dtype=np.float32)
    for at in range(299):
        put(pool, shape, pages[at // 16], at % 16, keys[at], values[at])
    q = rng.standard_normal((2, 16, 1), dtype=np.float32) * 10
    expected = attend_densely(q[:, :, 0], keys, values)
    for form in FORMS:
        _, out = compiled(form, shape)(
            pool,
            q,
            keys[299, :, :, None],
            values[299, :, :, None],
            pages[299 // 16][None],
            pages[None],
            np.array([299], np.int32),
            np.array([300], np.int32),
        )
        np.testing.assert_allclose(out[:, :, 0], expected, atol=2e-3)


def test_requests_do_not_reach_each_other():
    """A NaN anywhere in one request's step leaves the other's output bit-equal."""
    shape = SHAPES[0]
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 16, 64), dtype=np.float32) for _ in range(3))
    pool = np.full((8, shape.page_elems), np.nan, np.float32)
    pool[0] = 0
    own = np.array([[4, 2], [5, 3]], np.int32)
    kv_pages = np.repeat(own.ravel(), 16)
    table = np.pad(own, ((0, 0), (0, 17)))
    positions = np.tile(np.arange(32, dtype=np.int32), 2)
    context = np.full(2, 32, np.int32)
    for form in FORMS:
        step = compiled(form, shape)
        _, clean = step(pool, q, k, v, kv_pages, table, positions, context)
        for which in range(3):
            poisoned = [q.copy(), k.copy(), v.copy()]
            poisoned[which][:, :, 32:] = np.nan
            _, out = step(pool, *poisoned, kv_pages, table, positions, context)
            assert (np.asarray(out)[:, :, :32] == np.asarray(clean)[:, :, :32]).all()
            assert np.isnan(np.asarray(out)[:, :, 32:]).all()


@functools.cache
def tiny_params():
    config = ModelConfig.preset("tiny")
    params = random_params(config, np.dtype(np.float32), seed=0)
    return ModelParams.from_model(Llama(config, jax.tree.map(jnp.asarray, params)))


@pytest.mark.parametrize("ops", [XLA, CPU], ids=lambda ops: ops.name)
@pytest.mark.parametrize(("num_tokens", "tile"), [(1, 1), (4, 1), (32, 32)])
def test_compiled_step_updates_the_pool_in_place(num_tokens, tile, ops):
    config = ModelConfig.preset("tiny")
    block_tokens, num_pages, max_blocks = 16, 5003, 32
    layout = ChunkLayout(
        config, PROJECTIONS, 2 * config.num_kv_heads * block_tokens * config.head_dim
    )
    params = tiny_params()
    num_tiles = num_tokens // tile
    work = build_lora_work(
        np.full(num_tokens, -1, np.int32),
        [],
        num_items=max_work_items(num_tokens, tile, layout.num_chunks(64)),
        pages_per_chunk=layout.pages_per_chunk,
    )
    batch = StepBatch(
        tokens=np.zeros(num_tokens, np.int32),
        positions=np.zeros(num_tokens, np.int32),
        kv_pages=np.full(num_tokens, TRASH_PAGE, np.int32),
        page_table=np.zeros((num_tiles, max_blocks), np.int32),
        context_tokens=np.ones(num_tiles, np.int32),
        logit_tokens=np.zeros(num_tiles, np.int32),
        lora=LoraWork(**work),
    )
    pool = jax.ShapeDtypeStruct((num_pages, layout.page_elems), jnp.float32)
    pool_bytes = num_pages * layout.page_elems * 4
    program = compile_step(
        params,
        [pool] * config.num_layers,
        batch,
        layout=layout,
        block_tokens=block_tokens,
        ops=ops,
    )
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == pool_bytes * config.num_layers
    assert memory.temp_size_in_bytes < pool_bytes / 4
    copies = re.findall(r"= f32\[([\d,]+)\]\S* copy\(", program.as_text())
    copied_elems = [math.prod(int(d) for d in dims.split(",")) for dims in copies]
    assert max(copied_elems, default=0) < num_pages * layout.page_elems / 4


def test_bfloat16_pool_rounds_keys_and_values_to_nearest_even():
    shape = Shape(heads=2, kv_heads=1, head_dim=4, dtype="bfloat16")
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 1, 4, 3), dtype=np.float32)
    pool = np.zeros((4, shape.page_elems), ml_dtypes.bfloat16)
    expected = pool.copy()
    for t, (page, slot) in enumerate([(3, 15), (2, 0), (3, 7)]):
        put(expected, shape, page, slot, k[:, :, t], v[:, :, t])
    for write, _ in FORMS.values():
        found = jax.jit(functools.partial(write, block_tokens=16))(
            pool, k, v, np.array([3, 2, 3], np.int32), np.array([15, 0, 7], np.int32)
        )
        assert (np.asarray(found).view("u2") == expected.view("u2")).all()
