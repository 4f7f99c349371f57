"""A device that loses what it holds: the planner starts everything over, once."""

import dataclasses

from planner_driver import Driver, Text, planner_of, request_of

from jchameleon.runtime.policy.events import DeviceLost


def run_with_losses(breaks):
    """Return a driver after a run with adapters, cached blocks, pins and losses."""
    driver = Driver(planner_of())
    driver.breaks = breaks
    for uid in ("a", "b", "c"):
        driver.register(uid, 4)
    driver.pin("c")
    text = Text(("a", ""), range(40), range(100, 112))
    for index in range(4):
        driver.arrive_text(f"text{index}", text)
        driver.arrive(request_of(f"base{index}", prompt_tokens=50, max_tokens=9))
        driver.arrive(request_of(f"b{index}", max_tokens=6, adapter_uid="b"))
    driver.drain(2000)
    return driver


def test_every_request_ends_with_all_its_tokens_however_often_the_device_is_lost():
    for period in (2, 3, 5, 7):
        driver = run_with_losses(lambda step, period=period: step % period == 1)
        assert set(driver.outcome.values()) == {"finished"}, f"{period=}"
        assert driver.produced == {
            name: request.max_tokens for name, request in driver.requests.items()
        }
        books = driver.planner.books()
        assert books.squashes > 0 and books.growth_squashes == 0


def test_lost_adapters_and_blocks_are_not_found_again_and_pinned_ones_return():
    driver = run_with_losses(lambda step: False)
    planner = driver.planner
    before = planner.books()
    assert before.resident_pages > 4 and before.cached_pages > 0
    driver.events.append(DeviceLost())
    driver.memory.clear()
    plan = driver.tick()
    assert set(plan.evicted) == {"a", "b", "c"}
    # Nothing runs, so only the pinned one has a reason to come back.
    assert [load.uid for load in plan.loads] == ["c"]
    books = planner.books()
    assert (books.resident_pages, books.cached_pages, books.loading_pages) == (0, 0, 4)
    driver.tick()
    assert planner.adapter_stats("c").state == "resident"


def test_loss_counts_against_no_limit_and_keeps_the_order_of_arrival():
    driver = Driver(planner_of())
    for name in ("old", "middle", "young"):
        driver.arrive(request_of(name, prompt_tokens=33, max_tokens=60))
    for _ in range(5):
        driver.tick()
    for _ in range(driver.config.max_squashes + 3):
        driver.events.append(DeviceLost())
        driver.memory.clear()
        plan = driver.tick()
        assert plan.admitted == ("old", "middle", "young")
        assert [name for name, _ in plan.squashed] == ["young", "middle", "old"]
    driver.drain(500)
    assert set(driver.outcome.values()) == {"finished"}


def test_copy_under_way_survives_the_loss():
    driver = Driver(planner_of())
    driver.register("a", 4)
    driver.load_steps = lambda uid: 3
    driver.arrive(request_of("r", adapter_uid="a"))
    [load] = driver.tick().loads
    driver.events.append(DeviceLost())
    plan = driver.tick()
    assert plan.loads == () and plan.evicted == () and plan.admitted == ("r",)
    driver.drain(50)
    assert driver.planner.resident_pages("a") == load.pages
    assert driver.planner.books().loads == 1


def test_step_that_failed_teaches_nothing_about_how_long_steps_take():
    driver = Driver(planner_of())
    driver.arrive(request_of("r", prompt_tokens=33, max_tokens=60))
    for _ in range(8):
        driver.tick()
    estimator = driver.planner._estimator

    def estimate():
        return estimator.step_s(prefill_tokens=32, decode_rows=1)

    before = estimate()
    [step] = driver.events
    driver.events = [DeviceLost(), dataclasses.replace(step, duration_s=1e6)]
    driver.memory.clear()
    driver.tick()
    assert estimate() == before
    driver.drain(80)


def test_request_that_ends_with_the_loss_is_not_started_again():
    driver = Driver(planner_of())
    for name in ("stays", "goes"):
        driver.arrive(request_of(name, max_tokens=20))
    driver.tick()
    driver.events.append(DeviceLost())
    driver.memory.clear()
    driver.cancel("goes")
    plan = driver.tick()
    assert [name for name, _ in plan.squashed] == ["stays"]
    driver.drain(60)
