"""Loads of adapters: what is packed arrives in its pages, and nothing else changes."""

import queue
import threading
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jchameleon.config import ModelConfig
from jchameleon.lora.adapter import HostAdapter, LoraPair
from jchameleon.lora.layout import ChunkLayout
from jchameleon.runtime.programs import commit_load
from jchameleon.runtime.transfer import (
    CHUNKS_PER_PIECE,
    AdapterLoader,
    piece_pages,
    split_pieces,
)

TINY = ModelConfig.preset("tiny")
QKVO = ("q", "k", "v", "o")
LAYOUT = ChunkLayout(TINY, QKVO, 2 * TINY.num_kv_heads * 16 * TINY.head_dim)
NUM_PAGES = 400
RANKS = (1, 8, 17, 33, 64)  # from part of a piece to several, the last one padded

compiled_commit = jax.jit(commit_load, donate_argnums=0)


def random_adapter(rank, *, targets=QKVO, seed=0):
    rng = np.random.default_rng([seed, rank])
    modules = {}
    for layer in range(TINY.num_layers):
        for projection in targets:
            d_in, d_out = TINY.projection_shape(projection)
            modules[layer, projection] = LoraPair(
                a=rng.standard_normal((rank, d_in), dtype=np.float32),
                b=rng.standard_normal((d_out, rank), dtype=np.float32),
                scale=0.5,
            )
    return HostAdapter.build(modules, source="test")


@pytest.fixture
def make_loader():
    """Start loaders over one CPU device, closed when the test ends."""
    loaders = []

    def make(dtype=np.float32):
        woken = queue.SimpleQueue()
        loader = AdapterLoader(
            LAYOUT,
            np.dtype(dtype),
            jax.devices("cpu")[0],
            notify=lambda: woken.put(None),
        )
        loaders.append(loader)
        return loader, woken

    yield make
    for loader in loaders:
        loader.close()


def wait_for(loader, count, *, within_s=60):
    """Poll until `count` loads came back; return them by uid."""
    finished = {}
    deadline_s = time.monotonic() + within_s
    while len(finished) < count:
        assert time.monotonic() < deadline_s, f"{len(finished)} of {count} loads"
        for load in loader.poll():
            assert load.uid not in finished
            finished[load.uid] = load
        time.sleep(0.001)
    assert not loader.poll()
    return finished


def random_pools(dtype, *, seed=0):
    rng = np.random.default_rng(seed)
    shape = (NUM_PAGES, LAYOUT.page_elems)
    return [rng.standard_normal(shape).astype(dtype) for _ in range(TINY.num_layers)]


def hand_out_pages(adapters, *, seed=0):
    """Return pages in random order for each adapter, none of them reserved ones."""
    free = (np.random.default_rng(seed).permutation(NUM_PAGES - 2) + 2).tolist()
    return [
        tuple(free.pop() for _ in range(LAYOUT.num_pages(adapter.rank)))
        for adapter in adapters
    ]


def commit(pools, load):
    for piece in load.pieces:
        assert piece.pages.dtype == np.int32
        assert piece.pages.shape == (piece_pages(LAYOUT),)
        assert piece.block.shape[:2] == (TINY.num_layers, piece_pages(LAYOUT))
        pools = compiled_commit(pools, piece.pages, piece.block)
    return pools


def bits(array):
    array = np.asarray(array)
    return array.view(f"u{array.dtype.itemsize}")


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_split_pieces_cover_every_page_exactly(num_pages, piece, seed):
    rng = np.random.default_rng(seed)
    packed = rng.standard_normal((2, num_pages, 3), dtype=np.float32)
    pages = tuple((rng.permutation(100)[:num_pages] + 2).tolist())
    pool = np.full((2, 102, 3), np.nan, np.float32)
    written = set()
    pieces = split_pieces(packed, pages, piece)
    assert len(pieces) == -(-num_pages // piece)
    for own, block in pieces:
        assert own.dtype == np.int32
        assert own.shape == (piece,)
        assert block.shape == (2, piece, 3)
        assert not np.shares_memory(block, packed)
        fresh = set(own.tolist()) - written
        # Padding repeats a page of this very piece, never one of another.
        assert fresh == set(own.tolist())
        assert len(fresh) == min(piece, num_pages - len(written))
        written |= fresh
        for row, page in enumerate(own.tolist()):
            assert (block[:, row] == packed[:, pages.index(page)]).all()
        pool[:, own] = block
    assert written == set(pages)
    assert (pool[:, list(pages)] == packed).all()
    assert np.isnan(np.delete(pool, pages, axis=1)).all()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_load_writes_the_adapters_pages_and_no_other(make_loader, dtype):
    loader, woken = make_loader(dtype)
    adapters = [random_adapter(rank) for rank in RANKS]
    pages = hand_out_pages(adapters)
    for adapter, own in zip(adapters, pages, strict=True):
        loader.start(adapter, own)
    assert loader.in_flight == len(RANKS)
    finished = wait_for(loader, len(RANKS))
    assert loader.in_flight == 0
    assert woken.qsize() == len(RANKS)
    before = random_pools(dtype)
    expected = [pool.copy() for pool in before]
    pools = [jnp.asarray(pool) for pool in before]
    for adapter, own in zip(adapters, pages, strict=True):
        load = finished[adapter.uid]
        assert load.error is None
        chunks = -(-adapter.rank // 8)
        assert len(load.pieces) == -(-chunks // CHUNKS_PER_PIECE)
        pools = commit(pools, load)
        packed = LAYOUT.pack(adapter, dtype=dtype)
        for layer, pool in enumerate(expected):
            pool[list(own)] = packed[layer]
    for pool, wanted in zip(pools, expected, strict=True):
        assert (bits(pool) == bits(wanted)).all()


def test_failing_pack_gives_an_error_and_others_load(make_loader):
    loader, woken = make_loader()
    good = [random_adapter(rank) for rank in (8, 24)]
    foreign = random_adapter(8, targets=("q", "down"))
    adapters = [good[0], foreign, good[1]]
    for adapter, own in zip(adapters, hand_out_pages(adapters), strict=True):
        loader.start(adapter, own)
    finished = wait_for(loader, 3)
    assert woken.qsize() == 3
    assert loader.in_flight == 0
    failed = finished[foreign.uid]
    assert failed.pieces == ()
    assert "down" in failed.error
    assert "\n" not in failed.error
    assert [finished[adapter.uid].error for adapter in good] == [None, None]
    # The same adapter may be tried again.
    loader.start(foreign, hand_out_pages([foreign])[0])
    assert wait_for(loader, 1)[foreign.uid].error == failed.error


def test_host_arrays_changed_after_the_load_do_not_reach_the_device(make_loader):
    loader, _ = make_loader()
    adapter = random_adapter(17)
    packed = LAYOUT.pack(adapter, dtype=np.float32)
    (own,) = hand_out_pages([adapter])
    loader.start(adapter, own)
    load = wait_for(loader, 1)[adapter.uid]
    for pair in adapter.modules.values():
        pair.a[...] = np.nan
        pair.b[...] = np.nan
    second = random_adapter(24)  # whose staging might reuse the first one's memory
    loader.start(second, hand_out_pages([second], seed=1)[0])
    wait_for(loader, 1)
    pools = commit([jnp.asarray(pool) for pool in random_pools(np.float32)], load)
    for layer, pool in enumerate(pools):
        assert (np.asarray(pool)[list(own)] == packed[layer]).all()


def test_commit_updates_the_pools_in_place():
    count = piece_pages(LAYOUT)
    pool = jax.ShapeDtypeStruct((5003, LAYOUT.page_elems), jnp.float32)
    pool_bytes = 5003 * LAYOUT.page_elems * 4
    program = compiled_commit.lower(
        [pool] * TINY.num_layers,
        jax.ShapeDtypeStruct((count,), jnp.int32),
        jax.ShapeDtypeStruct((TINY.num_layers, count, LAYOUT.page_elems), jnp.float32),
    ).compile()
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == pool_bytes * TINY.num_layers
    assert memory.temp_size_in_bytes < pool_bytes / 4


def test_close_drops_what_is_under_way():
    loader = AdapterLoader(
        LAYOUT, np.dtype(np.float32), jax.devices("cpu")[0], notify=lambda: None
    )
    adapters = [random_adapter(64, seed=seed) for seed in range(6)]
    for adapter, own in zip(adapters, hand_out_pages(adapters), strict=True):
        loader.start(adapter, own)
    loader.close()
    names = [thread.name for thread in threading.enumerate()]
    assert not any(name.startswith("jchameleon-load") for name in names)
