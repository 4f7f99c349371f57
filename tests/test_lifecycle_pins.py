"""Pins of names whose contents are replaced, shared and unregistered."""

import pytest
from adapter_versions import check_books, write_version
from lifecycle_rig import ask, info_of, wait_until

from jchameleon.errors import CapacityError
from jchameleon.sampling import SamplingParams

pytest_plugins = ["lifecycle_fixtures"]


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
