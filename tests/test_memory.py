"""The pool takes what the device has left: never more, and hardly less."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jchameleon.errors import ConfigError
from jchameleon.runtime.memory import DeviceMemory, check_pool, fit_pages

TERMS = [
    field.name
    for field in dataclasses.fields(DeviceMemory)
    if field.name != "limit_bytes"
]
sizes = st.integers(0, 1 << 37)
memories = st.builds(
    DeviceMemory, limit_bytes=sizes, **{name: st.integers(0, 1 << 34) for name in TERMS}
)


@given(
    memory=memories,
    page_bytes=st.integers(1, 1 << 25),
    least=st.integers(3, 1000),
    useful=st.integers(1, 1 << 20),
)
def test_pool_fits_beside_all_else_and_wastes_little(memory, page_bytes, least, useful):
    taken = sum(getattr(memory, name) for name in TERMS)
    if taken + least * page_bytes > memory.limit_bytes:
        with pytest.raises(ConfigError) as caught:
            fit_pages(
                memory, page_bytes=page_bytes, least_pages=least, useful_pages=useful
            )
        for name in ("limit_bytes", *TERMS):
            assert str(getattr(memory, name)) in str(caught.value)
        assert f"needs {least}" in str(caught.value)
        return
    pages = fit_pages(
        memory, page_bytes=page_bytes, least_pages=least, useful_pages=useful
    )
    assert taken + pages * page_bytes <= memory.limit_bytes
    assert least <= pages <= max(least, useful)
    if least < pages < useful:
        # A 64th more, and it would not fit.
        more = pages + pages // 64 + 1
        assert taken + more * page_bytes > memory.limit_bytes
    check_pool(memory, pages * page_bytes)


@given(memory=memories, over=st.integers(-(1 << 20), 1 << 20))
def test_check_lets_a_pool_take_the_reserve_and_no_more(memory, over):
    others = sum(getattr(memory, name) for name in TERMS if name != "reserve_bytes")
    pool_bytes = memory.limit_bytes - others + over
    if over <= 0:
        check_pool(memory, pool_bytes)
        return
    with pytest.raises(ConfigError) as caught:
        check_pool(memory, pool_bytes)
    for name in ("limit_bytes", *TERMS):
        assert str(getattr(memory, name)) in str(caught.value)
    assert f"pool of {pool_bytes} bytes" in str(caught.value)


def test_starts_that_find_slightly_other_memory_make_the_same_pool():
    pages = set()
    for jitter in range(0, 200 << 20, 7 << 20):
        memory = DeviceMemory(
            limit_bytes=(75 << 30) + jitter,
            in_use_bytes=14 << 30,
            temp_bytes=1 << 28,
            output_bytes=1 << 27,
            staging_bytes=1 << 30,
        )
        pages.add(
            fit_pages(memory, page_bytes=8 << 20, least_pages=300, useful_pages=1 << 20)
        )
    assert len(pages) <= 2
