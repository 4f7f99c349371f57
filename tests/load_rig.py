"""What tests of loads share: adapters, pools to write them into, a loader's answers."""

import time

import jax
import numpy as np
from random_adapters import write_random_adapter
from slow_adapters import read_adapter

from jchameleon.config import ModelConfig
from jchameleon.lora.adapter import HostAdapter, LoraPair
from jchameleon.lora.layout import ChunkLayout
from jchameleon.runtime.programs import commit_load
from jchameleon.runtime.shapes import piece_pages

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


def written(path, rank, *, seed=0):
    """Write a random adapter to disk and return it."""
    return read_adapter(
        write_random_adapter(path, TINY, rank=rank, targets=QKVO, seed=seed)
    )
