"""The engine on the tiny model: what a request gets never depends on its company."""

import dataclasses
import threading
import time

import numpy as np
import pytest
from engine_harness import heard_compiles
from random_adapters import write_random_adapter

from jchameleon.config import ModelConfig
from jchameleon.errors import (
    CapacityError,
    DuplicateRequestError,
    EngineDeadError,
    InvalidRequestError,
)
from jchameleon.llm import LLM
from jchameleon.lora.adapter import HostAdapter
from jchameleon.runtime.outbox import Outbox
from jchameleon.sampling import SamplingParams

TINY = ModelConfig.preset("tiny")
SMALL = {"max_running": 4, "max_batch_tokens": 64, "max_model_len": 512}
RANKS = (1, 8, 17, 64, 8, 40)
QKVO = ("q", "k", "v", "o")


@pytest.fixture(scope="module")
def adapter_dirs(tmp_path_factory):
    """PEFT directories of random adapters of several ranks, by name."""
    root = tmp_path_factory.mktemp("adapters")
    dirs = {}
    for index, rank in enumerate(RANKS):
        path = root / f"a{index}"
        targets = QKVO if index % 2 else ("q", "v")
        write_random_adapter(
            path, TINY, rank=rank, targets=targets, seed=index, dtype="float32"
        )
        dirs[f"a{index}"] = path
    return dirs


@pytest.fixture(scope="module")
def llm(adapter_dirs):
    with LLM(model="tiny", adapters=adapter_dirs, **SMALL) as llm:
        yield llm


@dataclasses.dataclass(frozen=True)
class Ask:
    prompt: list[int]
    adapter: str | None
    sampling: SamplingParams


def asks(count, *, seed=0, max_prompt=90, max_tokens=12):
    """Return varied requests: lengths, adapters, greedy and drawn."""
    rng = np.random.default_rng(seed)
    out = []
    for index in range(count):
        length = int(rng.integers(1, max_prompt))
        adapter = rng.choice([None, *(f"a{i}" for i in range(len(RANKS)))])
        drawn = index % 2 == 1
        out.append(
            Ask(
                prompt=rng.integers(0, 256, length).tolist(),
                adapter=None if adapter is None else str(adapter),
                sampling=SamplingParams(
                    max_tokens=int(rng.integers(1, max_tokens + 1)),
                    temperature=0.8 if drawn else 0.0,
                    top_k=20 if index % 4 == 1 else 0,
                    top_p=0.9 if index % 4 == 3 else 1.0,
                    seed=index,
                    ignore_eos=True,
                ),
            )
        )
    return out


def run(llm, batch):
    outputs = llm.generate(
        [ask.prompt for ask in batch],
        adapters=[ask.adapter for ask in batch],
        sampling=[ask.sampling for ask in batch],
    )
    assert [o.finish_reason for o in outputs] == ["length"] * len(batch)
    return [o.token_ids for o in outputs]


def assert_books_are_empty(llm):
    stats = llm.stats()
    assert (stats.running, stats.waiting, stats.kv_pages) == (0, 0, 0)
    kept = stats.adapter_pages + stats.cached_pages
    assert stats.free_pages + kept == stats.total_pages
    llm._engine.check()


def test_tokens_alone_and_among_31_others_are_the_same(llm):
    batch = asks(32)
    together = run(llm, batch)
    alone = [run(llm, [ask])[0] for ask in batch]
    assert together == alone
    assert_books_are_empty(llm)


def test_tokens_differ_between_adapters_and_base(llm):
    ask = asks(1, seed=3)[0]
    sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    names = [None, *(f"a{i}" for i in range(len(RANKS)))]
    outputs = run(
        llm, [dataclasses.replace(ask, adapter=n, sampling=sampling) for n in names]
    )
    assert len(set(outputs)) == len(names)


def test_tokens_across_eviction_and_reload_are_the_same(llm, adapter_dirs):
    batch = asks(48, seed=1)
    expected = run(llm, batch)
    # Room for the largest adapter, and little beside it.
    pages = llm._executor.layout.num_pages(64) + 24
    options = SMALL | {"pool_bytes": pages * llm.stats().page_bytes}
    with LLM(model="tiny", adapters=adapter_dirs, **options) as small:
        for attempt in range(2):
            # What was freed may hold anything: nothing may read it.
            poisoned = small._engine.on_engine_thread(lambda: poison_free_pages(small))
            assert poisoned > 0
            assert run(small, batch) == expected, f"{attempt=}"
        stats = small.stats()
        assert stats.evictions > 10
        assert stats.loads > stats.evictions
        assert_books_are_empty(small)


def poison_free_pages(llm):
    """Fill every page that holds nothing with NaN; return how many those are."""
    planner, executor = llm._engine._planner, llm._engine._executor
    used = {0, 1, *planner._pool._shelved}
    for uid in llm._registry.names().values():
        used.update(planner.resident_pages(uid) or ())
    assert planner.books().running == 0
    free = [page for page in range(executor.num_pages) if page not in used]
    executor.poison(free)
    return len(free)


def test_tokens_across_chunk_sizes_are_the_same(llm, adapter_dirs):
    batch = asks(12, seed=2, max_prompt=300)
    expected = run(llm, batch)
    for max_batch_tokens in (36, 128, 512):
        options = SMALL | {"max_batch_tokens": max_batch_tokens}
        with LLM(model="tiny", adapters=adapter_dirs, **options) as other:
            assert run(other, batch) == expected, f"{max_batch_tokens=}"


def test_long_prompt_delays_a_decode_by_one_chunk_at_most(adapter_dirs):
    options = SMALL | {"max_model_len": 4400, "max_batch_tokens": 256}
    with LLM(model="tiny", adapters=adapter_dirs, **options) as llm:
        rng = np.random.default_rng(0)
        sampling = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
        stream = llm.stream([[1, 2, 3]], adapters="a1", sampling=sampling)
        first = next(stream)  # it decodes from here on
        long = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
        [output] = llm.generate([rng.integers(0, 256, 4000).tolist()], sampling=long)
        list(stream)
        records = llm.step_records
    with_prompt = [
        r for r in records if any(i == output.request_id for i, _ in r.prefill)
    ]
    chunks = [n for r in with_prompt for i, n in r.prefill if i == output.request_id]
    assert sum(chunks) == 4000
    assert len(chunks) >= 4000 // 256
    decoding = [r for r in with_prompt if first.request_id in r.decode]
    # The short request decoded in every iteration that ran a chunk.
    assert len(decoding) == len(with_prompt)
    for record in records:
        padded = sum(-(-n // 32) * 32 for _, n in record.prefill)
        assert padded + len(record.decode) <= 256


def test_no_program_compiles_after_warm_up(llm):
    compiled = heard_compiles()
    run(llm, asks(40, seed=5, max_prompt=300))
    assert compiled == []


def test_short_pool_makes_admission_wait_not_fail(adapter_dirs):
    with LLM(model="tiny", adapters=adapter_dirs, **SMALL) as llm:
        page_bytes = llm.stats().page_bytes
        expected = run(llm, batch := asks(20, seed=6, max_prompt=200))
        pages = 2 + llm._executor.layout.num_pages(64) + 14
    options = SMALL | {"pool_bytes": pages * page_bytes}
    with LLM(model="tiny", adapters=adapter_dirs, **options) as llm:
        assert run(llm, batch) == expected
        assert max(len(r.decode) for r in llm.step_records) <= 4
        with pytest.raises(CapacityError, match=f"pool has {pages - 2}"):
            llm.generate(
                [[1] * 400], adapters="a3", sampling=SamplingParams(max_tokens=100)
            )
        assert_books_are_empty(llm)


def test_cancelled_streams_free_everything_and_disturb_nobody(llm):
    batch = asks(4, seed=7, max_tokens=12)
    batch = [
        dataclasses.replace(a, sampling=dataclasses.replace(a.sampling, max_tokens=60))
        for a in batch
    ]
    expected = run(llm, batch)
    results = {}
    others = threading.Thread(target=lambda: results.update(tokens=run(llm, batch)))
    others.start()
    for seed in range(6):
        stream = llm.stream(
            [[seed + 1] * 40] * 3,
            adapters=["a0", "a3", None],
            sampling=SamplingParams(max_tokens=200, ignore_eos=True),
        )
        for _, _delta in zip(range(seed), stream, strict=False):
            pass
        stream.close()
    others.join()
    assert results["tokens"] == expected
    assert_books_are_empty(llm)


def test_cancel_by_id_ends_as_aborted_with_what_was_produced(llm):
    stream = llm.stream(
        [[5, 6, 7]], sampling=SamplingParams(max_tokens=400, ignore_eos=True)
    )
    first = next(stream)
    llm.cancel(first.request_id)
    llm.cancel("nobody")
    rest = list(stream)
    assert rest[-1].finish_reason == "aborted"
    produced = len(first.token_ids) + sum(len(d.token_ids) for d in rest)
    assert 1 <= produced < 400
    assert_books_are_empty(llm)


def test_failed_load_fails_only_its_own_requests(llm):
    good = llm._registry.get(llm._registry.resolve("a3"))
    modules = {
        key: dataclasses.replace(pair, a=pair.a[:, :-1])
        for key, pair in good.modules.items()
    }
    broken = HostAdapter.build(modules, source="broken")
    llm._engine.adapters.register(broken.card)
    llm._registry.add("broken", broken)
    batch = asks(6, seed=8)
    expected = run(llm, batch)
    before = llm.stats().load_failures
    outputs = llm.generate(
        [*(a.prompt for a in batch), [1, 2], [3]],
        adapters=[*(a.adapter for a in batch), "broken", "broken"],
        sampling=[*(a.sampling for a in batch), SamplingParams(), SamplingParams()],
    )
    assert [o.token_ids for o in outputs[:6]] == expected
    for output in outputs[6:]:
        assert output.finish_reason == "error"
        assert output.token_ids == ()
        assert "adapter could not be loaded" in output.error
    assert llm.stats().load_failures > before
    assert_books_are_empty(llm)


def test_overflowing_adapter_fails_its_row_and_no_other(llm, tmp_path):
    write_random_adapter(
        tmp_path / "huge", TINY, rank=8, targets=QKVO, seed=9, dtype="float32"
    )
    adapter = llm._registry.load("huge", tmp_path / "huge")
    modules = {
        key: dataclasses.replace(pair, b=np.full_like(pair.b, 3e38))
        for key, pair in adapter.modules.items()
    }
    adapter = HostAdapter.build(modules, source="huge")
    llm._engine.adapters.register(adapter.card)
    llm._registry.add("huge", adapter)
    batch = asks(3, seed=10)
    expected = run(llm, batch)
    outputs = llm.generate(
        [[1, 2, 3], *(a.prompt for a in batch)],
        adapters=["huge", *(a.adapter for a in batch)],
        sampling=[SamplingParams(), *(a.sampling for a in batch)],
    )
    assert outputs[0].finish_reason == "error"
    assert "not finite" in outputs[0].error
    assert [o.token_ids for o in outputs[1:]] == expected
    assert_books_are_empty(llm)


def test_duplicate_request_id_is_refused_while_in_flight(llm):
    outbox = Outbox()
    sampling = SamplingParams(max_tokens=100, ignore_eos=True)

    def submit():
        llm._engine.submit(
            llm._engine.prepare(
                "twice", [1, 2], sampling, adapter_uid=None, outbox=outbox
            )
        )

    submit()
    with pytest.raises(DuplicateRequestError, match="'twice' is in flight"):
        submit()
    llm._engine.cancel("twice")
    while outbox.get(timeout_s=30)[1].finish_reason is None:
        pass
    submit()  # it ended, so the id is free again
    llm._engine.cancel("twice")
    while outbox.get(timeout_s=30)[1].finish_reason is None:
        pass
    assert_books_are_empty(llm)


def test_slow_reader_gets_everything_in_few_deltas(llm):
    outbox = Outbox()
    sampling = SamplingParams(max_tokens=50, temperature=0.0, ignore_eos=True)
    expected = llm.generate([[9, 8, 7]], sampling=sampling)[0].token_ids
    llm._engine.submit(
        llm._engine.prepare(
            "slow", [9, 8, 7], sampling, adapter_uid=None, outbox=outbox
        )
    )
    while llm.stats().running:  # meanwhile nobody reads
        time.sleep(0.01)
    _, delta = outbox.get(timeout_s=30)
    assert delta.finish_reason == "length"
    assert delta.token_ids == expected


def test_dying_engine_answers_everybody(adapter_dirs):
    llm = LLM(model="tiny", adapters=adapter_dirs, **SMALL)
    stream = llm.stream(
        [[1, 2, 3]] * 6, sampling=SamplingParams(max_tokens=400, ignore_eos=True)
    )
    next(stream)

    def die():
        raise SystemExit("injected")

    with pytest.raises(EngineDeadError):
        llm._engine.on_engine_thread(die)
    endings = [d for d in stream if d.finish_reason is not None]
    assert len(endings) == 6
    assert {d.finish_reason for d in endings} == {"error"}
    assert all("injected" in d.error for d in endings)
    with pytest.raises(EngineDeadError, match="injected"):
        llm.generate([[1]])
    with pytest.raises(EngineDeadError):
        llm.stats()
    llm.close()


def test_cancel_of_what_is_no_id_is_refused_and_harms_nobody(llm):
    for bad in (["x"], None, 3, ""):
        with pytest.raises(InvalidRequestError, match="request_id="):
            llm.cancel(bad)
    run(llm, asks(2, seed=12))


def test_load_given_up_before_it_starts_leaves_nothing_behind(adapter_dirs):
    options = SMALL | {"max_loads_in_flight": 1}
    with LLM(model="tiny", adapters=adapter_dirs, **options) as llm:
        stream = llm.stream(
            [[1, 2, 3]] * 4,
            adapters=["a3", "a5", "a2", "a0"],
            sampling=SamplingParams(),
        )
        next(stream)
        stream.close()
        assert_books_are_empty(llm)
        while llm.stats().loads > sum(
            info.tier == "device" for info in llm.list_adapters()
        ):
            time.sleep(0.01)
        assert llm._engine._loads.waiters == 0, "nobody waits any more"


def test_close_answers_requests_that_the_engine_never_saw(adapter_dirs):
    llm = LLM(model="tiny", adapters=adapter_dirs, **SMALL)
    entered, leave = threading.Event(), threading.Event()

    def hold():
        entered.set()
        leave.wait(30)

    holder = threading.Thread(target=lambda: llm._engine.on_engine_thread(hold))
    holder.start()
    entered.wait(30)
    results = []
    caller = threading.Thread(target=lambda: results.extend(llm.generate([[1]] * 3)))
    caller.start()
    while len(llm._engine._door._open_ids) < 3:
        time.sleep(0.001)
    llm._engine._closing = True
    leave.set()
    caller.join(30)
    holder.join(30)
    assert [o.finish_reason for o in results] == ["aborted"] * 3
    assert all(o.timing.ttft_s is None for o in results)
    llm.close()
