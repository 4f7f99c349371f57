"""The prefix cache on the real engine: the same tokens, and fewer that are run."""

import dataclasses

import numpy as np
import pytest
from random_adapters import write_random_adapter

from jchameleon.config import EngineConfig, ModelConfig
from jchameleon.errors import ConfigError, InvalidRequestError
from jchameleon.llm import LLM
from jchameleon.runtime.outbox import Outbox
from jchameleon.sampling import SamplingParams

TINY = ModelConfig.preset("tiny")
SMALL = {"max_running": 8, "max_batch_tokens": 64, "max_model_len": 256}
# Pages of the tiny model hold 16 tokens, 8 KiB over its two layers.
PAGE_BYTES = 2 * (2 * 2 * 16) * 16 * 4
RANKS = (8, 32, 16)
ADAPTERS = [None, *(f"a{i}" for i in range(len(RANKS)))]
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def adapter_dirs(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for index, rank in enumerate(RANKS):
        write_random_adapter(
            root / f"a{index}",
            TINY,
            rank=rank,
            targets=("q", "k", "v", "o"),
            seed=index,
            dtype="float32",
        )
    return {f"a{index}": root / f"a{index}" for index in range(len(RANKS))}


def poison_before_every_step(llm):
    """Fill all pages that are free with NaN before each step of an engine."""
    engine, executor = llm.engine, llm._executor
    step = engine._step

    def poisoned_step(*args):
        free = engine._planner._pool._free
        # Always as many, so that it compiles once; the trash page may hold anything.
        executor.poison(free + [1] * (executor.num_pages - len(free)))
        engine._planner.check()
        return step(*args)

    engine._step = poisoned_step


@pytest.fixture(scope="module")
def tight(adapter_dirs):
    """An engine with the cache and hardly more pages than two adapters and two rows."""
    options = SMALL | {"pool_bytes": 62 * PAGE_BYTES}
    with LLM("tiny", adapters=adapter_dirs, **options) as llm:
        poison_before_every_step(llm)
        yield llm


@pytest.fixture(scope="module")
def roomy(adapter_dirs):
    with LLM("tiny", adapters=adapter_dirs, **SMALL) as llm:
        yield llm


@pytest.fixture(scope="module")
def plain(adapter_dirs):
    with LLM("tiny", adapters=adapter_dirs, prefix_cache=False, **SMALL) as llm:
        yield llm


def tokens_of(rng, count):
    return rng.integers(0, 256, count).tolist()


def questions(count, *, seed, systems):
    """Return (prompts, adapters, sampling, salts): many begin with the same system."""
    rng = np.random.default_rng(seed)
    prompts, adapters, sampling, salts = [], [], [], []
    for index in range(count):
        system = systems[int(rng.integers(len(systems)))]
        prompts.append(system + tokens_of(rng, int(rng.integers(1, 30))))
        adapters.append(ADAPTERS[int(rng.integers(len(ADAPTERS)))])
        salts.append([None, None, "tenant"][int(rng.integers(3))])
        sampling.append(
            SamplingParams(
                max_tokens=int(rng.integers(1, 40)),
                temperature=0.8 * (index % 2),
                seed=index,
                stop_token_ids=range(0, 256, 16),
                ignore_eos=True,
            )
        )
    return prompts, adapters, sampling, salts


def run(llm, prompts, adapters=None, sampling=GREEDY, salts=None):
    outputs = llm.generate(prompts, adapters, sampling, cache_salt=salts)
    assert {o.finish_reason for o in outputs} <= {"stop", "length"}
    stats = llm.stats()
    assert (stats.running, stats.waiting, stats.kv_pages) == (0, 0, 0)
    kept = stats.cached_pages + stats.adapter_pages
    assert stats.free_pages + kept == stats.total_pages
    llm.engine.check()
    return outputs


def ids(outputs):
    return [output.token_ids for output in outputs]


def cached(outputs):
    return [output.timing.cached_tokens for output in outputs]


def test_tokens_are_those_without_the_cache_while_pages_are_evicted(tight, plain):
    rng = np.random.default_rng(0)
    systems = [tokens_of(rng, n) for n in (40, 64, 100)]
    systems.append(systems[0] + tokens_of(rng, 30))
    asked = questions(80, seed=1, systems=systems)
    before = tight.stats()
    outputs = run(tight, *asked)
    after = tight.stats()
    assert ids(outputs) == ids(run(plain, *asked))
    assert sum(cached(outputs)) > 500
    assert after.prefix_hit_tokens - before.prefix_hit_tokens == sum(cached(outputs))
    assert after.evicted_blocks > 50 and after.evictions >= 5
    assert plain.stats().prefix_queried_tokens == plain.stats().cached_pages == 0


def test_turns_of_chats_find_the_turns_before_and_give_the_same_tokens(tight, plain):
    rng = np.random.default_rng(2)
    system = tokens_of(rng, 37)
    chats = [system + tokens_of(rng, 5 + i) for i in range(6)]
    adapters = [ADAPTERS[i % len(ADAPTERS)] for i in range(6)]
    sampling = [
        SamplingParams(max_tokens=30, temperature=0.7 * (i % 2), seed=i)
        for i in range(6)
    ]
    found = []
    for _ in range(4):
        outputs = run(tight, chats, adapters, sampling)
        assert ids(outputs) == ids(run(plain, chats, adapters, sampling))
        found.append(sum(cached(outputs)))
        chats = [
            chat + list(output.token_ids) + tokens_of(rng, 6)
            for chat, output in zip(chats, outputs, strict=True)
        ]
    assert all(tokens > 0 for tokens in found)


def test_turn_finds_all_full_blocks_of_the_turns_before(roomy):
    rng = np.random.default_rng(3)
    chat = tokens_of(rng, 20)
    seen = 0
    for _ in range(4):
        (output,) = run(roomy, [chat], "a1", dataclasses.replace(GREEDY, max_tokens=21))
        # The last token of an output has no KV entry.
        assert cached([output]) == [seen // 16 * 16]
        chat += list(output.token_ids)
        seen = len(chat) - 1
        chat += tokens_of(rng, 3)


def test_shared_system_prompt_is_prefilled_once_for_requests_that_come_at_once(
    roomy, plain
):
    rng = np.random.default_rng(4)
    system = tokens_of(rng, 128)
    prompts = [system + tokens_of(rng, 12) for _ in range(6)]

    def prefilled(llm):
        before = len(llm.step_records)
        outputs = run(llm, prompts, "a0")
        records = llm.step_records[before:]
        return ids(outputs), sum(n for r in records for _, n in r.prefill)

    expected, all_tokens = prefilled(plain)
    assert all_tokens == 6 * 140
    found, tokens = prefilled(roomy)
    assert found == expected
    assert tokens == 128 + 6 * 12
    # And not at all when it is there already.
    assert prefilled(roomy)[1] == 6 * 12


def test_other_salts_and_adapters_find_nothing_and_get_the_same_tokens(roomy, plain):
    prompt = tokens_of(np.random.default_rng(5), 100)
    expected = {name: ids(run(plain, [prompt], name)) for name in ADAPTERS}
    for name in ADAPTERS:
        for salt in (None, "one", "two", "None"):
            for found in (0, 96):
                outputs = run(roomy, [prompt], name, salts=salt)
                assert cached(outputs) == [found], (name, salt)
                assert ids(outputs) == expected[name]


def test_salts_may_be_one_for_each_prompt(roomy):
    prompt = tokens_of(np.random.default_rng(6), 50)
    run(roomy, [prompt], salts="x")
    outputs = run(roomy, [prompt] * 3, salts=["x", "y", None])
    assert cached(outputs) == [48, 0, 0]
    *_, last = roomy.stream(prompt, sampling=GREEDY, cache_salt="y")
    assert last.timing.cached_tokens == 48


@pytest.mark.parametrize(
    ("salt", "message"),
    [
        ("", "cache_salt='' must be a text of 1 to 256 characters, or None"),
        ("x" * 257, "cache_salt='xxx"),
        (3, "cache_salt=3 must be str or NoneType or a list"),
        (["a", 3], "cache_salt has 3, which must be str"),
        (["a"], "cache_salt has 1 entries for 2 prompts"),
    ],
)
def test_wrong_salt_is_refused_before_anything_runs(roomy, salt, message):
    before = roomy.stats().prefix_queried_tokens
    with pytest.raises(InvalidRequestError, match=message):
        roomy.generate([[1] * 40, [2] * 40], cache_salt=salt)
    assert roomy.stats().prefix_queried_tokens == before


def test_request_that_needs_every_token_run_neither_finds_nor_leaves_blocks(roomy):
    rng = np.random.default_rng(7)
    engine = roomy.engine

    def ask(prompt, **options):
        outbox = Outbox()
        name = f"all-{prompt[0]}-{len(prompt)}"
        submission = engine.prepare(
            name, prompt, GREEDY, adapter_uid=None, outbox=outbox, **options
        )
        before = len(engine.step_records)
        engine.submit(submission)
        tokens = ()
        while True:
            _, delta = outbox.get(timeout_s=60)
            tokens += delta.token_ids
            if delta.finish_reason:
                break
        records = engine.step_records[before:]
        return (
            tokens,
            delta.timing.cached_tokens,
            sum(n for r in records for _, n in r.prefill),
        )

    known, new = tokens_of(rng, 60), tokens_of(rng, 60)
    (output,) = run(roomy, [known])
    assert ask(known, prefix_cache=False) == (output.token_ids, 0, 60)
    assert ask(known) == (output.token_ids, 48, 12)
    tokens, *counts = ask(new, prefix_cache=False)
    assert counts == [0, 60]
    # It left nothing to be found.
    assert ask(new) == (tokens, 0, 60)
    assert ask(new) == (tokens, 48, 12)


def test_prompt_logprobs_are_whole_however_much_is_cached(roomy, plain):
    prompt = tokens_of(np.random.default_rng(31), 80)
    [first], [again] = (run(roomy, [prompt], "a1") for _ in range(2))
    assert again.timing.cached_tokens > 0
    scored = SamplingParams(max_tokens=4, temperature=0.0, prompt_logprobs=2)
    [found], [expected] = (run(llm, [prompt], "a1", scored) for llm in (roomy, plain))
    assert found.timing.cached_tokens == 0
    assert len(found.prompt_logprobs) == len(prompt)
    assert found.prompt_logprobs == expected.prompt_logprobs
    assert found.token_ids == expected.token_ids == first.token_ids[:4]


def test_completions_of_one_prompt_share_its_blocks(roomy, plain):
    prompt = tokens_of(np.random.default_rng(32), 80)
    three = SamplingParams(max_tokens=12, temperature=0.9, seed=3, n=3)
    [found], [expected] = (run(llm, [prompt], "a0", three) for llm in (roomy, plain))
    assert [o.token_ids for o in found.outputs] == [
        o.token_ids for o in expected.outputs
    ]
    assert sum(o.timing.cached_tokens for o in found.outputs) > len(prompt)


def test_damaged_block_fails_who_reads_it_and_is_gone_for_the_next(roomy):
    prompt = tokens_of(np.random.default_rng(8), 60)
    expected = ids(run(roomy, [prompt], "a2"))
    uid = roomy._registry.resolve("a2")

    def damage():
        blocks = roomy.engine._planner._space.prefix._blocks[uid].values()
        roomy._executor.poison([block.page for block in blocks])

    roomy.engine.on_engine_thread(damage)
    (output,) = roomy.generate([prompt], "a2", GREEDY)
    assert output.finish_reason == "error" and "not finite" in output.error
    outputs = run(roomy, [prompt], "a2")
    assert (ids(outputs), cached(outputs)) == (expected, [0])


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_prefix_cache_that_is_no_switch_is_refused(value):
    with pytest.raises(ConfigError, match=f"prefix_cache={value!r} must be true or"):
        EngineConfig(prefix_cache=value)
