"""GPU attention kernels against a loop over tokens, interpreted and on a GPU."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_backends import SLACK, jit, on_all, on_kernels
from paged_cases import Part, Shape, check_attention, make_step

from jchameleon.pallas import gpu_attention, gpu_pages, gpu_prefill_attention
from jchameleon.pallas.gpu_attention import (
    DecodeConfig,
    decode_config,
    paged_attention_gpu,
)
from jchameleon.pallas.gpu_prefill_attention import (
    PrefillConfig,
    attention_block_tiles,
    build_attention_blocks,
    prefill_config,
)
from jchameleon.pallas.reference import paged_attention_reference

# All query heads of a KV head in one tile, and head dimensions that fill none.
SHAPES = [
    Shape(heads=4, kv_heads=2, head_dim=16),
    Shape(heads=3, kv_heads=1, head_dim=64),
    Shape(heads=2, kv_heads=2, head_dim=80),
    Shape(heads=5, kv_heads=1, head_dim=96),
    Shape(heads=8, kv_heads=1, head_dim=128),
]
SMALL = SHAPES[0]

# Both sides of a block's edge, of a turn's edge, and several turns.
CONTEXTS = (1, 15, 16, 17, 31, 32, 33, 150)
DECODE = [Part(context - 1, 1) for context in CONTEXTS]
PREFILL = [Part(0, 32), Part(97, 32), Part(111, 17), Part(149, 1), Part(0, 15)]


def decode_of(splits, bn=16):
    return DecodeConfig(bn=bn, splits=splits, num_warps=4, num_stages=2)


def attend(step, shape, *, backend="interpret", blocks=None, config=None):
    """Run a backend on a step whose keys are written already."""
    of = {"kv_heads": shape.kv_heads, "block_tokens": shape.block_tokens}
    inputs = (step.q, step.after, step.table, step.positions, step.context)
    if backend == "reference":
        call = functools.partial(paged_attention_reference, **of)
        return jit(call, backend)(*inputs)
    of |= {"interpret": backend == "interpret", "config": config}
    call = functools.partial(paged_attention_gpu, **of)
    return jit(call, backend)(*inputs, blocks=blocks)


def check(step, shape, backend, **options):
    """Hold a backend to the loop over tokens."""
    out = attend(step, shape, backend=backend, **options)
    check_attention(out, step, slack=SLACK[backend])


def decode_step(shape, parts=DECODE, **layout):
    return make_step(shape, parts, num_tokens=10, tile=1, max_context=160, **layout)


def prefill_step(shape, parts=PREFILL, **layout):
    return make_step(shape, parts, num_tokens=192, tile=32, max_context=160, **layout)


def blocks_of(step, shape):
    return build_attention_blocks(
        step.table,
        step.positions,
        step.context,
        block_tiles=attention_block_tiles(
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            jnp.dtype(shape.dtype),
            tile_tokens=32,
        ),
    )


@on_all
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_contexts_around_edges_match_token_loop(shape, backend):
    check(decode_step(shape), shape, backend, config=decode_of(2))


@on_kernels
@pytest.mark.parametrize("splits", [1, 3, 16])
def test_decode_from_one_split_to_more_than_turns_matches_token_loop(splits, backend):
    check(decode_step(SMALL), SMALL, backend, config=decode_of(splits))


@on_kernels
def test_decode_with_chosen_config_matches_token_loop(backend):
    assert decode_config(10, 2, 16, 160, arch=None).splits == 1
    check(decode_step(SMALL), SMALL, backend)


@on_kernels
@pytest.mark.parametrize("block_tokens", [1, 24, 64])
def test_block_of_any_size_matches_token_loop(block_tokens, backend):
    shape = Shape(heads=2, kv_heads=1, head_dim=16, block_tokens=block_tokens)
    check(decode_step(shape), shape, backend, config=decode_of(2, bn=32))


@on_kernels
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bm", [32, 128])  # one head of the group, or four
def test_prefill_of_several_requests_matches_token_loop(shape, bm, backend):
    config = PrefillConfig(bm=bm, bn=16, num_warps=4, num_stages=2)
    check(prefill_step(shape), shape, backend, config=config)


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_prefill_of_several_requests_matches_token_loop(shape):
    check(prefill_step(shape), shape, "reference")


@on_kernels
@pytest.mark.parametrize(("heads", "first_block"), [(2, 96), (4, 64)])
def test_prefill_tiles_taken_together_match_token_loop(heads, first_block, backend):
    shape = Shape(heads=heads, kv_heads=2, head_dim=16, dtype="bfloat16")
    parts = [Part(16, 79), Part(0, 33)]  # three tiles, two, and one of padding
    step = prefill_step(shape, parts)
    blocks = blocks_of(step, shape)
    assert blocks[:, 1].max() == first_block
    check(step, shape, backend, blocks=blocks)


@on_kernels
def test_prefill_with_chosen_config_matches_token_loop(backend):
    check(prefill_step(SMALL), SMALL, backend)


@on_kernels
def test_shared_first_blocks_match_token_loop(backend):
    step = decode_step(SMALL, [Part(40, 1), Part(35, 1, shared=2)])
    check(step, SMALL, backend, config=decode_of(2))
    step = prefill_step(SMALL, [Part(32, 40), Part(32, 64, shared=2)])
    check(step, SMALL, backend, blocks=blocks_of(step, SMALL))


@on_all
@pytest.mark.parametrize("make", [decode_step, prefill_step])
def test_bfloat16_matches_token_loop(make, backend):
    shape = Shape(heads=6, kv_heads=2, head_dim=16, dtype="bfloat16")
    check(make(shape), shape, backend)


@on_all
def test_large_scores_neither_overflow_nor_underflow(backend):
    step = decode_step(SMALL)
    step.q[...] *= 1000
    out = np.asarray(attend(step, SMALL, backend=backend, config=decode_of(2)))
    assert np.isfinite(out).all()
    # One key takes all of the weight: its value, and no mean of values.
    largest = np.abs(step.after[np.isfinite(step.after)]).max()
    assert np.abs(out[:, :, step.real]).max() <= largest


@on_kernels
@pytest.mark.parametrize("make", [decode_step, prefill_step])
def test_requests_do_not_reach_each_other(make, backend):
    step = make(SMALL, [Part(20, 1), Part(25, 1)])
    clean = np.asarray(attend(step, SMALL, backend=backend))
    step.after[step.table[1, :2]] = np.nan
    out = np.asarray(attend(step, SMALL, backend=backend))
    first, second = step.real
    assert (out[:, :, first] == clean[:, :, first]).all()
    assert np.isnan(out[:, :, second]).all()


def test_blocks_take_tiles_of_one_request_longest_context_first():
    table = np.array([[2, 3], [2, 3], [2, 3], [4, 0], [2, 3], [0, 0]], np.int32)
    first = np.array([10, 42, 74, 0, 106, 0])
    positions = (first[:, None] + np.arange(32)).ravel().astype(np.int32)
    context = np.array([42, 74, 90, 5, 110, 1], np.int32)
    blocks = build_attention_blocks(table, positions, context, block_tiles=2)
    assert blocks.dtype == np.int32
    assert blocks.tolist() == [
        [128, 32, 110],
        [64, 32, 90],
        [0, 64, 74],
        [96, 32, 5],
        [160, 32, 1],
        [0, 0, 0],
    ]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dtype", "tiles"),
    [
        (32, 32, 128, "bfloat16", 4),
        (32, 16, 128, "bfloat16", 2),
        (9, 3, 64, "bfloat16", 1),
        (32, 2, 128, "bfloat16", 1),
        (8, 8, 256, "bfloat16", 2),
        (32, 32, 128, "float32", 1),
    ],
)
def test_block_tiles_fill_the_rows_of_a_program(
    heads, kv_heads, head_dim, dtype, tiles
):
    dtype = jnp.dtype(dtype)
    found = attention_block_tiles(heads, kv_heads, head_dim, dtype, tile_tokens=32)
    assert found == tiles


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", None])
def test_configs_split_few_rows_and_leave_many_alone(arch):
    assert decode_config(1, 32, 128, 4096, arch=arch).splits == 16
    assert decode_config(1, 32, 128, 255, arch=arch).splits == 1
    assert decode_config(256, 32, 128, 4096, arch=arch).splits == 1
    bf16 = jnp.dtype("bfloat16")
    assert prefill_config(128, 128, bf16, arch=arch).bm == 128
    assert prefill_config(128, 256, bf16, arch=arch).bm == 64
    assert prefill_config(128, 128, np.dtype("f4"), arch=arch).bm == 32
    assert prefill_config(9, 64, bf16, arch=arch).bm == 16


def broken(name):
    """Return what replaces a helper, and one of its modules, with a defect in it."""
    pages, decode = gpu_pages, gpu_attention
    split_turns = decode.split_turns

    def short_split(*args, **kw):
        first, end = split_turns(*args, **kw)
        return first, jnp.where(end - first > 1, end - 1, end)

    def stale_page(table_ref, tile, at, written, block_tokens):
        return token_pages(
            table_ref, tile, jnp.maximum(at - 1, 0), written, block_tokens
        )

    token_pages = pages.token_pages
    return {
        "split ends a turn early": (decode, "split_turns", short_split),
        "page of the token before": (pages, "token_pages", stale_page),
        "values are keys": (pages, "value_row", pages.key_row),
        "no mask of unwritten slots": (
            pages,
            "written_keys",
            lambda at, context: at < context + 1,
        ),
        "future keys": (
            gpu_prefill_attention,
            "seen_keys",
            lambda at, positions: at[None, :] <= positions[:, None] + 1,
        ),
    }[name]


@pytest.mark.parametrize(
    ("defect", "make"),
    [
        ("split ends a turn early", decode_step),
        ("page of the token before", decode_step),
        ("values are keys", decode_step),
        ("no mask of unwritten slots", decode_step),
        ("page of the token before", prefill_step),
        ("values are keys", prefill_step),
        ("no mask of unwritten slots", prefill_step),
        ("future keys", prefill_step),
    ],
)
def test_defect_in_kernel_is_noticed(monkeypatch, defect, make):
    monkeypatch.setattr(*broken(defect))
    step = make(SMALL)
    config = decode_of(2) if make is decode_step else None
    with pytest.raises(AssertionError):
        check_attention(attend(step, SMALL, config=config), step)


def spec(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


def refused(rule, *, q=(4, 16, 8), page=1024, tiles=8, kv_heads=2, **options):
    positions = spec(options.pop("num_positions", q[2]))
    context = spec(options.pop("num_contexts", tiles))
    blocks = options.pop("blocks", None)
    dtype = options.pop("dtype", jnp.float32)
    table = spec(tiles, 4, dtype=options.pop("table_dtype", jnp.int32))
    call = functools.partial(
        paged_attention_gpu, kv_heads=kv_heads, block_tokens=16, **options
    )
    with pytest.raises(ValueError, match=re.escape(rule)):
        jax.eval_shape(
            call,
            spec(*q, dtype=dtype),
            spec(9, page, dtype=dtype),
            table,
            positions,
            context,
            blocks=blocks,
        )


def test_unsupported_arguments_name_rule_and_value():
    refused("head_dim=20 must be a multiple of 8 from 16 to 256", q=(4, 20, 8))
    refused("head_dim=264 must be", q=(4, 264, 8))
    refused("pool dtype=float16 must be one of", dtype=jnp.float16)
    refused("pool shape (9, 1000) must be [P, 1024]", page=1000)
    refused("heads=3 must be a multiple of kv_heads=2", q=(3, 16, 8))
    refused("page_table dtype=float32 must be int32", table_dtype=jnp.float32)
    refused("num_tokens=6 must be num_tiles=2 times a", q=(4, 16, 6), tiles=2)
    refused("is for decode, tiles have 4 tokens", tiles=2, config=decode_of(1))
    prefill = PrefillConfig(bm=16, bn=16, num_warps=4, num_stages=2)
    refused("are for tiles of several tokens", config=prefill)
    refused("positions.shape=(7,) and context_tokens.shape", num_positions=7)
    refused("must be (8,) and (8,)", num_contexts=9)
    refused("blocks dtype=float32 must be", tiles=2, blocks=spec(2, 3, dtype=float))
    refused("blocks.shape=(2, 2) must be (blocks, 3)", tiles=2, blocks=spec(2, 2))
    refused("bm=16 must hold a block of 32", q=(4, 16, 64), tiles=2, config=prefill)
    with pytest.raises(ValueError, match="bn=8 must be a power of two >= 16"):
        decode_of(1, bn=8)
    with pytest.raises(ValueError, match="splits=0 must be at least 1"):
        decode_of(0)
    with pytest.raises(ValueError, match="num_warps=3 must be 1, 2, 4 or 8"):
        dataclasses.replace(prefill, num_warps=3)
    with pytest.raises(ValueError, match="num_stages=0 must be at least 1"):
        dataclasses.replace(decode_of(1), num_stages=0)
    with pytest.raises(ValueError, match="bm=24 must be a power of two >= 16"):
        PrefillConfig(bm=24, bn=16, num_warps=4, num_stages=2)
