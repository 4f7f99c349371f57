"""What holds an adapter: requests until they end, and the engine until its own end."""

import gc

import pytest
from adapter_versions import GREEDY, check_books
from lifecycle_rig import (
    LONG,
    OPTIONS,
    PROMPT,
    ask,
    in_thread,
    open_requests,
    wait_until,
)
from slow_adapters import read_adapter

from jchameleon.errors import (
    AdapterBusyError,
    EngineDeadError,
    InvalidRequestError,
    JChameleonError,
    QueueFullError,
    UnknownAdapterError,
)
from jchameleon.llm import LLM
from jchameleon.runtime.outbox import Outbox
from jchameleon.runtime.policy.replay import replay
from jchameleon.sampling import SamplingParams

pytest_plugins = ["lifecycle_fixtures"]


def test_references_are_those_of_accepted_requests_until_they_end(llm, folder):
    llm.register_adapter("a", folder / "v0")
    first = llm.stream([PROMPT] * 2, "a", LONG)
    second = llm.stream([PROMPT] * 3, ["a", None, "a"], GREEDY)
    assert open_requests(llm) == 4
    next(first)
    llm.cancel(next(second).request_id)
    list(second)
    assert open_requests(llm) == 2
    first.close()
    wait_until(lambda: open_requests(llm) == 0)


def test_stream_never_started_holds_its_reference_until_it_is_closed(llm, folder):
    llm.register_adapter("a", folder / "v0")
    stream = llm.stream([PROMPT] * 3, "a")
    assert open_requests(llm) == 3
    stream.close()
    assert open_requests(llm) == 0
    assert list(stream) == []
    stream.close()


def test_stream_never_started_and_dropped_is_found(llm, folder):
    llm.register_adapter("a", folder / "v0")
    stream = llm.stream([PROMPT] * 3, "a")
    stream.itself = stream  # only the collector of cycles finds it
    del stream
    assert open_requests(llm) == 3
    gc.collect()
    wait_until(lambda: open_requests(llm) == 0)


def test_dropped_leases_are_found_in_the_middle_of_any_call(llm, folder):
    """Collections run wherever Python likes, also with the registry's lock held."""
    llm.register_adapter("a", folder / "v0")
    before = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        for _ in range(30):
            stream = llm.stream([PROMPT] * 2, "a")
            stream.itself = stream
            del stream
            llm.list_adapters()
            llm.register_adapter("b", folder / "v1")
            llm.unregister_adapter("b", timeout_s=30)
    finally:
        gc.set_threshold(*before)
    gc.collect()
    wait_until(lambda: open_requests(llm) == 0)


@pytest.mark.parametrize(
    ("prompts", "sampling", "error"),
    [
        ([PROMPT, []], GREEDY, InvalidRequestError),
        ([PROMPT, [10**6]], GREEDY, InvalidRequestError),
        ([PROMPT, [1] * 200], GREEDY, InvalidRequestError),
        ([PROMPT, "text"], SamplingParams(stop=["x"], max_tokens=127), JChameleonError),
    ],
)
def test_call_refused_at_the_door_keeps_no_reference(
    llm, folder, prompts, sampling, error
):
    llm.register_adapter("a", folder / "v0")
    with pytest.raises(error):
        llm.generate(prompts, "a", sampling)
    assert open_requests(llm) == 0
    with pytest.raises(UnknownAdapterError):
        llm.generate([PROMPT] * 2, ["a", "nobody"])
    assert open_requests(llm) == 0


def test_full_queue_keeps_no_reference(folder):
    options = OPTIONS | {"max_running": 1, "max_waiting": 1}
    with LLM("tiny", adapters={"a": folder / "v0"}, **options) as llm:
        busy = llm.stream([PROMPT] * 2, None, LONG)
        next(busy)
        with pytest.raises(QueueFullError):
            llm.generate([PROMPT] * 3, "a")
        assert open_requests(llm) == 0
        busy.close()
        wait_until(lambda: llm.stats().running == llm.stats().waiting == 0)
        # A call larger than the queue holds all its references from the start.
        stream = llm.stream([PROMPT] * 5, "a", GREEDY)
        next(stream)
        assert open_requests(llm) >= 4
        list(stream)
        assert open_requests(llm) == 0
        stream = llm.stream([PROMPT] * 5, "a", GREEDY)
        next(stream)
        stream.close()
        wait_until(lambda: open_requests(llm) == 0)


def test_claims_of_one_request_s_parts_end_each_with_its_own(llm, folder):
    llm.register_adapter("a", folder / "v0")
    lease = llm._registry.lease("a", "whole")
    others = [lease.another(f"part-{index}") for index in range(2)]
    lease.release()
    lease.release()
    assert open_requests(llm) == 2
    with pytest.raises(AdapterBusyError, match="2 open requests"):
        llm.unregister_adapter("a", timeout_s=0)
    others[0].abandon()
    assert others[1].another("late").uid == lease.uid
    others[1].release()
    gc.collect()
    wait_until(lambda: llm.list_adapters() == [])


# The engine by itself, and its end.


def test_requests_without_a_claim_end_when_their_adapter_goes(llm, folder, reference):
    adapter = read_adapter(folder / "v0")
    with llm._registry.holding(adapter):
        engine, outbox = llm.engine, Outbox()
        engine.adapters.register(adapter.card)

        def submission(name, uid=adapter.uid):
            return engine.prepare(name, PROMPT, LONG, adapter_uid=uid, outbox=outbox)

        engine.submit(submission("runs"))
        engine.submit(submission("other", None))
        outbox.get(timeout_s=30)
        late = submission("late")
        engine.adapters.unregister(adapter.uid)
        engine.submit(late)
        ends = {}
        while len(ends) < 3:
            name, delta = outbox.get(timeout_s=30)
            if delta.finish_reason:
                ends[name] = (delta.finish_reason, delta.error)
        gone = ("aborted", "its adapter was unregistered")
        assert ends == {"runs": gone, "late": gone, "other": ("length", None)}
        with pytest.raises(UnknownAdapterError, match="no adapter with uid"):
            submission("later")
        engine.adapters.unregister(adapter.uid)  # it is gone: no change


def test_nobody_waits_for_an_engine_that_has_ended(folder):
    llm = LLM("tiny", adapters={"a": folder / "v0"}, **OPTIONS)
    never = llm.stream([PROMPT], "a", LONG)
    remover = in_thread(lambda: llm.unregister_adapter("a"))
    wait_until(lambda: llm.list_adapters()[0].draining)
    llm.close()
    assert isinstance(remover.finish(), EngineDeadError)
    for call in (
        lambda: llm.unregister_adapter("a"),
        lambda: llm.register_adapter("b", folder / "v1"),
        lambda: llm.list_adapters(),
        lambda: list(never),
    ):
        with pytest.raises(EngineDeadError, match="closed"):
            call()
    assert llm._registry.names() == {}


def test_dying_engine_ends_drains_and_releases_everything(folder):
    llm = LLM("tiny", adapters={"a": folder / "v0"}, **OPTIONS)
    stream = llm.stream([PROMPT], "a", LONG)
    next(stream)
    remover = in_thread(lambda: llm.unregister_adapter("a"))
    wait_until(lambda: llm.list_adapters()[0].draining)

    def die():
        raise SystemExit("injected")

    with pytest.raises(EngineDeadError):
        llm.engine.on_engine_thread(die)
    assert [d.finish_reason for d in stream if d.finish_reason] == ["error"]
    end = remover.finish()
    assert end is None or "injected" in str(end)
    llm.close()
    assert llm._registry._contents == {}


def test_plan_log_of_replaced_pinned_and_gone_adapters_replays(folder, tmp_path):
    log = tmp_path / "plans.gz"
    for policy in ("chameleon", "histogram", "gdsf"):
        with LLM("tiny", policy=policy, plan_log=str(log), **OPTIONS) as llm:
            for number in (0, 1, 2, 0):
                llm.register_adapter("a", folder / f"v{number}", replace=True, pin=True)
                stream = llm.stream([PROMPT] * 3, "a", LONG)
                next(stream)
                llm.register_adapter("a", folder / "v1", replace=True)
                list(stream)
                ask(llm, "a")
                llm.unregister_adapter("a")
            check_books(llm, {})
        report = replay(log)
        assert report.first_difference is None and not report.cut_off
        assert report.evictions >= 4
