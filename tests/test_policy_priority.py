"""Priorities: a line against a sorted list, and who starts first under each policy."""

import bisect
import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_traffic import CONFIG as TRAFFIC_CONFIG
from plan_traffic import LooseEngine, record
from planner_driver import CONFIG, planner_of

from jchameleon.runtime.policy.admission import Fifo
from jchameleon.runtime.policy.chameleon import Chameleon
from jchameleon.runtime.policy.events import Arrival, Cancel, StepDone
from jchameleon.runtime.policy.lanes import Entry, Lane
from jchameleon.runtime.policy.line import PriorityLine
from jchameleon.runtime.policy.paced import Paced
from jchameleon.runtime.policy.predictor import Oracle
from jchameleon.runtime.policy.presets import policy_preset_names
from jchameleon.runtime.policy.replay import replay
from jchameleon.runtime.policy.request import Request
from jchameleon.runtime.policy.sjf import ShortestJobFirst
from jchameleon.runtime.policy.slora import SLora
from jchameleon.runtime.policy.vtc import Vtc

ONE_ROW = dataclasses.replace(CONFIG, max_running=1)
POLICIES = {
    "fifo": Fifo,
    "sjf": ShortestJobFirst,
    "s-lora": SLora,
    "s-lora-abort": lambda: SLora(early_abort_slo_s=6.0),
    "chameleon": Chameleon,
    "paced": Paced,
    "vtc": Vtc,
    "chameleon-in-order": lambda: Chameleon(max_overtaken=0),
}

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "first", "pop", "insert"]),
        st.integers(-2, 2),
        st.integers(0, 30),
    ),
    max_size=60,
)


@given(STEPS)
def test_line_agrees_with_a_list_for_each_priority(steps):
    line, lists = PriorityLine(), {}
    for action, priority, key in steps:
        own = lists.setdefault(priority, [])
        known = {k for keys in lists.values() for k in keys}
        if action == "pop":
            expected = f"item {key}" if key in known else None
            assert line.get(key) == expected
            assert line.pop(key) == expected
            for keys in lists.values():
                keys[:] = [k for k in keys if k != key]
        elif key in known:
            with pytest.raises(ValueError, match="waits already"):
                line.add(key, "twice", priority)
        elif action == "insert" and own == sorted(own):
            line.insert(key, f"item {key}", priority)
            bisect.insort(own, key)
        else:
            line.add(key, f"item {key}", priority, first=action == "first")
            own.insert(0 if action == "first" else len(own), key)
        order = list(itertools.chain(*(lists[p] for p in sorted(lists))))
        assert list(line) == order and len(line) == len(order)
        assert list(line.values()) == [f"item {k}" for k in order]
        assert all((k in line) == (k in order) for k in range(31))
        there = [p for p in sorted(lists) if lists[p]]
        assert line.first_priority == (there[0] if there else None)
        for p in range(-2, 3):
            ends = lists.get(p) or [None]
            for last, k in ((False, ends[0]), (True, ends[-1])):
                expected = None if k is None else f"item {k}"
                assert line.end_of(p, last=last) == expected


@given(st.permutations(range(12)), st.lists(st.integers(-1, 1), min_size=12))
def test_lane_is_sorted_by_priority_then_arrival(seqs, priorities):
    lane = Lane(upper_wrs=1.0, least_tokens=0.0)
    for seq in seqs:
        request = request_of(f"r{seq}", priorities[seq])
        lane.add(Entry(request, seq, chunks=1, adapter_pages=0))
    order = sorted(seqs, key=lambda seq: (priorities[seq], seq))
    assert lane.head().seq == order[0]
    assert [entry.seq for entry in lane.behind_head(20)] == order[1:]


def request_of(request_id, priority=0, prompt_tokens=20, max_tokens=5, **fields):
    return Request(
        request_id=request_id,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        expected_tokens=max_tokens,
        priority=priority,
        **fields,
    )


def ended(request_id):
    return StepDone(0.01, (), (request_id,))


def start_order(planner, requests):
    """Let one request run while the others arrive; return who starts after whom."""
    planner.plan(0.0, [Arrival(request_of("running"))])
    planner.plan(0.1, [Arrival(request) for request in requests])
    order, running = [], "running"
    while len(order) < len(requests):
        [running] = planner.plan(0.2, [ended(running)]).admitted
        planner.check()
        order.append(running)
    return order


@pytest.mark.parametrize("name", POLICIES)
def test_lower_priority_starts_first_and_equals_in_the_order_of_the_policy(name):
    planner = planner_of(ONE_ROW, admission=POLICIES[name](), predictor=Oracle())
    requests = [
        request_of("late", 1),
        request_of("normal", 0),
        request_of("normal too", 0),
        request_of("soon", -5),
        request_of("late too", 1),
        request_of("soon too", -5),
    ]
    order = start_order(planner, requests)
    assert [one.removesuffix(" too") for one in order] == [
        *["soon"] * 2,
        *["normal"] * 2,
        *["late"] * 2,
    ]
    if name != "s-lora-abort":  # newest first when overloaded
        assert order[::2] == ["soon", "normal", "late"]


def test_sjf_takes_the_shortest_of_the_most_urgent():
    planner = planner_of(ONE_ROW, admission=ShortestJobFirst(), predictor=Oracle())
    requests = [
        request_of("short", 1, max_tokens=1),
        request_of("long", 0, max_tokens=9),
        request_of("middle", 0, max_tokens=5),
    ]
    assert start_order(planner, requests) == ["middle", "long", "short"]


@pytest.mark.parametrize("name", POLICIES)
def test_urgent_request_that_comes_last_and_leaves_is_forgotten(name):
    planner = planner_of(ONE_ROW, admission=POLICIES[name](), predictor=Oracle())
    planner.plan(0.0, [Arrival(request_of("running"))])
    planner.plan(0.1, [Arrival(request_of("waits")), Arrival(request_of("soon", -9))])
    planner.plan(0.2, [Cancel("soon")])
    assert planner.plan(0.3, [ended("running")]).admitted == ("waits",)
    assert planner.books().waiting == 0


def test_squashed_request_comes_first_within_its_priority_only():
    config = dataclasses.replace(CONFIG, max_running=2)

    class SquashOnce(Fifo):
        def admit(self, view):
            running = {r.request_id: r for r in view.running}
            if (
                "back" in running
                and view.now_s > 1
                and not view.squashes(running["back"])
            ):
                assert view.squash(running["back"], "for the test")
                return
            super().admit(view)

    planner = planner_of(config, admission=SquashOnce(), predictor=Oracle())
    first = [request_of("stays"), request_of("back")]
    assert planner.plan(0.0, map_arrivals(first)).admitted == ("stays", "back")
    step = StepDone(0.01, (("stays", 1), ("back", 1)), ())
    planner.plan(0.1, [step, *map_arrivals([request_of("older")])])
    events = map_arrivals([request_of("soon", -1), request_of("late", 1)])
    plan = planner.plan(2.0, [StepDone(0.01, (("stays", 1), ("back", 1)), ()), *events])
    assert [request_id for request_id, _ in plan.squashed] == ["back"]
    order = list(planner.plan(2.1, []).admitted)
    while planner.books().waiting:
        order += planner.plan(2.2, [ended(order[-1])]).admitted
        planner.check()
    assert order == ["soon", "back", "older", "late"]


def map_arrivals(requests):
    return [Arrival(request) for request in requests]


class Watched(Chameleon):
    """Count, at each start, whom it overtakes, by looking at everyone who waits."""

    def __init__(self, max_overtaken):
        super().__init__(
            max_overtaken=max_overtaken,
            lanes="static",
            min_samples=5,
            first_refresh_s=0.5,
            refresh_s=5.0,
        )
        self.most = max_overtaken
        self.seqs = {}
        self.overtaken = {}
        self.num_full = self.num_urgent = 0

    def admit(self, view):
        for request in view.arrived:
            self.seqs[request.request_id] = len(self.seqs)
            self.overtaken[request.request_id] = 0
        super().admit(Spy(view, self))

    def started(self, request, waiting):
        first = min(other.priority for other in waiting)
        self.num_urgent += request.priority > first
        for other in waiting:
            younger = self.seqs[other.request_id] < self.seqs[request.request_id]
            passed = other.priority == request.priority and younger
            if other.priority == first < request.priority:
                passed = True
            if not passed:
                continue
            self.overtaken[other.request_id] += 1
            if other.priority == first:
                assert self.overtaken[other.request_id] <= self.most
                self.num_full += self.overtaken[other.request_id] == self.most


class Spy:
    def __init__(self, view, policy):
        self._view, self._policy = view, policy

    def __getattr__(self, name):
        return getattr(self._view, name)

    def try_admit(self, request, **reported):
        waiting = list(self._view.waiting)
        if not self._view.try_admit(request, **reported):
            return False
        self._policy.started(request, waiting)
        return True


def test_nobody_is_overtaken_too_often_while_no_more_urgent_request_waits():
    config = dataclasses.replace(TRAFFIC_CONFIG, kv_reserve="predicted")
    full = urgent = 0
    for seed in range(12):
        policy = Watched(max_overtaken=3)
        planner = planner_of(config, admission=policy, predictor=Oracle())
        engine = LooseEngine(planner, seed, priorities=(-1, 0, 0, 0, 2))
        for _ in range(300):
            engine.tick()
            planner.check()
        full += policy.num_full
        urgent += policy.num_urgent
        tallies = policy._tallies.values()
        assert sum(tally.waiting for tally in tallies) == planner.books().waiting
        assert sum(tally.members for tally in tallies) == (
            planner.books().waiting + planner.books().running
        )
    assert full > 10 and urgent > 30, (full, urgent)


@pytest.mark.parametrize("preset", policy_preset_names())
def test_replay_of_a_log_with_priorities_is_identical(preset, tmp_path):
    path = tmp_path / "plans.gz"
    record(path, preset, seed=5, priorities=(-3, 0, 0, 4))
    assert replay(path).first_difference is None
