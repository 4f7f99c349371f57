"""Fixtures of the tests of adapters' lives, each file with an engine of its own.

A file that names this module in `pytest_plugins` may put another engine in the place of
`shared_llm`.
"""

import gc

import pytest
from adapter_versions import GREEDY, SMALL, check_books, write_version
from lifecycle_rig import LONG, PROMPT, slow_engine

from jchameleon.llm import LLM


@pytest.fixture(scope="module")
def shared_llm():
    with slow_engine() as llm:
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
