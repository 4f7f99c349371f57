"""An engine on the tiny model, faults to inject into it, and what must hold after."""

import collections
import types

import jax
import numpy as np
from random_adapters import write_random_adapter

from jchameleon.config import ModelConfig
from jchameleon.sampling import SamplingParams

TINY = ModelConfig.preset("tiny")
OPTIONS = {"max_running": 8, "max_batch_tokens": 96, "max_model_len": 256}
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED: injected"
MARK = 2**31 - 5
"""A seed: rows that draw with it are those that make steps fail."""


def write_adapters(root, count=3):
    """Write PEFT directories of random adapters; return them by name."""
    for index in range(count):
        targets = ("q", "k", "v", "o") if index % 2 else ("q", "v")
        write_random_adapter(
            root / f"a{index}",
            TINY,
            rank=(8, 17, 40)[index % 3],
            targets=targets,
            seed=index,
            dtype="float32",
        )
    return {f"a{index}": root / f"a{index}" for index in range(count)}


def varied(count, *, seed=0, max_tokens=14):
    """Return prompts, adapters and sampling of requests that use all there is.

    Greedy and drawn, edited logits, log-probabilities of output and prompt, prompts
    that begin alike and so share blocks of the prefix cache.
    """
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, 256, 40).tolist()
    prompts, adapters, sampling = [], [], []
    for index in range(count):
        own = rng.integers(0, 256, int(rng.integers(1, 60))).tolist()
        prompts.append(shared + own if index % 3 == 0 else own)
        adapters.append([None, "a0", "a1", "a2"][int(rng.integers(0, 4))])
        sampling.append(
            SamplingParams(
                max_tokens=int(rng.integers(max_tokens // 2, max_tokens + 1)),
                temperature=0.8 if index % 2 else 0.0,
                top_p=0.9 if index % 4 == 3 else 1.0,
                repetition_penalty=1.3 if index % 4 == 1 else 1.0,
                logprobs=2 if index % 3 == 1 else None,
                prompt_logprobs=1 if index % 5 == 2 else None,
                seed=index,
                ignore_eos=True,
            )
        )
    return prompts, adapters, sampling


def streamed(llm, batch):
    """Run a batch as a stream; return what each request sent, put together.

    Returns:
      per request: (token ids, text, finish reason, rounded log-probabilities).
    """
    pieces = collections.defaultdict(list)
    for delta in llm.stream(*batch):
        pieces[delta.index].append(delta)
    out = []
    for index in range(len(batch[0])):
        deltas = pieces[index]
        assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
        out.append(
            (
                tuple(token for d in deltas for token in d.token_ids),
                "".join(d.text for d in deltas),
                deltas[-1].finish_reason,
                tuple(map(_rounded, (one for d in deltas for one in d.logprobs or ()))),
                tuple(
                    map(_rounded, (p for d in deltas for p in d.prompt_logprobs or ()))
                ),
            )
        )
    return out


def _rounded(logprobs):
    # Recomputed in other steps, the last bits may differ.
    if logprobs is None:
        return None
    return tuple((token, round(value, 3)) for token, value in logprobs.items())


def check_baseline(llm):
    """Assert that an idle engine holds no request, lease, page or id too many."""
    engine = llm._engine
    engine.check()
    stats = llm.stats()
    assert (stats.running, stats.waiting, stats.kv_pages) == (0, 0, 0)
    kept = stats.adapter_pages + stats.cached_pages
    assert stats.free_pages + kept == stats.total_pages
    assert engine.heartbeat().open_requests == 0
    assert not engine._live and not engine._replies._undelivered
    assert engine._loads.waiters == 0
    assert all(info.requests == 0 for info in llm.list_adapters())
    placed = set(llm._executor._builder._adapter_pages)
    planner = engine._planner
    resident = {u for u in placed if planner.resident_pages(u) is not None}
    assert placed == resident, "executor and planner disagree about what is there"
    table = llm._executor.table
    assert table.free_places == llm._engine.max_running
    assert not table._edits and not table._logprobs


class BrokenSteps:
    """Makes steps of an executor fail after they ran, so that the pool is gone.

    Attributes:
      failures: steps that failed so far.
    """

    def __init__(self, executor, fails):
        """`fails(rows, prefill)` says whether a step is to fail.

        Rows have `sampling`, None or with the seed and the position.
        """
        self.failures = 0
        self._executor, self._fails = executor, fails
        self._runs = {True: executor._run_prefill, False: executor._run_decode}
        executor._run_prefill = lambda rows: self._broken_run(rows, rows, prefill=True)
        executor._run_decode = lambda rows: self._broken_run(
            rows, single_rows(rows), prefill=False
        )

    def _broken_run(self, rows, singles, *, prefill):
        pools = self._executor._pools
        found = self._runs[prefill](rows)
        if not self._fails(singles, prefill):
            return found
        self.failures += 1
        assert all(pool.is_deleted() for pool in pools), "nothing was donated"
        for pool in self._executor._pools:
            pool.delete()
        raise jax.errors.JaxRuntimeError(OUT_OF_MEMORY)

    def mend(self):
        self._executor._run_prefill = self._runs[True]
        self._executor._run_decode = self._runs[False]


def single_rows(rows):
    """Return what tests ask of each of `DecodeRows`."""
    fields = rows.sampling.fields
    return [
        types.SimpleNamespace(
            sampling=types.SimpleNamespace(seed=tuple(seed), position=position)
        )
        for seed, position in zip(
            fields["seed"].tolist(), fields["position"].tolist(), strict=True
        )
    ]


def is_marked(row):
    return row.sampling is not None and row.sampling.seed == (0, MARK)
