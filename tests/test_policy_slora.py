"""S-LoRA's scheduler in a real planner: first come, first served, and early abort."""

import dataclasses

import pytest
from plan_traffic import CONFIG as TRAFFIC_CONFIG
from plan_traffic import LooseEngine
from planner_driver import CONFIG, planner_of

from jchameleon.errors import ConfigError
from jchameleon.runtime.policy.events import AdapterRegistered, Arrival, StepDone
from jchameleon.runtime.policy.predictor import Oracle
from jchameleon.runtime.policy.request import Request
from jchameleon.runtime.policy.slora import SLora


def rows(count):
    return dataclasses.replace(CONFIG, max_running=count)


def arrivals(*names, at_s=0.0, prompt_tokens=20):
    return [
        Arrival(
            Request(
                request_id=name,
                prompt_tokens=prompt_tokens,
                max_tokens=5,
                arrival_s=at_s,
            )
        )
        for name in names
    ]


def ended(*names):
    return StepDone(0.01, (), names)


def test_without_slo_order_is_arrival_and_nobody_is_rejected():
    planner = planner_of(rows(1), admission=SLora())
    assert planner.plan(0.0, arrivals("a", "b", "c")).admitted == ("a",)
    for previous, expected in (("a", "b"), ("b", "c")):
        plan = planner.plan(1e6, [ended(previous)])
        assert plan.admitted == (expected,)
        assert plan.failed == ()


def test_without_slo_head_that_does_not_fit_holds_the_rest():
    planner = planner_of(admission=SLora())  # 32 pages of 16 tokens
    planner.plan(0.0, arrivals("runs", prompt_tokens=300))
    events = arrivals("large", prompt_tokens=300) + arrivals("small")
    assert planner.plan(0.0, events).admitted == ()
    assert planner.plan(0.0, [ended("runs")]).admitted == ("large", "small")


def test_overload_is_served_newest_first_and_later_oldest_first():
    planner = planner_of(rows(2), admission=SLora(early_abort_slo_s=6.0))
    # queue 5: rate = int(0.7 * (5 - 0) + 0.3 * 1) = 3 >= batch = 1, newest first.
    plan = planner.plan(0.0, arrivals("a", "b", "c", "d", "e"))
    assert plan.admitted == ("e", "d")
    # No row is free: nothing happens. batch = int(0.7 * 2 + 0.3 * 1) = 1.
    assert planner.plan(0.1, []).admitted == ()
    # queue 3, and 3 were left: rate = int(0.7 * 0 + 0.3 * 3) = 0 < 1, oldest first.
    assert planner.plan(0.2, [ended("e")]).admitted == ("a",)
    # queue 2 + 3, 2 were left: rate = int(0.7 * 3 + 0) = 2 >= 1, newest first.
    plan = planner.plan(0.3, [ended("d"), *arrivals("f", "g", "h", at_s=0.3)])
    assert plan.admitted == ("h",)


def test_last_queue_is_what_the_last_admitting_call_left():
    planner = planner_of(rows(2), admission=SLora(early_abort_slo_s=6.0))
    # rate = int(0.7 * 2 + 0.3) = 1 >= 1: "large" first. batch 1, last_queue 1.
    events = arrivals("small", prompt_tokens=300) + arrivals("large", prompt_tokens=300)
    assert planner.plan(0.0, events).admitted == ("large",)
    # A row is free, but no pages. rate = int(0.7 * (2 - 1) + 0.3) = 1: newest first.
    # "tiny" fits: rate was right, and last_queue is 1 again.
    assert planner.plan(0.1, arrivals("tiny", at_s=0.1)).admitted == ("tiny",)
    # The row of "tiny" ends: rate = int(0.7 * (1 - 1) + 0.3) = 0, oldest; no pages.
    assert planner.plan(0.2, [ended("tiny")]).admitted == ()
    # Nobody was admitted, so last_queue stays 1: rate = int(0.7 * (2 - 1) + 0) = 0.
    assert planner.plan(0.3, arrivals("b", at_s=0.3)).admitted == ()
    # rate = int(0.7 * (3 - 1) + 0) = 1, newest first; a zero would hold the line.
    assert planner.plan(0.4, arrivals("c", at_s=0.4)).admitted == ("c",)


def test_batch_follows_what_calls_admitted():
    planner = planner_of(rows(8), admission=SLora(early_abort_slo_s=6.0))
    # rate 5 >= 1: all eight. batch = int(0.7 * 8 + 0.3 * 1) = 5, last_queue 0.
    names = "abcdefgh"
    plan = planner.plan(0.0, arrivals(*names, prompt_tokens=30))
    assert plan.admitted == tuple(reversed(names))
    # rate = int(0.7 * 4 + 0.3 * 5) = 4 < 5: oldest first.
    events = [ended(*names), *arrivals("i", "j", "k", "l", at_s=0.1)]
    assert planner.plan(0.1, events).admitted == ("i", "j", "k", "l")


@pytest.mark.parametrize(("now_s", "rejected"), [(5.49, False), (5.51, True)])
def test_wait_that_leaves_no_time_for_prefill_is_rejected(now_s, rejected):
    planner = planner_of(rows(1), admission=SLora(early_abort_slo_s=6.0))
    planner.plan(0.0, arrivals("a"))
    planner.plan(0.0, arrivals("old"))
    planner.plan(2.0, arrivals("young", at_s=2.0))
    plan = planner.plan(now_s, [ended("a")])
    if rejected:
        reason = "waited 5.510 s, too long for early_abort_slo_s=6"
        assert plan.failed == (("old", reason, "rejected"),)
        assert plan.admitted == ("young",)
        assert planner.books().waiting == 0
    else:
        assert plan.failed == ()
        assert planner.books().waiting == 1
    planner.check()


def test_all_overdue_are_rejected_in_arrival_order_and_forgotten():
    planner = planner_of(rows(1), admission=SLora(early_abort_slo_s=6.0))
    planner.plan(0.0, [AdapterRegistered("x", 8, 2), *arrivals("a")])
    planner.plan(0.0, arrivals("b", "c", "d"))
    plan = planner.plan(100.0, [ended("a"), *arrivals("e", at_s=100.0)])
    assert [request_id for request_id, *_ in plan.failed] == ["b", "c", "d"]
    assert plan.admitted == ("e",)
    # The ids are free again.
    plan = planner.plan(100.0, [ended("e"), *arrivals("b", at_s=100.0)])
    assert plan.admitted == ("b",)
    planner.check()


def test_waits_while_no_row_is_free_are_not_looked_at():
    planner = planner_of(rows(1), admission=SLora(early_abort_slo_s=6.0))
    planner.plan(0.0, arrivals("a", "b"))
    assert planner.plan(100.0, []).failed == ()
    assert len(planner.plan(100.0, [ended("b")]).failed) == 1


class Watched(SLora):
    """Compare every call with a plain reading of the rules over the whole line."""

    def __init__(self, slo_s):
        super().__init__(early_abort_slo_s=slo_s)
        self.slo_s = slo_s
        self.rate, self.batch, self.left = 1, 1, 0
        self.num_newest = self.num_oldest = self.num_rejected = self.num_back = 0

    def admit(self, view):
        before, line = view.num_running, list(view.waiting)
        back = [r for r in line if view.squashes(r)]
        super().admit(view)
        admitted = list(view.running)[before:]
        if before == view.capacity.max_running:
            assert not admitted and list(view.waiting) == line
            return
        self.rate = int(0.7 * (len(line) - self.left) + 0.3 * self.rate)
        fresh = [r for r in line if r not in back]
        late = [r for r in fresh if view.now_s - r.arrival_s + 0.5 >= self.slo_s]
        order = [r for r in fresh if r not in late]
        newest = self.rate >= self.batch
        order = back + (order[::-1] if newest else order)
        order.sort(key=lambda r: r.priority)
        assert admitted == order[: len(admitted)]
        left = [r for r in line if r not in admitted and r not in late]
        assert list(view.waiting) == left
        if len(admitted) < len(order):
            assert not view.try_admit(order[len(admitted)])
        if admitted:
            self.batch = max(1, int(0.7 * len(admitted) + 0.3 * self.batch))
            self.left = len(left)
        several = len(order) > 1 and bool(admitted)
        self.num_newest += several and newest
        self.num_oldest += several and not newest
        self.num_rejected += len(late)
        self.num_back += len([r for r in admitted if r in back])


@pytest.mark.parametrize("priorities", [(0,), (-7, 0, 0, 3)])
def test_random_traffic_agrees_with_a_reading_of_the_whole_line(priorities):
    # So small a pool that two squashed requests wait at a time.
    config = dataclasses.replace(TRAFFIC_CONFIG, kv_reserve="predicted", num_pages=40)
    newest = oldest = rejected = back = 0
    for seed in range(16):
        policy = Watched(slo_s=2.0 if seed % 2 else 6.0)
        planner = planner_of(config, admission=policy, predictor=Oracle())
        engine = LooseEngine(planner, seed, priorities)
        for _ in range(400):
            engine.tick()
            planner.check()
        newest += policy.num_newest
        oldest += policy.num_oldest
        rejected += policy.num_rejected
        back += policy.num_back
    assert min(newest, oldest, rejected, back) > 10, (newest, oldest, rejected, back)


@pytest.mark.parametrize("slo_s", [0.5, 0, -1.0, float("nan"), float("inf"), "6", True])
def test_slo_without_time_to_wait_is_refused(slo_s):
    with pytest.raises(ConfigError, match="early_abort_slo_s=.* must be above 0.5"):
        SLora(early_abort_slo_s=slo_s)
