"""Random runs of requests that begin alike, against sets and the content of pages.

`Driver` plays the device: it knows which KV entry lies where, and fails when a request
looks for one that is not there, overwritten or another's.
"""

import collections
import dataclasses
import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from planner_driver import CONFIG, Driver, Text

from jchameleon.runtime.policy.candidates import State
from jchameleon.runtime.policy.planner import Planner
from jchameleon.runtime.policy.prefix import released_pages
from jchameleon.runtime.policy.presets import build_policies, load_policy

ADAPTERS = {"a": 3, "b": 6, "bad": 4}
SALTS = (None, "salt")
# What prompts begin with; some of these begin alike themselves.
SYSTEMS = ((), (1,) * 9, (1,) * 9 + (2,) * 12, (1,) * 9 + (3,) * 30, (4,) * 17)


# Predicts too little for most.
LOW = {"name": "quantile", "quantile": 0.1, "min_samples": 2}


def answer(tokens):
    """Return the next token: the same for all who said the same."""
    return (7 * sum(tokens[-3:]) + len(tokens)) % 5


def text_of(space, prompt, length):
    tokens = list(prompt)
    for _ in range(length):
        tokens.append(answer(tokens))
    return Text(space, prompt, tokens[len(prompt) :])


@dataclasses.dataclass(frozen=True)
class Case:
    """A planner's limits: blocks smaller and larger than tiles, pools of any size."""

    preset: str
    predictor: dict
    block_tokens: int
    num_pages: int


def planner_of(case):
    policy = load_policy({"preset": case.preset, "predictor": case.predictor})
    config = dataclasses.replace(
        CONFIG,
        num_pages=case.num_pages,
        block_tokens=case.block_tokens,
        prefill_tile_tokens=8,
        max_batch_tokens=40,
        kv_reserve=policy.kv_reserve,
        max_squashes=policy.max_squashes,
    )
    return Planner(config, **build_policies(policy))


class Checked(Driver):
    """Checks every plan against the longest prefix that was cached."""

    def __init__(self, case):
        super().__init__(planner_of(case))
        self.case = case
        self.counts = collections.Counter()
        self.load_steps = lambda uid: ADAPTERS[uid] // 3
        self.fails = lambda uid: uid == "bad"
        for uid, pages in ADAPTERS.items():
            self.register(uid, pages)
        self.tick()

    def known(self):
        """Return uid -> keys of all blocks that are cached."""
        prefix = self.planner._space.prefix
        return {uid: prefix.keys(uid) for uid in (None, *ADAPTERS)}

    def tick(self):
        before = self.known()
        plan = super().tick()
        after = self.known()
        found = dict(plan.cached)
        for request_id in plan.admitted:
            if request_id not in self.texts:
                assert request_id not in found
                continue
            self.check_match(request_id, found.get(request_id, 0), before, after)
        self.counts.update(
            hits=len([r for r in plan.admitted if r in found]),
            late=len([r for r in found if r not in plan.admitted]),
            swapped=len(plan.swapped),
            squashed=len(plan.squashed),
            evicted=len(plan.evicted),
            again=len([r for r in found if self.squashes.get(r)]),
        )
        return plan

    def check_match(self, request_id, tokens, before, after):
        """Assert that a request found neither more nor less than was there."""
        text, block_tokens = self.texts[request_id], self.config.block_tokens
        blocks = tokens // block_tokens
        most = (self.to_prefill[request_id] - 1) // block_tokens
        uid = text.space[0]
        assert blocks <= most
        keys = [text.key(i, block_tokens) for i in range(self.keyed[request_id])]
        assert set(keys[:blocks]) <= after[uid]
        if blocks < min(most, len(keys)):
            # Blocks come before admission and go with it: this one was not there.
            assert keys[blocks] not in before[uid] & after[uid]


def used_pages(planner, rows):
    """Return the pages that `rows` use."""
    pages = set()
    for row in rows:
        pages.update(block.page for block in row.blocks)
        pages.update(planner._pool.pages_of(("kv", row.request.request_id)))
    return pages


def locked_pages(planner, rows):
    """Return how many pages nothing can free while `rows` run."""
    users = {row.adapter for row in rows}
    total = len(used_pages(planner, rows))
    for uid in planner._residency.uids():
        adapter = planner._residency.get(uid)
        if adapter.state is State.RESIDENT:
            busy = adapter in users or adapter.pinned
        elif adapter.state is State.PENDING:
            busy = adapter in users or adapter.pinned
        else:
            busy = adapter.state is State.LOADING
        total += adapter.num_pages * busy
    return total


def spare_pages(planner, row, without):
    """Return what is left with `row` when `without` are squashed, by counting pages."""
    config = planner.config
    rows = [other for other in planner._running.values() if other not in without]
    total = locked_pages(planner, rows)
    held = {block for other in rows for block in other.blocks}
    table = planner._space.prefix._blocks.get(row.request.adapter_uid, {})
    most = (row.request.prompt_tokens + row.produced_tokens - 1) // config.block_tokens
    blocks = []
    for key in row.keys[:most]:
        if key not in table:
            break
        blocks.append(table[key])
    total += len([block for block in blocks if block not in held])
    output = planner._reserved_tokens(row)
    total += config.kv_pages(row.request.prompt_tokens, output) - len(blocks)
    adapter = row.adapter
    if adapter is not None:
        mine = any(other.adapter is adapter for other in rows)
        counted = (
            adapter.state is State.LOADING
            or mine
            or (adapter.pinned and adapter.state is not State.ABSENT)
        )
        total += 0 if counted else adapter.num_pages
    for uid in planner._space._wanted:
        other = planner._residency.get(uid)
        if other.state is State.ABSENT and other is not adapter:
            total += other.num_pages
    return config.usable_pages - total


class Run(RuleBasedStateMachine):
    """Chats, alike and not, cancels, pins and forgotten adapters, in any order."""

    @initialize(
        preset=st.sampled_from(["chameleon", "fifo-lru", "gdsf", "s-lora"]),
        block_tokens=st.sampled_from([4, 16]),
        pages=st.integers(0, 60),
    )
    def start(self, preset, block_tokens, pages):
        least = 2 + 10 + 100 // block_tokens
        self.driver = Checked(
            Case(preset, {"name": "oracle"}, block_tokens, least + pages)
        )
        self.names = 0
        self.order = []
        # The planner's predictors all listen to the caller here, who may be wrong.
        self.expects = lambda most: 1 + hash((self.names, most)) % most

    def add(self, text, length, keys=True):
        driver, name = self.driver, f"r{self.names}"
        request = text.request(name, driver.config.block_tokens)
        pages = ADAPTERS.get(text.space[0], 0)
        if driver.planner.can_ever_fit(
            request.prompt_tokens, request.max_tokens, pages
        ):
            return
        self.names += 1
        self.order.append(name)
        expected = self.expects(request.max_tokens)
        if keys:
            driver.arrive_text(name, text, length=length, expected_tokens=expected)
        else:
            driver.arrive(
                dataclasses.replace(request, block_keys=(), expected_tokens=expected),
                length=length,
            )

    @rule(
        system=st.sampled_from(SYSTEMS),
        tail=st.lists(st.integers(0, 1), max_size=20),
        uid=st.sampled_from([None, None, *ADAPTERS]),
        salt=st.sampled_from(SALTS),
        length=st.integers(1, 24),
        unused=st.integers(0, 8),
        count=st.integers(1, 3),
        keys=st.sampled_from([True, True, True, False]),
    )
    def ask(self, system, tail, uid, salt, length, unused, count, keys):
        prompt = (*system, *tail) or (0,)
        for _ in range(count):
            self.add(text_of((uid, salt), prompt, length + unused), length, keys)

    @precondition(lambda self: self.driver.texts)
    @rule(data=st.data(), more=st.lists(st.integers(0, 4), min_size=1, max_size=9))
    def go_on(self, data, more):
        name = data.draw(st.sampled_from(sorted(self.driver.texts)))
        text = self.driver.texts[name]
        said = len(text.prompt) + self.driver.produced.get(name, 0)
        prompt = (*text.tokens[:said], *more)
        if len(prompt) < 80:
            self.add(text_of(text.space, prompt, 8), 8)

    @precondition(lambda self: self.driver.requests)
    @rule(data=st.data())
    def cancel(self, data):
        self.driver.cancel(data.draw(st.sampled_from(self.order)))

    @precondition(lambda self: self.driver.requests)
    @rule(data=st.data())
    def spoil(self, data):
        bad = data.draw(st.sampled_from(self.order))
        self.driver.spoils = lambda request_id: request_id == bad

    @rule(count=st.integers(1, 8))
    def steps(self, count):
        for _ in range(count):
            self.driver.tick()

    @rule(pinned=st.booleans())
    def pin(self, pinned):
        driver = self.driver
        driver.tick()
        if not pinned or driver.planner.why_not_pin("a", {}) is None:
            driver.pin("a", pinned)
            driver.tick()

    @rule(uid=st.sampled_from([None, *ADAPTERS]))
    def forget(self, uid):
        prefix = self.driver.planner._space.prefix
        known = len(prefix.keys(uid))
        assert prefix.forget(uid) == known
        assert not prefix.keys(uid)
        self.driver.planner.check()

    @rule(data=st.data())
    def count_pages(self, data):
        planner = self.driver.planner
        running = list(planner._running.values())
        without = [row for row in running if data.draw(st.booleans())]
        for row in list(planner._waiting.values())[:4]:
            spare = spare_pages(planner, row, without)
            kv_pages, missing = planner._missing_pages(row, without)
            assert missing == max(0, -spare)
            most = (row.known_tokens - 1) // planner.config.block_tokens
            found = planner._space.spare_pages(kv_pages, row, most, without)
            assert found == spare
        ends = data.draw(st.permutations(running))
        left = list(ends)
        for row, pages in zip(ends, released_pages(ends), strict=True):
            before = len(used_pages(planner, left))
            left.remove(row)
            assert pages == before - len(used_pages(planner, left))

    @invariant()
    def spare_is_what_nobody_locks(self):
        if hasattr(self, "driver"):
            planner = self.driver.planner
            locked = locked_pages(planner, planner._running.values())
            spare = planner.config.usable_pages - locked
            assert planner._space.can_free(spare)
            assert not planner._space.can_free(spare + 1)

    def teardown(self):
        if not hasattr(self, "driver"):
            return
        driver = self.driver
        driver.spoils = lambda request_id: False
        for uid in sorted(driver.pinned):
            driver.pin(uid, pinned=False)
        driver.drain(5_000)
        for name, outcome in driver.outcome.items():
            if outcome == "finished":
                assert driver.produced[name] == driver.lengths[name]
        books = driver.planner.books()
        assert books.kv_pages == books.running == books.waiting == 0
        assert books.prefix_hit_tokens <= books.prefix_queried_tokens


def test_any_run_shares_only_what_is_there_and_all_of_it():
    Run.TestCase.settings = settings(
        max_examples=300,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    Run.TestCase().runTest()


def crowded(preset, block_tokens, seed):
    """Return a driver after hundreds of steps of chats in a pool that is too small."""
    rng = random.Random(seed)
    driver = Checked(Case(preset, LOW, block_tokens, 2 + 14 + 160 // block_tokens))
    ended = []
    for _ in range(300):
        if rng.random() < 0.5:
            uid = rng.choice([None, None, "a", "a", "b", "bad"])
            space, prompt = (uid, rng.choice(SALTS)), rng.choice(SYSTEMS)
            if ended and rng.random() < 0.3:
                last = driver.texts[rng.choice(ended)]
                space, prompt = last.space, last.tokens[:60]
            prompt += tuple(rng.randrange(2) for _ in range(rng.randint(1, 9)))
            text = text_of(space, prompt, 50)
            for _ in range(rng.choice([1, 1, 1, 3])):
                name = f"r{len(driver.requests)}"
                # Few of them are long, and those outgrow what was predicted.
                length = rng.choice([2, 3, 4, 5, 50])
                driver.arrive_text(name, text, length=length)
                ended.append(name)
        driver.tick()
    driver.drain(20_000)
    return driver


@pytest.mark.parametrize("block_tokens", [4, 16])
def test_crowded_runs_reach_every_mechanism_and_replay(block_tokens):
    counts = collections.Counter()
    for preset, seed in (("chameleon", 0), ("adaptive", 1), ("s-lora", 2)):
        driver = crowded(preset, block_tokens, seed)
        counts += driver.counts
        books = driver.planner.books()
        counts["evicted_blocks"] += books.evicted_blocks
        assert books.prefix_hit_tokens >= sum(driver.cached.values())
        planner = planner_of(driver.case)
        for step, (events, plan) in enumerate(
            zip(driver.log, driver.plans, strict=True)
        ):
            assert planner.plan(step * 0.01, events) == plan, f"step {step} differs"
    for name in ("hits", "late", "swapped", "evicted", "evicted_blocks", "squashed"):
        assert counts[name] > 10, counts
    assert counts["again"] > 0, counts
