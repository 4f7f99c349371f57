"""Adapters in host memory: a budget, least recently used first, the rest on disk."""

import shutil
import threading
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_adapters import write_random_adapter
from slow_adapters import MODEL, close_gate, open_gate, read_adapter

from jchameleon.errors import AdapterError
from jchameleon.llm import LLM
from jchameleon.lora.adapter import HostAdapter
from jchameleon.lora.layout import ChunkLayout
from jchameleon.runtime.host_store import MOST_PATHS, HostStats, HostStore
from jchameleon.sampling import SamplingParams

LAYOUT = ChunkLayout(MODEL, ("q", "k", "v", "o"), 2 * MODEL.kv_dim * 16)
PAGE_BYTES = LAYOUT.page_elems * 4 * MODEL.num_layers
CROWDED = {
    "max_running": 4,
    "max_batch_tokens": 64,
    "max_model_len": 64,
    # Room for the largest adapter, and little beside it.
    "pool_bytes": (LAYOUT.num_pages(24) + 12) * PAGE_BYTES,
}
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


def write(path, *, seed, rank=8):
    return write_random_adapter(path, MODEL, rank=rank, targets=("q", "v"), seed=seed)


def sized(name, num_bytes):
    """Return an adapter that only its uid and size matter of."""
    return HostAdapter(
        uid=name,
        rank=1,
        modules=MappingProxyType({}),
        targets=frozenset("q"),
        num_bytes=num_bytes,
        source=f"/{name}",
    )


SIZES = {"a": 1, "b": 3, "c": 3, "d": 4, "e": 6, "f": 11}


@given(
    budget=st.integers(0, 12),
    calls=st.lists(
        st.tuples(st.booleans(), st.sampled_from(sorted(SIZES))),
        min_size=20,
        max_size=60,
    ),
)
def test_memory_and_counters_follow_a_list_of_uses(budget, calls):
    adapters = {f"/{name}": sized(name, size) for name, size in SIZES.items()}
    store = HostStore(adapters.__getitem__, budget_bytes=budget)
    known, line, hits, reads, drops = set(), [], 0, 0, 0
    for is_put, name in calls:
        if is_put or name not in known:
            store.put(adapters[f"/{name}"], f"/{name}")
            known.add(name)
        else:
            assert store.get(name) is adapters[f"/{name}"]
            hits += name in line
            reads += name not in line
        if name in line:
            line.remove(name)
            line.append(name)
        elif SIZES[name] <= budget:
            line.append(name)
            while sum(SIZES[n] for n in line) > budget:
                line.pop(0)
                drops += 1
        assert [n for n in SIZES if store.held_bytes(n)] == sorted(line)
        assert store.stats() == HostStats(
            host_bytes=sum(SIZES[n] for n in line),
            host_adapters=len(line),
            host_hits=hits,
            disk_reads=reads,
            drops=drops,
        )


def test_get_of_an_adapter_never_put_is_a_key_error():
    with pytest.raises(KeyError):
        HostStore(read_adapter, budget_bytes=1).get("0" * 64)


def test_adapter_over_the_budget_is_read_again_each_time(tmp_path):
    adapter = read_adapter(write(tmp_path / "a", seed=0))
    store = HostStore(read_adapter, budget_bytes=adapter.num_bytes - 1)
    store.put(adapter, tmp_path / "a")
    for reads in (1, 2):
        again = store.get(adapter.uid)
        assert again.uid == adapter.uid
        assert again is not adapter
        assert store.stats().disk_reads == reads
    assert (store.stats().host_adapters, store.stats().host_bytes) == (0, 0)
    assert store.stats().drops == 0


def test_changed_files_are_refused_with_both_uids(tmp_path):
    old = read_adapter(write(tmp_path / "a", seed=0))
    store = HostStore(read_adapter, budget_bytes=0)
    store.put(old, tmp_path / "a")
    new = read_adapter(write(tmp_path / "a", seed=1))
    with pytest.raises(AdapterError, match="must not change") as caught:
        store.get(old.uid)
    for part in (str(tmp_path / "a"), old.uid[:12], new.uid[:12]):
        assert part in str(caught.value)
    write(tmp_path / "a", seed=0)
    assert store.get(old.uid).uid == old.uid


def test_missing_directory_is_named_and_read_when_it_is_back(tmp_path):
    adapter = read_adapter(write(tmp_path / "a", seed=0))
    store = HostStore(read_adapter, budget_bytes=0)
    store.put(adapter, tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "away")
    with pytest.raises(AdapterError, match="no such directory") as caught:
        store.get(adapter.uid)
    assert str(tmp_path / "a") in str(caught.value)
    (tmp_path / "away").rename(tmp_path / "a")
    assert store.get(adapter.uid).uid == adapter.uid


def test_second_path_is_read_only_when_the_first_fails(tmp_path):
    adapter = read_adapter(write(tmp_path / "a", seed=0))
    write(tmp_path / "b", seed=0)
    read = []
    store = HostStore(
        lambda path: read.append(path) or read_adapter(path), budget_bytes=0
    )
    for name in "aba":
        store.put(adapter, tmp_path / name)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert store.get(adapter.uid).source == a
    assert read == [a]
    write(tmp_path / "a", seed=1)  # another content is as bad as none
    assert store.get(adapter.uid).source == b
    assert read == [a, a, b]
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(AdapterError) as caught:
        store.get(adapter.uid)
    assert a in str(caught.value)
    assert b in str(caught.value)
    assert read == [a, a, b, a, b]
    assert store.stats().disk_reads == 5


def test_relative_path_outlives_a_change_of_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter = read_adapter(write("a", seed=0))
    store = HostStore(read_adapter, budget_bytes=0)
    store.put(adapter, "a")
    monkeypatch.chdir("/")
    assert store.get(adapter.uid).uid == adapter.uid


def get_in_threads(store, uid, count):
    """Start threads that ask for one adapter; return them and their answers."""
    answers = []

    def ask():
        try:
            answers.append(store.get(uid))
        except AdapterError as error:
            answers.append(error)

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, answers


def join(threads):
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_threads_that_ask_at_once_share_one_read(tmp_path):
    slow = read_adapter(write(tmp_path / "slow", seed=0))
    store = HostStore(read_adapter, budget_bytes=slow.num_bytes)
    store.put(slow, tmp_path / "slow")
    store.put(sized("other", slow.num_bytes), "/other")  # drops it
    close_gate(tmp_path / "slow")
    threads, answers = get_in_threads(store, slow.uid, 8)
    threads[-1].join(0.05)
    assert answers == []
    open_gate(tmp_path / "slow")
    join(threads)
    assert len(answers) == 8
    assert len({id(answer) for answer in answers}) == 1
    assert answers[0].uid == slow.uid
    assert store.stats().disk_reads == 1
    assert store.held_bytes(slow.uid)


def test_threads_that_share_a_failed_read_all_hear_of_it(tmp_path):
    slow = read_adapter(write(tmp_path / "slow", seed=0))
    store = HostStore(read_adapter, budget_bytes=0)
    store.put(slow, tmp_path / "slow")
    write(tmp_path / "slow", seed=1)
    close_gate(tmp_path / "slow")
    threads, answers = get_in_threads(store, slow.uid, 4)
    threads[-1].join(0.05)
    open_gate(tmp_path / "slow")
    join(threads)
    assert [type(answer) for answer in answers] == [AdapterError] * 4
    write(tmp_path / "slow", seed=0)
    assert store.get(slow.uid).uid == slow.uid, "a later call tries again"


def test_slow_read_holds_up_nobody_else(tmp_path):
    slow = read_adapter(write(tmp_path / "slow", seed=0, rank=64))
    disk = read_adapter(write(tmp_path / "disk", seed=1, rank=17))
    memory = read_adapter(write(tmp_path / "memory", seed=2))
    store = HostStore(read_adapter, budget_bytes=memory.num_bytes)
    for adapter in (slow, disk, memory):
        store.put(adapter, adapter.source)
    close_gate(tmp_path / "slow")
    waiting, late = get_in_threads(store, slow.uid, 1)
    try:
        for adapter in (memory, disk):
            threads, answers = get_in_threads(store, adapter.uid, 1)
            join(threads)
            assert [answer.uid for answer in answers] == [adapter.uid]
        assert store.held_bytes(memory.uid)
        assert store.stats().host_hits == 1
        assert late == []
    finally:
        open_gate(tmp_path / "slow")
        join(waiting)
    assert [answer.uid for answer in late] == [slow.uid]


def test_forgotten_adapter_gives_up_memory_and_paths():
    store = HostStore(read_adapter, budget_bytes=8)
    for name in "ad":
        store.put(sized(name, SIZES[name]), f"/{name}")
    store.forget("a")
    store.forget("a")
    store.forget("never put")
    assert (store.stats().host_bytes, store.stats().host_adapters) == (SIZES["d"], 1)
    assert store.stats().drops == 0
    with pytest.raises(KeyError):
        store.get("a")


def test_adapter_forgotten_while_it_is_read_is_not_kept(tmp_path):
    slow = read_adapter(write(tmp_path / "slow", seed=0))
    store = HostStore(read_adapter, budget_bytes=slow.num_bytes)
    store.put(slow, tmp_path / "slow")
    store.put(sized("other", slow.num_bytes), "/other")  # drops it
    close_gate(tmp_path / "slow")
    threads, answers = get_in_threads(store, slow.uid, 1)
    while store.stats().disk_reads == 0:
        threads[0].join(0.001)
    store.forget(slow.uid)
    open_gate(tmp_path / "slow")
    join(threads)
    assert [answer.uid for answer in answers] == [slow.uid]
    assert not store.held_bytes(slow.uid)


def test_only_the_latest_paths_of_a_content_are_known(tmp_path):
    adapter = read_adapter(write(tmp_path / "a", seed=0))
    read = []
    store = HostStore(
        lambda path: read.append(path) or read_adapter(path), budget_bytes=0
    )
    for number in range(MOST_PATHS + 5):
        store.put(adapter, tmp_path / str(number))
    with pytest.raises(AdapterError):
        store.get(adapter.uid)
    assert read == [str(tmp_path / str(n)) for n in range(5, MOST_PATHS + 5)]


# Through the engine.


@pytest.fixture
def adapter_dirs(tmp_path):
    ranks = {"a": 8, "b": 17, "c": 1, "d": 24}
    return {
        name: write(tmp_path / name, seed=seed, rank=rank)
        for seed, (name, rank) in enumerate(ranks.items())
    }


def ask(llm, names):
    prompts = [[index + 1, 2, 3, 4] for index in range(len(names))]
    return llm.generate(prompts, adapters=names, sampling=GREEDY)


def check_idle(llm):
    stats = llm.stats()
    assert (stats.running, stats.waiting, stats.kv_pages) == (0, 0, 0)
    llm._engine.check()


def test_tokens_from_disk_and_from_memory_are_the_same(adapter_dirs):
    names = [*"abcd", None] * 4
    found = []
    for host_cache_bytes in (1, 1 << 30):
        options = CROWDED | {"host_cache_bytes": host_cache_bytes}
        with LLM(model="tiny", adapters=adapter_dirs, **options) as llm:
            found.append([output.token_ids for output in ask(llm, names)])
            stats = llm.stats()
            assert stats.loads >= 4
            assert stats.evictions > 0
            held = [info.host_bytes > 0 for info in llm.list_adapters()]
            if host_cache_bytes == 1:
                assert held == [False] * 4
                assert (stats.host_bytes, stats.host_adapters) == (0, 0)
                assert (stats.host_hits, stats.disk_reads) == (0, stats.loads)
            else:
                assert held == [True] * 4
                assert stats.host_adapters == 4
                assert (stats.host_hits, stats.disk_reads) == (stats.loads, 0)
            assert stats.emulated_link is None
            check_idle(llm)
    assert found[0] == found[1]
    assert len(set(found[0][:5])) == 5


def test_adapter_whose_files_changed_or_vanished_fails_alone(adapter_dirs):
    options = CROWDED | {"host_cache_bytes": 1}
    with LLM(model="tiny", adapters=adapter_dirs, **options) as llm:
        names = ["a", "b", "c", None, "b", "d", "c"]
        expected = {
            index: output.token_ids
            for index, output in enumerate(ask(llm, ["a", None, None, None]))
        }
        uids = {info.name: info.uid for info in llm.list_adapters()}
        write(adapter_dirs["b"], seed=77, rank=17)
        adapter_dirs["c"].rename(adapter_dirs["c"].with_name("gone"))
        outputs = ask(llm, names)
        for name, output in zip(names, outputs, strict=True):
            if name not in ("b", "c"):
                assert output.finish_reason == "length"
                continue
            assert output.finish_reason == "error"
            assert output.token_ids == ()
            assert output.error.startswith("adapter could not be loaded: ")
            assert str(adapter_dirs[name]) in output.error
            why = uids["b"][:12] if name == "b" else "no such directory"
            assert why in output.error
        assert outputs[0].token_ids == expected[0]
        assert outputs[3].token_ids == expected[3]
        assert llm.stats().load_failures >= 2
        check_idle(llm)
        # What is put right works again.
        adapter_dirs["c"].with_name("gone").rename(adapter_dirs["c"])
        [again] = ask(llm, ["c"])
        assert again.finish_reason == "length"
        check_idle(llm)
