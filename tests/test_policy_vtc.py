"""Turns by adapter: order, what is charged, priorities, and how far apart they get."""

import dataclasses
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_driver import CONFIG, Driver, planner_of, request_of

from jchameleon.errors import ConfigError
from jchameleon.runtime.policy.vtc import Vtc

ONE_ROW = dataclasses.replace(CONFIG, max_running=1)


def driver_of(config=ONE_ROW, **options):
    """Return a driver with adapters a, b and c, and its policy."""
    policy = Vtc(**options)
    driver = Driver(planner_of(config, admission=policy))
    for uid in "abc":
        driver.register(uid, 2)
    driver.tick()
    return driver, policy


def arrive(driver, uid, first, count, **fields):
    for index in range(first, first + count):
        request = request_of(f"{uid}{index}", adapter_uid=uid, max_tokens=4)
        driver.arrive(dataclasses.replace(request, **fields), length=4)


def run(driver, total):
    """Tick until `total` requests have ended; return the order of their starts."""
    order = []
    while len(driver.outcome) < total:
        order += driver.tick().admitted
    return order


def test_adapter_that_was_served_less_goes_first():
    driver, _ = driver_of()
    arrive(driver, "a", 0, 6)
    assert driver.tick().admitted == ("a0",)
    arrive(driver, "b", 0, 3)
    assert run(driver, 9) == ["b0", "a1", "b1", "a2", "b2", "a3", "a4", "a5"]


def test_adapter_that_comes_back_has_saved_up_nothing():
    driver, _ = driver_of()
    arrive(driver, "a", 0, 8)
    run(driver, 4)
    # By what it was given alone, it could run four times before `a` does again.
    arrive(driver, "b", 0, 4)
    assert "bb" not in "".join(name[0] for name in run(driver, 12)[:6])


def test_line_that_ran_empty_does_not_put_the_next_one_ahead():
    driver, policy = driver_of()
    arrive(driver, "a", 0, 4)
    run(driver, 4)
    assert not policy._turns._in_line
    arrive(driver, "b", 0, 3)
    arrive(driver, "a", 4, 3)
    order = run(driver, 10)
    assert sorted(order[:2]) == ["a4", "b0"]


def test_prompts_and_outputs_are_charged_with_their_weights():
    driver, policy = driver_of(prompt_weight=0.5, output_weight=3.0)
    arrive(driver, "a", 0, 1)
    run(driver, 1)
    driver.tick()
    # 20 prompt tokens; the last of four output tokens is not seen any more.
    assert policy._turns._counters == {"a": 0.5 * 20 + 3.0 * 3}
    assert not policy._turns._charged and not policy._turns.lines


def test_lower_priorities_come_first_whatever_the_counters():
    driver, _ = driver_of()
    arrive(driver, "a", 0, 1)
    driver.tick()
    arrive(driver, "b", 0, 2, priority=1)
    arrive(driver, "a", 1, 2)
    arrive(driver, "a", 3, 1, priority=1)
    assert run(driver, 6) == ["a1", "a2", "b0", "b1", "a3"]


def test_who_leaves_the_line_is_gone_and_its_id_may_come_again():
    driver, policy = driver_of()
    arrive(driver, "a", 0, 1)
    driver.tick()
    arrive(driver, "b", 0, 2)
    driver.tick()
    driver.cancel("b0")
    driver.tick()
    del driver.outcome["b0"], driver.requests["b0"]
    arrive(driver, "b", 0, 1)
    assert run(driver, 3) == ["b1", "b0"]
    assert not policy._turns.lines and not policy._turns._in_line


def test_counter_of_an_unregistered_adapter_is_forgotten():
    driver, policy = driver_of()
    arrive(driver, "a", 0, 1)
    run(driver, 1)
    driver.unregister("a")
    for _ in range(3):
        driver.tick()
    assert policy._turns._counters == {}


class View:
    """An `AdmissionView` of two rows that is told what happened."""

    def __init__(self):
        self.capacity = types.SimpleNamespace(max_running=2)
        self.running, self.produced = [], {}

    @property
    def num_running(self):
        return len(self.running)

    def produced_tokens(self, request):
        return self.produced.get(request.request_id, 0)

    def try_admit(self, request):
        if self.num_running == 2:
            return False
        self.running.append(request)
        return True

    def step(self, policy, *, arrived=(), ended=(), requeued=()):
        self.arrived, self.ended, self.requeued = arrived, ended, requeued
        gone = [*ended, *requeued]
        self.running = [one for one in self.running if one not in gone]
        before = list(self.running)
        policy.admit(self)
        started = [one for one in self.running if one not in before]
        return [one.request_id for one in started]


def test_who_is_sent_back_comes_first_in_its_line_and_pays_its_prompt_once():
    policy, view = Vtc(), View()
    a = [request_of(f"a{i}", 20, 9, adapter_uid="a") for i in range(4)]
    b = request_of("b0", 500, 9, adapter_uid="b")
    assert view.step(policy, arrived=a[:2]) == ["a0", "a1"]
    assert view.step(policy, arrived=[*a[2:], b]) == []
    view.produced = {"a0": 3, "a1": 3}
    assert view.step(policy) == []
    assert policy._turns._counters == {"a": 52.0, "b": 40.0}
    # The youngest is named first, as by the planner; b0 was charged nothing so far.
    assert view.step(policy, requeued=[a[1], a[0]]) == ["b0", "a0"]
    assert policy._turns._counters == {"a": 52.0, "b": 540.0}
    assert view.step(policy, ended=[b]) == ["a1"]
    assert view.step(policy, ended=[a[0]]) == ["a2"]
    assert policy._turns._counters["a"] == 72.0
    # Sent back and gone since: it is in no line any more.
    assert view.step(policy, ended=[a[1]], requeued=[a[1]]) == ["a3"]
    view.step(policy, ended=[a[2], a[3]])
    assert not policy._turns.lines
    assert not policy._turns._charged and not policy._turns._unpaid


@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 20)), min_size=3, max_size=3
    ),
    rows=st.integers(1, 6),
)
@settings(max_examples=25, deadline=None)
def test_adapters_that_always_wait_are_served_much_the_same(sizes, rows):
    """Within twice what a batch of the largest requests is worth."""
    config = dataclasses.replace(CONFIG, max_running=rows)
    driver, policy = driver_of(config)
    served = dict.fromkeys("abc", 0.0)
    prompts = {}
    for uid, (prompt, output) in zip("abc", sizes, strict=True):
        for index in range(40):
            request = request_of(f"{uid}{index}", prompt, output, adapter_uid=uid)
            prompts[request.request_id] = prompt
            driver.arrive(request, length=output)
    bound = 2 * rows * max(prompt + 2.0 * output for prompt, output in sizes)
    turns = policy._turns
    while len(driver.outcome) < 60 and (len(driver.outcome) < 1 or turns._in_line):
        plan = driver.tick()
        for name in plan.admitted:
            served[name[0]] += prompts[name]
        # Whoever decodes produces a token in this step.
        for name in plan.decode:
            served[name[0]] += 2.0
        if len(policy._turns._in_line) < 3:
            break
        assert max(served.values()) - min(served.values()) <= bound
    assert len(driver.outcome) >= 10


@pytest.mark.parametrize("options", [{"prompt_weight": 0}, {"output_weight": -1}])
def test_weights_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match="must be a finite number above 0"):
        Vtc(**options)
