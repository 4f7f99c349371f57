"""Adapters that come and go while requests run: every call, every race."""

import random
import threading

import pytest
from adapter_versions import GREEDY, TINY, check_books, write_version
from counted import calls_of
from lifecycle_rig import LONG, PROMPT, ask, in_thread, info_of, tokens_of, wait_until
from random_adapters import write_random_adapter

from jchameleon.errors import (
    AdapterBusyError,
    AdapterConflictError,
    AdapterError,
    InvalidRequestError,
    JChameleonError,
    UnknownAdapterError,
)
from jchameleon.llm import LLM
from jchameleon.outputs import RequestOutput
from jchameleon.sampling import SamplingParams

pytest_plugins = ["lifecycle_fixtures"]


# Register and replace.


def test_register_reads_and_checks_in_full_before_it_returns(llm, folder):
    info = llm.register_adapter("a", folder / "v0")
    assert (info.name, info.rank, info.targets) == ("a", 8, ("q", "v"))
    assert (info.tier, info.draining, info.pinned) == ("host", False, False)
    assert info.source == str(folder / "v0")
    weights = folder / "v1" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(AdapterError, match="v1"):
        llm.register_adapter("b", folder / "v1")
    write_version(folder / "v1", 1)  # the publisher has finished by now
    llm.register_adapter("b", folder / "v1")
    assert sorted(info.name for info in llm.list_adapters()) == ["a", "b"]


def test_same_content_again_is_no_change(llm, folder, reference):
    first = llm.register_adapter("a", folder / "v0")
    write_version(folder / "copy", 0)
    for options in ({}, {"replace": True}):
        assert llm.register_adapter("a", folder / "copy", **options).uid == first.uid
    assert len(llm.list_adapters()) == 1
    assert ask(llm, "a") == reference(0)


def test_other_content_without_replace_is_a_conflict_and_changes_nothing(
    llm, folder, reference
):
    uid = llm.register_adapter("a", folder / "v0").uid
    with pytest.raises(AdapterConflictError, match="use another name or replace=True"):
        llm.register_adapter("a", folder / "v1")
    check_books(llm, {"a": uid})
    assert ask(llm, "a") == reference(0)


def test_replaced_name_serves_the_new_while_old_requests_finish_on_the_old(
    llm, folder, reference
):
    old = llm.register_adapter("a", folder / "v0")
    running = llm.stream([PROMPT], "a", LONG)
    first = next(running)
    accepted = llm.stream([PROMPT], "a", LONG)  # not submitted yet
    new = llm.register_adapter("a", folder / "v1", replace=True)
    assert new.uid != old.uid
    assert ask(llm, "a") == reference(1)
    entries = llm.list_adapters()
    assert [(i.uid, i.draining, i.requests) for i in entries] == [
        (new.uid, False, 0),
        (old.uid, True, 2),
    ]
    assert first.token_ids + tokens_of(running) == reference(0, LONG)
    assert tokens_of(accepted) == reference(0, LONG)
    wait_until(lambda: len(llm.list_adapters()) == 1)
    check_books(llm, {"a": new.uid})


def test_replaced_content_without_requests_is_forgotten_at_once(llm, folder):
    llm.register_adapter("a", folder / "v0")
    ask(llm, "a")
    new = llm.register_adapter("a", folder / "v1", replace=True)
    check_books(llm, {"a": new.uid})


def test_name_that_goes_back_to_a_draining_content_keeps_it(llm, folder, reference):
    old = llm.register_adapter("a", folder / "v0")
    stream = llm.stream([PROMPT], "a", LONG)
    first = next(stream)
    llm.register_adapter("a", folder / "v1", replace=True)
    llm.register_adapter("a", folder / "v0", replace=True)
    assert first.token_ids + tokens_of(stream) == reference(0, LONG)
    assert ask(llm, "a") == reference(0)
    check_books(llm, {"a": old.uid})
    assert info_of(llm, "a").loads == 1, "its copy on the device was kept"


def test_replaced_content_under_another_name_stays(llm, folder, reference):
    old = llm.register_adapter("a", folder / "v0")
    llm.register_adapter("alias", folder / "v0")
    new = llm.register_adapter("a", folder / "v1", replace=True)
    check_books(llm, {"a": new.uid, "alias": old.uid})
    assert ask(llm, "alias") == reference(0)
    assert ask(llm, "a") == reference(1)


def test_adapter_that_is_refused_leaves_nothing(llm, folder):
    write_random_adapter(folder / "mlp", TINY, rank=8, targets=("up",), seed=3)
    write_version(folder / "large", 4, rank=96)
    for path in ("mlp", "large", "nowhere"):
        with pytest.raises(AdapterError):
            llm.register_adapter("a", folder / path, replace=True, pin=True)
        check_books(llm, {})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.register_adapter("", "x"), "adapter name ''"),
        (lambda llm: llm.register_adapter("a", "x", replace=1), "replace=1 must be"),
        (lambda llm: llm.register_adapter("a", "x", pin=None), "pin=None must be"),
        (lambda llm: llm.unregister_adapter("a", force="yes"), "force='yes' must be"),
        (lambda llm: llm.unregister_adapter("a", timeout_s=-1), "timeout_s=-1 must"),
        (
            lambda llm: llm.unregister_adapter("a", timeout_s=float("nan")),
            "timeout_s=nan must",
        ),
        (lambda llm: llm.unregister_adapter("a", timeout_s="1"), "timeout_s='1' must"),
        (lambda llm: llm.unregister_adapter("a"), "unknown adapter 'a'"),
        (lambda llm: llm.pin_adapter("a"), "unknown adapter 'a'"),
        (lambda llm: llm.unpin_adapter("a"), "unknown adapter 'a'"),
    ],
)
def test_bad_arguments_are_refused_by_name(llm, call, message):
    with pytest.raises(JChameleonError, match=message) as caught:
        call(llm)
    assert isinstance(
        caught.value, InvalidRequestError | AdapterError | UnknownAdapterError
    )


# Unregister.


def test_unregistered_name_is_unknown_and_its_adapter_gone(llm, folder):
    llm.register_adapter("a", folder / "v0")
    ask(llm, "a")
    llm.unregister_adapter("a")
    stats = check_books(llm, {})
    assert stats.free_pages + stats.cached_pages == stats.total_pages
    for call in (ask, LLM.unregister_adapter, LLM.pin_adapter):
        with pytest.raises(UnknownAdapterError, match="unknown adapter 'a'"):
            call(llm, "a")


def test_unregister_waits_for_running_and_waiting_requests(llm, folder, reference):
    llm.register_adapter("a", folder / "v0")
    streams = [llm.stream([PROMPT], "a", LONG) for _ in range(7)]  # 4 run at once
    firsts = [next(streams[0])]
    readers = [in_thread(lambda s=stream: tokens_of(s)) for stream in streams[1:]]
    wait_until(lambda: llm.stats().waiting == 3)
    remover = in_thread(lambda: llm.unregister_adapter("a"))
    wait_until(lambda: llm.list_adapters()[0].draining)
    with pytest.raises(UnknownAdapterError, match="takes no new requests; [1-7] of"):
        llm.stream([PROMPT], "a")
    assert remover.is_alive()
    expected = reference(0, LONG)
    assert [reader.finish() for reader in readers] == [expected] * 6
    assert firsts[0].token_ids + tokens_of(streams[0]) == expected
    assert remover.finish() is None
    check_books(llm, {})


def test_timeout_says_how_many_are_left_and_a_later_call_goes_on(
    llm, folder, reference
):
    llm.register_adapter("a", folder / "v0")
    stream = llm.stream([PROMPT] * 2, "a", LONG)
    first = next(stream)
    for timeout_s in (0, 0.01):
        with pytest.raises(AdapterBusyError, match="2 open requests after") as caught:
            llm.unregister_adapter("a", timeout_s=timeout_s)
        assert isinstance(caught.value, TimeoutError)
    [info] = llm.list_adapters()
    assert (info.draining, info.requests) == (True, 2)
    rest = list(stream)
    whole = {0: (), 1: ()}
    for delta in (first, *rest):
        whole[delta.index] += delta.token_ids
    assert whole == dict.fromkeys((0, 1), reference(0, LONG))
    try:
        llm.unregister_adapter("a", timeout_s=1e99)
    except UnknownAdapterError:
        pass  # it was gone by then
    check_books(llm, {})


def test_force_aborts_what_runs_waits_or_was_never_submitted(llm, folder):
    llm.register_adapter("a", folder / "v0")
    bystander = llm.stream([PROMPT], None, LONG)
    kept = next(bystander)
    runs = llm.stream([PROMPT] * 6, "a", LONG)
    next(runs)
    never = llm.stream([PROMPT], "a", LONG)
    llm.unregister_adapter("a", force=True)
    ends = [delta for delta in runs if delta.finish_reason]
    assert len(ends) == 6
    for delta in ends:
        assert delta.finish_reason == "aborted"
        assert delta.error == "adapter 'a' was unregistered"
    [late] = never
    assert (late.finish_reason, late.token_ids) == ("aborted", ())
    assert late.error == "adapter 'a' was unregistered"
    whole = kept.token_ids + tokens_of(bystander)
    assert whole == ask(llm, None, LONG), "others are not disturbed"
    check_books(llm, {})


def test_force_ends_a_drain_that_another_call_waits_for(llm, folder):
    llm.register_adapter("a", folder / "v0")
    stream = llm.stream([PROMPT], "a", LONG)
    patient = in_thread(lambda: llm.unregister_adapter("a"))
    wait_until(lambda: llm.list_adapters()[0].draining)
    llm.unregister_adapter("a", force=True, timeout_s=30)
    assert patient.finish() is None
    stream.close()


def test_register_during_the_drain_starts_a_new_life(llm, folder, reference):
    for again in (0, 1):  # the same content, then another
        llm.register_adapter("a", folder / "v0")
        stream = llm.stream([PROMPT], "a", LONG)
        first = next(stream)
        remover = in_thread(lambda: llm.unregister_adapter("a"))
        wait_until(lambda: llm.list_adapters()[0].draining)
        info = llm.register_adapter("a", folder / f"v{again}")
        assert ask(llm, "a") == reference(again)
        assert remover.is_alive()
        assert first.token_ids + tokens_of(stream) == reference(0, LONG)
        assert remover.finish() is None
        check_books(llm, {"a": info.uid})
        llm.unregister_adapter("a")


def test_of_two_names_of_one_content_each_drains_for_itself(llm, folder, reference):
    uid = llm.register_adapter("a", folder / "v0").uid
    llm.register_adapter("b", folder / "v0")
    of_a, of_b = (llm.stream([PROMPT], name, LONG) for name in "ab")
    first_a, first_b = next(of_a), next(of_b)
    llm.pin_adapter("a")
    llm.pin_adapter("b")
    with pytest.raises(AdapterBusyError, match="has 1 open request after"):
        llm.unregister_adapter("a", timeout_s=0)
    assert info_of(llm, "b").pinned
    llm.unregister_adapter("a", force=True)
    assert tokens_of([first_a, *of_a]) != reference(0, LONG)
    assert first_b.token_ids + tokens_of(of_b) == reference(0, LONG)
    check_books(llm, {"b": uid})
    assert info_of(llm, "b").pinned and info_of(llm, "b").tier == "device"
    llm.unregister_adapter("b")
    check_books(llm, {})


def test_two_threads_unregister_at_once_and_both_get_an_end(llm, folder):
    for _ in range(10):
        llm.register_adapter("a", folder / "v0")
        stream = llm.stream([PROMPT], "a", GREEDY)
        next(stream)
        threads = [in_thread(lambda: llm.unregister_adapter("a")) for _ in range(3)]
        list(stream)
        ends = [thread.finish() for thread in threads]
        assert None in ends
        for end in ends:  # who came after the end is told so
            assert end is None or isinstance(end, UnknownAdapterError)
        check_books(llm, {})


def test_threads_that_replace_one_name_leave_one_content(llm, folder, reference):
    llm.register_adapter("a", folder / "v0")
    stop = threading.Event()
    seen = []

    def replace(number):
        for _ in range(15):
            llm.register_adapter("a", folder / f"v{number}", replace=True)

    def use():
        while not stop.is_set():
            seen.append(ask(llm, "a"))

    users = [in_thread(use) for _ in range(2)]
    threads = [in_thread(lambda n=number: replace(n)) for number in range(3)]
    assert [thread.finish() for thread in threads] == [None] * 3
    stop.set()
    assert [user.finish() for user in users] == [None] * 2
    assert set(seen) <= {reference(number) for number in range(3)}
    uid = info_of(llm, "a").uid
    wait_until(lambda: len(llm.list_adapters()) == 1)
    check_books(llm, {"a": uid})


def any_call(llm, rng, folder):
    """Do one thing to one of two names and return its result."""
    name, path = rng.choice("ab"), folder / f"v{rng.randrange(3)}"
    match rng.randrange(12):
        case 0 | 10 | 11:
            return llm.register_adapter(name, path, replace=rng.random() < 0.5)
        case 1:
            return llm.register_adapter(name, path, replace=True, pin=True)
        case 2:
            return llm.unregister_adapter(name, timeout_s=rng.choice([0, 0.01, 30]))
        case 3:
            return llm.unregister_adapter(name, timeout_s=30, force=True)
        case 4:
            return llm.unpin_adapter(name)
        case 5:
            return llm.stream([PROMPT] * 2, name, GREEDY)  # and drop it
        case 6:
            return llm.list_adapters()
    return llm.generate([PROMPT], name, GREEDY)


def test_threads_that_do_all_at_once_leave_nothing_behind(llm, folder, reference):
    expected = {reference(number) for number in range(3)}

    def live(seed):
        rng = random.Random(seed)
        done = 0
        while done < 5:
            try:
                result = any_call(llm, rng, folder)
            except (AdapterConflictError, UnknownAdapterError, AdapterBusyError):
                continue
            for output in result if isinstance(result, list) else ():
                if isinstance(output, RequestOutput):
                    whole = output.finish_reason == "length"
                    assert whole or "was unregistered" in output.error
                    assert not whole or output.token_ids in expected
                    done += whole
        return done

    threads = [in_thread(lambda s=seed: live(s)) for seed in range(4)]
    assert [thread.finish() for thread in threads] == [5] * 4


# Many.


def test_thousand_adapters_register_list_and_run_through_a_small_pool(llm, tmp_path):
    """Work is counted in Python calls and in questions to the engine thread.

    A registration costs some 520 calls, nearly all of them to read and check the files,
    and one question, whether it is the tenth or the thousandth. A list costs one
    question and 11 calls for each adapter.
    """
    count = 1_000
    paths = {
        f"n{index:04}": write_random_adapter(
            tmp_path / f"n{index}", TINY, rank=1, targets=("q",), seed=index
        )
        for index in range(count)
    }
    asked = []
    adapters = llm._engine.adapters
    ask_engine = adapters._ask
    adapters._ask = lambda action: asked.append(action) or ask_engine(action)
    try:
        costs = [
            calls_of(lambda n=name, p=path: llm.register_adapter(n, p))[0]
            for name, path in paths.items()
        ]
        assert len(asked) == count
        list_calls, infos = calls_of(llm.list_adapters)
        assert len(asked) == count + 1
    finally:
        adapters._ask = ask_engine
    assert max(costs[-10:]) < 1.1 * min(costs[10:20])
    assert list_calls < 15 * count
    assert [info.name for info in infos] == sorted(paths)
    assert {info.tier for info in infos} == {"host"}
    sampling = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    outputs = llm.generate([PROMPT] * count, list(paths), sampling)
    assert {output.finish_reason for output in outputs} == {"length"}
    stats = llm.stats()
    infos = llm.list_adapters()
    assert sum(info.hits + info.misses for info in infos) == count
    assert min(info.loads for info in infos) >= 1
    on_device = [info for info in infos if info.tier == "device"]
    used_bytes = stats.adapter_pages * stats.page_bytes
    assert sum(info.device_bytes for info in on_device) == used_bytes
    assert 0 < len(on_device) < 20
    # Those used first have been evicted since, and come back as they were.
    again = llm.generate([PROMPT] * 10, list(paths)[:10], sampling)
    assert [o.token_ids for o in again] == [o.token_ids for o in outputs[:10]]
    for name in paths:
        llm.unregister_adapter(name)
