"""Shortest job first: order of admission in a real planner."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_traffic import CONFIG as TRAFFIC_CONFIG
from plan_traffic import LooseEngine
from planner_driver import CONFIG, Driver, planner_of, request_of

from jchameleon.runtime.policy.events import Arrival, Cancel, StepDone
from jchameleon.runtime.policy.predictor import Oracle
from jchameleon.runtime.policy.request import Request
from jchameleon.runtime.policy.sjf import ShortestJobFirst

ONE_ROW = dataclasses.replace(CONFIG, max_running=1)


def sjf_planner(config=ONE_ROW, admission=None):
    return planner_of(
        config, admission=admission or ShortestJobFirst(), predictor=Oracle()
    )


def expecting(request_id, expected_tokens, **sizes):
    request = request_of(request_id, max_tokens=20, **sizes)
    return dataclasses.replace(request, expected_tokens=expected_tokens)


def admission_order(driver, most_steps=2000):
    """Run everything to its end and return ids in the order of admission."""
    order = []
    for _ in range(most_steps):
        order += driver.tick().admitted
        if len(driver.outcome) == len(driver.requests):
            return order
    raise AssertionError("not all requests ended")


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=12))
@settings(max_examples=30)
def test_requests_together_run_by_predicted_output_then_arrival(lengths):
    driver = Driver(sjf_planner())
    for index, expected in enumerate(lengths):
        # Prompts run against it: only the output counts.
        request = expecting(f"r{index}", expected, prompt_tokens=60 - 2 * index)
        driver.arrive(request, length=expected)
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    assert admission_order(driver) == [f"r{i}" for i in order]


def test_late_short_request_passes_those_that_wait_but_not_those_that_run():
    driver = Driver(sjf_planner())
    driver.arrive(expecting("first", 9))
    assert driver.tick().admitted == ("first",)
    driver.arrive(expecting("middle", 8))
    driver.tick()
    driver.arrive(expecting("late", 2))
    assert admission_order(driver) == ["late", "middle"]


def test_long_request_starves_while_shorter_ones_come():
    driver = Driver(sjf_planner())
    driver.arrive(expecting("running", 5), length=5)
    driver.tick()
    driver.arrive(expecting("long", 20))
    for step in range(200):
        driver.arrive(expecting(f"short{step}", 3), length=3)
        assert "long" not in driver.tick().admitted
    assert "long" not in driver.outcome


def test_head_that_does_not_fit_holds_the_rest():
    driver = Driver(sjf_planner(CONFIG))  # 32 pages of 16 tokens
    driver.arrive(expecting("runs", 10, prompt_tokens=300), length=10)  # 20 pages
    driver.tick()
    driver.arrive(expecting("large", 2, prompt_tokens=300))
    driver.arrive(expecting("small", 3, prompt_tokens=20))
    assert driver.tick().admitted == ()
    order = admission_order(driver)
    assert order == ["large", "small"]


def test_who_leaves_while_waiting_is_not_admitted_and_its_id_may_come_again():
    driver = Driver(sjf_planner())
    driver.arrive(expecting("running", 4), length=4)
    driver.tick()
    driver.arrive(expecting("gone", 1))
    driver.arrive(expecting("stays", 3), length=3)
    driver.tick()
    driver.cancel("gone")
    driver.tick()
    del driver.outcome["gone"], driver.requests["gone"]
    driver.arrive(expecting("gone", 9), length=9)
    assert admission_order(driver) == ["stays", "gone"]


def test_id_that_ends_and_comes_again_between_two_plans_is_the_new_request():
    planner = sjf_planner()

    def arrival(request_id, expected):
        return Arrival(expecting(request_id, expected))

    planner.plan(0.0, [arrival("running", 4)])
    planner.plan(0.0, [arrival("twice", 1), arrival("once", 3)])
    planner.plan(0.0, [Cancel("twice"), arrival("twice", 9)])
    end = StepDone(0.01, (("running", 1),), ("running",))
    assert planner.plan(0.0, [end]).admitted == ("once",)
    end = StepDone(0.01, (("once", 1),), ("once",))
    assert planner.plan(0.0, [end]).admitted == ("twice",)


class Watched(ShortestJobFirst):
    """Compare every call with a sort of the whole line."""

    def __init__(self):
        super().__init__()
        self.arrivals = {}
        self.num_admitted = 0
        self.num_back = 0
        self.num_held = 0

    def admit(self, view):
        for request in view.arrived:
            self.arrivals[request.request_id] = len(self.arrivals)
        expected = sorted(
            view.waiting,
            key=lambda r: (
                r.priority,
                view.predicted_tokens(r),
                self.arrivals[r.request_id],
            ),
        )
        before = view.num_running
        super().admit(view)
        admitted = list(view.running)[before:]
        assert admitted == expected[: len(admitted)]
        assert self._num_waiting == len(expected) - len(admitted)
        if len(admitted) < len(expected):
            assert not view.try_admit(expected[len(admitted)])
            self.num_held += view.num_running < view.capacity.max_running
        self.num_admitted += len(admitted)
        self.num_back += sum(view.squashes(request) > 0 for request in admitted)


@pytest.mark.parametrize("priorities", [(0,), (-7, 0, 0, 3)])
@pytest.mark.parametrize("kv_reserve", ["predicted", "max_tokens"])
def test_random_traffic_agrees_with_a_sort_of_the_line(kv_reserve, priorities):
    config = dataclasses.replace(TRAFFIC_CONFIG, kv_reserve=kv_reserve)
    admitted = back = held = 0
    for seed in range(6):
        policy = Watched()
        engine = LooseEngine(sjf_planner(config, policy), seed, priorities)
        for _ in range(400):
            engine.tick()
        admitted += policy.num_admitted
        back += policy.num_back
        held += policy.num_held
    assert admitted > 300 and held > 100
    assert back > 5 if kv_reserve == "predicted" else back == 0


def test_cancelled_long_requests_do_not_pile_up():
    policy = ShortestJobFirst()
    planner = sjf_planner(admission=policy)
    planner.plan(0.0, [Arrival(expecting("running", 20))])
    planner.plan(0.0, [Arrival(expecting("head", 1))])
    for turn in range(200):
        ids = [f"{turn}-{i}" for i in range(10)]
        planner.plan(0.0, [Arrival(expecting(i, 20)) for i in ids])
        planner.plan(0.0, [Cancel(i) for i in ids])
    assert len(policy._heap) < 100
    assert list(policy._entries) == ["running", "head"]


def test_expected_output_of_none_counts_as_its_limit():
    planner = sjf_planner()
    silent = Request(request_id="silent", prompt_tokens=1, max_tokens=7)
    events = [Arrival(silent), Arrival(expecting("longer", 8))]
    assert planner.plan(0.0, events).admitted == ("silent",)
