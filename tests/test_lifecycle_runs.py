"""Random lives of adapters on a running engine: each request gets its own version.

Names are registered, replaced, pinned and unregistered in any order while requests are
accepted, run and are dropped, in a pool that holds two adapters or so.
"""

import collections
import dataclasses
import gc

import numpy as np
import pytest
from adapter_versions import PAGE_BYTES, check_books, write_version
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)

from jchameleon.errors import (
    AdapterBusyError,
    AdapterConflictError,
    CapacityError,
    UnknownAdapterError,
)
from jchameleon.llm import LLM
from jchameleon.sampling import SamplingParams

NAMES = ("a", "b", "c")
HOWS = ("once", "wait", "force", "force")  # to unregister
# 4 pages for each 8: the two largest together are more than may be pinned, so that
# refused pins are met in every run of this test.
RANKS = (8, 24, 40, 40)  # of the versions
SAMPLING = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
PROMPTS = [
    np.random.default_rng(seed).integers(0, 256, length).tolist()
    for seed, length in enumerate((3, 20, 50))
]
LIMITS = {"max_running": 4, "max_batch_tokens": 64, "max_model_len": 512}
POOL_PAGES = 38
TALLY = collections.Counter()


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("versions")
    return [
        write_version(root / f"v{number}", number, rank=rank)
        for number, rank in enumerate(RANKS)
    ]


@pytest.fixture(scope="module")
def expected(paths):
    """Tokens by (version, prompt), from engines that know one adapter each."""
    found = {}
    for version, path in enumerate(paths):
        with LLM("tiny", adapters={"only": path}, **LIMITS) as llm:
            for index, prompt in enumerate(PROMPTS):
                for number, name in ((version, "only"), (None, None)):
                    [output] = llm.generate([prompt], name, SAMPLING)
                    found[number, index] = output.token_ids
            assert llm.stats().evictions == llm.stats().squashes == 0
    assert len(set(found.values())) == len(found)
    return found


@pytest.fixture(scope="module")
def llm(paths):
    host_bytes = 3 * sum(path.stat().st_size for path in paths[0].iterdir())
    with LLM(
        "tiny",
        pool_bytes=POOL_PAGES * PAGE_BYTES,
        host_cache_bytes=host_bytes,  # a few; others come from disk again
        **LIMITS,
    ) as llm:
        yield llm


@dataclasses.dataclass(eq=False)
class Run:
    """A call of one request, its adapter as it was when the call was made."""

    stream: object
    name: str | None
    version: int | None
    prompt: int
    pins: int  # made by then
    tokens: tuple = ()
    started: bool = False
    forced: bool = False


class Lives(RuleBasedStateMachine):
    """A model of names, versions and requests beside the engine.

    What is drawn depends on no state: how far requests have come is a matter of time.
    """

    llm = expected = paths = None

    @initialize()
    def start(self):
        self.live = {}  # name -> version
        self.pinned = set()
        self.draining = set()  # names that may still drain
        self.runs = []
        self.pins = 0
        for version, name in enumerate(NAMES):
            self.register(name, version, False, False)

    def open_runs(self, name):
        return [run for run in self.runs if run.name == name and not run.forced]

    @rule(
        name=st.sampled_from(NAMES),
        version=st.integers(0, len(RANKS) - 1),
        replace=st.sampled_from([True, True, False]),
        pin=st.sampled_from([False, False, False, True]),
    )
    def register(self, name, version, replace, pin):
        old = self.live.get(name)
        try:
            info = self.llm.register_adapter(
                name, self.paths[version], replace=replace, pin=pin
            )
        except AdapterConflictError:
            assert old not in (None, version) and not replace
            TALLY["conflicts"] += 1
            return
        except CapacityError:
            assert pin or name in self.pinned
            TALLY["refused pins"] += 1
            return
        assert old in (None, version) or replace
        if old not in (None, version):
            self.draining.add(name)
            TALLY["replaced"] += 1
            TALLY["replaced in use"] += bool(self.open_runs(name))
        self.live[name] = version
        if pin:
            self.pinned.add(name)
        assert info.pinned == (name in self.pinned)
        self.pins += info.pinned

    @rule(name=st.sampled_from(NAMES), how=st.sampled_from(HOWS))
    def unregister(self, name, how):
        is_open = self.open_runs(name)
        if how == "wait" and is_open:
            how = "once"  # nobody would read them meanwhile
        known = name in self.live or name in self.draining
        was_live = name in self.live
        try:
            self.llm.unregister_adapter(
                name,
                timeout_s=0 if how == "once" else 60,
                force=how == "force",
            )
        except UnknownAdapterError:
            assert not was_live
            TALLY["unknown"] += not known
            self.draining.discard(name)
            return
        except AdapterBusyError:
            assert how == "once"
            self.draining.add(name)
            TALLY["busy"] += bool(is_open)
        else:
            assert known
            self.draining.discard(name)
            TALLY[how] += 1
            # What is left of them has ended, whether anybody has read it or not.
            for run in is_open:
                assert how == "force" or run.started
                run.forced = how == "force"
            TALLY["forced"] += how == "force" and bool(is_open)
        self.live.pop(name, None)
        self.pinned.discard(name)

    @rule(name=st.sampled_from(NAMES), pinned=st.booleans())
    def pin(self, name, pinned):
        call = self.llm.pin_adapter if pinned else self.llm.unpin_adapter
        try:
            call(name)
        except UnknownAdapterError:
            assert name not in self.live
        except CapacityError:
            assert pinned and name not in self.pinned
            TALLY["refused pins"] += 1
        else:
            assert name in self.live
            (self.pinned.add if pinned else self.pinned.discard)(name)
            self.pins += pinned
            TALLY["pins"] += pinned

    @rule(
        name=st.sampled_from([*NAMES, *NAMES, *NAMES, None]),
        prompt=st.integers(0, len(PROMPTS) - 1),
        begin=st.booleans(),
        more=st.sampled_from([0, 1, 2]),
    )
    def accept(self, name, prompt, begin, more):
        if name is not None and name not in self.live:
            with pytest.raises(UnknownAdapterError):
                self.llm.stream([PROMPTS[prompt]], name, SAMPLING)
            return
        try:
            stream = self.llm.stream([PROMPTS[prompt]], name, SAMPLING)
        except CapacityError:
            assert self.pinned
            return
        version = None if name is None else self.live[name]
        run = Run(stream, name, version, prompt, self.pins)
        self.runs.append(run)
        if begin:
            self.read(run, 1)
        if more:
            self.accept(name, prompt, not begin, more - 1)

    @rule(which=st.integers(0, 9), count=st.sampled_from([1, 5, 60]))
    def go_on(self, which, count):
        if self.runs:
            self.read(self.runs[which % len(self.runs)], count)

    def read(self, run, count):
        """Read some deltas; when the last is among them, check how it ended."""
        run.started = True
        for _ in range(count):
            delta = next(run.stream)
            run.tokens += delta.token_ids
            expected = self.expected[run.version, run.prompt]
            assert run.tokens == expected[: len(run.tokens)]
            if delta.finish_reason is not None:
                self.runs.remove(run)
                self.check_end(run, delta)
                return

    def check_end(self, run, delta):
        if delta.finish_reason == "aborted":
            assert (
                run.forced and delta.error == f"adapter {run.name!r} was unregistered"
            )
            TALLY["aborted"] += 1
        elif delta.finish_reason == "error":
            # Pins made between its acceptance and its arrival left it no room.
            assert "pages of pinned adapters" in delta.error and run.pins < self.pins
        else:
            assert delta.finish_reason == "length"
            assert run.tokens == self.expected[run.version, run.prompt]
            TALLY["whole"] += 1
            was_replaced = run.name and self.live.get(run.name) != run.version
            TALLY["whole on an old version"] += bool(was_replaced)
        assert list(run.stream) == []

    @rule(which=st.integers(0, 30), how=st.sampled_from(["close", "drop"]))
    def give_up(self, which, how):
        if which >= len(self.runs):
            return
        run = self.runs.pop(which)
        if how == "close":
            run.stream.close()
        else:
            del run
            gc.collect()

    @rule()
    def evict(self):
        """Ask for nearly the whole pool."""
        try:
            self.llm.generate(
                [[7] * 400], sampling=SamplingParams(max_tokens=1, ignore_eos=True)
            )
        except CapacityError:
            assert self.pinned

    @invariant()
    def books_balance(self):
        if not hasattr(self, "live"):
            return
        self.llm.engine.check()
        infos = self.llm.list_adapters()
        found = {info.name: info for info in infos if not info.draining}
        assert found.keys() == self.live.keys()
        assert {n for n, info in found.items() if info.pinned} == self.pinned
        uids = self.llm._registry.names()
        for name, version in self.live.items():
            same = [n for n in self.live if self.live[n] == version]
            assert {uids[n] for n in same} == {found[name].uid}
        waiting, in_engine = self.llm.engine.on_engine_thread(self.references)
        accepted = [run for run in self.runs if not run.started and not run.forced]
        assert waiting == collections.Counter(run.name for run in accepted if run.name)
        assert in_engine

    def references(self):
        """Return accepted requests by name, and whether all others are the engine's."""
        uses = [
            use
            for binding, _ in self.llm._registry.bindings()
            for use in binding.requests.values()
        ]
        waiting = [use.binding.name for use in uses if not use.submitted]
        live = self.llm.engine._live.items()
        mine = {i for i, one in live if one.submission.adapter_uid is not None}
        submitted = {use.request_id for use in uses if use.submitted}
        return collections.Counter(waiting), submitted == mine

    def teardown(self):
        if not hasattr(self, "live"):
            return
        for run in list(self.runs):
            self.read(run, 100)
        assert not self.runs
        for name in NAMES:
            try:
                self.llm.unregister_adapter(name, timeout_s=60)
            except UnknownAdapterError:
                assert name not in self.live
        stats = check_books(self.llm, {})
        assert stats.free_pages + stats.cached_pages == stats.total_pages
        assert (stats.host_bytes, stats.host_adapters) == (0, 0)


def test_any_order_of_lives_gives_every_request_its_own_version(llm, expected, paths):
    machine = type(
        "Machine", (Lives,), {"llm": llm, "expected": expected, "paths": paths}
    )
    machine.TestCase.settings = settings(
        max_examples=80,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    TALLY.clear()
    evictions = llm.stats().evictions
    machine.TestCase().runTest()
    print(TALLY)
    assert llm.stats().evictions > evictions + 50
    for what in (
        "conflicts",
        "refused pins",
        "pins",
        "replaced in use",
        "busy",
        "wait",
        "forced",
        "aborted",
        "whole",
        "whole on an old version",
    ):
        assert TALLY[what] > 0, f"{what} never happened"
