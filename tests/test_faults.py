"""Requests that fail by themselves, and what their ends say; nobody else notices."""

import errno
import os
import threading
import time

import numpy as np
import pytest
from fault_rig import (
    OPTIONS,
    TINY,
    check_baseline,
    streamed,
    varied,
    write_adapters,
)
from lifecycle_rig import in_thread, wait_until
from random_adapters import write_random_adapter
from slow_adapters import close_gate, open_gate, read_adapter

from jchameleon.errors import AdapterDrainingError, AdapterError, AdapterReadError
from jchameleon.llm import LLM
from jchameleon.lora.adapter import HostAdapter
from jchameleon.lora.safetensors import read_failure
from jchameleon.runtime.faults import load_fault
from jchameleon.runtime.outbox import Outbox
from jchameleon.sampling import SamplingParams

BATCH = varied(9)
LONG = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
SHORT = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def shared_llm(tmp_path_factory):
    """An engine that keeps nothing in host memory: every load reads the disk."""
    dirs = write_adapters(tmp_path_factory.mktemp("adapters"))
    with LLM("tiny", adapters=dirs, host_cache_bytes=1, **OPTIONS) as llm:
        llm._host.read = read_adapter  # waits where a test closes a gate
        yield llm


@pytest.fixture
def llm(shared_llm):
    yield shared_llm
    wait_until(lambda: shared_llm._engine.heartbeat().open_requests == 0)
    check_baseline(shared_llm)


@pytest.fixture(scope="module")
def expected(shared_llm):
    return streamed(shared_llm, BATCH)


class BrokenTexts:
    """A tokenizer whose n-th text from now on fails, at a moment of one's choice."""

    def __init__(self, tokenizer, number, moment):
        self._tokenizer, self._left, self._moment = tokenizer, number, moment

    def stream(self):
        self._left -= 1
        text = self._tokenizer.stream()
        if self._left != -1:
            return text
        if self._moment == "start":
            raise ValueError("injected at the start")
        return BrokenText(text, self._moment)


class BrokenText:
    def __init__(self, text, moment):
        self._text, self._moment, self._pushed = text, moment, 0

    def push(self, token_id):
        self._pushed += 1
        if self._moment == "third token" and self._pushed == 3:
            raise ValueError("injected at the third token")
        return self._text.push(token_id)

    def flush(self):
        if self._moment == "end":
            raise ValueError("injected at the end")
        return self._text.flush()


@pytest.mark.parametrize("stop", [(), ("no such text",)])
@pytest.mark.parametrize(
    ("moment", "num_tokens"), [("start", 0), ("third token", 2), ("end", 5)]
)
def test_text_that_fails_ends_its_request_alone(
    llm, expected, monkeypatch, caplog, moment, num_tokens, stop
):
    place = 4
    monkeypatch.setattr(
        llm._engine._replies,
        "_tokenizer",
        BrokenTexts(llm._engine._replies._tokenizer, place, moment),
    )
    prompts, adapters, sampling = (list(column) for column in BATCH)
    prompts.insert(place, [1, 2, 3])
    adapters.insert(place, "a1")
    sampling.insert(
        place, SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, stop=stop)
    )
    outputs = llm.generate(prompts, adapters, sampling)
    broken = outputs.pop(place)
    assert (broken.finish_reason, broken.fault) == ("error", "internal")
    assert f"ValueError: injected at the {moment}" in broken.error
    assert len(broken.token_ids) == num_tokens
    assert broken.timing.total_s > 0
    assert [o.token_ids for o in outputs] == [one[0] for one in expected]
    [record] = [r for r in caplog.records if broken.request_id in r.getMessage()]
    assert record.exc_info is not None, "with its traceback"
    assert streamed(llm, BATCH) == expected


def test_logit_edits_that_fail_on_a_token_end_their_request_alone(
    llm, expected, monkeypatch
):
    from jchameleon.runtime.edits import RowEdits

    add, count = RowEdits.add, iter(range(100))

    def failing_add(self, token):
        if next(count) == 2:
            raise IndexError("injected")
        add(self, token)

    monkeypatch.setattr(RowEdits, "add", failing_add)
    prompts, adapters, sampling = BATCH
    edited = [i for i, s in enumerate(sampling) if s.repetition_penalty != 1.0]
    found = streamed(llm, BATCH)
    failed = [i for i, one in enumerate(found) if one[2] == "error"]
    assert len(failed) == 1 and failed[0] in edited
    for place, (one, right) in enumerate(zip(found, expected, strict=True)):
        assert place in failed or one == right


def test_cancelled_request_whose_text_fails_is_still_cancelled(llm, monkeypatch):
    replies = llm._engine._replies
    monkeypatch.setattr(
        replies, "_tokenizer", BrokenTexts(replies._tokenizer, 0, "end")
    )
    stream = llm.stream([[1, 2, 3]], sampling=LONG)
    llm.cancel(next(stream).request_id)
    last = list(stream)[-1]
    assert (last.finish_reason, last.fault) == ("aborted", "cancelled")


def test_id_of_a_request_that_failed_can_be_used_at_once(llm, monkeypatch):
    """Whatever the planner hears of the first must not reach the second."""
    engine = llm._engine
    replies = engine._replies
    for _ in range(20):
        tokenizer = replies._tokenizer
        monkeypatch.setattr(
            replies, "_tokenizer", BrokenTexts(tokenizer, 0, "third token")
        )
        for reason in ("error", "length"):
            outbox = Outbox()
            engine.submit(
                engine.prepare("same", [1, 2], SHORT, adapter_uid=None, outbox=outbox)
            )
            delta = None
            while delta is None or delta.finish_reason is None:
                _, delta = outbox.get(timeout_s=30)
            assert delta.finish_reason == reason
        monkeypatch.setattr(replies, "_tokenizer", tokenizer)


def test_logits_that_are_not_finite_say_so(llm, expected, tmp_path):
    path = write_random_adapter(
        tmp_path / "huge", TINY, rank=8, targets=("q", "v"), seed=9, dtype="float32"
    )
    huge = read_adapter(str(path))
    modules = {
        key: pair.__class__(a=pair.a, b=np.full_like(pair.b, 3e38), scale=pair.scale)
        for key, pair in huge.modules.items()
    }
    huge = HostAdapter.build(modules, source="huge")
    read, llm._host.read = llm._host.read, lambda place: huge
    llm._engine.adapters.register(huge.card)
    llm._registry.add("huge", huge)
    prompts, adapters, sampling = (list(column) for column in BATCH)
    outputs = llm.generate([*prompts, [1]], [*adapters, "huge"], [*sampling, SHORT])
    llm._host.read = read
    assert (outputs[-1].finish_reason, outputs[-1].fault) == ("error", "not_finite")
    assert [o.token_ids for o in outputs[:-1]] == [one[0] for one in expected]
    llm.unregister_adapter("huge", timeout_s=30)


def failing_disk(monkeypatch, folder, number):
    """Let every attempt to open a file under `folder` fail as a disk does."""
    real = os.open

    def failing_open(path, *args, **kwargs):
        if str(path).startswith(str(folder)):
            raise OSError(number, os.strerror(number))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", failing_open)


@pytest.mark.parametrize(
    ("number", "fault"),
    [
        (errno.EIO, "adapter_io"),
        (errno.EMFILE, "adapter_io"),
        (errno.EACCES, "adapter"),
    ],
)
def test_disk_error_fails_only_requests_for_that_adapter(
    llm, expected, monkeypatch, tmp_path, number, fault
):
    path = write_random_adapter(tmp_path / "bad", TINY, rank=8, targets=("q",), seed=5)
    llm.register_adapter("bad", path)
    prompts, adapters, sampling = (list(column) for column in BATCH)
    with monkeypatch.context() as patched:
        failing_disk(patched, path, number)
        outputs = llm.generate(
            [[1], *prompts, [2]], ["bad", *adapters, "bad"], [SHORT, *sampling, SHORT]
        )
        with pytest.raises(AdapterError) as caught:
            llm.register_adapter("other", path)
    for output in (outputs[0], outputs[-1]):
        assert (output.finish_reason, output.fault) == ("error", fault)
        assert os.strerror(number) in output.error
    assert isinstance(caught.value, AdapterReadError) == (fault == "adapter_io")
    assert [o.token_ids for o in outputs[1:-1]] == [one[0] for one in expected]
    # The disk is well again, and so is the adapter.
    [output] = llm.generate([[1]], "bad", SHORT)
    assert output.finish_reason == "length"
    llm.unregister_adapter("bad", timeout_s=30)


def test_deleted_files_say_that_the_adapter_is_to_blame(llm, tmp_path):
    path = write_random_adapter(tmp_path / "gone", TINY, rank=8, targets=("q",), seed=6)
    llm.register_adapter("gone", path)
    for file in path.iterdir():
        file.unlink()
    [output] = llm.generate([[1]], "gone", SHORT)
    assert (output.finish_reason, output.fault) == ("error", "adapter")
    llm.unregister_adapter("gone", timeout_s=30)


def test_read_that_hangs_delays_only_requests_for_that_adapter(llm, expected, tmp_path):
    path = write_random_adapter(tmp_path / "slow", TINY, rank=8, targets=("q",), seed=7)
    llm.register_adapter("slow", path)
    close_gate(path)
    waiting = in_thread(lambda: llm.generate([[1, 2]] * 2, "slow", SHORT))
    wait_until(lambda: llm._engine.heartbeat().open_requests == 2)
    for _ in range(2):  # whole runs pass while the read hangs
        assert streamed(llm, BATCH) == expected
    assert waiting.is_alive()
    # Requests for it wait in no step: with a limit they end without one.
    limited = SamplingParams(max_tokens=3, time_limit_s=0.05)
    [output] = llm.generate([[3]], "slow", limited)
    assert (output.finish_reason, output.fault) == ("time_limit", None)
    # A hanging read is no hanging engine.
    wait_until(lambda: llm._engine.heartbeat().stalled_s == 0.0)
    open_gate(path)
    outputs = waiting.finish()
    assert [o.finish_reason for o in outputs] == ["length"] * 2
    llm.unregister_adapter("slow", timeout_s=30)


def test_ends_by_callers_say_which(llm, tmp_path):
    path = write_random_adapter(tmp_path / "x", TINY, rank=8, targets=("q",), seed=8)
    llm.register_adapter("x", path)
    stream = llm.stream([[1, 2]], "x", LONG)
    first = next(stream)
    assert first.fault is None
    remover = in_thread(lambda: llm.unregister_adapter("x"))
    wait_until(lambda: llm.list_adapters()[-1].draining)
    with pytest.raises(AdapterDrainingError, match="was unregistered and takes no"):
        llm.generate([[1]], "x")
    llm.unregister_adapter("x", force=True, timeout_s=30)
    assert list(stream)[-1].fault == "unregistered"
    remover.finish()
    stream = llm.stream([[1, 2]], None, LONG)
    llm.cancel(next(stream).request_id)
    assert list(stream)[-1].fault == "cancelled"
    [output] = llm.generate([[1, 2]], None, SHORT)
    assert (output.finish_reason, output.fault, output.outputs[0].fault) == (
        "length",
        None,
        None,
    )


def test_request_that_a_policy_turns_away_was_rejected():
    policy = {
        "source": "test",
        "preset": "s-lora",
        "admission": {"early_abort_slo_s": 0.51},
    }
    options = OPTIONS | {"max_running": 1, "policy": policy}
    with LLM("tiny", **options) as llm:
        outputs = llm.generate([[1]] * 3, None, LONG)
        ends = sorted((o.finish_reason, o.fault) for o in outputs)
        # Whoever came first ran, while the others waited for too long.
        assert ends == [("error", "rejected")] * 2 + [("length", None)]


def held(llm):
    """Hold the engine thread; return the function that lets it go."""
    entered, leave = threading.Event(), threading.Event()

    def hold():
        entered.set()
        assert leave.wait(60)

    holder = in_thread(lambda: llm._engine.on_engine_thread(hold))
    assert entered.wait(30)

    def let_go():
        leave.set()
        holder.finish()

    return let_go


def test_request_whose_time_is_over_before_it_starts_runs_no_step(llm):
    let_go = held(llm)
    limited = SamplingParams(max_tokens=5, time_limit_s=0.01)
    caller = in_thread(
        lambda: llm.generate([[1] * 30] * 3, [None, "a0", "a1"], limited)
    )
    wait_until(lambda: llm._engine.heartbeat().open_requests == 3)
    end_s = time.monotonic() + 0.02
    wait_until(lambda: time.monotonic() > end_s)
    loads = llm._engine._planner.books().loads
    let_go()
    outputs = caller.finish()
    assert [o.finish_reason for o in outputs] == ["time_limit"] * 3
    ids = {o.request_id for o in outputs}
    assert not ids & {i for record in llm.step_records for i, _ in record.prefill}
    assert llm.stats().loads == loads, "no adapter was loaded for it"


def test_heartbeat_tells_a_hanging_engine_from_an_idle_one(tmp_path):
    llm = LLM("tiny", **OPTIONS)
    engine = llm._engine
    wait_until(lambda: engine.heartbeat().stalled_s == 0.0)
    beat = engine.heartbeat()
    assert beat.alive and beat.open_requests == 0
    entered, leave = threading.Event(), threading.Event()
    run = llm._executor._run

    def hanging_run(shape, batch):
        entered.set()
        assert leave.wait(60)
        return run(shape, batch)

    llm._executor._run = hanging_run
    caller = in_thread(lambda: llm.generate([[1, 2]] * 2, None, SHORT))
    assert entered.wait(30)
    # From this very thread, while the engine's is stuck in a step.
    wait_until(lambda: engine.heartbeat().stalled_s > 0.05)
    before = engine.heartbeat()
    assert before.alive and before.open_requests == 2
    wait_until(lambda: engine.heartbeat().stalled_s > before.stalled_s)
    leave.set()
    caller.finish()
    wait_until(lambda: engine.heartbeat().stalled_s == 0.0)
    llm.close()
    beat = engine.heartbeat()
    assert not beat.alive and beat.stalled_s == 0.0


def test_closing_engine_says_that_it_was_closed():
    llm = LLM("tiny", **OPTIONS)
    stream = llm.stream([[1, 2, 3]] * 3, None, LONG)
    next(stream)
    llm.close()
    ends = [(d.finish_reason, d.fault) for d in stream if d.finish_reason]
    assert ends == [("aborted", "closed")] * 3


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (AdapterError("refused"), "adapter"),
        (read_failure("x", FileNotFoundError(errno.ENOENT, "gone")), "adapter"),
        (read_failure("x", ValueError("embedded null byte")), "adapter"),
        (read_failure("x", OSError(errno.ESTALE, "stale")), "adapter_io"),
        (MemoryError(), "internal"),
        (OSError(errno.EIO, "not of a file of the adapter"), "internal"),
    ],
)
def test_load_failures_are_told_apart(error, fault):
    assert load_fault(error) == fault
