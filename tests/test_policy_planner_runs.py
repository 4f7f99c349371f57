"""Random runs on pools of any size: all end, books balance, replay is identical."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from planner_driver import Driver, QueueAhead, planner_of, request_of

from jchameleon.runtime.policy.planner import PlannerConfig


class FixedAdmission:
    """Try everyone in an order drawn from a seed: not fair, and never idle."""

    def __init__(self, seed):
        self.rng = random.Random(seed)

    def admit(self, view):
        waiting = list(view.waiting)
        self.rng.shuffle(waiting)
        for request in waiting:
            view.try_admit(request)


def random_run(seed, *, prefetch=False, shuffled=False):
    """Drive random traffic through a small pool to its end; return the driver."""
    rng = random.Random(seed)
    tile = rng.choice([1, 4, 32])
    max_running = rng.randint(1, 6)
    config = PlannerConfig(
        num_pages=rng.randint(8, 40),
        block_tokens=rng.choice([1, 4, 16]),
        max_running=max_running,
        max_batch_tokens=max_running + tile + rng.randint(0, 3 * tile),
        max_loads_in_flight=rng.randint(1, 3),
        prefill_tile_tokens=tile,
    )
    policies = {}
    if prefetch:
        policies["prefetch"] = QueueAhead()
    if shuffled:
        policies["admission"] = FixedAdmission(seed)
    driver = Driver(planner_of(config, **policies))
    driver.load_steps = lambda uid: rng.randint(1, 5)
    driver.fails = lambda uid: rng.random() < 0.15
    adapters = {f"a{i}": rng.randint(1, 8) for i in range(rng.randint(1, 6))}
    for uid, num_pages in adapters.items():
        driver.register(uid, num_pages)
    refused = 0
    for step in range(rng.randint(5, 60)):
        for i in range(rng.choice([0, 0, 1, 1, 2, 5])):
            uid = rng.choice([None, *adapters])
            prompt, limit = rng.randint(1, 120), rng.randint(1, 12)
            if driver.planner.can_ever_fit(prompt, limit, adapters.get(uid, 0)):
                refused += 1
                continue
            request = request_of(f"s{step}.{i}", prompt, limit, uid)
            driver.arrive(request, length=rng.randint(1, limit))
        if driver.requests and rng.random() < 0.2:
            driver.cancel(rng.choice(list(driver.requests)))
        driver.tick()
    # Each request takes at most its prompt in tiles, its tokens and its load's wait.
    driver.drain(20 + len(driver.requests) * (120 + 12 + 6))
    driver.tick()
    return driver


@given(seed=st.integers(0, 2**32), prefetch=st.booleans(), shuffled=st.booleans())
@settings(max_examples=120, deadline=None)
def test_every_accepted_request_ends_and_books_balance(seed, prefetch, shuffled):
    driver = random_run(seed, prefetch=prefetch, shuffled=shuffled)
    books = driver.planner.books()
    assert (books.waiting, books.running, books.kv_pages) == (0, 0, 0)
    for request_id, outcome in driver.outcome.items():
        if outcome == "finished":
            assert driver.produced[request_id] == driver.lengths[request_id]
    idle = books.resident_pages + books.loading_pages
    assert books.free_pages + idle + 2 == driver.config.num_pages


@given(seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_replay_of_events_gives_identical_plans(seed):
    driver = random_run(seed)
    plans = []
    for planner in (planner_of(driver.config), planner_of(driver.config)):
        plans.append(
            [planner.plan(i * 0.01, events) for i, events in enumerate(driver.log)]
        )
    assert plans[0] == plans[1]
    assert planner.books() == driver.planner.books()


def test_random_runs_reach_evictions_failures_and_hits():
    """The random traffic above is worth something only if it gets everywhere."""
    total = dict.fromkeys(("evictions", "load_failures", "hits", "misses"), 0)
    outcomes = set()
    for seed in range(20):
        driver = random_run(seed)
        outcomes |= set(driver.outcome.values())
        for field in total:
            total[field] += getattr(driver.planner.books(), field)
    assert min(total.values()) > 15, total
    assert outcomes == {"finished", "cancelled", "failed"}
