"""Plans for adapters: which are loaded, hit, evicted and loaded ahead."""

import dataclasses

from planner_driver import CONFIG, Driver, QueueAhead, planner_of, request_of

from jchameleon.runtime.policy.plan import Load


def test_request_with_absent_adapter_loads_while_others_run():
    driver = Driver(planner_of())
    driver.load_steps = lambda uid: 3
    driver.register("a", num_pages=4)
    driver.arrive(request_of("slow", adapter_uid="a"))
    driver.arrive(request_of("base"))
    plan = driver.tick()
    assert plan.admitted == ("slow", "base")
    assert plan.loads == (Load("a", (4, 5, 6, 7)),)
    assert [chunk.request_id for chunk in plan.prefill] == ["base"]
    assert driver.tick().decode == ("base",)
    assert driver.tick().decode == ("base",)
    plan = driver.tick()
    assert [chunk.request_id for chunk in plan.prefill] == ["slow"]
    assert plan.decode == ("base",)
    assert driver.planner.resident_pages("a") == (4, 5, 6, 7)
    assert driver.planner.adapter_stats("a").misses == 1


def test_second_request_joins_a_load_and_third_hits():
    driver = Driver(planner_of())
    driver.load_steps = lambda uid: 2
    driver.register("a", num_pages=4)
    driver.arrive(request_of("first", adapter_uid="a"))
    assert len(driver.tick().loads) == 1
    driver.arrive(request_of("joins", adapter_uid="a"))
    plan = driver.tick()
    assert (plan.admitted, plan.loads, plan.hits) == (("joins",), (), ())
    driver.drain(20)
    driver.arrive(request_of("hit", adapter_uid="a"))
    plan = driver.tick()
    assert (plan.admitted, plan.loads, plan.hits) == (("hit",), (), ("hit",))
    stats = driver.planner.adapter_stats("a")
    assert (stats.hits, stats.misses, stats.loads) == (1, 2, 1)
    books = driver.planner.books()
    assert (books.hits, books.misses, books.loads) == (1, 2, 1)


def test_loads_in_flight_are_bounded_and_start_in_admission_order():
    driver = Driver(planner_of())
    for uid in "abcd":
        driver.register(uid, num_pages=2)
        driver.arrive(request_of(f"r{uid}", adapter_uid=uid))
    plan = driver.tick()
    assert plan.admitted == ("ra", "rb", "rc", "rd")
    assert [load.uid for load in plan.loads] == ["a", "b"]
    assert driver.planner.books().loading_pages == 8
    assert driver.planner.adapter_stats("c").state == "pending"
    assert [load.uid for load in driver.tick().loads] == ["c", "d"]
    driver.drain(20)


def test_eviction_takes_idle_adapters_lru_and_no_more_than_needed():
    driver = Driver(planner_of())
    for uid in "abc":
        driver.register(uid, num_pages=8)
        driver.arrive(request_of(f"first-{uid}", adapter_uid=uid))
        driver.drain(20)
    assert driver.tick().evicted == ()
    driver.arrive(request_of("again", adapter_uid="a"))
    driver.drain(20)  # now b is the oldest
    assert driver.planner.books().free_pages == 8
    driver.arrive(request_of("big", prompt_tokens=16 * 9, max_tokens=1))
    assert driver.tick().evicted == ("b",)
    driver.arrive(request_of("bb", adapter_uid="b"))
    plan = driver.tick()
    assert plan.evicted == ("c",)
    assert driver.planner.adapter_stats("c").evictions == 1
    driver.drain(20)


def test_adapter_of_queued_request_is_evicted_last():
    config = dataclasses.replace(CONFIG, max_running=2)
    driver = Driver(planner_of(config))
    for uid in "ab":
        driver.register(uid, num_pages=8)
        driver.arrive(request_of(f"first-{uid}", adapter_uid=uid))
        driver.drain(20)
    driver.tick()
    # a is older, but the last in line needs it and no row is left for it.
    driver.arrive(request_of("long", prompt_tokens=16 * 9, max_tokens=3))
    driver.arrive(request_of("longer", prompt_tokens=16 * 9, max_tokens=3))
    driver.arrive(request_of("needs-a", adapter_uid="a"))
    plan = driver.tick()
    assert plan.admitted == ("long", "longer")
    assert plan.evicted == ("b",)
    driver.drain(30)
    assert driver.planner.adapter_stats("a").hits == 1


def test_own_idle_adapter_is_not_evicted_to_make_room_for_its_request():
    driver = Driver(planner_of())
    for uid in "ab":
        driver.register(uid, num_pages=12)
        driver.arrive(request_of(f"first-{uid}", adapter_uid=uid))
        driver.drain(20)
    driver.tick()
    assert driver.planner.books().free_pages == 8
    driver.arrive(request_of("r", 16 * 10, max_tokens=1, adapter_uid="a"))
    plan = driver.tick()
    assert (plan.evicted, plan.hits) == (("b",), ("r",))
    driver.drain(20)


def test_head_that_cannot_fit_evicts_nothing_and_holds_the_line():
    driver = Driver(planner_of())
    driver.register("a", num_pages=8)
    driver.arrive(request_of("first", adapter_uid="a"))
    driver.drain(20)
    driver.arrive(request_of("long", prompt_tokens=16 * 16, max_tokens=1))
    driver.tick()
    # 8 pages are free and 8 idle; 17 are needed.
    driver.arrive(request_of("head", prompt_tokens=16 * 17, max_tokens=1))
    driver.arrive(request_of("small"))
    plan = driver.tick()
    assert (plan.admitted, plan.evicted) == ((), ())
    assert driver.planner.resident_pages("a") is not None
    driver.drain(40)
    assert set(driver.outcome.values()) == {"finished"}


def test_head_with_resident_adapter_in_need_of_exactly_all_pages_runs():
    driver = Driver(planner_of())
    driver.register("a", num_pages=8)
    driver.register("b", num_pages=9)
    for uid in "ab":
        driver.arrive(request_of(f"first-{uid}", adapter_uid=uid))
        driver.drain(20)
    driver.tick()
    driver.arrive(request_of("all", 16 * 24, max_tokens=1, adapter_uid="a"))
    assert driver.tick().evicted == ("b",)
    assert driver.planner.books().free_pages == 0
    driver.drain(20)


def test_cancel_while_adapter_loads_leaves_it_idle_resident():
    driver = Driver(planner_of())
    driver.load_steps = lambda uid: 3
    driver.register("a", num_pages=4)
    driver.arrive(request_of("r", adapter_uid="a"))
    driver.tick()
    driver.cancel("r")
    driver.tick()
    books = driver.planner.books()
    assert (books.kv_pages, books.loading_pages) == (0, 4)
    # Nothing may evict it on its way.
    driver.arrive(request_of("big", prompt_tokens=16 * 29, max_tokens=1))
    assert driver.tick().admitted == ()
    plan = driver.tick()
    assert (plan.admitted, plan.evicted) == (("big",), ("a",))


def test_failed_load_fails_its_requests_only_and_later_ones_try_again():
    driver = Driver(planner_of(dataclasses.replace(CONFIG, max_running=3)))
    driver.load_steps = lambda uid: 2
    driver.fails = lambda uid: uid == "bad"
    for uid in ("bad", "good"):
        driver.register(uid, num_pages=4)
    driver.arrive(request_of("b1", adapter_uid="bad"))
    driver.arrive(request_of("g", adapter_uid="good"))
    driver.arrive(request_of("base"))
    driver.arrive(request_of("b2", adapter_uid="bad"))
    driver.tick()
    driver.tick()
    plan = driver.tick()
    assert plan.failed == (
        ("b1", "disk is on fire", "adapter_io"),
        ("b2", "disk is on fire", "adapter_io"),
    )
    stats = driver.planner.adapter_stats("bad")
    assert (stats.state, stats.failures, stats.queued) == ("absent", 1, 0)
    driver.fails = lambda uid: False
    driver.arrive(request_of("b3", adapter_uid="bad"))
    driver.drain(20)
    assert driver.outcome["b3"] == driver.outcome["g"] == "finished"
    assert driver.outcome["base"] == "finished"
    books = driver.planner.books()
    assert (books.loads, books.load_failures) == (3, 1)


def test_adapter_registered_twice_keeps_its_state():
    driver = Driver(planner_of())
    driver.register("a", num_pages=4)
    driver.arrive(request_of("r", adapter_uid="a"))
    driver.drain(20)
    driver.register("a", num_pages=4)
    driver.tick()
    assert len(driver.planner.resident_pages("a")) == 4


def test_prefetch_uses_idle_link_and_free_pages_only():
    config = dataclasses.replace(CONFIG, max_running=1, max_loads_in_flight=3)
    driver = Driver(planner_of(config, prefetch=QueueAhead()))
    for uid, num_pages in (("a", 4), ("b", 27), ("c", 4), ("d", 4)):
        driver.register(uid, num_pages=num_pages)
        driver.arrive(request_of(f"r{uid}", adapter_uid=uid))
    plan = driver.tick()
    # ra's own load, then c: b is too large for what is free, and the last place on the
    # link is kept for whoever is admitted next.
    assert plan.admitted == ("ra",)
    assert [load.uid for load in plan.loads] == ["a", "c"]
    assert plan.evicted == ()
    assert [load.uid for load in driver.tick().loads] == ["d"]
    driver.drain(60)
    assert driver.planner.adapter_stats("c").misses <= 1
    assert set(driver.outcome.values()) == {"finished"}


class Insists:
    """Want one adapter, again and again."""

    def candidates(self, view):
        return ["a"]


def test_prefetch_that_failed_is_left_to_the_next_request():
    driver = Driver(planner_of(prefetch=Insists()))
    driver.register("a", 4)
    driver.fails = lambda uid: True
    plans = [driver.tick() for _ in range(5)]
    assert [len(plan.loads) for plan in plans] == [1, 0, 0, 0, 0]
    driver.fails = lambda uid: False
    driver.arrive(request_of("r", adapter_uid="a"))
    driver.drain(20)
    assert driver.outcome == {"r": "finished"} and "a" in driver.resident
