"""Chameleon under traffic: random on plain counters, and through the planner."""

import dataclasses
import random

import pytest
from admission_engine import Engine, request_of
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_driver import CONFIG, Driver, planner_of

from jchameleon.runtime.policy.chameleon import Chameleon
from jchameleon.runtime.policy.predictor import Oracle

SHARED = {"a": (8, 1), "b": (16, 3), "c": (64, 9), "d": (128, 20)}


def run_traffic(seed, *, max_overtaken, recharge=False, steps=80, **options):
    """Play random traffic, check bound and books; return (bypasses, squashes)."""
    rng = random.Random(seed)
    policy = Chameleon(max_overtaken=max_overtaken, recharge=recharge, **options)
    engine = Engine(
        pages=40,
        max_running=rng.choice([4, 50]),
        adapters=SHARED,
        run_s=lambda prompt, output, load: 0.02 * output + 0.01 * load,
    )
    bypasses = squashes = 0
    for step in range(steps):
        arrivals = []
        for i in range(rng.choice([0, 0, 1, 1, 4])):
            request_id = f"r{step}-{i}"
            prompt, output = rng.choice([(3, 2), (9, 30), (60, 10)])
            most = output * rng.choice([1, 5])
            adapter = rng.choice([None, *SHARED])
            arrivals.append(request_of(request_id, prompt, output, adapter, most))
            engine.left_s[request_id] = rng.choice([0.1, 1.0, 9.0])
        end = [request_id for request_id in engine.running_ids if rng.random() < 0.2]
        end += [
            request_id for request_id in engine.waiting_by_id if rng.random() < 0.02
        ]
        for request_id in engine.running_ids:
            squashed = engine.squash_counts.get(request_id, 0)
            if request_id not in end and rng.random() < 0.05:
                most = engine.running_by_id[request_id].max_tokens
                engine.outgrow(request_id, most)
            elif squashed < engine.max_squashes and rng.random() < 0.03:
                engine.requeue(request_id)
        engine.step(policy, *arrivals, end=end, now_s=engine.now_s + 0.4)
        bypasses += len(engine.passed)
        squashes += len(engine.squashed)

        assert max(engine.overtaken.values(), default=0) <= max_overtaken
        assert engine.num_running or not engine.waiting_by_id
        costs = sum(map(engine.cost, engine.running_by_id.values()))
        charges = sum(engine.charges[request_id] for request_id in engine.running_ids)
        used = sum(lane.used_tokens for lane in policy.lanes())
        assert used == (costs if recharge else charges)
    engine.step(policy, end=[*engine.waiting_by_id, *engine.running_ids])
    assert all((lane.waiting, lane.used_tokens) == (0, 0) for lane in policy.lanes())
    return bypasses, squashes


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    max_overtaken=st.sampled_from([0, 1, 3, 10]),
    recharge=st.booleans(),
    min_samples=st.integers(1, 10),
    first_refresh_s=st.sampled_from([0.0, 3.0]),
    refresh_s=st.sampled_from([0.4, 4.0, 1000.0]),
    window_requests=st.sampled_from([1, 20]),
    lanes=st.sampled_from(["kmeans", "elbow", "static"]),
)
def test_any_traffic_keeps_the_bound_and_the_books(**options):
    run_traffic(**options)


def test_random_traffic_has_bypasses_and_squashes():
    runs = [run_traffic(seed, max_overtaken=30, steps=200) for seed in range(8)]
    assert sum(bypasses for bypasses, _ in runs) > 20
    assert sum(squashes for _, squashes in runs) > 5


# Through the planner.


def planner_with(num_pages=34, max_running=8, **options):
    """A driver whose engine reserves for max_tokens and is told true lengths."""
    config = dataclasses.replace(CONFIG, num_pages=num_pages, max_running=max_running)
    planner = planner_of(config, admission=Chameleon(**options), predictor=Oracle())
    return Driver(planner)


def test_bypass_then_squash_through_the_planner_and_everyone_ends():
    driver = planner_with()
    driver.register("big", num_pages=20, rank=64)
    driver.register("tiny", num_pages=2)
    driver.arrive(request_of("warm", 20, 2, "tiny"))
    driver.drain(20)
    # 7 and 7 pages for what they may produce, though few tokens are expected.
    driver.arrive(request_of("hog1", 20, 40, most=92), length=92)
    driver.arrive(request_of("hog2", 20, 40, most=92), length=92)
    driver.arrive(request_of("head", 20, 5, "big"))
    driver.arrive(request_of("passer", 20, 12, "tiny"))
    plan = driver.tick()
    assert plan.admitted == ("hog1", "hog2", "passer")
    assert plan.bypasses == (("passer", "head"),)
    assert plan.hits == ("passer",)
    assert [(request_id, lane) for request_id, lane, _ in plan.lanes] == [
        ("hog1", 0),
        ("hog2", 0),
        ("passer", 0),
    ]
    for _ in range(4):
        driver.tick()
    streamed = driver.produced["passer"]
    assert 0 < streamed < 12
    # The head needs 22 of 32 pages, hog2 holds 7 and the passer 4 with its adapter.
    driver.arrive(request_of("late", 20, 150))
    driver.cancel("hog1")
    plan = driver.tick()
    assert plan.squashed == (("passer", "bypass"),)
    assert plan.admitted[0] == "head"
    assert plan.loads[0].uid == "big"
    driver.drain(300)
    assert driver.outcome.pop("hog1") == "cancelled"
    assert set(driver.outcome.values()) == {"finished"}
    assert driver.produced["passer"] == 12
    stats = driver.planner.books()
    assert (stats.bypasses, stats.squashes) == (1, 1)
    assert [lane.used_tokens for lane in stats.lanes] == [0]


@pytest.mark.parametrize("most", [2, 5])
def test_a_stream_of_small_requests_overtakes_large_ones_up_to_the_bound(most):
    driver = planner_with(
        num_pages=162, max_overtaken=most, min_samples=12, first_refresh_s=0.05
    )
    driver.register("big", num_pages=40, rank=128)
    overtaken = {}
    for step in range(400):
        for i in range(2):
            driver.arrive(request_of(f"small{step}-{i}", 20, 3))
        if step % 20 == 0:
            driver.arrive(request_of(f"large{step}", 100, 60, "big"))
        running = set(driver.outcome) | set(driver.admission_order)
        waiting = [
            request_id for request_id in driver.requests if request_id not in running
        ]
        for request_id in driver.tick().admitted:
            for older in waiting[: waiting.index(request_id)]:
                overtaken[older] = overtaken.get(older, 0) + 1
            waiting.remove(request_id)
    assert len(driver.planner.books().lanes) == 2
    assert max(overtaken.values()) == most
    driver.drain(4000)
    assert set(driver.outcome.values()) == {"finished"}
