"""Adapters that rest in pinned host memory, on a CPU that is told to do so."""

import gc
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from engine_harness import heard_compiles
from load_rig import (
    LAYOUT,
    QKVO,
    RANKS,
    TINY,
    bits,
    commit,
    hand_out_pages,
    random_pools,
    wait_for,
    written,
)
from random_adapters import write_random_adapter
from slow_adapters import close_gate, open_gate, read_adapter

from jchameleon import llm as front
from jchameleon.llm import LLM
from jchameleon.runtime.host_store import HostStore
from jchameleon.runtime.staging import (
    HostStaging,
    Packer,
    PinnedStaging,
    choose_staging,
    rests_pinned,
)
from jchameleon.runtime.transfer import AdapterLoader
from jchameleon.sampling import SamplingParams

DEVICE = jax.devices("cpu")[0]
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


def packed_bytes(adapter, itemsize=4):
    """Return the bytes of an adapter's pieces: whole ones, of four chunks each."""
    pieces = -(-adapter.rank // 32)
    pages = pieces * 4 * LAYOUT.pages_per_chunk
    return pages * LAYOUT.page_elems * TINY.num_layers * itemsize


def pinned_bytes():
    """Return the bytes of all pinned arrays that anybody holds."""
    gc.collect()
    return sum(
        array.nbytes
        for array in jax.live_arrays()
        if array.sharding.memory_kind == "pinned_host"
    )


def store_of(adapters, *, budget_bytes=1 << 30):
    store = HostStore(read_adapter, budget_bytes=budget_bytes)
    for adapter in adapters:
        store.put(adapter, adapter.source)
    return store


@pytest.fixture
def make_loader():
    loaders = []

    def make(store, dtype=np.float32, kind=PinnedStaging):
        loader = AdapterLoader(
            LAYOUT,
            np.dtype(dtype),
            kind(Packer(LAYOUT, np.dtype(dtype)), DEVICE, store),
            notify=lambda: None,
            max_in_flight=8,
        )
        loaders.append(loader)
        return loader

    yield make
    for loader in loaders:
        loader.close()


@pytest.fixture
def adapters(tmp_path):
    return [
        written(tmp_path / f"a{rank}", rank, seed=seed)
        for seed, rank in enumerate(RANKS)
    ]


def load_all(loader, adapters, *, seed=0):
    pages = hand_out_pages(adapters, seed=seed)
    for adapter, own in zip(adapters, pages, strict=True):
        loader.start(adapter.uid, own)
    return pages, wait_for(loader, len(adapters))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_load_from_pinned_memory_writes_what_packing_gives(
    make_loader, adapters, dtype
):
    store = store_of(adapters)
    loader = make_loader(store, dtype)
    hits = 0
    for attempt in range(3):  # the first packs, the others find it done
        pages, finished = load_all(loader, adapters, seed=attempt)
        before = random_pools(dtype, seed=attempt)
        expected = [pool.copy() for pool in before]
        pools = [jnp.asarray(pool) for pool in before]
        for adapter, own in zip(adapters, pages, strict=True):
            load = finished[adapter.uid]
            assert load.error is None
            for piece in load.pieces:
                assert piece.block.sharding.memory_kind == "device"
            pools = commit(pools, load)
            packed = LAYOUT.pack(adapter, dtype=dtype)
            for layer, pool in enumerate(expected):
                pool[list(own)] = packed[layer]
        for pool, wanted in zip(pools, expected, strict=True):
            assert (bits(pool) == bits(wanted)).all()
        stats = store.stats()
        assert stats.disk_reads == 0
        assert stats.host_hits - hits == len(adapters)
        # Packed in place of what was read, and counted as what it is.
        total = sum(packed_bytes(a, np.dtype(dtype).itemsize) for a in adapters)
        assert stats.host_bytes == total
        for adapter in adapters:
            rest = store.get_packed(adapter.uid)
            assert rest.uid == adapter.uid
            kinds = {block.sharding.memory_kind for block in rest.blocks}
            assert kinds == {"pinned_host"}
            assert store.held_bytes(adapter.uid) == packed_bytes(
                adapter, np.dtype(dtype).itemsize
            )
        hits = store.stats().host_hits


def test_dropped_adapters_free_their_pinned_memory(make_loader, adapters):
    before = pinned_bytes()
    sizes = [packed_bytes(adapter) for adapter in adapters]
    budget = sizes[-1] + sizes[-2]
    store = store_of(adapters, budget_bytes=budget)
    loader = make_loader(store)
    for adapter in adapters * 2:
        load_all(loader, [adapter])
        held = [store.held_bytes(a.uid) for a in adapters]
        assert store.stats().host_bytes == sum(held) <= budget
        assert store.held_bytes(adapter.uid) == packed_bytes(adapter)
        kept = [
            packed_bytes(a) for a in adapters if store.get_packed(a.uid) is not None
        ]
        assert pinned_bytes() - before == sum(kept)
    assert store.stats().drops > 0
    for adapter in adapters:
        store.forget(adapter.uid)
    assert store.stats().host_bytes == 0
    assert pinned_bytes() == before


def test_adapter_dropped_while_its_copy_is_under_way_arrives_whole(
    make_loader, adapters
):
    [adapter] = adapters[-1:]
    store = store_of([adapter])
    loader = make_loader(store)
    load_all(loader, [adapter])
    (pages,) = hand_out_pages([adapter])
    loader.start(adapter.uid, pages)
    store.forget(adapter.uid)
    load = wait_for(loader, 1)[adapter.uid]
    pools = commit([jnp.asarray(pool) for pool in random_pools(np.float32)], load)
    packed = LAYOUT.pack(adapter, dtype=np.float32)
    for layer, pool in enumerate(pools):
        assert (np.asarray(pool)[list(pages)] == packed[layer]).all()


def test_adapter_that_is_over_the_budget_packed_rests_as_it_was_read(
    make_loader, adapters
):
    [adapter] = adapters[:1]  # of rank 1, and so mostly padding when packed
    assert adapter.num_bytes < packed_bytes(adapter)
    before = pinned_bytes()
    store = store_of([adapter], budget_bytes=packed_bytes(adapter) - 1)
    loader = make_loader(store)
    for _ in range(2):
        _, finished = load_all(loader, [adapter])
        assert finished[adapter.uid].error is None
        assert store.get_packed(adapter.uid) is None
        assert store.stats().host_bytes == adapter.num_bytes
    del finished
    assert pinned_bytes() == before


def test_failed_read_fails_that_load_alone_and_changed_content_is_refused(
    make_loader, tmp_path, adapters
):
    store = store_of(adapters, budget_bytes=1)
    loader = make_loader(store)
    write_random_adapter(tmp_path / "a8", TINY, rank=8, targets=QKVO, seed=99)
    (tmp_path / "a17").rename(tmp_path / "away")
    _, finished = load_all(loader, adapters)
    errors = {a.rank: finished[a.uid].error for a in adapters}
    assert "must not change" in errors.pop(8)
    assert "no such directory" in errors.pop(17)
    assert set(errors.values()) == {None}
    assert all(store.get_packed(adapter.uid) is None for adapter in adapters)
    (tmp_path / "away").rename(tmp_path / "a17")
    _, finished = load_all(loader, adapters[2:3])
    assert finished[adapters[2].uid].error is None


def test_adapter_forgotten_while_it_is_prepared_is_not_kept(
    make_loader, tmp_path, adapters
):
    slow = written(tmp_path / "slow", 8, seed=77)
    store = HostStore(read_adapter, budget_bytes=packed_bytes(slow))
    store.put(slow, slow.source)
    store.put(adapters[-1], adapters[-1].source)  # larger than the budget
    loader = make_loader(store)
    load_all(loader, [slow])
    store.forget(slow.uid)
    other = written(tmp_path / "other", 8, seed=78)
    store.put(slow, slow.source)
    store.put(other, other.source)
    load_all(loader, [other])  # drops what was read of the slow one
    close_gate(tmp_path / "slow")
    (pages,) = hand_out_pages([slow])
    loader.start(slow.uid, pages)
    try:
        while store.stats().disk_reads == 0:
            threading.Event().wait(0.001)
        store.forget(slow.uid)
    finally:
        open_gate(tmp_path / "slow")
    assert wait_for(loader, 1)[slow.uid].error is None
    assert store.held_bytes(slow.uid) == 0


def test_copy_that_cannot_start_fails_that_load_alone(make_loader, adapters):
    class Full(PinnedStaging):
        def copy(self, blocks):
            if len(blocks) == 1:
                return super().copy(blocks)
            raise RuntimeError("RESOURCE_EXHAUSTED: no memory")

    loader = make_loader(store_of(adapters), kind=Full)
    for _ in range(2):  # prepared by a worker, then at rest
        _, finished = load_all(loader, adapters)
        errors = {a.rank: finished[a.uid].error for a in adapters}
        assert [r for r, error in errors.items() if error is None] == [1, 8, 17]
        assert "RESOURCE_EXHAUSTED" in errors[33]
        assert loader.in_flight == 0


def test_only_a_device_of_its_own_memory_gets_pinned_adapters():
    kinds = {memory.kind for memory in DEVICE.addressable_memories()}
    assert "pinned_host" in kinds
    assert rests_pinned("gpu", kinds)
    assert not rests_pinned("cpu", kinds)
    assert not rests_pinned("gpu", {"device"})
    with LLM("tiny", max_running=4, max_batch_tokens=64, max_model_len=64) as llm:
        chosen = choose_staging(llm._executor, llm._host)
        assert isinstance(chosen, HostStaging)


# Through the engine.


@pytest.fixture
def paths(tmp_path):
    return {
        f"e{rank}": write_random_adapter(
            tmp_path / f"e{rank}", TINY, rank=rank, targets=QKVO, seed=rank
        )
        for rank in (8, 40, 3, 16, 24)
    }


def crowded(paths, **options):
    """Start an engine whose pool holds the largest adapter and little beside it."""
    page_bytes = LAYOUT.page_elems * 4 * TINY.num_layers
    return LLM(
        "tiny",
        adapters=paths,
        max_running=4,
        max_model_len=64,
        max_batch_tokens=64,
        max_lora_rank=40,
        pool_bytes=(LAYOUT.num_pages(40) + 14) * page_bytes,
        **options,
    )


def ask(llm, names):
    prompts = [[index + 1, 2, 3] * (index % 7 + 1) for index in range(len(names))]
    return [
        output.token_ids
        for output in llm.generate(prompts, adapters=names, sampling=GREEDY)
    ]


def use_staging(monkeypatch, make):
    """Let engines started from now on stage as `make(packer, device, store)` does."""

    def choose(executor, store):
        packer = Packer(executor.layout, executor.dtype)
        return make(packer, executor.device, store)

    monkeypatch.setattr(front, "choose_staging", choose)


NAMES = ["e8", "e40", None, "e3", "e16", "e24", "e8", "e40", None, "e3"] * 2


@pytest.mark.parametrize("host_cache_bytes", [1 << 30, 400_000, 1])
def test_engine_with_pinned_adapters_gives_the_same_tokens(
    monkeypatch, paths, host_cache_bytes
):
    with crowded(paths) as llm:
        expected = ask(llm, NAMES)
    assert len({tuple(tokens) for tokens in expected}) > 10
    use_staging(monkeypatch, PinnedStaging)
    before = pinned_bytes()
    with crowded(paths, host_cache_bytes=host_cache_bytes) as llm:
        compiles = heard_compiles()
        assert ask(llm, NAMES) == expected
        assert ask(llm, NAMES[::-1])[::-1] != expected  # other prompts
        assert ask(llm, NAMES) == expected
        assert not compiles, "a copy must not need a program"
        stats = llm.stats()
        assert stats.evictions > 0
        assert stats.loads > 2 * len(paths)
        assert stats.host_bytes <= host_cache_bytes
        assert pinned_bytes() - before <= stats.host_bytes
        infos = llm.list_adapters()
        assert sum(info.host_bytes for info in infos) == stats.host_bytes
        if host_cache_bytes == 1 << 30:
            assert stats.disk_reads == 0
            assert pinned_bytes() - before == stats.host_bytes > 0
        else:
            assert stats.disk_reads > 0
        llm._engine.check()
        for name in paths:
            llm.unregister_adapter(name)
        assert llm.stats().host_bytes == 0
        assert pinned_bytes() == before


class Late:
    """An array that says so only when asked for the `polls`th time."""

    def __init__(self, array, polls):
        self.array, self.polls = array, polls

    def is_ready(self):
        self.polls -= 1
        return self.polls < 0 and self.array.is_ready()


def test_copies_start_before_the_step_and_nobody_waits_for_them(monkeypatch, paths):
    events = []

    class Watched(PinnedStaging):
        def at_rest(self, uid):
            blocks = super().at_rest(uid)
            events.append(("load", uid, blocks is not None))
            return blocks

        def copy(self, blocks):
            uids = [
                uid
                for uid in llm._registry.names().values()
                if (rest := self._store._kept.get(uid)) is not None
                and getattr(rest, "blocks", None) is blocks
            ]
            events.append(("copy", *uids))
            return tuple(Late(block, 6) for block in super().copy(blocks))

    use_staging(monkeypatch, Watched)
    with crowded(paths) as llm:
        executor = llm._executor
        for run in (executor.prefill, executor.decode):

            def step(rows, run=run):
                named = getattr(rows, "adapter_uids", None)
                if named is None:
                    named = [row.adapter_uid for row in rows]
                events.append(("step", *set(named)))
                return run(rows)

            monkeypatch.setattr(executor, run.__name__, step)

        def write(uid, pages, pieces, run=executor.commit):
            events.append(("commit", uid))
            for piece in pieces:
                assert piece.block.polls < 0, "committed before it arrived"
                object.__setattr__(piece, "block", piece.block.array)
            run(uid, pages, pieces)

        monkeypatch.setattr(executor, "commit", write)
        ask(llm, NAMES)
        ask(llm, NAMES)
        monkeypatch.undo()
    at_rest = overlapped = 0
    for at, event in enumerate(events):
        if event[0] != "load" or not event[2]:
            continue
        uid = event[1]
        at_rest += 1
        assert events[at + 1] == ("copy", uid), "before anything else is dispatched"
        landed = events.index(("commit", uid), at)
        steps = [one for one in events[at:landed] if one[0] == "step"]
        # Others run meanwhile, and nobody uses what has not arrived.
        overlapped += bool(steps)
        assert not any(uid in one[1:] for one in steps)
    assert at_rest > 5
    assert overlapped > 0
