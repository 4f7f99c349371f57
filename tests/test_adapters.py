"""Names and cards of adapters: what a name leads to, and what a registration costs."""

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
