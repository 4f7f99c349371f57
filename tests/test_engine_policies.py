"""Policies on the real engine: they change when a request runs, never what it gets."""

import dataclasses
import os
import threading

import numpy as np
import pytest
from random_adapters import write_random_adapter

from jchameleon.config import ModelConfig
from jchameleon.errors import (
    CapacityError,
    ConfigError,
    EngineDeadError,
    UnknownAdapterError,
)
from jchameleon.llm import LLM
from jchameleon.runtime.outbox import Delta, Outbox
from jchameleon.runtime.policy.presets import policy_preset_names
from jchameleon.runtime.policy.replay import replay
from jchameleon.sampling import SamplingParams

TINY = ModelConfig.preset("tiny")
RANKS = (8, 16, 64, 32, 8)
# Pages of the tiny model hold 16 tokens, 8 KiB over its two layers.
PAGE_BYTES = 2 * (2 * 2 * 16) * 16 * 4
SMALL = {"max_running": 8, "max_batch_tokens": 64, "max_model_len": 256}


@pytest.fixture(scope="module")
def adapter_dirs(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    dirs = {}
    for index, rank in enumerate(RANKS):
        path = root / f"a{index}"
        write_random_adapter(
            path, TINY, rank=rank, targets=("q", "v"), seed=index, dtype="float32"
        )
        dirs[f"a{index}"] = path
    return dirs


def requests_of(count, *, seed):
    """Return (prompts, adapters, sampling): lengths and adapters vary, ends too."""
    rng = np.random.default_rng(seed)
    names = [None, *(f"a{i}" for i in range(len(RANKS)))]
    prompts, adapters, sampling = [], [], []
    for index in range(count):
        prompts.append(rng.integers(0, 256, int(rng.integers(1, 80))).tolist())
        adapters.append(names[int(rng.integers(len(names)))])
        sampling.append(
            SamplingParams(
                max_tokens=int(rng.integers(30, 90)),
                temperature=0.8 * (index % 2),
                seed=index,
                # A byte in about eight ends it, so lengths cannot be told beforehand.
                stop_token_ids=range(0, 256, 8),
                ignore_eos=True,
            )
        )
    return prompts, adapters, sampling


@pytest.fixture(scope="module")
def undisturbed(adapter_dirs):
    """Requests and their tokens from an engine that never squashes or evicts."""
    asked = requests_of(40, seed=1)
    with LLM("tiny", adapters=adapter_dirs, policy="fifo-lru", **SMALL) as llm:
        tokens = [output.token_ids for output in llm.generate(*asked)]
        assert llm.stats().squashes == llm.stats().evictions == 0
    assert len({len(ids) for ids in tokens}) > 10
    return asked, tokens


def run(llm, asked):
    outputs = llm.generate(*asked)
    assert {o.finish_reason for o in outputs} <= {"stop", "length"}
    stats = llm.stats()
    assert (stats.running, stats.waiting, stats.kv_pages) == (0, 0, 0)
    llm.engine.check()
    return outputs, stats


@pytest.mark.parametrize("preset", policy_preset_names())
def test_tokens_are_the_same_under_every_preset(preset, adapter_dirs, undisturbed):
    asked, tokens = undisturbed
    # A pool in which two large adapters and a few rows do not fit together.
    with LLM(
        "tiny",
        adapters=adapter_dirs,
        policy=preset,
        pool_bytes=62 * PAGE_BYTES,
        **SMALL,
    ) as llm:
        outputs, stats = run(llm, asked)
    assert [output.token_ids for output in outputs] == tokens
    assert stats.evictions > 0
    in_lanes = [output.timing.lane is not None for output in outputs]
    assert all(in_lanes) if stats.lanes else not any(in_lanes)


def test_squashed_rows_stream_exactly_the_tokens_of_an_undisturbed_run(
    adapter_dirs, undisturbed
):
    asked, tokens = undisturbed
    policy = {
        "preset": "fifo-lru",
        "kv": {"reserve": "predicted"},
        "predictor": {"name": "quantile", "quantile": 0.1, "min_samples": 2},
    }
    with LLM(
        "tiny",
        adapters=adapter_dirs,
        policy=policy,
        pool_bytes=48 * PAGE_BYTES,
        **SMALL,
    ) as llm:
        pieces = [[] for _ in tokens]
        squashes = 0
        for delta in llm.stream(*asked):
            pieces[delta.index] += delta.token_ids
            if delta.timing is not None:
                squashes += delta.timing.squashes
        stats = llm.stats()
    assert stats.growth_squashes == stats.squashes == squashes > 0
    assert stats.grown_pages > 0
    assert [tuple(ids) for ids in pieces] == tokens


def test_bypass_and_its_squash_stream_the_tokens_of_an_undisturbed_run(adapter_dirs):
    # Rows that outgrow what was expected of them hold more pages than they are charged:
    # only then does a head have its tokens but not its pages.
    rng = np.random.default_rng(5)

    def ask(prompt_tokens, max_tokens, expected_tokens, seed):
        sampling = SamplingParams(
            max_tokens=max_tokens,
            expected_tokens=expected_tokens,
            seed=seed,
            ignore_eos=True,
        )
        return rng.integers(0, 256, prompt_tokens).tolist(), sampling

    asked = {f"long{i}": (*ask(100, 140, 1, i), None) for i in range(3)}
    asked["head"] = (*ask(20, 16, 16, 3), "a2")  # 3 pages, and 32 of its adapter
    asked["passer"] = (*ask(60, 60, 8, 4), None)
    with LLM("tiny", adapters=adapter_dirs, policy="fifo-lru", **SMALL) as llm:
        prompts, sampling, adapters = zip(*asked.values(), strict=True)
        outputs = llm.generate(prompts, adapters=adapters, sampling=sampling)
        expected = {
            name: output.token_ids for name, output in zip(asked, outputs, strict=True)
        }

    outbox = Outbox()
    got = {name: Delta() for name in asked}
    policy = {"preset": "chameleon", "predictor": {"name": "oracle"}}
    with LLM(
        "tiny",
        adapters=adapter_dirs,
        policy=policy,
        pool_bytes=62 * PAGE_BYTES,
        **SMALL,
    ) as llm:

        def submit(name):
            prompt, sampling, adapter = asked[name]
            uid = None if adapter is None else llm._registry.resolve(adapter)
            submission = llm.engine.prepare(
                name, prompt, sampling, adapter_uid=uid, outbox=outbox
            )
            llm.engine.submit(submission)

        def read_until(done):
            while not done():
                name, delta = outbox.get(timeout_s=60)
                got[name] = got[name].then(delta)

        longs = [name for name in asked if name.startswith("long")]
        for name in longs:
            submit(name)
        # From their 65th token on 128 are expected of each: 11 pages of 60 each now.
        read_until(lambda: min(len(got[name].token_ids) for name in longs) >= 66)
        submit("head")
        submit("passer")
        read_until(lambda: got["passer"].token_ids)
        # Its pages and the passer's are enough for the head, its own are not.
        llm.cancel("long0")
        read_until(lambda: all(delta.finish_reason for delta in got.values()))
        stats = llm.stats()
    assert stats.bypasses >= 1 and stats.squashes - stats.growth_squashes >= 1
    assert got["head"].timing.bypasses >= 1
    assert got["passer"].timing.squashes >= 1
    assert got.pop("long0").finish_reason == "aborted"
    assert {name: got[name].token_ids for name in got} == {
        name: expected[name] for name in got
    }


def test_plan_log_of_a_real_run_replays_to_the_same_plans(
    adapter_dirs, undisturbed, tmp_path
):
    asked, _ = undisturbed
    log = tmp_path / "plans.gz"
    with LLM(
        "tiny",
        adapters=adapter_dirs,
        policy="chameleon",
        plan_log=str(log),
        pool_bytes=62 * PAGE_BYTES,
        **SMALL,
    ) as llm:
        _, stats = run(llm, asked)
    report = replay(log)
    assert report.first_difference is None and not report.cut_off
    assert report.admitted == len(asked[0]) + stats.squashes
    assert report.evictions == stats.evictions > 0


def test_plan_log_that_cannot_be_written_is_refused_before_the_start(tmp_path):
    with pytest.raises(ConfigError, match=r"plan log .*no/such.* cannot be written"):
        LLM("tiny", plan_log=str(tmp_path / "no/such/plans.gz"), **SMALL)


def test_pinned_adapter_is_loaded_and_stays_while_others_come_and_go(adapter_dirs):
    with LLM("tiny", adapters=adapter_dirs, pool_bytes=62 * PAGE_BYTES, **SMALL) as llm:
        llm.pin_adapter("a2")
        asked = requests_of(20, seed=3)
        run(llm, asked)
        (pinned,) = [info for info in llm.list_adapters() if info.pinned]
        assert pinned.name == "a2" and pinned.tier == "device"
        assert pinned.evictions == 0 and pinned.loads == 1
        assert llm.stats().evictions > 0
        llm.unpin_adapter("a2")
        run(llm, asked)
        assert not any(info.pinned for info in llm.list_adapters())
        with pytest.raises(UnknownAdapterError, match="nobody"):
            llm.pin_adapter("nobody")


def test_pin_that_would_leave_no_room_is_refused_with_the_numbers(adapter_dirs):
    with LLM("tiny", adapters=adapter_dirs, pool_bytes=48 * PAGE_BYTES, **SMALL) as llm:
        pages = llm.stats().total_pages
        names = [info.name for info in llm.list_adapters()]
        with pytest.raises(CapacityError, match=f"of the pool's {pages}, and a req"):
            for name in names:
                llm.pin_adapter(name)
        assert any(info.pinned for info in llm.list_adapters())
        for name in names:
            llm.unpin_adapter(name)
        run(llm, requests_of(3, seed=4))


def test_two_pins_at_once_leave_room_for_what_waits(adapter_dirs):
    # Each fits beside the waiting request, both do not.
    with LLM("tiny", adapters=adapter_dirs, pool_bytes=62 * PAGE_BYTES, **SMALL) as llm:
        prompts, _, _ = requests_of(8, seed=6)
        long = SamplingParams(max_tokens=120, ignore_eos=True)
        stream = llm.stream([[1] * 128] * 12, sampling=long)
        next(stream)
        errors = []

        def pin(name):
            try:
                llm.pin_adapter(name)
            except CapacityError as error:
                errors.append(error)

        def both():
            # On the engine thread nothing happens between the two.
            pin("a2")  # 32 of 60 pages
            pin("a3")  # 16: 12 are left, and each request needs 16

        llm.engine.on_engine_thread(both)
        reasons = [delta.finish_reason for delta in stream if delta.finish_reason]
        assert len(errors) == 1 and reasons == ["length"] * 12
        assert prompts


def test_unknown_uids_are_refused_at_the_door(adapter_dirs):
    with LLM("tiny", adapters=adapter_dirs, **SMALL) as llm:
        for pinned in (True, False):
            with pytest.raises(UnknownAdapterError, match="uid 'nope'"):
                llm.engine.adapters.pin("nope", pinned=pinned)
        with pytest.raises(UnknownAdapterError, match="uid 'nope'"):
            llm.engine.prepare(
                "r", [1], SamplingParams(), adapter_uid="nope", outbox=Outbox()
            )
        run(llm, requests_of(3, seed=4))


def test_cancel_beside_an_arrival_that_no_longer_fits_disturbs_nobody(adapter_dirs):
    with LLM("tiny", adapters=adapter_dirs, pool_bytes=48 * PAGE_BYTES, **SMALL) as llm:
        outbox = Outbox()
        sampling = SamplingParams(max_tokens=100)
        engine = llm.engine
        submission = engine.prepare(
            "x", [1] * 150, sampling, adapter_uid=None, outbox=outbox
        )
        llm.pin_adapter("a2")  # 32 of 46 pages; x needs 16

        def together():
            engine.submit(submission)
            engine.cancel("x")

        engine.on_engine_thread(together)
        _, delta = outbox.get(timeout_s=30)
        assert delta.finish_reason == "aborted"
        run(llm, requests_of(3, seed=4))


def test_engine_that_waits_for_a_load_does_not_plan_meanwhile(adapter_dirs, tmp_path):
    log = tmp_path / "plans.gz"
    link = {"link_bytes_per_s": 1e9, "link_latency_s": 0.5}
    with LLM("tiny", adapters=adapter_dirs, plan_log=log, **link, **SMALL) as llm:
        sampling = SamplingParams(max_tokens=2)
        (output,) = llm.generate([[1, 2]], adapters="a0", sampling=sampling)
        assert output.timing.adapter_load_s >= 0.5
        assert llm.stats().emulated_link is not None
    assert replay(log).iterations < 15


def test_closed_engine_registers_nothing_more(adapter_dirs):
    dirs = dict(adapter_dirs)
    late = dirs.pop("a0")
    llm = LLM("tiny", adapters=dirs, **SMALL)
    llm.close()
    with pytest.raises(EngineDeadError):
        llm.register_adapter("a0", late)
    with pytest.raises(UnknownAdapterError, match="unknown adapter 'a0'"):
        llm._registry.resolve("a0")


@dataclasses.dataclass
class Dishonest:
    """Raises once something has to be evicted."""

    def score(self, table):
        raise LookupError("I lost my notes")


def test_policy_that_raises_ends_the_run_with_its_name(adapter_dirs, undisturbed):
    asked, _ = undisturbed
    name = f"{__name__}:Dishonest"
    with LLM(
        "tiny",
        adapters=adapter_dirs,
        policy={"preset": "fifo-lru", "eviction": {"name": name}},
        pool_bytes=62 * PAGE_BYTES,
        **SMALL,
    ) as llm:
        outputs = llm.generate(*asked)
    errors = {output.error for output in outputs if output.finish_reason == "error"}
    assert len(errors) == 1
    assert f"eviction policy {name} raised LookupError: I lost my" in errors.pop()


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("chameleno", "policy='chameleno' is no preset; did you mean 'chameleon'"),
        ({"preset": "chameleon", "admission": {"slo_s": 0}}, "slo_s=0 must"),
        ({"preset": "lru", "eviction": {"wieght": 1}}, "wieght"),
    ],
)
def test_wrong_policy_is_refused_before_the_model_is_placed(policy, message):
    with pytest.raises(ConfigError, match=message):
        LLM("tiny", policy=policy, **SMALL)


def test_plan_log_that_breaks_ends_and_disturbs_nobody(
    adapter_dirs, undisturbed, tmp_path
):
    asked, tokens = undisturbed
    log = tmp_path / "plans.gz"
    os.mkfifo(log)

    def read_the_header_and_leave():
        with open(log, "rb") as file:
            file.read(1)

    reader = threading.Thread(target=read_the_header_and_leave)
    reader.start()
    with LLM("tiny", adapters=adapter_dirs, plan_log=log, **SMALL) as llm:
        reader.join()
        outputs, _ = run(llm, asked)
        assert not llm.engine._log.writes
    assert [output.token_ids for output in outputs] == tokens
