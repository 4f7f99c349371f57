"""The GPU's LoRA kernels, interpreted, against loops over the elements' addresses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lora_world import (
    FUSED,
    MAX_CHUNKS,
    ODD,
    QKVO,
    assert_product,
    by_address,
    group_of,
    make_world,
    random_inputs,
)

from jchameleon.config import PROJECTIONS
from jchameleon.lora.layout import ChunkLayout
from jchameleon.pallas import gpu_lora, gpu_lora_tiles
from jchameleon.pallas.gpu_lora import multi_lora_gpu
from jchameleon.pallas.gpu_lora_config import (
    check_expand,
    check_shrink,
    choose_expand,
    choose_shrink,
)
from jchameleon.pallas.gpu_lora_work import (
    GpuLoraWork,
    build_gpu_lora_work,
    work_sizes,
)

SMALL = dataclasses.replace(
    ODD,
    name="small",
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)
# Rows of A, 192 long, do not divide pages; a third of one, 64 long, does.
WIDE = dataclasses.replace(
    SMALL, name="wide", hidden_size=192, num_heads=3, num_kv_heads=1, head_dim=64
)
SHAPES = {"static": (SMALL, 1024), "hoist": (WIDE, 2048), "element": (ODD, 192)}
QUICK = {"xla_backend_optimization_level": 0}
"""Compile in half the time: these programs run for milliseconds."""

GPU_RANKS = (1, 8, 17, 24, 128, 64, 5)


@functools.cache
def world_of(shape, dtype="float32", targets=QKVO):
    model, page_elems = SHAPES[shape]
    return make_world(model, targets, GPU_RANKS, dtype=dtype, page_elems=page_elems)


def build(world, token_adapter, *, prefill, max_chunks=MAX_CHUNKS):
    return build_gpu_lora_work(
        np.asarray(token_adapter, np.int32),
        world.pages,
        prefill=prefill,
        max_chunks=max_chunks,
        pages_per_chunk=world.layout.pages_per_chunk,
    )


def configs(world, name, num_tokens, *, prefill, programs=3, **changes):
    """Return block sizes as chosen, but with so few programs that they take turns."""
    group, page_elems = group_of(world.layout, name), world.pool.shape[1]
    blocks, items, _ = work_sizes(num_tokens, prefill=prefill, max_chunks=MAX_CHUNKS)
    shrink = choose_shrink(group, page_elems, num_items=items, prefill=prefill)
    expand = choose_expand(group, page_elems, num_blocks=blocks, prefill=prefill)
    return {
        "shrink": dataclasses.replace(shrink, programs=programs, **changes),
        "expand": dataclasses.replace(expand, programs=min(programs, 2)),
    }


def function_of(world, name, num_tokens, *, prefill, **changes):
    return jax.jit(
        functools.partial(
            multi_lora_gpu,
            group=group_of(world.layout, name),
            interpret=True,
            **configs(world, name, num_tokens, prefill=prefill, **changes),
        ),
        compiler_options=QUICK,
    )


def check(world, name, batches, *, prefill, function=None, **changes):
    """Hold one program to the loop over addresses, for each batch of its shape."""
    num_tokens = len(batches[0])
    if function is None:
        function = function_of(world, name, num_tokens, prefill=prefill, **changes)
    for seed, batch in enumerate(batches):
        batch = np.asarray(batch, np.int32)
        y, x = random_inputs(world, name, num_tokens, seed=seed)
        work = GpuLoraWork(**build(world, batch, prefill=prefill))
        found = np.asarray(function(y, x, world.pool, work))
        expected, size = by_address(world, name, y, x, batch)
        assert_product(found, y, batch, expected, size, batch)
    assert function._cache_size() == 1  # one program serves every mix


def decode_batches(num_tokens):
    rng = np.random.default_rng(num_tokens)
    adapters = len(GPU_RANKS)
    mixed = rng.integers(-1, adapters, num_tokens)
    return [
        np.sort(mixed),
        mixed,  # unsorted: adapters come in several runs
        np.full(num_tokens, -1),
        np.full(num_tokens, 4),
        np.arange(num_tokens) % adapters,  # no neighbours share
        np.where(np.arange(num_tokens) % 3 == 1, 4, -1),
    ]


def prefill_batch(num_tokens, *, seed):
    """Return requests of whole tiles, the last tile of each padded with -1."""
    rng = np.random.default_rng(seed)
    tiles = np.full((num_tokens // 32, 32), -1)
    at = 0
    while at < len(tiles):
        end = min(at + int(rng.integers(1, 5)), len(tiles))
        tiles[at:end] = rng.integers(-1, len(GPU_RANKS))
        tiles[end - 1, int(rng.integers(1, 33)) :] = -1
        at = end
    return tiles.ravel()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_mixed_ranks_match_addresses(shape, dtype):
    world = world_of(shape, dtype)
    chosen = configs(world, "qkv", 24, prefill=False)
    assert chosen["shrink"].lookup == shape
    check(world, "qkv", decode_batches(24), prefill=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_mixed_ranks_match_addresses(shape, dtype):
    world = world_of(shape, dtype)
    batches = [prefill_batch(224, seed=seed) for seed in range(3)]
    batches += [np.full(224, 4), np.full(224, -1)]
    check(world, "qkv", batches, prefill=True)


@pytest.mark.parametrize("prefill", [False, True])
def test_rows_over_two_pages_match_addresses(prefill):
    world = world_of("hoist")
    batch = np.repeat([4, -1, 2], [33, 31, 32])
    check(world, "qkv", [batch], prefill=prefill, splits=1, lookup="select", block_k=64)


@pytest.mark.parametrize("num_tokens", [1, 40])
def test_steps_of_any_length_match_addresses(num_tokens):
    world = world_of("static", "bfloat16")
    padded = np.where(np.arange(num_tokens) < 35, 5, -1)
    check(world, "o", [padded], prefill=True)
    thirds = np.arange(num_tokens) * 3 // num_tokens
    check(world, "o", [padded, thirds], prefill=False)


@pytest.mark.parametrize(
    ("shape", "targets", "name"),
    [
        ("hoist", ("q", "v"), "qkv"),
        ("element", ("q", "v"), "qkv"),
        ("hoist", ("v",), "qkv"),
        ("element", ("k", "up"), "gate_up"),
        ("hoist", PROJECTIONS, "down"),
    ],
)
def test_targets_subset_adapts_their_rows_alone(shape, targets, name):
    world = world_of(shape, targets=targets)
    batch = np.array([3, 3, -1, 2, 6])
    function = function_of(world, name, 5, prefill=False)
    check(world, name, [batch], prefill=False, function=function)
    # Rows of other projections keep their bits, whatever is there.
    y, x = random_inputs(world, name, 5)
    at, untouched = 0, np.zeros(len(y), bool)
    for projection in FUSED[name]:
        size = world.model.projection_shape(projection)[1]
        untouched[at : at + size] = projection not in targets
        at += size
    y[untouched] *= -0.0
    work = GpuLoraWork(**build(world, batch, prefill=False))
    found = np.asarray(function(y, x, world.pool, work))
    assert found[untouched].tobytes() == y[untouched].tobytes()


def test_default_block_sizes_match_addresses():
    world = world_of("static")
    group = group_of(world.layout, "qkv")
    function = jax.jit(
        functools.partial(multi_lora_gpu, group=group, interpret=True),
        compiler_options=QUICK,
    )
    check(world, "qkv", [[4, 4, -1, 6]], prefill=False, function=function)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_lower_for_nvidia_gpus(shape, dtype):
    """Interpreted kernels may use what Triton lacks; lowering needs no GPU."""
    world = world_of(shape, dtype)
    group = group_of(world.layout, "qkv")
    y, x = random_inputs(world, "qkv", 64)
    for prefill in (False, True):
        work = GpuLoraWork(**build(world, np.full(64, 4), prefill=prefill))
        call = jax.jit(functools.partial(multi_lora_gpu, group=group))
        traced = call.trace(y, x, world.pool, work)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert "lora_shrink_qkv" in text and "lora_expand_qkv" in text


@pytest.mark.parametrize("prefill", [False, True])
def test_not_finite_rows_and_adapters_reach_no_others(prefill):
    world = world_of("hoist", "bfloat16")
    batch = np.repeat([4, -1, 3, 4], 32 if prefill else 4)
    y, x = random_inputs(world, "qkv", len(batch))
    function = function_of(world, "qkv", len(batch), prefill=prefill)
    work = GpuLoraWork(**build(world, batch, prefill=prefill))
    clean = np.asarray(function(y, x, world.pool, work))
    pool = world.pool.copy()
    pages = world.pages[4].ravel()
    pool[pages] = np.where(np.isnan(pool[pages]), pool[pages], pool.dtype.type(3e38))
    x[:, batch == -1] = np.nan
    others = (batch != 4) & (batch != -1)
    lost = np.flatnonzero(others)[1]
    x[:, lost], others[lost] = np.inf, False
    found = np.asarray(function(y, x, pool, work))
    assert (found[:, others] == clean[:, others]).all()
    assert (found[:, batch == -1] == y[:, batch == -1]).all()
    assert not np.isfinite(found[:, batch == 4].astype(np.float32)).all()


def test_lists_beyond_counts_are_not_read():
    world = world_of("static")
    batch = np.array([3, 3, -1, 5], np.int32)
    y, x = random_inputs(world, "qkv", 4)
    function = function_of(world, "qkv", 4, prefill=False)
    work = build(world, batch, prefill=False)
    before = np.asarray(function(y, x, world.pool, GpuLoraWork(**work)))
    work["items"][:, work["counts"][0] :] = 1
    work["blocks"][:, work["counts"][1] :] = 1
    after = np.asarray(function(y, x, world.pool, GpuLoraWork(**work)))
    assert (after == before).all()


def _shifted(function, by):
    return lambda *args, **kwargs: function(*args, **kwargs) + np.int32(by)


MISTAKES = {
    "page": ("_slot_of", lambda f: lambda e, n: jnp.zeros_like(f(e, n))),
    "offset": (
        "_tile",
        lambda f: lambda pool, page, at, lane: f(pool, page, at + np.int32(8), lane),
    ),
    "chunk": ("_chunk_of", lambda f: lambda rank: jnp.zeros_like(rank)),
    "rank": ("_row_of", lambda f: lambda rank: jnp.zeros_like(rank)),
    "first row": ("_rows", lambda f: _shifted(f, 1)),
    "turn": ("_turns", lambda f: _shifted(f, -1)),
    "mask": (
        "_store",
        lambda f: (
            lambda ref, place, value, mask, lead=None: f(
                ref, place, value, jnp.ones_like(mask), lead=lead
            )
        ),
    ),
    "product": ("dot", lambda f: lambda left, right: f(left, right * 0 + right[:1])),
}


@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_mistake_in_addresses_is_seen(mistake, monkeypatch):
    world = world_of("static")
    batch = np.array([4, 4, -1, 3, 2, 2, 6, 0])
    run = functools.partial(check, world, "o", [batch], lookup="hoist")
    if mistake is None:
        run(prefill=False)
        return
    name, plant = MISTAKES[mistake]
    module = gpu_lora if hasattr(gpu_lora, name) else gpu_lora_tiles
    monkeypatch.setattr(module, name, plant(getattr(module, name)))
    with pytest.raises(AssertionError):
        run(prefill=False)


@pytest.mark.parametrize("row", [0, 1, 2, 3])
@pytest.mark.parametrize("field", ["items", "blocks"])
def test_mistake_in_lists_is_seen(field, row):
    world = world_of("static")
    batch = np.array([3, 3, 3, -1, 4, 4, 6, 0], np.int32)
    function = static_decode()
    work = build(world, batch, prefill=False)
    y, x = random_inputs(world, "qkv", len(batch))
    expected, size = by_address(world, "qkv", y, x, batch)
    found = np.asarray(function(y, x, world.pool, GpuLoraWork(**work)))
    assert_product(found, y, batch, expected, size)
    # Of adapter 3's first item or block: other chunks, a token less, a group less.
    work[field][row, 0] += (2, 1, -1, -1)[row]
    found = np.asarray(function(y, x, world.pool, GpuLoraWork(**work)))
    with pytest.raises(AssertionError):
        assert_product(found, y, batch, expected, size)


@functools.cache
def static_decode():
    return function_of(world_of("static"), "qkv", 8, prefill=False)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"block_k": 48}, "block_k=48 must be a power of two >= 16"),
        ({"block_k": 8}, "block_k=8 must be a power of two >= 16"),
        ({"splits": 2}, "d_in=192 must be a multiple of splits . block_k = 128"),
        ({"splits": 0}, "splits=0 must be at least 1"),
        ({"splits": 1, "lookup": "hoist"}, "lookup='hoist' cannot find runs of 192"),
        ({"lookup": "static"}, "lookup='static' cannot find runs of 64"),
        ({"lookup": "element"}, "splits=3 must be 1 with lookup='element'"),
        ({"programs": 0}, "programs=0 must be at least 1"),
        ({"num_warps": 3}, "num_warps=3 must be 1, 2, 4 or 8"),
        ({"num_stages": 0}, "num_stages=0 must be at least 1"),
    ],
)
def test_shrink_block_sizes_that_do_not_fit_are_refused(changes, rule):
    world = world_of("hoist")
    chosen = configs(world, "qkv", 16, prefill=False)["shrink"]
    group = group_of(world.layout, "qkv")
    check_shrink(chosen, group, 2048)
    with pytest.raises(ValueError, match=rule):
        check_shrink(dataclasses.replace(chosen, **changes), group, 2048)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"block_n": 128}, "block_n=128 must divide 64"),
        ({"block_n": 24}, "block_n=24 must be a power of two >= 16"),
        ({"lookup": "select"}, "lookup='select' must be 'hoist' or 'element'"),
    ],
)
def test_expand_block_sizes_that_do_not_fit_are_refused(changes, rule):
    world = world_of("hoist")
    chosen = configs(world, "qkv", 16, prefill=False)["expand"]
    group = group_of(world.layout, "qkv")
    check_expand(chosen, group, 2048)
    with pytest.raises(ValueError, match=rule):
        check_expand(dataclasses.replace(chosen, **changes), group, 2048)


def test_pages_of_odd_elements_are_refused():
    world = world_of("hoist")
    chosen = configs(world, "qkv", 16, prefill=False)
    group = group_of(world.layout, "qkv")
    with pytest.raises(ValueError, match="page_elems=2044 must be a multiple of 8"):
        check_shrink(chosen["shrink"], group, 2044)
    with pytest.raises(ValueError, match="page_elems=2044 must be a multiple of 8"):
        check_expand(chosen["expand"], group, 2044)


def test_other_element_type_or_shape_of_x_is_refused():
    world = world_of("static")
    y, x = random_inputs(world, "qkv", 4)
    work = GpuLoraWork(**build(world, [0, 0, 1, -1], prefill=False))
    call = functools.partial(
        multi_lora_gpu,
        pool=world.pool,
        work=work,
        group=group_of(world.layout, "qkv"),
        interpret=True,
    )
    with pytest.raises(ValueError, match="x.dtype=bfloat16 must be pool.dtype=float32"):
        call(y, x.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="must be d_in=64"):
        call(y, x[:32])


def test_chosen_block_sizes_fit_every_known_shape():
    """(hidden, ffn, heads, KV heads, head width): Llama, SmolLM2, Qwen2, Mistral."""
    shapes = [
        (4096, 11008, 32, 32, 128),
        (4096, 14336, 32, 8, 128),
        (2048, 8192, 32, 8, 64),
        (3072, 8192, 24, 8, 128),
        (576, 1536, 9, 3, 64),
        (960, 2560, 15, 5, 64),
        (896, 4864, 14, 2, 64),
        (3584, 18944, 28, 4, 128),
        (64, 128, 4, 2, 16),
    ]
    for hidden, ffn, heads, kv_heads, head_dim in shapes:
        model = dataclasses.replace(
            ODD,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
        )
        page_elems = 2 * kv_heads * 16 * head_dim
        for targets in (QKVO, ("q", "v"), PROJECTIONS):
            for group in ChunkLayout(model, targets, page_elems).groups:
                for prefill in (False, True):
                    shrink = choose_shrink(
                        group, page_elems, num_items=512, prefill=prefill
                    )
                    expand = choose_expand(
                        group, page_elems, num_blocks=64, prefill=prefill
                    )
                    check_shrink(shrink, group, page_elems)
                    check_expand(expand, group, page_elems)
                    assert shrink.lookup != "element", (model, group)
                    assert expand.lookup == "hoist", (model, group)
