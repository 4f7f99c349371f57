"""A root with adapters, what each answers alone, and a server that each test clears."""

import pytest
from adapter_service import VERSIONS, call, listed, table
from adapter_versions import write_version
from server_harness import check_baseline, running_server

from jchameleon.llm import LLM
from jchameleon.sampling import SamplingParams


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for number in range(VERSIONS):
        write_version(root / f"v{number}", number, rank=8 + 8 * (number % 3))
    return root


@pytest.fixture(scope="session")
def expected(root):
    """Return greedy tokens of each version, from engines of one adapter each."""
    found = {}
    sampling = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    for number in range(VERSIONS):
        with LLM(
            "tiny",
            adapters={"only": root / f"v{number}"},
            max_running=8,
            max_batch_tokens=64,
            max_model_len=512,
        ) as llm:
            [output] = llm.generate(["hello"], "only", sampling)
            found[number] = list(output.token_ids)
    assert len({tuple(ids) for ids in found.values()}) == VERSIONS
    return found


@pytest.fixture(scope="module")
def shared_server(root):
    with running_server(table(root)) as server:
        yield server


@pytest.fixture
def server(shared_server):
    """A server without adapters, before and after each test."""
    yield shared_server
    for adapter in listed(shared_server):
        call(
            shared_server,
            "UnregisterAdapter",
            adapter_id=adapter.adapter_id,
            force=True,
        )
    check_baseline(shared_server)
