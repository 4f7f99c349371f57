"""Sampling fields through the engine: company, limits, several completions."""

import dataclasses
import threading
import time

import numpy as np
import pytest
from engine_harness import heard_compiles
from random_adapters import write_random_adapter

from jchameleon.config import ModelConfig
from jchameleon.errors import InvalidRequestError
from jchameleon.llm import LLM
from jchameleon.runtime.completions import prepare_completions
from jchameleon.runtime.outbox import Outbox
from jchameleon.sampling import SamplingParams

TINY = ModelConfig.preset("tiny")
SMALL = {"max_running": 4, "max_batch_tokens": 64, "max_model_len": 512}
DRAWN = SamplingParams(max_tokens=20, temperature=1.0, seed=3, ignore_eos=True)
GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)

OPTIONS = {
    "min_p": {"min_p": 0.2},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "presence_penalty": {"presence_penalty": 2.0},
    "frequency_penalty": {"frequency_penalty": -2.0},
    "logit_bias": {"logit_bias": {i: 4.0 for i in range(0, 200, 3)}},
    "logprobs": {"logprobs": 5},
    "prompt_logprobs": {"prompt_logprobs": 2},
    "min_tokens": {"min_tokens": 9, "ignore_eos": False},
    "n": {"n": 3},
}


@pytest.fixture(scope="module")
def adapter_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter") / "first"
    write_random_adapter(path, TINY, rank=8, targets=("q", "v"), seed=0)
    return path


@pytest.fixture(scope="module")
def llm(adapter_dir):
    with LLM(model="tiny", adapters={"first": adapter_dir}, **SMALL) as llm:
        yield llm


def assert_books_are_empty(llm):
    stats = llm.stats()
    assert (stats.running, stats.waiting, stats.kv_pages) == (0, 0, 0)
    llm.engine.check()


@pytest.mark.parametrize("name", OPTIONS)
def test_neighbour_without_options_draws_bit_for_bit_what_it_draws_alone(llm, name):
    neighbours = [[1, 2, 3], [9] * 40, [250, 7]]
    sampling = [DRAWN, GREEDY, DRAWN]
    adapters = [None, "first", None]
    alone = [
        llm.generate([prompt], adapter, one)[0].token_ids
        for prompt, adapter, one in zip(neighbours, adapters, sampling, strict=True)
    ]
    optional = dataclasses.replace(DRAWN, **OPTIONS[name])
    outputs = llm.generate(
        [[5, 6, 7, 8] * 4, *neighbours],
        ["first", *adapters],
        [optional, *sampling],
    )
    assert [o.token_ids for o in outputs[1:]] == alone
    [again] = llm.generate([[5, 6, 7, 8] * 4], "first", optional)
    assert outputs[0].token_ids == again.token_ids
    if again.logprobs is not None:
        for found, expected in zip(outputs[0].logprobs, again.logprobs, strict=True):
            assert list(found) == list(expected)
            # Other rows make another program, which may round differently.
            assert found == pytest.approx(expected, abs=1e-4)
    assert_books_are_empty(llm)


def test_no_program_compiles_for_any_option(llm):
    compiled = heard_compiles()
    everything = dataclasses.replace(
        DRAWN,
        logprobs=20,
        prompt_logprobs=20,
        min_p=0.01,
        repetition_penalty=1.2,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        logit_bias={1: 1.0},
        min_tokens=3,
        n=2,
    )
    for count in (1, 2, 4):
        llm.generate([[7] * (60 * count)] * count, sampling=everything)
    assert compiled == []


def test_stream_with_every_report_concatenates_to_generate(llm):
    sampling = dataclasses.replace(DRAWN, logprobs=2, prompt_logprobs=1, n=3)
    prompts = ["abc", "hello there"]
    outputs = llm.generate(prompts, [None, "first"], sampling)
    found = {}
    for delta in llm.stream(prompts, [None, "first"], sampling):
        own = found.setdefault(
            (delta.index, delta.completion), [(), "", (), None, None]
        )
        assert own[4] is None, "nothing follows the last delta"
        own[0] += delta.token_ids
        own[1] += delta.text
        own[2] += delta.logprobs
        if delta.prompt_logprobs is not None:
            assert own[3] is None, "prompts are scored once"
            own[3] = delta.prompt_logprobs
        own[4] = delta.finish_reason
    assert len(found) == 6
    for index, output in enumerate(outputs):
        for one in output.outputs:
            tokens, text, logprobs, scores, reason = found[index, one.index]
            assert (tokens, text, reason) == (
                one.token_ids,
                one.text,
                one.finish_reason,
            )
            assert [list(d) for d in logprobs] == [list(d) for d in one.logprobs]
            assert (scores is None) == (one.index > 0)
        assert list(found[index, 0][3][1]) == list(output.prompt_logprobs[1])


def test_min_tokens_keeps_end_tokens_away_and_stop_strings_as_text(llm):
    eos = llm.model_config.eos_token_ids[0]
    free = SamplingParams(max_tokens=60, temperature=3.0, seed=1, ignore_eos=True)
    [whole] = llm.generate("q", sampling=free)
    # A bias makes ends likely: without a minimum they come at once.
    ends = {eos: 12.0, 65: 12.0}
    early = dataclasses.replace(
        free, ignore_eos=False, stop_token_ids=[65], logit_bias=ends
    )
    [output] = llm.generate("q", sampling=early)
    assert output.finish_reason == "stop" and len(output.token_ids) < 10
    [output] = llm.generate("q", sampling=dataclasses.replace(early, min_tokens=10))
    assert output.finish_reason == "stop"
    assert 11 <= len(output.token_ids) < 20
    assert not {eos, 65} & set(output.token_ids[:10])
    # A stop string of one character, which is in the text from the start.
    char = next(c for c in whole.text if c.isascii() and c.isprintable())
    stop = dataclasses.replace(free, stop=char, min_tokens=30)
    [output] = llm.generate("q", sampling=stop)
    count = len(output.token_ids)
    assert output.token_ids == whole.token_ids[:count]
    if output.finish_reason == "stop":
        assert count > 30 and ord(char) == output.token_ids[-1]
        assert char not in llm.tokenizer.decode(list(output.token_ids[30:-1]))
    assert char in output.text


def test_include_stop_keeps_the_stop_string_and_the_stop_tokens_text(llm):
    free = dataclasses.replace(DRAWN, max_tokens=80)
    [whole] = llm.generate("abc", sampling=free)
    stop = next(
        whole.text[i : i + 2]
        for i in range(10, len(whole.text) - 2)
        if "\ufffd" not in whole.text[i : i + 2]
    )
    cut = dataclasses.replace(free, stop=stop)
    kept = dataclasses.replace(cut, include_stop=True)
    [without, with_stop] = llm.generate(["abc"] * 2, sampling=[cut, kept])
    assert without.text == whole.text[: whole.text.index(stop)]
    assert with_stop.text == without.text + stop
    token = next(t for t in whole.token_ids[5:] if 32 <= t < 127)
    cut = dataclasses.replace(free, stop_token_ids=[token])
    kept = dataclasses.replace(cut, include_stop=True)
    [without, with_stop] = llm.generate(["abc"] * 2, sampling=[cut, kept])
    assert without.token_ids == with_stop.token_ids
    assert with_stop.text == llm.tokenizer.decode(list(with_stop.token_ids))
    assert without.text == llm.tokenizer.decode(list(without.token_ids[:-1]))


def test_truncate_prompt_tokens_keeps_the_last(llm):
    prompt = list(range(1, 100))
    keep = dataclasses.replace(GREEDY, truncate_prompt_tokens=7)
    [output] = llm.generate([prompt], sampling=keep)
    [expected] = llm.generate([prompt[-7:]], sampling=GREEDY)
    assert output.prompt_token_ids == tuple(prompt[-7:])
    assert output.token_ids == expected.token_ids
    # It is cut before it is measured; what is shorter stays.
    long = [[3] * 5000, [1, 2]]
    outputs = llm.generate(long, sampling=keep)
    assert [len(o.prompt_token_ids) for o in outputs] == [7, 2]
    with pytest.raises(InvalidRequestError, match="prompt has token id 999"):
        llm.generate([[999, *prompt]], sampling=keep)


class SquashOnce:
    """Admit in order, and send the first back once, some plans after its start."""

    def __init__(self, *, after_plans: int) -> None:
        self._left = after_plans

    def admit(self, view):
        running = list(view.running)
        if running:
            self._left -= 1
            if self._left == 0:
                assert view.squash(running[0], "for the test")
                return
        for request in view.waiting:
            view.try_admit(request)


@pytest.mark.parametrize("after_plans", [1, 2, 3, 12])
def test_logprobs_of_a_squashed_request_are_those_of_an_undisturbed_run(
    llm, after_plans
):
    """It is sent back while its prompt runs, 64 tokens a plan, and while it decodes.

    The first step is shared, so that afterwards the prompt is cut at other places.
    """
    sampling = dataclasses.replace(
        GREEDY, prompt_logprobs=3, logprobs=1, presence_penalty=1.0
    )
    prompt = np.random.default_rng(0).integers(0, 250, 200).tolist()
    [expected] = llm.generate([prompt], sampling=sampling)
    policy = {
        "preset": "fifo-lru",
        "admission": {
            "name": "test_engine_sampling:SquashOnce",
            "after_plans": after_plans,
        },
        "kv": {"max_squashes": 1},
    }
    with LLM(model="tiny", policy=policy, **SMALL) as squashing:
        short = dataclasses.replace(GREEDY, max_tokens=1)
        deltas = squashing.stream([[1, 2], prompt], sampling=[short, sampling])
        deltas = [delta for delta in deltas if delta.index == 1]
        assert squashing.step_records[0].prefill == (("req-0", 2), ("req-1", 32))
    assert deltas[-1].timing.squashes == 1
    assert sum((d.token_ids for d in deltas), ()) == expected.token_ids
    [scores] = [d.prompt_logprobs for d in deltas if d.prompt_logprobs is not None]
    assert len(scores) == 200 and scores[0] is None
    found = sum((d.logprobs for d in deltas if d.logprobs), ())
    for values, wanted in (
        (scores, expected.prompt_logprobs),
        (found, expected.logprobs),
    ):
        assert len(values) == len(wanted)
        for one, other in zip(values, wanted, strict=True):
            assert one is other is None or one == pytest.approx(other, abs=1e-4)


def test_completions_with_a_seed_repeat_and_the_first_is_that_of_n_1(llm):
    several = dataclasses.replace(DRAWN, n=5)
    [output] = llm.generate(["abc"], "first", several)
    assert [one.index for one in output.outputs] == list(range(5))
    tokens = [one.token_ids for one in output.outputs]
    assert len(set(tokens)) == 5
    assert output.token_ids == tokens[0]
    assert output.text == output.outputs[0].text
    [again] = llm.generate(["abc"], "first", several)
    assert [one.token_ids for one in again.outputs] == tokens
    [alone] = llm.generate(["abc"], "first", DRAWN)
    assert alone.token_ids == tokens[0]
    [other] = llm.generate(["abc"], "first", dataclasses.replace(several, seed=4))
    assert not set(tokens) & {one.token_ids for one in other.outputs}
    assert_books_are_empty(llm)


def test_more_completions_than_the_queue_holds_all_come(adapter_dir):
    options = SMALL | {"max_waiting": 2}
    with LLM(model="tiny", **options) as llm:
        several = dataclasses.replace(DRAWN, n=9, max_tokens=3, seed=None)
        outputs = llm.generate(["abc", "d"], sampling=several)
        for output in outputs:
            assert len({one.token_ids for one in output.outputs}) > 5
            assert {one.finish_reason for one in output.outputs} == {"length"}


def test_cancel_ends_all_completions_also_those_not_yet_submitted():
    options = SMALL | {"max_waiting": 2}
    with LLM(model="tiny", **options) as llm:
        long = dataclasses.replace(DRAWN, max_tokens=400)
        stream = llm.stream(
            ["abc", "other"], sampling=[dataclasses.replace(long, n=12), GREEDY]
        )
        first = next(stream)
        llm.cancel(first.request_id)
        ends = {}
        for delta in stream:
            if delta.finish_reason is not None:
                assert (delta.index, delta.completion) not in ends
                ends[delta.index, delta.completion] = delta.finish_reason
                assert delta.timing is not None
        assert ends.pop((1, 0)) == "length"
        assert ends == {(0, i): "aborted" for i in range(12)}
        assert_books_are_empty(llm)
        llm.cancel(first.request_id)


def test_engine_takes_completions_one_by_one(llm):
    engine, outbox = llm.engine, Outbox()
    several = dataclasses.replace(DRAWN, n=2, prompt_logprobs=0)
    with pytest.raises(InvalidRequestError, match="n=2 must be 1 in the request of a"):
        engine.prepare("one", [1, 2], several, adapter_uid=None, outbox=outbox)
    submissions = prepare_completions(
        engine, "one", [1, 2], several, adapter_uid=None, outbox=outbox
    )
    assert [s.request_id for s in submissions] == ["one", "one#1"]
    assert [s.sampling.prompt_logprobs for s in submissions] == [0, None]


def test_time_limit_ends_a_running_request_with_what_there_is(llm):
    long = dataclasses.replace(GREEDY, max_tokens=500)
    [warm] = llm.generate([[1, 2, 3]], sampling=long)
    limit_s = warm.timing.total_s / 2
    limited = dataclasses.replace(long, time_limit_s=limit_s)
    start_s = time.monotonic()
    [output] = llm.generate([[1, 2, 3]], sampling=limited)
    assert output.finish_reason == "time_limit"
    assert output.error is None
    assert limit_s <= output.timing.total_s <= time.monotonic() - start_s
    count = len(output.token_ids)
    assert 0 < count < 500
    assert output.token_ids == warm.token_ids[:count]
    assert_books_are_empty(llm)


def test_time_limit_ends_waiting_requests(llm):
    limited = dataclasses.replace(GREEDY, time_limit_s=0.02, prompt_logprobs=1)
    long = dataclasses.replace(GREEDY, max_tokens=200)
    prompts = [*[[i, i] for i in range(4)], [7, 8], [9] * 450]
    outputs = llm.generate(prompts, sampling=[long] * 4 + [limited] * 2)
    assert [o.finish_reason for o in outputs] == ["length"] * 4 + ["time_limit"] * 2
    for output in outputs[4:]:
        assert (output.token_ids, output.text) == ((), "")
        assert output.prompt_logprobs is None
        assert output.timing.ttft_s is None
        assert output.timing.total_s >= 0.02
    assert outputs[4].timing.total_s < outputs[0].timing.total_s
    assert_books_are_empty(llm)


def test_time_limit_that_is_not_reached_changes_nothing_and_is_forgotten(llm):
    limited = dataclasses.replace(GREEDY, time_limit_s=3600.0, max_tokens=1)
    [expected] = llm.generate(["abc"], sampling=GREEDY)
    for _ in range(3):
        outputs = llm.generate(["abc"] * 50, sampling=limited)
        assert {o.finish_reason for o in outputs} == {"length"}
        assert {o.token_ids for o in outputs} == {expected.token_ids[:1]}
    assert len(llm.engine._deadlines._heap) <= 2 * 50 + 64 + 1


def test_time_limit_wakes_an_engine_that_only_waits_for_a_load(tmp_path):
    """Nothing else happens meanwhile: the emulated link takes seconds."""
    write_random_adapter(tmp_path / "slow", TINY, rank=8, targets=("q",), seed=0)
    options = SMALL | {"link_bytes_per_s": 1e9, "link_latency_s": 3.0}
    with LLM(model="tiny", adapters={"slow": tmp_path / "slow"}, **options) as llm:
        limited = dataclasses.replace(GREEDY, time_limit_s=0.2)
        start_s = time.monotonic()
        [output] = llm.generate(["abc"], "slow", limited)
        assert output.finish_reason == "time_limit"
        assert time.monotonic() - start_s < 1.5


def test_priority_decides_who_starts(llm):
    """Four rows are taken; of those that wait the most urgent start first."""
    engine, outbox = llm.engine, Outbox()
    hold = dataclasses.replace(GREEDY, max_tokens=60)
    submit = []
    for name, priority in (
        *[(f"running{i}", 0) for i in range(4)],
        *[("late", 5), ("normal", 0), ("soon", -5)],
    ):
        sampling = dataclasses.replace(hold, priority=priority)
        submit.append(
            engine.prepare(name, [1, 2], sampling, adapter_uid=None, outbox=outbox)
        )
    engine.on_engine_thread(lambda: [engine.submit(one) for one in submit])
    firsts, open_ids = [], {one.request_id for one in submit}
    while open_ids:
        request_id, delta = outbox.get(30.0)
        if delta.token_ids and request_id not in firsts:
            firsts.append(request_id)
        if delta.finish_reason is not None:
            open_ids.remove(request_id)
    waits = {r: i for i, r in enumerate(firsts)}
    records = [i for record in llm.step_records for i, _ in record.prefill]
    order = [i for i in records if i in ("late", "normal", "soon")]
    assert order == ["soon", "normal", "late"] and len(waits) == 7


def test_bad_token_ids_are_refused_before_anything_runs(llm):
    with pytest.raises(InvalidRequestError, match="logit_bias has 259, outside"):
        llm.generate(["a"], sampling=SamplingParams(logit_bias={259: 1.0}))
    with pytest.raises(InvalidRequestError, match="logit_bias has 2147483647, outside"):
        llm.generate(["a"], sampling=SamplingParams(logit_bias={2**31 - 1: 1.0}))
    assert_books_are_empty(llm)


def test_options_in_many_threads_stay_their_own(llm):
    jobs = [
        dataclasses.replace(DRAWN, seed=i, **OPTIONS[name])
        for i, name in enumerate([*OPTIONS] * 2)
    ]
    alone = [llm.generate(["xyz"], sampling=one)[0] for one in jobs]
    found = [None] * len(jobs)

    def run(i):
        [found[i]] = llm.generate(["xyz"], sampling=jobs[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, found, strict=True):
        assert [o.token_ids for o in one.outputs] == [
            o.token_ids for o in other.outputs
        ]
