"""Multi-LoRA against loops over the elements' addresses, and the work list's bounds."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora_world import (
    FUSED,
    MAX_CHUNKS,
    MORE_RANKS,
    RANKS,
    WIDE_HEADS,
    assert_product,
    by_address,
    group_of,
    mixed_world,
    random_inputs,
)

from jchameleon.config import PROJECTIONS
from jchameleon.pallas.cpu_lora import multi_lora_cpu
from jchameleon.pallas.multi_lora import (
    CHUNKS_PER_ITEM,
    LoraWork,
    build_lora_work,
    max_work_items,
    multi_lora,
    tile_tokens,
)
from jchameleon.pallas.operations import CPU, compile_operations
from jchameleon.pallas.reference import multi_lora_reference

FORMS = {
    "xla": multi_lora,
    "cpu": multi_lora_cpu,
    "reference": multi_lora_reference,
}
compile_operations(CPU)


@functools.cache
def compiled(form, layout, name):
    return jax.jit(functools.partial(FORMS[form], group=group_of(layout, name)))


def forms(dtype):
    """Return the names of the forms that serve an element type."""
    return [form for form in FORMS if form != "cpu" or dtype == np.float32]


def run(form, world, name, y, x, token_adapter, query_tile):
    work = build_lora_work(
        token_adapter,
        world.pages,
        num_items=max_work_items(len(token_adapter), query_tile, MAX_CHUNKS),
        pages_per_chunk=world.layout.pages_per_chunk,
    )
    function = compiled(form, world.layout, name)
    return np.asarray(function(y, x, world.pool, LoraWork(**work)))


def check(world, name, token_adapter, *, query_tile=1, seed=0):
    """Hold both forms to the loop over addresses, and base tokens to their bits."""
    token_adapter = np.asarray(token_adapter, np.int32)
    y, x = random_inputs(world, name, len(token_adapter), seed=seed)
    expected, size = by_address(world, name, y, x, token_adapter)
    for form in forms(y.dtype):
        found = run(form, world, name, y, x, token_adapter, query_tile)
        assert_product(found, y, token_adapter, expected, size, form)


def decode_batches(num_tokens, num_adapters):
    """Return the mixes of adapters that a decode step of this shape must take."""
    rng = np.random.default_rng(num_tokens)
    distinct = rng.permutation(num_adapters)[:num_tokens]
    batches = [
        np.full(num_tokens, -1),
        rng.integers(-1, num_adapters, num_tokens),
        np.where(rng.random(num_tokens) < 0.5, distinct, -1),
        distinct,
        np.arange(num_tokens) % len(RANKS),
    ]
    batches += [np.full(num_tokens, i) for i in range(len(RANKS))]
    return batches


@pytest.mark.parametrize("num_tokens", [1, 4, 16, 64])
def test_decode_mixed_ranks_and_base_rows_match_addresses(num_tokens):
    world = mixed_world()
    for batch in decode_batches(num_tokens, len(MORE_RANKS)):
        check(world, "qkv", batch)


@pytest.mark.parametrize(
    ("targets", "name"),
    [
        (("q", "v"), "qkv"),
        (("gate", "up"), "gate_up"),
        (("k", "up", "down"), "gate_up"),
        *((PROJECTIONS, name) for name in FUSED),
    ],
)
def test_targets_subset_adapts_their_rows_alone(targets, name):
    world = mixed_world(targets)
    check(world, name, [3, -1, 2, 6])
    y, x = random_inputs(world, name, 4)
    found = run("xla", world, name, y, x, np.array([3, -1, 2, 6], np.int32), 1)
    at = 0
    for projection in FUSED[name]:
        size = world.model.projection_shape(projection)[1]
        changed = (found[at : at + size] != y[at : at + size]).any(axis=0)
        assert changed.tolist() == [projection in targets and t != 1 for t in range(4)]
        at += size


@pytest.mark.parametrize("page_elems", [64, 4096])
def test_page_size_of_any_multiple_of_64_matches_addresses(page_elems):
    world = mixed_world(PROJECTIONS, model=WIDE_HEADS, page_elems=page_elems)
    check(world, "qkv", [6, 0, -1, 5])


@pytest.mark.parametrize("num_tokens", [32, 64, 160, 512])
def test_packed_prefill_adapters_straddle_tiles(num_tokens):
    world = mixed_world()
    tiles = num_tokens // 32
    rng = np.random.default_rng(num_tokens)
    # Runs of tiles of one request, whose ends do not fall on LoRA tiles; the last tile
    # of a request is padded, and so is the end of the step.
    batch = np.full((tiles, 32), -1)
    at, adapter = 0, 0
    while at < tiles:
        run_tiles = int(rng.integers(1, 4))
        batch[at : at + run_tiles] = adapter
        last = min(at + run_tiles, tiles) - 1
        batch[last, int(rng.integers(1, 32)) :] = -1
        at, adapter = at + run_tiles, (adapter + 1) % len(RANKS)
    batch[-1] = batch[-1] if tiles < 4 else -1
    check(world, "qkv", batch.ravel(), query_tile=32)
    check(world, "qkv", np.full(num_tokens, 6), query_tile=32)  # one for all
    check(world, "qkv", np.full(num_tokens, -1), query_tile=32)


def test_many_rows_of_any_adapters_match_addresses():
    """Blocks of tokens side by side in which many adapters meet."""
    world = mixed_world()
    rng = np.random.default_rng(0)
    check(world, "qkv", rng.integers(-1, len(MORE_RANKS), 512))
    check(world, "qkv", np.repeat(rng.integers(-1, len(RANKS), 64), 8))


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("page_elems", [64, 4096])
def test_long_prefill_of_every_group_matches_addresses(name, page_elems):
    world = mixed_world(PROJECTIONS, model=WIDE_HEADS, page_elems=page_elems)
    batch = np.repeat([6, 0, -1, 5, 4, 3, 6, 2, 1, -1, 5], 32)
    batch[300:340] = -1
    check(world, name, batch, query_tile=32)


@pytest.mark.parametrize(("num_tokens", "query_tile"), [(16, 1), (64, 32)])
def test_bfloat16_matches_addresses(num_tokens, query_tile):
    world = mixed_world(dtype="bfloat16")
    rng = np.random.default_rng(num_tokens)
    requests = rng.integers(-1, len(RANKS), num_tokens // query_tile)
    check(world, "qkv", np.repeat(requests, query_tile), query_tile=query_tile)
    check(world, "qkv", np.full(num_tokens, 6), query_tile=query_tile)


def test_product_is_scale_b_a_x_of_the_adapter_file():
    world = mixed_world(PROJECTIONS)
    batch = np.array([5, 2, -1, 6], np.int32)
    for name, members in FUSED.items():
        y, x = random_inputs(world, name, 4)
        expected = y.astype(np.float64)
        for t, index in enumerate(batch):
            if index >= 0:
                modules = world.adapters[index].modules
                pairs = [modules[0, projection] for projection in members]
                wide = x[:, t].astype(np.float64)
                expected[:, t] += np.concatenate(
                    [0.75 * p.b @ (p.a @ wide) for p in pairs]
                )
        for form in FORMS:
            found = run(form, world, name, y, x, batch, 1)
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("num_tokens", [16, 512])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_overflow_of_one_adapter_does_not_reach_others(dtype, num_tokens):
    world = mixed_world(dtype=dtype)
    batch = np.array([4, -1, 3, 4] * (num_tokens // 4), np.int32)
    y, x = random_inputs(world, "qkv", num_tokens)
    x[:, 1::4] *= x.dtype.type(8)  # a base token that overflows there, were it let in
    clean = [run(form, world, "qkv", y, x, batch, 1) for form in forms(x.dtype)]
    huge = dataclasses.replace(world, pool=world.pool.copy())
    pages = huge.pages[4].ravel()
    huge.pool[pages] = np.where(
        np.isnan(huge.pool[pages]), huge.pool[pages], np.asarray(3e38, dtype)
    )
    others = batch != 4
    for form, before in zip(forms(x.dtype), clean, strict=True):
        found = run(form, huge, "qkv", y, x, batch, 1).astype(np.float32)
        assert not np.isfinite(found[:, ~others]).any(), form
        assert (found[:, others] == before[:, others].astype(np.float32)).all(), form


@pytest.mark.parametrize("num_tokens", [16, 512])
def test_infinite_adapter_does_not_reach_others_on_cpu(num_tokens):
    world = mixed_world()
    batch = np.array([4, -1, 3, 4] * (num_tokens // 4), np.int32)
    y, x = random_inputs(world, "qkv", num_tokens)
    clean = run("cpu", world, "qkv", y, x, batch, 1)
    pool = world.pool.copy()
    pool[world.pages[4].ravel()] = np.inf
    found = run("cpu", dataclasses.replace(world, pool=pool), "qkv", y, x, batch, 1)
    others = batch != 4
    assert not np.isfinite(found[:, ~others]).any()
    assert (found[:, others] == clean[:, others]).all()


@pytest.mark.parametrize("num_tokens", [16, 512])
def test_not_finite_token_does_not_reach_others(num_tokens):
    world = mixed_world()
    batch = np.array([4, -1, 3, 4] * (num_tokens // 4), np.int32)
    y, x = random_inputs(world, "qkv", num_tokens)
    clean = {form: run(form, world, "qkv", y, x, batch, 1) for form in FORMS}
    x[:, [0, 5]] = [np.inf, np.nan]
    y[:, 5] = np.nan
    others = np.delete(np.arange(num_tokens), [0, 5])
    for form in FORMS:
        found = run(form, world, "qkv", y, x, batch, 1)
        assert (found[:, others] == clean[form][:, others]).all(), form


def test_list_beyond_count_is_not_read():
    world = mixed_world()
    batch = np.array([3, -1, 5, 3], np.int32)
    y, x = random_inputs(world, "qkv", 4)
    for form in FORMS:
        before = run(form, world, "qkv", y, x, batch, 1)
        work = build_lora_work(
            batch,
            world.pages,
            num_items=max_work_items(4, 1, MAX_CHUNKS),
            pages_per_chunk=world.layout.pages_per_chunk,
        )
        count = int(work["count"])
        nan_page = int(np.flatnonzero(np.isnan(world.pool).all(axis=1))[0])
        work["pages"][count:] = nan_page
        work["owner"][count:] = 3
        function = compiled(form, world.layout, "qkv")
        after = np.asarray(function(y, x, world.pool, LoraWork(**work)))
        assert (after == before).all(), form


@st.composite
def batches(draw):
    """Return (token_adapter, adapter chunks, query_tile, max_chunks) of any step."""
    if draw(st.booleans()):
        query_tile = 1
        num_tokens = draw(st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128, 256]))
    else:
        query_tile = 32
        num_tokens = 32 * draw(st.integers(1, 20))
    max_chunks = draw(st.integers(1, 32))
    requests = num_tokens // query_tile
    chunks = draw(
        st.lists(st.integers(1, max_chunks), min_size=1, max_size=min(requests, 40))
    )
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    of_request = rng.integers(-1, len(chunks), requests)
    if draw(st.booleans()):
        of_request = np.resize(rng.permutation(len(chunks)), requests)
    token_adapter = np.repeat(of_request, query_tile).astype(np.int32)
    if query_tile > 1:
        token_adapter[rng.random(num_tokens) < 0.1] = -1
    return token_adapter, chunks, query_tile, max_chunks


@given(batches())
def test_work_list_holds_every_chunk_of_every_tile_once(batch):
    token_adapter, chunks, query_tile, max_chunks = batch
    num_tokens, width = len(token_adapter), 3
    ends = np.cumsum([0, *chunks])
    pages = [
        2 + np.arange(start * width, end * width, dtype=np.int32).reshape(-1, width)
        for start, end in zip(ends, ends[1:], strict=False)
    ]
    num_items = max_work_items(num_tokens, query_tile, max_chunks)
    work = build_lora_work(
        token_adapter, pages, num_items=num_items, pages_per_chunk=width
    )
    tile = tile_tokens(num_tokens)
    assert num_tokens % tile == 0
    assert 0 <= work["count"] <= num_items
    assert work["first_token"].shape == (num_items,)
    assert work["pages"].shape == (num_items, CHUNKS_PER_ITEM * width)
    assert work["owner"].shape == (num_items, CHUNKS_PER_ITEM)
    found = []
    for item in range(work["count"]):
        first = int(work["first_token"][item])
        assert first % tile == 0
        for place, owner in enumerate(work["owner"][item].tolist()):
            own = work["pages"][item, place * width : (place + 1) * width].tolist()
            if owner < 0:
                assert own == [0] * width
            else:
                found.append((first, owner, *own))
    expected = [
        (first, owner, *own)
        for first in range(0, num_tokens, tile)
        for owner in sorted({*token_adapter[first : first + tile].tolist()} - {-1})
        for own in pages[owner].tolist()
    ]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize(
    ("num_tokens", "query_tile"),
    [(1, 1), (4, 1), (16, 1), (64, 1), (256, 1), (32, 32), (96, 32), (512, 32)],
)
@pytest.mark.parametrize("max_chunks", [1, 5, 16, 25, 32])
def test_max_work_items_worst_batch_reaches_it(num_tokens, query_tile, max_chunks):
    requests = num_tokens // query_tile
    token_adapter = np.repeat(np.arange(requests, dtype=np.int32), query_tile)
    pages = [np.full((max_chunks, 1), 2 + i, np.int32) for i in range(requests)]
    num_items = max_work_items(num_tokens, query_tile, max_chunks)
    work = build_lora_work(token_adapter, pages, num_items=num_items, pages_per_chunk=1)
    assert work["count"] == num_items
    with pytest.raises(ValueError, match=f"exceeds num_items={num_items - 1}"):
        build_lora_work(
            token_adapter, pages, num_items=num_items - 1, pages_per_chunk=1
        )


def test_base_rows_alone_need_no_item():
    world = mixed_world()
    for pages in (world.pages, []):
        work = build_lora_work(
            np.full(16, -1, np.int32),
            pages,
            num_items=3,
            pages_per_chunk=world.layout.pages_per_chunk,
        )
        assert work["count"] == 0
        assert (work["owner"] == -1).all()
        assert not work["pages"].any()


@pytest.mark.parametrize("form", ["xla", "cpu"])
def test_one_program_serves_every_mix(form):
    world = mixed_world()
    y, x = random_inputs(world, "qkv", 16)
    function = compiled(form, world.layout, "qkv")
    run(form, world, "qkv", y, x, np.full(16, -1, np.int32), 1)
    programs = function._cache_size()
    for batch in decode_batches(16, len(MORE_RANKS)):
        run(form, world, "qkv", y, x, np.asarray(batch, np.int32), 1)
    assert function._cache_size() == programs
