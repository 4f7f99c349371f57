"""Adapters that come and go while requests run: every call, every race, every end."""

import gc
import random
import threading
import time

import pytest
from adapter_versions import (
    GREEDY,
    PAGE_BYTES,
    SMALL,
    TINY,
    check_books,
    write_version,
)
from counted import calls_of
from random_adapters import write_random_adapter
from slow_adapters import close_gate, open_gate, read_adapter

from jchameleon.errors import (
    AdapterBusyError,
    AdapterConflictError,
    AdapterError,
    CapacityError,
    EngineDeadError,
    InvalidRequestError,
    JChameleonError,
    QueueFullError,
    UnknownAdapterError,
)
from jchameleon.llm import LLM
from jchameleon.outputs import RequestOutput
from jchameleon.runtime.outbox import Outbox
from jchameleon.runtime.policy.replay import replay
from jchameleon.sampling import SamplingParams

PROMPT = [5, 6, 7, 8, 9]
LONG = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)
# Room for two adapters of rank 8 and four requests, or little more than one of rank 64.
OPTIONS = SMALL | {"pool_bytes": 48 * PAGE_BYTES}


@pytest.fixture(scope="module")
def shared_llm():
    with LLM("tiny", **OPTIONS) as llm:
        llm._host.read = read_adapter  # waits where a test closes a gate
        step = llm._engine._step

        def slow_step(*args):
            """Let long requests last, however late a test's thread gets its turn."""
            time.sleep(0.004)
            return step(*args)

        llm._engine._step = slow_step
        yield llm


@pytest.fixture
def llm(shared_llm):
    """An engine without adapters, before and after each test."""
    check_books(shared_llm, {})
    yield shared_llm
    gc.collect()
    for name in {info.name for info in shared_llm.list_adapters()}:
        shared_llm.unregister_adapter(name, timeout_s=30, force=True)
    stats = check_books(shared_llm, {})
    assert stats.free_pages + stats.cached_pages == stats.total_pages
    assert (stats.host_bytes, stats.host_adapters) == (0, 0)


@pytest.fixture
def folder(tmp_path):
    """Directories v0, v1, ... of different contents."""
    for number in range(3):
        write_version(tmp_path / f"v{number}", number)
    return tmp_path


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Tokens of each content from an engine that knows no other."""
    root = tmp_path_factory.mktemp("reference")
    found = {}
    for number in range(3):
        path = write_version(root / f"v{number}", number)
        with LLM("tiny", adapters={"only": path}, **SMALL) as llm:
            for sampling in (GREEDY, LONG):
                [output] = llm.generate([PROMPT], "only", sampling)
                found[number, sampling] = output.token_ids
    assert len(set(found.values())) == len(found)
    return lambda number, sampling=GREEDY: found[number, sampling]


def ask(llm, name, sampling=GREEDY):
    [output] = llm.generate([PROMPT], name, sampling)
    assert output.finish_reason == "length", output.error
    return output.token_ids


def tokens_of(stream):
    return tuple(token for delta in stream for token in delta.token_ids)


def info_of(llm, name):
    [info] = [i for i in llm.list_adapters() if i.name == name and not i.draining]
    return info


def in_thread(action):
    """Start a thread; `.result` is what it returned or raised, once it is joined."""

    class Thread(threading.Thread):
        result = None

        def run(self):
            try:
                self.result = action()
            except JChameleonError as error:
                self.result = error

        def finish(self):
            self.join(30)
            assert not self.is_alive(), "it waits for ever"
            return self.result

    thread = Thread()
    thread.start()
    return thread


def wait_until(condition):
    end_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.001)


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


def test_files_changed_on_disk_need_replace_and_never_mix(
    llm, folder, reference, monkeypatch
):
    monkeypatch.setattr(llm._host, "_budget_bytes", 0)  # every load reads the disk
    llm.register_adapter("a", folder / "v0")
    assert info_of(llm, "a").tier == "disk"
    write_version(folder / "v0", 1)
    [output] = llm.generate([PROMPT], "a", GREEDY)
    assert output.finish_reason == "error"
    assert "or with replace=True" in output.error
    with pytest.raises(AdapterConflictError):
        llm.register_adapter("a", folder / "v0")
    llm.register_adapter("a", folder / "v0", replace=True)
    assert ask(llm, "a") == reference(1)
    # A resident copy outlives its files, and may be unregistered without them.
    for path in (folder / "v0").iterdir():
        path.unlink()
    assert ask(llm, "a") == reference(1)
    llm.unregister_adapter("a")
    check_books(llm, {})


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


def test_unregister_while_it_loads_waits_for_the_copy(llm, folder, monkeypatch):
    monkeypatch.setattr(llm._host, "_budget_bytes", 0)
    llm.register_adapter("slow", folder / "v0")
    close_gate(folder / "v0")
    stream = llm.stream([PROMPT], "slow", GREEDY)
    reader = in_thread(lambda: list(stream))
    wait_until(lambda: info_of(llm, "slow").tier == "loading")
    with pytest.raises(AdapterBusyError, match="has 1 open request after"):
        llm.unregister_adapter("slow", timeout_s=0)
    with pytest.raises(AdapterBusyError, match="a copy under way to the device"):
        llm.unregister_adapter("slow", timeout_s=0.05, force=True)
    assert [delta.finish_reason for delta in reader.finish()] == ["aborted"]
    assert ask(llm, None), "others go on meanwhile"
    with pytest.raises(UnknownAdapterError, match="takes no new requests; 0 of"):
        llm.generate([PROMPT], "slow")
    remover = in_thread(lambda: llm.unregister_adapter("slow"))
    [info] = llm.list_adapters()
    assert (info.tier, info.draining, info.requests) == ("loading", True, 0)
    open_gate(folder / "v0")
    assert remover.finish() is None
    stats = check_books(llm, {})
    assert stats.free_pages + stats.cached_pages == stats.total_pages


def test_registered_again_while_its_copy_ends_it_is_kept(
    llm, folder, reference, monkeypatch
):
    monkeypatch.setattr(llm._host, "_budget_bytes", 0)
    uid = llm.register_adapter("slow", folder / "v0").uid
    write_version(folder / "copy", 0)
    close_gate(folder / "v0")
    stream = llm.stream([PROMPT], "slow", GREEDY)
    reader = in_thread(lambda: list(stream))
    wait_until(lambda: info_of(llm, "slow").tier == "loading")
    with pytest.raises(AdapterBusyError):
        llm.unregister_adapter("slow", timeout_s=0.05, force=True)
    reader.finish()
    llm.register_adapter("other", folder / "copy")
    user = in_thread(lambda: ask(llm, "other"))
    open_gate(folder / "v0")
    assert user.finish() == reference(0)
    check_books(llm, {"other": uid})
    assert info_of(llm, "other").loads == 1


def test_unregister_while_its_load_fails_ends_with_it(llm, folder, monkeypatch):
    monkeypatch.setattr(llm._host, "_budget_bytes", 0)
    llm.register_adapter("slow", folder / "v0")
    write_version(folder / "v0", 1)
    close_gate(folder / "v0")
    stream = llm.stream([PROMPT] * 2, "slow", GREEDY)
    reader = in_thread(lambda: list(stream))
    wait_until(lambda: info_of(llm, "slow").tier == "loading")
    remover = in_thread(lambda: llm.unregister_adapter("slow"))
    wait_until(lambda: llm.list_adapters()[0].draining)
    open_gate(folder / "v0")
    ends = reader.finish()
    assert [delta.finish_reason for delta in ends] == ["error"] * 2
    assert all("could not be loaded" in delta.error for delta in ends)
    assert remover.finish() is None
    check_books(llm, {})


# Pins.


def test_pinned_name_that_is_replaced_pins_the_new_content(llm, folder):
    old = llm.register_adapter("a", folder / "v0", pin=True)
    assert old.pinned
    wait_until(lambda: info_of(llm, "a").tier == "device")
    new = llm.register_adapter("a", folder / "v1", replace=True)
    assert new.pinned
    wait_until(lambda: info_of(llm, "a").tier == "device")
    stats = check_books(llm, {"a": new.uid})
    assert stats.adapter_pages * stats.page_bytes == new.size_bytes
    assert llm._engine._planner._residency.pinned_uids() == (new.uid,)


def test_pin_with_another_name_on_the_content_stays_on_it(llm, folder):
    llm.register_adapter("a", folder / "v0", pin=True)
    old = llm.register_adapter("alias", folder / "v0", pin=True)
    new = llm.register_adapter("a", folder / "v1", replace=True)
    pinned = llm._engine._planner._residency.pinned_uids
    wait_until(lambda: set(pinned()) == {old.uid, new.uid})
    llm.unpin_adapter("a")
    llm.unpin_adapter("a")
    wait_until(lambda: set(pinned()) == {old.uid})
    llm.unregister_adapter("alias")
    wait_until(lambda: pinned() == ())
    check_books(llm, {"a": new.uid})


def test_pin_on_a_known_name_by_registering_it_again(llm, folder):
    llm.register_adapter("a", folder / "v0")
    assert llm.register_adapter("a", folder / "v0", pin=True).pinned
    assert llm.register_adapter("a", folder / "v0").pinned, "no change"
    wait_until(lambda: info_of(llm, "a").tier == "device")


def test_pin_that_has_no_room_refuses_the_registration_whole(llm, folder, reference):
    old = llm.register_adapter("a", folder / "v0", pin=True)
    write_version(folder / "large", 4, rank=64)
    stream = llm.stream([[1] * 60], None, SamplingParams(max_tokens=60, seed=0))
    next(stream)  # it may need 8 of the pool's 46 pages, the large adapter takes 32
    for name, replace in (("b", False), ("b", True)):
        llm.register_adapter("more", folder / "v1", replace=True, pin=True)
        llm.register_adapter("even", folder / "v2", replace=True, pin=True)
        with pytest.raises(CapacityError, match="cannot be pinned"):
            llm.register_adapter(name, folder / "large", replace=replace, pin=True)
        llm.unregister_adapter("more")
        llm.unregister_adapter("even")
    list(stream)
    check_books(llm, {"a": old.uid})
    assert ask(llm, "a") == reference(0)


def test_unregistering_a_pinned_adapter_gives_its_pages_back(llm, folder):
    llm.register_adapter("a", folder / "v0", pin=True)
    wait_until(lambda: info_of(llm, "a").tier == "device")
    llm.unregister_adapter("a")
    stats = check_books(llm, {})
    assert stats.free_pages + stats.cached_pages == stats.total_pages


# References.


def open_requests(llm, name="a"):
    return info_of(llm, name).requests


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


def test_failed_requests_keep_no_reference(llm, folder, monkeypatch):
    monkeypatch.setattr(llm._host, "_budget_bytes", 0)
    llm.register_adapter("a", folder / "v0")
    for path in (folder / "v0").iterdir():
        path.unlink()
    [output] = llm.generate([PROMPT], "a")
    assert output.finish_reason == "error"
    assert open_requests(llm) == 0


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
