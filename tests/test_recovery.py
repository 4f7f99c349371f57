"""Steps that fail: everyone else gets the tokens of an undisturbed run."""

import math
import random

import jax
import pytest
from fault_rig import (
    MARK,
    OPTIONS,
    OUT_OF_MEMORY,
    BrokenSteps,
    check_baseline,
    is_marked,
    streamed,
    varied,
    write_adapters,
)

from jchameleon.errors import EngineDeadError
from jchameleon.llm import LLM
from jchameleon.runtime.policy.replay import replay
from jchameleon.sampling import SamplingParams

BATCH = varied(12)


@pytest.fixture(scope="module")
def adapter_dirs(tmp_path_factory):
    return write_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def shared_llm(adapter_dirs):
    with LLM("tiny", adapters=adapter_dirs, **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(shared_llm):
    """What an undisturbed run gives."""
    return streamed(shared_llm, BATCH)


@pytest.fixture
def llm(shared_llm):
    yield shared_llm
    check_baseline(shared_llm)


@pytest.fixture
def breaking(llm):
    """Return a function that lets steps of the engine fail until the test ends."""
    broken = []

    def break_steps(fails):
        broken.append(BrokenSteps(llm._executor, fails))
        return broken[-1]

    yield break_steps
    for one in broken:
        one.mend()


def nth(*numbers):
    """Return what says that the steps of these numbers, counted from 0, fail."""
    count = iter(range(10**9))
    return lambda rows, prefill: next(count) in numbers


@pytest.mark.parametrize("numbers", [(0,), (1,), (6,), (11,), (3, 9, 17), (2, 3)])
def test_lost_steps_are_computed_again_without_repeat_or_gap(
    llm, expected, breaking, numbers
):
    broken = breaking(nth(*numbers))
    squashes = llm.stats().squashes
    assert streamed(llm, BATCH) == expected
    assert broken.failures == len(numbers)
    assert llm.stats().squashes > squashes
    assert llm._engine.heartbeat().alive


@pytest.mark.parametrize("when", ["decode", "prefill", "third token"])
def test_request_that_fails_its_steps_is_found_and_ended_alone(
    llm, expected, breaking, when
):
    def fails(rows, prefill):
        marked = [row for row in rows if is_marked(row)]
        if when == "third token":
            return any(row.sampling.position >= 5 + 3 for row in marked)
        return bool(marked) and prefill == (when == "prefill")

    broken = breaking(fails)
    prompts, adapters, sampling = (list(column) for column in BATCH)
    place = 3
    prompts.insert(place, [7, 8, 9, 10, 11])
    adapters.insert(place, "a1")
    sampling.insert(
        place,
        SamplingParams(max_tokens=30, temperature=1.0, seed=MARK, ignore_eos=True),
    )
    found = streamed(llm, (prompts, adapters, sampling))
    culprit = found.pop(place)
    assert found == expected
    assert culprit[2] == "error"
    # As it was, once more, halves down to one request, and that once more.
    assert 2 <= broken.failures <= 3 + math.ceil(math.log2(OPTIONS["max_running"]))
    assert llm._engine.heartbeat().alive


def test_culprit_alone_is_tried_twice_and_named(llm, breaking, caplog):
    broken = breaking(lambda rows, prefill: any(map(is_marked, rows)))
    sampling = SamplingParams(max_tokens=5, temperature=1.0, seed=MARK)
    for _ in range(4):  # it never ends the engine, however often it comes
        broken.failures = 0
        [output] = llm.generate([[1, 2, 3]], sampling=sampling)
        assert (output.finish_reason, output.fault) == ("error", "internal")
        assert OUT_OF_MEMORY in output.error
        assert broken.failures == 2
    failed = [r for r in caplog.records if output.request_id in r.getMessage()]
    assert failed and failed[-1].exc_info, "its traceback is in the log"


def test_failure_to_read_a_result_back_is_a_failed_step(llm, expected, monkeypatch):
    """An exception on the host in the middle of a step, with the pool still there."""
    from jchameleon.runtime import drawing

    fetch, count = drawing.Draws.fetch, iter(range(10**9))

    def failing_fetch(self):
        if next(count) in (2, 9):
            raise OSError("injected")
        return fetch(self)

    pools, rebuild = [], llm._executor.rebuild_pool

    def watched_rebuild():
        pools.extend(llm._executor._pools)
        rebuild()

    monkeypatch.setattr(llm._executor, "rebuild_pool", watched_rebuild)
    monkeypatch.setattr(drawing.Draws, "fetch", failing_fetch)
    assert streamed(llm, BATCH) == expected
    assert pools and all(pool.is_deleted() for pool in pools), "two pools at a time"


def test_edits_and_logprobs_that_raise_end_their_request_alone(
    llm, expected, monkeypatch
):
    from jchameleon.runtime import drawing

    unpack = drawing.unpack_logprobs

    def failing_unpack(packed, count):
        if count == 5:
            raise ValueError("injected into logprobs")
        return unpack(packed, count)

    lists = drawing.edit_lists

    def failing_lists(edits, **sizes):
        if any(edit._bias_marks_it for _, edit in edits):
            raise ValueError("injected into edits")
        return lists(edits, **sizes)

    from jchameleon.runtime.edits import RowEdits

    monkeypatch.setattr(drawing, "unpack_logprobs", failing_unpack)
    monkeypatch.setattr(drawing, "edit_lists", failing_lists)
    made = RowEdits.__init__

    def marking_init(self, sampling, prompt, **kwargs):
        made(self, sampling, prompt, **kwargs)
        self._bias_marks_it = dict(sampling.logit_bias or {}).get(250) == -7.0

    monkeypatch.setattr(RowEdits, "__init__", marking_init)
    prompts, adapters, sampling = (list(column) for column in BATCH)
    prompts += [[1, 2], [3, 4]]
    adapters += ["a0", None]
    sampling += [
        SamplingParams(max_tokens=9, logprobs=5),
        SamplingParams(max_tokens=9, logit_bias={250: -7.0}),
    ]
    found = streamed(llm, (prompts, adapters, sampling))
    assert found[:-2] == expected
    assert [one[2] for one in found[-2:]] == ["error", "error"]


class TurnsAway:
    """Admit in order, and reject who comes back to the line."""

    def admit(self, view):
        back = {request.request_id for request in view.requeued}
        for request in list(view.waiting):
            if request.request_id in back:
                view.reject(request, "not twice")
            else:
                view.try_admit(request)


def test_policy_may_turn_away_who_lost_its_place(adapter_dirs):
    policy = {
        "source": "test",
        "preset": "fifo-lru",
        "admission": {"name": "test_recovery:TurnsAway"},
    }
    with LLM("tiny", adapters=adapter_dirs, policy=policy, **OPTIONS) as llm:
        BrokenSteps(llm._executor, nth(5))
        outputs = llm.generate(*BATCH)
        faults = {o.fault for o in outputs}
        assert faults == {None, "rejected"}
        check_baseline(llm)


@pytest.mark.parametrize("seed", range(3))
def test_random_losses_and_cancels_leave_no_trace(llm, expected, breaking, seed):
    """Whoever ends undisturbed has its tokens; whatever happens, the books balance."""
    rng = random.Random(seed)
    breaking(lambda rows, prefill: rng.random() < 0.04)
    for _ in range(6):
        got = {index: [] for index in range(len(BATCH[0]))}
        ends = {}
        for delta in llm.stream(*BATCH):
            got[delta.index] += delta.token_ids
            if delta.finish_reason is not None:
                assert delta.index not in ends
                ends[delta.index] = delta.finish_reason, delta.fault
            elif rng.random() < 0.05:
                llm.cancel(delta.request_id)
        assert len(ends) == len(got)
        for index, (reason, fault) in ends.items():
            right = expected[index][0]
            assert tuple(got[index]) == right[: len(got[index])]
            if reason == "length":
                assert len(got[index]) == len(right)
            else:
                assert fault in ("cancelled", "internal")
    check_baseline(llm)


def test_failed_commit_fails_its_requests_and_nobody_else(adapter_dirs, expected):
    with LLM("tiny", adapters=adapter_dirs, **OPTIONS) as llm:
        executor = llm._executor
        commit, names = executor.commit, llm._registry.names()

        def failing_commit(uid, pages, pieces):
            commit(uid, pages, pieces)
            if uid == names["a1"]:
                for pool in executor._pools:
                    pool.delete()
                raise jax.errors.JaxRuntimeError(OUT_OF_MEMORY)

        executor.commit = failing_commit
        found = streamed(llm, BATCH)
        for one, right, adapter in zip(found, expected, BATCH[1], strict=True):
            assert one[2] == "error" if adapter == "a1" else one == right
        executor.commit = commit
        assert streamed(llm, BATCH) == expected
        check_baseline(llm)


def test_recoveries_replay_from_the_plan_log(adapter_dirs, expected, tmp_path):
    log = tmp_path / "plans"
    with LLM("tiny", adapters=adapter_dirs, plan_log=str(log), **OPTIONS) as llm:
        BrokenSteps(llm._executor, nth(1, 30))
        assert streamed(llm, BATCH) == expected
    report = replay(log)
    assert report.first_difference is None
    assert report.squashes > 0


def test_pinned_adapter_returns_after_the_device_was_lost(llm, breaking):
    llm.pin_adapter("a2")
    try:
        greedy = SamplingParams(max_tokens=4, temperature=0.0)
        right = llm.generate([[5, 6]], "a2", greedy)
        breaking(nth(1))
        llm.generate([[9] * 40], None, greedy)
        [info] = [i for i in llm.list_adapters() if i.name == "a2"]
        assert info.pinned and info.tier in ("loading", "device")
        again = llm.generate([[5, 6]], "a2", greedy)
        assert again[0].token_ids == right[0].token_ids
    finally:
        llm.unpin_adapter("a2")


def test_device_that_runs_nothing_any_more_ends_the_engine_and_answers_all(
    adapter_dirs,
):
    llm = LLM("tiny", adapters=adapter_dirs, **OPTIONS)
    executor = llm._executor
    failures = []

    def dead(*args):
        failures.append(1)
        raise jax.errors.JaxRuntimeError("INTERNAL: injected")

    stream = llm.stream(
        [[1, 2, 3]] * 6, "a0", SamplingParams(max_tokens=200, ignore_eos=True)
    )
    next(stream)
    executor._steps = dict.fromkeys(executor._steps, dead)
    ends = [d for d in stream if d.finish_reason is not None]
    assert [(d.finish_reason, d.fault) for d in ends] == [("error", "engine")] * 6
    assert len(failures) <= 3 + math.ceil(math.log2(6)) + 1
    assert not llm._engine.heartbeat().alive
    with pytest.raises(EngineDeadError, match="injected"):
        llm.generate([[1]])
    llm.close()


def test_pool_that_cannot_be_built_again_ends_the_engine(adapter_dirs):
    llm = LLM("tiny", adapters=adapter_dirs, **OPTIONS)

    def no_room():
        raise jax.errors.JaxRuntimeError(OUT_OF_MEMORY)

    llm._executor._empty_pools = no_room
    BrokenSteps(llm._executor, nth(4))
    outputs = llm.generate(*BATCH)
    assert {(o.finish_reason, o.fault) for o in outputs} == {("error", "engine")}
    llm.close()
