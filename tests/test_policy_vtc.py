"""Turns by adapter: order, what is charged, priorities, and how far apart they get."""

import dataclasses
import types
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_driver import CONFIG, Driver, planner_of, request_of

from jchameleon.errors import ConfigError
from jchameleon.runtime.policy import vtc
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
    assert not policy._turns._charged and not policy._turns._lines


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
    assert not policy._turns._lines and not policy._turns._in_line


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
    assert not policy._turns._lines
    assert not policy._turns._charged and not policy._turns._unpaid


class Plain:
    """The same rule without heaps: looks at everybody who waits, every time."""

    def __init__(self):
        self.counters, self.charged, self.unpaid = {}, {}, set()
        self.waiting, self.began, self.left_last = [], {}, 0.0

    def admit(self, view):
        for request in view.ended:
            self.charged.pop(request.request_id, None)
            self.leave(request)
        for request in view.running:
            produced = view.produced_tokens(request)
            more = produced - self.charged[request.request_id]
            self.charged[request.request_id] = produced
            self.counters[request.adapter_uid] += 2.0 * more
        who = {request.adapter_uid for request in self.waiting}
        least = min((self.counters[uid] for uid in who), default=self.left_last)
        for request in view.requeued:
            if request.request_id in self.charged:
                self.join(request, least)
                self.waiting.insert(0, self.waiting.pop())
        for request in view.arrived:
            self.charged[request.request_id] = 0
            self.unpaid.add(request.request_id)
            self.join(request, least)
        while self.waiting:
            request = min(
                self.waiting,
                key=lambda r: (
                    r.priority,
                    self.counters[r.adapter_uid],
                    self.began[r.priority, r.adapter_uid],
                ),
            )
            if not view.try_admit(request):
                return
            if request.request_id in self.unpaid:
                self.unpaid.remove(request.request_id)
                self.counters[request.adapter_uid] += request.prompt_tokens
            self.leave(request)

    def join(self, request, least):
        uid = request.adapter_uid
        if all(one.adapter_uid != uid for one in self.waiting):
            self.counters[uid] = max(self.counters.get(uid, 0.0), least)
        key = request.priority, uid
        if all((one.priority, one.adapter_uid) != key for one in self.waiting):
            self.began[key] = max(self.began.values(), default=0) + 1
        self.waiting.append(request)

    def leave(self, request):
        if request in self.waiting:
            self.waiting.remove(request)
            uid = request.adapter_uid
            if all(one.adapter_uid != uid for one in self.waiting):
                self.left_last = self.counters[uid]


@pytest.mark.parametrize("slack", [vtc._SLACK, -1])
@given(rng=st.randoms(use_true_random=False), adapters=st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_heaps_choose_as_a_look_at_everybody_does(slack, rng, adapters):
    with mock.patch.object(vtc, "_SLACK", slack):  # -1 sweeps all the time
        compare(rng, adapters)


def compare(rng, adapters):
    """Play the same events to both, ids that come again and adapters that go too."""
    policies = Vtc(), Plain()
    views = View(), View()
    waiting = []
    for tick in range(150):
        arrived = [
            dataclasses.replace(
                request_of(
                    f"r{3 * (tick % 20) + i}",
                    rng.randint(1, 30),
                    9,
                    adapter_uid=rng.choice([None, *map(str, range(adapters))]),
                ),
                priority=rng.choice([0, 0, 0, 1]),
            )
            for i in range(rng.choice([0, 0, 1, 3]))
        ]
        taken = {one.request_id for one in [*waiting, *views[0].running]}
        arrived = [one for one in arrived if one.request_id not in taken]
        running = list(views[0].running)
        ended = [one for one in running if rng.random() < 0.3]
        requeued = [one for one in running if rng.random() < 0.1 and one not in ended]
        ended += [one for one in waiting if rng.random() < 0.05]
        waiting = [one for one in waiting if one not in ended] + arrived + requeued
        for view in views:
            view.produced |= {one.request_id: tick for one in running}
            view.produced |= {one.request_id: 0 for one in arrived}
        started = [
            view.step(policy, arrived=arrived, ended=ended, requeued=requeued)
            for policy, view in zip(policies, views, strict=True)
        ]
        assert started[0] == started[1]
        waiting = [one for one in waiting if one.request_id not in started[0]]
        open_uids = {one.adapter_uid for one in [*waiting, *views[0].running]}
        gone = str(rng.randrange(adapters))
        if gone not in open_uids:
            policies[0].forget(gone)
            policies[1].counters.pop(gone, None)
        turns = policies[0]._turns
        assert sum(map(len, turns._lines.values())) == len(waiting)


def test_lines_that_come_and_go_while_nobody_starts_leave_nothing_behind():
    policy, view = Vtc(), View()
    view.step(policy, arrived=[request_of(f"r{i}", adapter_uid="a") for i in range(3)])
    for index in range(500):
        one = request_of(f"b{index}", adapter_uid=f"b{index}")
        assert view.step(policy, arrived=[one]) == []
        assert view.step(policy, ended=[one]) == []
    turns = policy._turns
    assert len(turns._lines) == len(turns._places) == len(turns._in_line) == 1
    assert len(turns._next) <= 2 * 2 + vtc._SLACK
    assert len(turns._least) <= 2 * 2 + vtc._SLACK


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
        if len(turns._in_line) < 3:
            break
        assert max(served.values()) - min(served.values()) <= bound
    assert len(driver.outcome) >= 10


@pytest.mark.parametrize("options", [{"prompt_weight": 0}, {"output_weight": -1}])
def test_weights_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match="must be a finite number above 0"):
        Vtc(**options)
