"""Names and cards of adapters: what a name leads to, and what a registration costs."""

import gc
import tracemalloc

import numpy as np
import pytest

from jchameleon.errors import AdapterConflictError, AdapterError, UnknownAdapterError
from jchameleon.lora.adapter import AdapterCard, HostAdapter, LoraPair
from jchameleon.runtime.adapters import AdapterRegistry
from jchameleon.runtime.host_store import HostStore


def build(number, *, rank=8, source="somewhere"):
    """Return an adapter whose content is `number`."""
    pair = LoraPair(
        a=np.full((rank, 64), number, np.float32),
        b=np.full((64, rank), number, np.float32),
        scale=1.0,
    )
    return HostAdapter.build({(0, "q"): pair}, source=source)


def unreadable(path):
    raise AdapterError(f"adapter {path!r}: there is no such directory")


@pytest.fixture
def registry():
    return AdapterRegistry(HostStore(unreadable, budget_bytes=1 << 20))


def test_card_describes_the_adapter_without_its_weights(registry):
    adapter = build(1, source="here")
    registry.add("one", adapter)
    assert registry.card(registry.resolve("one")) == AdapterCard(
        uid=adapter.uid,
        rank=8,
        targets=frozenset({"q"}),
        num_bytes=2 * 8 * 64 * 4,
        source="here",
    )
    assert registry.get(adapter.uid) is adapter


def test_two_names_of_one_content_share_a_card(registry):
    first, second = build(1, source="first"), build(1, source="second")
    registry.add("one", first)
    registry.add("uno", second)
    assert registry.names() == {"one": first.uid, "uno": first.uid}
    assert registry.card(first.uid).source == "first"


def test_name_taken_by_other_content_is_refused_and_keeps_its_own(registry):
    registry.add("one", build(1))
    registry.add("one", build(1))
    other = build(2)
    for refuse in (registry.check, registry.add):
        with pytest.raises(AdapterConflictError, match="'one' is taken") as caught:
            refuse("one", other)
        assert other.uid[:12] in str(caught.value)
    assert registry.resolve("one") == build(1).uid
    with pytest.raises(KeyError):
        registry.get(other.uid)


@pytest.mark.parametrize("name", ["", "x" * 129, "a\nb", None, 3])
def test_bad_name_is_refused(registry, name):
    for refuse in (lambda: registry.load(name, "/"), lambda: registry.add(name, None)):
        with pytest.raises(AdapterError, match="adapter name"):
            refuse()


def test_load_reads_the_path_and_registers_nothing(registry):
    with pytest.raises(AdapterError, match="adapter '/nowhere': there is no such"):
        registry.load("one", "/nowhere")
    with pytest.raises(AdapterError, match="path 7 must be a path"):
        registry.load("one", 7)
    assert registry.names() == {}


def test_unknown_name_lists_some_of_those_there_are(registry):
    with pytest.raises(UnknownAdapterError, match="'x'; registered are: none$"):
        registry.resolve("x")
    for number in range(20):
        registry.add(f"n{number:02}", build(number))
    with pytest.raises(UnknownAdapterError, match="n00, .*, n19$"):
        registry.resolve("x")
    for number in range(20, 27):
        registry.add(f"n{number:02}", build(number))
    with pytest.raises(UnknownAdapterError, match="n19 and 7 more$"):
        registry.resolve("x")


def test_ten_thousand_adapters_cost_memory_for_cards_only():
    largest = build(0)
    store = HostStore(unreadable, budget_bytes=10 * largest.num_bytes)
    registry = AdapterRegistry(store)
    tracemalloc.start()
    try:
        before_bytes, _ = tracemalloc.get_traced_memory()
        for number in range(10_000):
            source = f"/adapters/customer-{number:05}/latest"
            registry.add(f"customer-{number:05}", build(number, source=source))
        after_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(registry.names()) == 10_000
    assert store.stats().host_adapters == 10
    weights_bytes = 10_000 * largest.num_bytes
    assert weights_bytes > 35 << 20, "weights would be noticed"
    assert after_bytes - before_bytes < 20 << 20


def test_name_taken_over_drains_what_it_stood_for(registry):
    old, new = build(1), build(2)
    registry.add("a", old)
    lease = registry.lease("a", "r")
    with registry.holding(new):
        registry.bind("a", new.uid)
    assert registry.resolve("a") == new.uid and lease.uid == old.uid
    assert registry.card(old.uid).uid == old.uid
    [drains] = registry.draining("a")
    assert (drains.uid, drains.draining) == (old.uid, True)
    lease.release()
    assert registry.draining("a") == []
    for forgotten in (registry.card, registry.get):
        with pytest.raises(KeyError):
            forgotten(old.uid)


def test_content_is_kept_while_a_name_a_lease_or_a_registration_claims_it(registry):
    adapter = build(1)
    with registry.holding(adapter):
        registry.bind("a", adapter.uid)
    registry.add("b", adapter)
    lease = registry.lease("a", "r")
    registry.unbind("a")
    registry.unbind("b")
    with registry.holding(adapter):
        lease.release()
        assert registry.get(adapter.uid) is adapter
    with pytest.raises(KeyError):
        registry.get(adapter.uid)


def test_lease_is_released_once_however_often_it_is_said(registry):
    registry.add("a", build(1))
    first, second = (registry.lease("a", name) for name in ("first", "second"))
    first.submit()
    first.abandon()
    assert len(registry.binding("a").requests) == 2, "the engine has it"
    for _ in range(3):
        first.release()
        second.abandon()
    assert registry.binding("a").requests == {}
    registry.lease("a", "dropped")
    gc.collect()
    assert registry.binding("a").requests == {}


def test_failed_registration_leaves_nothing(registry):
    with pytest.raises(RuntimeError, match="no room"), registry.holding(build(1)):
        raise RuntimeError("no room")
    with pytest.raises(KeyError):
        registry.get(build(1).uid)
    assert registry.bindings() == []


def test_engine_that_gives_up_late_does_not_take_what_came_back(registry):
    retired = []
    registry.connect(retired.append, lambda action: action())
    adapter = build(1)
    registry.add("a", adapter)
    registry.unbind("a")
    assert retired == [adapter.uid]
    assert [b.name for b, _ in registry.bindings()] == ["a"], "it is still leaving"
    registry.add("b", adapter)
    assert registry.draining("a") == []
    registry.forgotten(adapter.uid)
    assert registry.get(adapter.uid) is adapter
    registry.unbind("b")
    registry.forgotten(adapter.uid)
    registry.forgotten(adapter.uid)
    assert registry.bindings() == []
    with pytest.raises(KeyError):
        registry.get(adapter.uid)


def test_registrations_without_end_leave_memory_as_it_was(registry):
    def cycle(count, start):
        for number in range(start, start + count):
            adapter = build(number, rank=1, source=f"/v{number}")
            with registry.holding(adapter):
                registry.bind("a", adapter.uid)
            registry.lease("a", f"r{number}").release()
        registry.unbind("a")

    tracemalloc.start()
    try:
        cycle(500, 0)
        before_bytes, _ = tracemalloc.get_traced_memory()
        cycle(2_000, 500)
        after_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after_bytes - before_bytes < 2_000 * 4
    assert not (registry._live or registry._draining or registry._contents)
    assert not (registry._host._paths or registry._host._kept)
