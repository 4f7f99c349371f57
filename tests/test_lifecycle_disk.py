"""Adapters that come and go while every load reads the disk."""

import pytest
from adapter_versions import GREEDY, check_books, write_version
from lifecycle_rig import (
    PROMPT,
    ask,
    in_thread,
    info_of,
    open_requests,
    slow_engine,
    wait_until,
)
from slow_adapters import close_gate, open_gate

from jchameleon.errors import (
    AdapterBusyError,
    AdapterConflictError,
    AdapterDrainingError,
)

pytest_plugins = ["lifecycle_fixtures"]


@pytest.fixture(scope="module")
def shared_llm():
    """An engine that keeps nothing in host memory: every load reads the disk."""
    with slow_engine(host_cache_bytes=1) as llm:
        yield llm


def test_files_changed_on_disk_need_replace_and_never_mix(llm, folder, reference):
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


def test_unregister_while_it_loads_waits_for_the_copy(llm, folder):
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
    with pytest.raises(AdapterDrainingError, match="takes no new requests; 0 of"):
        llm.generate([PROMPT], "slow")
    remover = in_thread(lambda: llm.unregister_adapter("slow"))
    [info] = llm.list_adapters()
    assert (info.tier, info.draining, info.requests) == ("loading", True, 0)
    open_gate(folder / "v0")
    assert remover.finish() is None
    stats = check_books(llm, {})
    assert stats.free_pages + stats.cached_pages == stats.total_pages


def test_registered_again_while_its_copy_ends_it_is_kept(llm, folder, reference):
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


def test_unregister_while_its_load_fails_ends_with_it(llm, folder):
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


def test_failed_requests_keep_no_reference(llm, folder):
    llm.register_adapter("a", folder / "v0")
    for path in (folder / "v0").iterdir():
        path.unlink()
    [output] = llm.generate([PROMPT], "a")
    assert output.finish_reason == "error"
    assert open_requests(llm) == 0
