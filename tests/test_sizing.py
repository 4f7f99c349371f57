"""A pool as large as the device allows; a CPU reports none of the numbers."""

import logging

import jax
import pytest

from jchameleon.config import EngineConfig, ModelConfig
from jchameleon.errors import ConfigError
from jchameleon.llm import LLM
from jchameleon.models.llama import Llama
from jchameleon.models.loader import load_model
from jchameleon.pallas.operations import XLA
from jchameleon.runtime import setup, sizing
from jchameleon.runtime.executor import Executor
from jchameleon.runtime.programs import ModelParams
from jchameleon.runtime.setup import chunk_layout
from jchameleon.sampling import SamplingParams

TINY = ModelConfig.preset("tiny")
SMALL = {
    "max_running": 16,
    "max_model_len": 64,
    "max_batch_tokens": 64,
    "max_lora_rank": 40,
    "max_loads_in_flight": 3,
    "backend": "xla",
}
PAGE_BYTES = TINY.num_layers * 2 * TINY.kv_dim * 16 * 4
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def params():
    tree = load_model("tiny", dtype="float32").params
    return ModelParams.from_model(Llama(TINY, jax.tree.map(jax.numpy.asarray, tree)))


def make_executor(params, num_pages, **options):
    config = EngineConfig(**SMALL | options)
    return Executor(
        params,
        TINY,
        config,
        chunk_layout(TINY, config, ()),
        num_pages=num_pages,
        max_model_len=64,
        ops=XLA,
    )


def test_temporaries_do_not_depend_on_the_pages_and_the_largest_have_most(params):
    few = make_executor(params, 100)
    few.compile_largest()
    many = make_executor(params, 5000)
    many.warm_up()
    assert few.temp_bytes == many.temp_bytes > 0


def test_outputs_are_what_the_largest_steps_return(params):
    executor = make_executor(params, 100)
    executor.compile_largest()
    compiled = executor._steps.values()
    assert len(compiled) == 2
    logits_bytes = streams_bytes = 0
    for program in compiled:
        logits, _, stream = jax.tree.map(lambda one: one, program.out_info)
        logits_bytes += logits.size * 4
        streams_bytes += stream.size * 4
    assert executor.output_bytes == 2 * logits_bytes + streams_bytes


class Reports:
    """Stands for what an allocator would say, with room for some pages of a pool."""

    def __init__(self, monkeypatch, *, pages, least_loads):
        self.in_use_bytes = 123_456
        self.pages = pages
        self.staged_bytes = least_loads
        self.executors = []
        measure = sizing.measure_num_pages
        monkeypatch.setattr(sizing, "memory_stats", lambda device: self.stats())
        monkeypatch.setattr(setup, "memory_stats", lambda device: self.stats())

        def keep(executor):
            self.executors.append(executor)
            return measure(executor)

        monkeypatch.setattr(setup, "measure_num_pages", keep)

    def stats(self):
        taken = 0
        if self.executors:
            one = self.executors[0]
            taken = one.temp_bytes + one.output_bytes if one._steps else 0
        room = self.pages * PAGE_BYTES + PAGE_BYTES // 2
        reserve = 256 << 20
        limit = self.in_use_bytes + taken + self.staged_bytes + reserve + room
        return {"bytes_limit": limit, "bytes_in_use": self.in_use_bytes}


def staged_bytes():
    # Three adapters of rank 40: five chunks each, in two pieces of four chunks.
    chunk = chunk_layout(TINY, EngineConfig(**SMALL), ()).pages_per_chunk
    return 3 * 2 * 4 * chunk * PAGE_BYTES


def test_pool_takes_the_room_that_the_device_reports(monkeypatch, caplog):
    reports = Reports(monkeypatch, pages=61, least_loads=staged_bytes())
    with caplog.at_level(logging.INFO, "jchameleon.runtime.sizing"):
        with LLM("tiny", **SMALL) as llm:
            # 7 leading bits of 61 are 61 itself; two pages are never handed out.
            assert llm.stats().total_pages == 61 - 2
            assert llm._executor.pool_bytes == 61 * PAGE_BYTES
            [measured] = llm.generate([[1, 2, 3]], sampling=GREEDY)
    lines = [r.getMessage() for r in caplog.records if "device memory" in r.message]
    assert len(lines) == 1
    assert f"pool of {61 * PAGE_BYTES} bytes" in lines[0]
    assert f"{reports.in_use_bytes} in use" in lines[0]
    assert f"{staged_bytes()} staged adapters" in lines[0]
    monkeypatch.undo()
    with LLM("tiny", pool_bytes=61 * PAGE_BYTES, **SMALL) as llm:
        [named] = llm.generate([[1, 2, 3]], sampling=GREEDY)
    assert measured.token_ids == named.token_ids


def test_pool_is_no_larger_than_can_be_used(monkeypatch):
    Reports(monkeypatch, pages=5000, least_loads=staged_bytes())
    with LLM("tiny", **SMALL) as llm:
        measured = llm._executor.num_pages
    monkeypatch.undo()
    with LLM("tiny", **SMALL) as llm:
        assert llm._executor.num_pages == measured < 1000


def test_model_that_leaves_no_room_is_refused_with_every_term(monkeypatch):
    reports = Reports(monkeypatch, pages=10, least_loads=staged_bytes())
    with pytest.raises(ConfigError) as caught:
        LLM("tiny", **SMALL)
    [executor] = reports.executors
    for term in (
        reports.stats()["bytes_limit"],
        reports.in_use_bytes,
        executor.temp_bytes,
        executor.output_bytes,
        staged_bytes(),
        256 << 20,
    ):
        assert str(term) in str(caught.value)
    assert "leaves 10 pages" in str(caught.value)


def test_named_pool_that_does_not_fit_is_refused(monkeypatch):
    reports = Reports(monkeypatch, pages=0, least_loads=0)
    pool_bytes = reports.stats()["bytes_limit"]
    with pytest.raises(ConfigError, match="does not fit on the device: .* lower pool"):
        LLM("tiny", pool_bytes=pool_bytes, **SMALL)
