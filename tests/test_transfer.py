"""Loads of adapters: what is packed arrives in its pages, and nothing else changes."""

import os
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
from load_rig import (
    LAYOUT,
    QKVO,
    RANKS,
    TINY,
    bits,
    commit,
    compiled_commit,
    hand_out_pages,
    random_adapter,
    random_pools,
    wait_for,
    written,
)
from random_adapters import write_random_adapter
from slow_adapters import close_gate, open_gate, read_adapter

from jchameleon.config import EngineConfig
from jchameleon.llm import LLM
from jchameleon.runtime.host_store import HostStore
from jchameleon.runtime.pieces import split_blocks, split_targets
from jchameleon.runtime.shapes import CHUNKS_PER_PIECE, piece_pages
from jchameleon.runtime.staging import HostStaging, Packer
from jchameleon.runtime.transfer import (
    AdapterLoader,
    EmulatedLink,
    emulated_link,
)
from jchameleon.sampling import SamplingParams


@pytest.fixture
def make_loader():
    """Start loaders over one CPU device, closed when the test ends."""
    loaders = []

    def make(adapters=(), dtype=np.float32, *, fetch=None, **options):
        library = {adapter.uid: adapter for adapter in adapters}
        woken = queue.SimpleQueue()
        staging = HostStaging(
            Packer(LAYOUT, np.dtype(dtype)),
            jax.devices("cpu")[0],
            fetch or library.__getitem__,
        )
        loader = AdapterLoader(
            LAYOUT,
            np.dtype(dtype),
            staging,
            notify=lambda: woken.put(None),
            **{"max_in_flight": 4} | options,
        )
        loaders.append(loader)
        return loader, woken

    yield make
    for loader in loaders:
        loader.close()


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_pieces_cover_every_page_exactly(num_pages, piece, seed):
    rng = np.random.default_rng(seed)
    packed = rng.standard_normal((2, num_pages, 3), dtype=np.float32)
    pages = tuple((rng.permutation(100)[:num_pages] + 2).tolist())
    pool = np.full((2, 102, 3), np.nan, np.float32)
    written = set()
    targets, blocks = split_targets(pages, piece), split_blocks(packed, piece)
    pieces = list(zip(targets, blocks, strict=True))
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
    adapters = [random_adapter(rank) for rank in RANKS]
    loader, woken = make_loader(adapters, dtype)
    pages = hand_out_pages(adapters)
    for adapter, own in zip(adapters, pages, strict=True):
        loader.start(adapter.uid, own)
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
    good = [random_adapter(rank) for rank in (8, 24)]
    foreign = random_adapter(8, targets=("q", "down"))
    adapters = [good[0], foreign, good[1]]
    loader, woken = make_loader(adapters)
    for adapter, own in zip(adapters, hand_out_pages(adapters), strict=True):
        loader.start(adapter.uid, own)
    finished = wait_for(loader, 3)
    assert woken.qsize() == 3
    assert loader.in_flight == 0
    failed = finished[foreign.uid]
    assert failed.pieces == ()
    assert "down" in failed.error
    assert "\n" not in failed.error
    assert [finished[adapter.uid].error for adapter in good] == [None, None]
    # The same adapter may be tried again.
    loader.start(foreign.uid, hand_out_pages([foreign])[0])
    assert wait_for(loader, 1)[foreign.uid].error == failed.error


def test_host_arrays_changed_after_the_load_do_not_reach_the_device(make_loader):
    adapter = random_adapter(17)
    second = random_adapter(24)  # whose staging might reuse the first one's memory
    loader, _ = make_loader([adapter, second])
    packed = LAYOUT.pack(adapter, dtype=np.float32)
    (own,) = hand_out_pages([adapter])
    loader.start(adapter.uid, own)
    load = wait_for(loader, 1)[adapter.uid]
    for pair in adapter.modules.values():
        pair.a[...] = np.nan
        pair.b[...] = np.nan
    loader.start(second.uid, hand_out_pages([second], seed=1)[0])
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


def test_close_drops_what_is_under_way(make_loader):
    adapters = [random_adapter(64, seed=seed) for seed in range(6)]
    loader, _ = make_loader(adapters)
    for adapter, own in zip(adapters, hand_out_pages(adapters), strict=True):
        loader.start(adapter.uid, own)
    loader.close()
    names = [thread.name for thread in threading.enumerate()]
    assert not any(name.startswith("jchameleon-load") for name in names)


def test_failed_read_fails_that_load_and_a_later_one_tries_again(make_loader, tmp_path):
    adapters = [written(tmp_path / f"a{seed}", 8, seed=seed) for seed in range(3)]
    store = HostStore(read_adapter, budget_bytes=0)
    for adapter in adapters:
        store.put(adapter, adapter.source)
    loader, _ = make_loader(fetch=store.get)
    os.rename(tmp_path / "a1", tmp_path / "away")
    pages = hand_out_pages(adapters)
    for adapter, own in zip(adapters, pages, strict=True):
        loader.start(adapter.uid, own)
    finished = wait_for(loader, 3)
    errors = [finished[adapter.uid].error for adapter in adapters]
    assert errors[::2] == [None, None]
    assert str(tmp_path / "a1") in errors[1]
    assert "no such directory" in errors[1]
    os.rename(tmp_path / "away", tmp_path / "a1")
    loader.start(adapters[1].uid, pages[1])
    load = wait_for(loader, 1)[adapters[1].uid]
    assert load.error is None
    pools = commit([jnp.asarray(pool) for pool in random_pools(np.float32)], load)
    packed = LAYOUT.pack(adapters[1], dtype=np.float32)
    for layer, pool in enumerate(pools):
        assert (np.asarray(pool)[list(pages[1])] == packed[layer]).all()


@pytest.mark.parametrize("link", [None, EmulatedLink(bytes_per_s=1e9)])
def test_slow_reads_hold_up_no_load_from_memory(make_loader, tmp_path, link):
    slow = [written(tmp_path / f"slow{seed}", 64, seed=seed) for seed in range(3)]
    quick = [written(tmp_path / f"quick{seed}", 8, seed=seed) for seed in range(5)]
    store = HostStore(read_adapter, budget_bytes=5 * quick[0].num_bytes)
    for adapter in (*slow, *quick):
        store.put(adapter, adapter.source)
    assert not any(store.held_bytes(adapter.uid) for adapter in slow)
    assert all(store.held_bytes(adapter.uid) for adapter in quick)
    loader, _ = make_loader(fetch=store.get, max_in_flight=4, link=link)
    pages = hand_out_pages([*slow, quick[0]])
    for adapter, own in zip(slow, pages, strict=False):
        close_gate(tmp_path / f"slow{slow.index(adapter)}")
        loader.start(adapter.uid, own)
    try:
        for adapter in quick:
            loader.start(adapter.uid, pages[-1])
            finished = wait_for(loader, 1, within_s=20)
            assert finished[adapter.uid].error is None
        assert loader.in_flight == 3
    finally:
        for index in range(3):
            open_gate(tmp_path / f"slow{index}")
    finished = wait_for(loader, 3)
    assert [finished[adapter.uid].error for adapter in slow] == [None] * 3
    assert (store.stats().host_hits, store.stats().disk_reads) == (5, 3)


def load_bytes(adapter):
    """Return the bytes of an adapter's pages in all pools."""
    return sum(
        LAYOUT.num_pages(adapter.rank) * pool[0].nbytes
        for pool in random_pools(np.float32)
    )


def arrivals(loader, adapters, pages):
    """Start loads; return when each was started (before, after) and when it arrived."""
    before, after, arrived = [], [], {}
    for adapter, own in zip(adapters, pages, strict=True):
        before.append(time.monotonic())
        loader.start(adapter.uid, own)
        after.append(time.monotonic())
    deadline_s = time.monotonic() + 60
    while len(arrived) < len(adapters):
        assert time.monotonic() < deadline_s
        finished = loader.poll()
        now_s = time.monotonic()
        for load in finished:
            assert load.error is None
            arrived[load.uid] = now_s
        time.sleep(0.001)
    return before, after, [arrived[adapter.uid] for adapter in adapters]


def fifo(starts, sizes, link):
    """Return when a first-in, first-out link delivers, from the definition."""
    out = []
    for index, start_s in enumerate(starts):
        sent_s = start_s
        for earlier in range(index + 1):
            # The link is busy at least from any earlier start on.
            queue_bytes = sum(sizes[earlier : index + 1])
            sent_s = max(sent_s, starts[earlier] + queue_bytes / link.bytes_per_s)
        out.append(sent_s + link.latency_s)
    return out


def test_emulated_link_delivers_as_a_fifo_does(make_loader):
    adapters = [
        random_adapter(rank, seed=seed) for seed, rank in enumerate((8, 40, 1, 17))
    ]
    sizes = [load_bytes(adapter) for adapter in adapters]
    # The largest takes 0.2 s; latencies one after the other would take 2 s.
    link = EmulatedLink(bytes_per_s=max(sizes) / 0.2, latency_s=0.5)
    loader, _ = make_loader(adapters, link=link)
    pages = hand_out_pages(adapters)
    for attempt in range(2):  # the second finds the link idle again
        before, after, arrived = arrivals(loader, adapters, pages)
        assert arrived == sorted(arrived), f"{attempt=}"
        for low_s, high_s, at_s in zip(
            fifo(before, sizes, link), fifo(after, sizes, link), arrived, strict=True
        ):
            assert low_s <= at_s <= high_s + 0.8, f"{attempt=}"


def test_failed_read_is_told_before_the_emulated_link_would_deliver(make_loader):
    adapter = random_adapter(8)
    link = EmulatedLink(bytes_per_s=1.0)
    loader, _ = make_loader([], link=link)  # it lacks the adapter
    loader.start(adapter.uid, hand_out_pages([adapter])[0])
    assert "KeyError" in wait_for(loader, 1)[adapter.uid].error


def test_emulated_link_is_off_unless_configured():
    assert emulated_link(EngineConfig()) is None
    link = emulated_link(EngineConfig(link_bytes_per_s=1.2e8, link_latency_s=0.001))
    assert link == EmulatedLink(bytes_per_s=1.2e8, latency_s=0.001)
    assert str(link) == "1.2e+08 B/s + 0.001 s"


def test_engine_waits_for_the_emulated_link_and_names_it(tmp_path):
    path = write_random_adapter(tmp_path / "a", TINY, rank=8, targets=QKVO, seed=0)
    sampling = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    options = {"max_running": 4, "max_batch_tokens": 64, "max_model_len": 64}
    options |= {"link_bytes_per_s": 1e9, "link_latency_s": 0.3}
    with LLM(model="tiny", adapters={"a": path}, **options) as llm:
        [first] = llm.generate([[1, 2]], adapters="a", sampling=sampling)
        [again] = llm.generate([[1, 2]], adapters="a", sampling=sampling)
        assert llm.stats().emulated_link == "1e+09 B/s + 0.3 s"
    assert first.timing.ttft_s > 0.3
    assert again.timing.ttft_s < first.timing.ttft_s
    assert again.token_ids == first.token_ids
