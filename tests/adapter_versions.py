"""PEFT directories of the tiny model, and books that know no adapter that is gone."""

import shutil

from random_adapters import write_random_adapter

from jchameleon.config import ModelConfig
from jchameleon.sampling import SamplingParams

TINY = ModelConfig.preset("tiny")
# Pages of the tiny model hold 16 tokens, 8 KiB over its two layers.
PAGE_BYTES = 2 * (2 * 2 * 16) * 16 * 4
SMALL = {"max_running": 4, "max_batch_tokens": 64, "max_model_len": 128}
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


def write_version(path, number, *, rank=8):
    """Write content `number` to `path`, in place of what is there."""
    shutil.rmtree(path, ignore_errors=True)
    return write_random_adapter(
        path, TINY, rank=rank, targets=("q", "v"), seed=number, dtype="float32"
    )


def check_books(llm, names):
    """Assert that an engine without requests knows `names`, name -> uid, and no more.

    Returns:
      its stats.
    """
    registry, engine = llm._registry, llm._engine
    engine.check()
    stats = llm.stats()
    assert (stats.running, stats.waiting, stats.kv_pages) == (0, 0, 0)
    uids = set(names.values())
    assert registry.names() == names
    assert registry._draining == {}
    assert registry._contents.keys() == uids
    assert not any(binding.requests for binding in registry._live.values())
    bound = [binding.uid for binding in registry._live.values()]
    for uid, content in registry._contents.items():
        assert content.claims == bound.count(uid)
    assert engine.adapters._cards.keys() == uids
    known = engine.on_engine_thread(
        lambda: (
            set(engine._planner._residency.uids()),
            set(engine.adapters._received),
            set(llm._executor._builder._adapter_pages),
            set(engine._planner._space.prefix._blocks),
        )
    )
    assert known[0] == known[1] == uids
    assert known[2] <= uids
    assert known[3] <= uids | {None}, "KV blocks outlive their adapter"
    assert llm._host._paths.keys() == uids
    assert llm._host._kept.keys() <= uids
    held_pages = stats.adapter_pages + stats.cached_pages
    assert stats.free_pages + held_pages == stats.total_pages
    assert len(engine._door._open_ids) == 0
    return stats
