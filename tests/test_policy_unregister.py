"""Adapters that are unregistered: what they held is free, nothing remembers them."""

import dataclasses
import tracemalloc

import pytest
from counted import calls_of
from planner_driver import CONFIG, Driver, planner_of, request_of

from jchameleon.runtime.policy.chameleon import Chameleon
from jchameleon.runtime.policy.events import (
    AdapterPinned,
    AdapterRegistered,
    AdapterUnregistered,
    Arrival,
    Cancel,
    LoadDone,
    StepDone,
)
from jchameleon.runtime.policy.eviction import ChameleonScore, Gdsf
from jchameleon.runtime.policy.histogram import Histogram
from jchameleon.runtime.policy.planner import Planner
from jchameleon.runtime.policy.predictor import Quantile


def driver_of(**policies):
    return Driver(planner_of(**policies))


def run(driver, name, uid, **lengths):
    """Run one request to its end."""
    driver.arrive(request_of(name, adapter_uid=uid, **lengths))
    driver.drain(100)


def orders(driver):
    table = driver.planner._residency._adapters
    return {uid: adapter.order for uid, adapter in table.items()}


def test_resident_copy_is_evicted_and_its_pages_serve_the_same_plan():
    driver = driver_of()
    driver.register("a", 20)
    run(driver, "r", "a")
    driver.register("b", 30)  # of 32 pages
    driver.unregister("a")
    driver.arrive(request_of("next", adapter_uid="b"))
    plan = driver.tick()
    assert (plan.evicted, plan.forgotten) == (("a",), ("a",))
    assert plan.admitted == ("next",) and plan.loads[0].uid == "b"
    driver.drain(100)
    assert not driver.planner.knows("a")
    with pytest.raises(ValueError, match="'a' was never registered"):
        driver.planner.adapter_stats("a")


def test_absent_adapter_is_forgotten_at_once_and_takes_no_requests():
    driver = driver_of()
    driver.register("a", 3)
    driver.tick()
    driver.unregister("a")
    assert driver.tick().forgotten == ("a",)
    for event in (
        Arrival(request_of("r", adapter_uid="a")),
        AdapterUnregistered("a"),
        AdapterPinned("a", True),
    ):
        with pytest.raises(ValueError, match="'a' was never registered"):
            driver.planner.plan(1.0, [event])


@pytest.mark.parametrize("state", ["waits", "runs"])
def test_adapter_that_a_request_names_is_not_unregistered(state):
    config = dataclasses.replace(CONFIG, max_running=1)
    planner = planner_of(config)
    first = request_of("first", adapter_uid="a" if state == "runs" else None)
    events = [AdapterRegistered("a", 8, 3), Arrival(first)]
    if state == "waits":
        events.append(Arrival(request_of("second", adapter_uid="a")))
    planner.plan(0.0, events)
    counts = "1 running and 0" if state == "runs" else "0 running and 1"
    with pytest.raises(ValueError, match=f"'a' has {counts} waiting requests"):
        planner.plan(0.1, [AdapterUnregistered("a")])


def test_end_and_unregistration_in_one_plan_are_in_order():
    planner = planner_of(prefetch=Histogram(), predictor=Quantile())
    planner.plan(0.0, [AdapterRegistered("a", 8, 3)])
    planner.plan(0.1, [Arrival(request_of("r", adapter_uid="a"))])
    plan = planner.plan(0.2, [Cancel("r"), AdapterUnregistered("a")])
    assert plan.forgotten == ()  # its copy is under way
    assert planner.plan(0.3, [LoadDone("a")]).forgotten == ("a",)
    planner.check()


@pytest.mark.parametrize("fails", [False, True])
def test_copy_under_way_ends_before_the_adapter_is_forgotten(fails):
    driver = driver_of()
    driver.load_steps = lambda uid: 4
    driver.fails = lambda uid: fails
    driver.register("a", 3)
    driver.arrive(request_of("r", adapter_uid="a"))
    driver.tick()
    driver.cancel("r")
    driver.unregister("a")
    plans = [driver.tick() for _ in range(4)]
    assert [plan.forgotten for plan in plans] == [(), (), (), ("a",)]
    assert plans[-1].evicted == (() if fails else ("a",))
    books = driver.planner.books()
    assert books.free_pages == CONFIG.usable_pages
    assert books.loads == books.evictions + books.load_failures == 1


def test_leaving_adapter_takes_no_requests():
    driver = driver_of()
    driver.load_steps = lambda uid: 4
    driver.register("a", 3)
    driver.arrive(request_of("r", adapter_uid="a"))
    driver.tick()
    driver.cancel("r")
    driver.unregister("a")
    driver.tick()
    for event in (
        Arrival(request_of("s", adapter_uid="a")),
        AdapterPinned("a", True),
        AdapterUnregistered("a"),
    ):
        with pytest.raises(ValueError, match="'a' was unregistered"):
            driver.planner.plan(0.03, [event])


@pytest.mark.parametrize("state", ["loading", "resident"])
def test_registration_before_it_is_forgotten_keeps_copy_and_counters(state):
    driver = driver_of()
    driver.load_steps = lambda uid: 3
    driver.register("a", 3)
    driver.arrive(request_of("r", adapter_uid="a"))
    driver.tick()
    if state == "resident":
        driver.drain(100)
    else:
        driver.cancel("r")
    driver.unregister("a")
    if state == "loading":
        driver.tick()
    driver.register("a", 3)
    driver.arrive(request_of("again", adapter_uid="a"))
    driver.drain(100)
    stats = driver.planner.adapter_stats("a")
    assert (stats.loads, stats.evictions) == (1, 0)
    assert driver.outcome["again"] == "finished"
    assert all(plan.forgotten == () for plan in driver.plans)


def test_pinned_adapter_gives_up_pin_pages_and_place_in_line():
    driver = driver_of()
    driver.register("a", 20)
    driver.register("b", 10)
    driver.pin("a")
    driver.tick()
    driver.tick()
    assert "a" in driver.resident
    driver.unregister("a")
    plan = driver.tick()
    assert (plan.evicted, plan.forgotten) == (("a",), ("a",))
    assert driver.planner._residency.pinned_pages == 0
    # One that is pinned and has no room yet.
    driver.arrive(request_of("r", prompt_tokens=16 * 25))
    driver.tick()
    driver.pin("b")
    assert driver.tick().loads == ()
    driver.unregister("b")
    assert driver.tick().forgotten == ("b",)
    driver.drain(100)
    assert driver.planner.books().loads == 1


def test_pinned_copy_in_line_for_the_link_is_given_up():
    driver = driver_of(config=dataclasses.replace(CONFIG, max_loads_in_flight=1))
    driver.load_steps = lambda uid: 3
    driver.register("a", 4)
    driver.register("b", 4)
    driver.pin("a")
    driver.pin("b")
    driver.tick()
    assert driver.planner.adapter_stats("b").state == "pending"
    driver.unregister("b")
    assert driver.tick().forgotten == ("b",)
    for _ in range(4):
        driver.tick()
    assert driver.planner.books().loads == 1


def test_max_rank_follows_the_registered_adapters():
    driver = driver_of()
    ranks = {"a": 8, "b": 64, "c": 64, "d": 16}
    for uid, rank in ranks.items():
        driver.register(uid, 2, rank=rank)
    driver.tick()
    for gone in ("b", "a", "c", "d"):
        driver.unregister(gone)
        driver.tick()
        del ranks[gone]
        largest = max(ranks.values(), default=0)
        assert driver.planner._residency.max_rank == largest
        assert driver.planner._capacity.max_rank == largest


def test_sizes_are_measured_against_the_largest_that_is_left():
    driver = driver_of(admission=Chameleon())
    driver.register("small", 1, rank=8)
    driver.register("large", 8, rank=64)
    driver.arrive(request_of("r0", adapter_uid="small"))
    first = driver.tick()
    driver.drain(100)
    driver.unregister("large")
    driver.arrive(request_of("r1", adapter_uid="small"))
    second = driver.tick()
    assert first.lanes[0][2] == pytest.approx(1 / 8)
    assert second.lanes[0][2] == pytest.approx(1.0)


def test_order_of_the_gone_is_given_again_and_carries_no_counts():
    driver = driver_of(eviction=ChameleonScore())
    for uid in "abc":
        driver.register(uid, 2)
    for index in range(5):
        run(driver, f"r{index}", "b")
    assert driver.planner.adapter_stats("b").frequency == 5
    driver.unregister("b")
    driver.tick()
    driver.register("new", 2)
    driver.register("newer", 2)
    driver.tick()
    assert orders(driver) == {"a": 0, "new": 1, "c": 2, "newer": 3}
    assert driver.planner.adapter_stats("new").frequency == 0
    run(driver, "last", "new")
    stats = driver.planner.adapter_stats("new")
    assert (stats.frequency, stats.hits, stats.misses) == (1, 0, 1)


def cycle(planner, count, start=0):
    """Register, use and unregister adapters of ever new content."""
    now_s = start * 0.01
    for index in range(start, start + count):
        uid, name = f"uid-{index}", f"r{index}"
        events = [AdapterRegistered(uid, 8, 2)]
        if index % 10 == 0:
            events.append(Arrival(request_of(name, 4, 1, uid)))
        plan = planner.plan(now_s, events)
        if plan.loads:
            planner.plan(now_s, [LoadDone(uid)])
            planner.plan(now_s, [StepDone(0.001, ((name, 1),), (name,))])
        forgotten = planner.plan(now_s, [AdapterUnregistered(uid)]).forgotten
        assert forgotten == (uid,)
        now_s += 0.01


def test_hundred_thousand_registrations_leave_memory_as_it_was():
    planner = planner_of(
        admission=Chameleon(window_requests=64),
        eviction=Gdsf(),
        predictor=Quantile(),
        prefetch=Histogram(bin_s=0.05, bins=40, min_samples=3, min_cv=0.5),
    )
    tracemalloc.start()
    try:
        cycle(planner, 4_000)  # windows of the latest requests are full by now
        before_bytes, _ = tracemalloc.get_traced_memory()
        cycle(planner, 2_000, 4_000)
        after_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after_bytes - before_bytes < 2_000 * 4, "a few bytes for each would show"
    sizes = sizes_of(planner)
    cycle(planner, 94_000, 6_000)
    assert sizes_of(planner) == sizes
    planner.check()


def sizes_of(planner):
    """Return the length of all that is kept per adapter."""
    residency = planner._residency
    return {
        "adapters": len(residency._adapters),
        "orders": len(residency._free_orders),
        "ranks": len(residency._ranks),
        "leaving": len(residency.leaving),
        "window": residency._window.counts.size,
        "gdsf": planner._space._eviction._uses.size,
        "quantile": len(planner._predictor._by_adapter),
        "histogram": len(planner._prefetch._adapters),
        "windows": len(planner._prefetch._open),
        "agenda": len(planner._prefetch._agenda),
        "loads": len(planner._space._load_started_s),
        "wanted": len(planner._space._wanted),
    }


def test_one_more_adapter_costs_the_same_among_ten_and_ten_thousand():
    costs = {}
    for known in (10, 10_000):
        planner: Planner = planner_of()
        planner.plan(0.0, [AdapterRegistered(f"u{i}", 8, 2) for i in range(known)])
        events = ([AdapterRegistered("x", 8, 2)], [AdapterUnregistered("x")])
        for event in events:  # arrays have grown by now
            planner.plan(0.1, event)
        costs[known] = [
            calls_of(lambda event=event, plan=planner.plan: plan(0.2, event))[0]
            for event in events
        ]
    assert costs[10] == costs[10_000]
