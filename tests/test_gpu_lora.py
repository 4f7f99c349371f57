"""The GPU's LoRA kernels against loops over addresses, interpreted and on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_backends import SLACK, jit, on_all, on_kernels
from gpu_lora_cases import GPU_RANKS, SHAPES, build, configs, world_of
from lora_world import (
    FUSED,
    MAX_CHUNKS,
    assert_product,
    by_address,
    group_of,
    random_inputs,
)

from jchameleon.config import PROJECTIONS
from jchameleon.pallas import gpu_lora, gpu_lora_tiles
from jchameleon.pallas.gpu_lora import multi_lora_gpu
from jchameleon.pallas.gpu_lora_work import (
    GpuLoraWork,
)
from jchameleon.pallas.multi_lora import LoraWork, build_lora_work, max_work_items
from jchameleon.pallas.reference import multi_lora_reference


def function_of(world, name, num_tokens, *, prefill, backend="interpret", **changes):
    group = group_of(world.layout, name)
    if backend == "reference":
        return jit(functools.partial(multi_lora_reference, group=group), backend)
    call = functools.partial(
        multi_lora_gpu,
        group=group,
        interpret=backend == "interpret",
        **configs(world, name, num_tokens, prefill=prefill, **changes),
    )
    return jit(call, backend)


def work_of(world, batch, *, prefill, backend):
    if backend != "reference":
        return GpuLoraWork(**build(world, batch, prefill=prefill))
    items = max_work_items(len(batch), 32 if prefill else 1, MAX_CHUNKS)
    of = {"num_items": items, "pages_per_chunk": world.layout.pages_per_chunk}
    return LoraWork(**build_lora_work(batch, world.pages, **of))


def check(
    world, name, batches, *, prefill, function=None, backend="interpret", **changes
):
    """Hold one program to the loop over addresses, for each batch of its shape."""
    num_tokens = len(batches[0])
    if function is None:
        of = {"prefill": prefill, "backend": backend}
        function = function_of(world, name, num_tokens, **of, **changes)
    for seed, batch in enumerate(batches):
        batch = np.asarray(batch, np.int32)
        y, x = random_inputs(world, name, num_tokens, seed=seed)
        work = work_of(world, batch, prefill=prefill, backend=backend)
        found = np.asarray(function(y, x, world.pool, work))
        expected, size = by_address(world, name, y, x, batch)
        slack = SLACK[backend]
        assert_product(found, y, batch, expected, size, batch, slack=slack)
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
        np.where(np.arange(num_tokens) < adapters, np.arange(num_tokens), -1),
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


@on_all
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_mixed_ranks_match_addresses(shape, dtype, backend):
    world = world_of(shape, dtype)
    chosen = configs(world, "qkv", 24, prefill=False)
    assert chosen["shrink"].lookup == shape
    check(world, "qkv", decode_batches(24), prefill=False, backend=backend)


@on_all
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_mixed_ranks_match_addresses(shape, dtype, backend):
    world = world_of(shape, dtype)
    batches = [prefill_batch(224, seed=seed) for seed in range(3)]
    batches += [np.full(224, 4), np.full(224, -1), np.repeat(np.arange(7), 32)]
    check(world, "qkv", batches, prefill=True, backend=backend)


@on_kernels
@pytest.mark.parametrize("prefill", [False, True])
def test_rows_over_two_pages_match_addresses(prefill, backend):
    world = world_of("hoist")
    batch = np.repeat([4, -1, 2], [33, 31, 32])
    changes = {"splits": 1, "lookup": "select", "block_k": 64}
    check(world, "qkv", [batch], prefill=prefill, backend=backend, **changes)


@on_kernels
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_steps_of_any_length_match_addresses(num_tokens, backend):
    world = world_of("static", "bfloat16")
    padded = np.where(np.arange(num_tokens) < 35, 5, -1)
    check(world, "o", [padded], prefill=True, backend=backend)
    thirds = np.arange(num_tokens) * 3 // num_tokens
    check(world, "o", [padded, thirds], prefill=False, backend=backend)


@on_kernels
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
def test_targets_subset_adapts_their_rows_alone(shape, targets, name, backend):
    world = world_of(shape, targets=targets)
    batch = np.array([3, 3, -1, 2, 6])
    function = function_of(world, name, 5, prefill=False, backend=backend)
    check(world, name, [batch], prefill=False, function=function, backend=backend)
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


@on_kernels
def test_default_block_sizes_match_addresses(backend):
    world = world_of("static")
    group = group_of(world.layout, "qkv")
    call = functools.partial(
        multi_lora_gpu, group=group, interpret=backend == "interpret"
    )
    function = jit(call, backend)
    batches = [[4, 4, -1, 6]]
    check(world, "qkv", batches, prefill=False, function=function, backend=backend)


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


@on_kernels
@pytest.mark.parametrize("prefill", [False, True])
def test_not_finite_rows_and_adapters_reach_no_others(prefill, backend):
    world = world_of("hoist", "bfloat16")
    batch = np.repeat([4, -1, 3, 4], 32 if prefill else 4)
    y, x = random_inputs(world, "qkv", len(batch))
    of = {"prefill": prefill, "backend": backend}
    function = function_of(world, "qkv", len(batch), **of)
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
    with pytest.raises(ValueError, match="must have the 128 rows of qkv"):
        call(y[:127], x)
    with pytest.raises(ValueError, match="y.dtype=float16 must be one of"):
        call(y.astype(np.float16), x)


@pytest.mark.parametrize(
    ("field", "change", "rule"),
    [
        ("items", lambda a: a[:, :-1], "num_items=51 must be a multiple of num_blo"),
        ("blocks", lambda a: a.astype("f4"), "blocks dtype=float32 must be int32"),
        ("counts", lambda a: a.astype("i8"), "counts dtype=int64 must be int32"),
        ("pages", lambda a: a[:, :1], "chunks of 1 pages of page_elems=1024 must hold"),
    ],
)
def test_lists_of_other_shapes_are_refused(field, change, rule):
    world = world_of("static")
    y, x = random_inputs(world, "qkv", 4)
    work = build(world, [0, 0, 1, -1], prefill=False)
    work[field] = change(work[field])
    group = group_of(world.layout, "qkv")
    with pytest.raises(ValueError, match=rule):
        multi_lora_gpu(
            y, x, world.pool, GpuLoraWork(**work), group=group, interpret=True
        )
