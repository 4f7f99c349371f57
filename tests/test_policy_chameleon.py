"""Chameleon's admission: an engine of plain counters, then the planner itself."""

import dataclasses
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_driver import CONFIG, Driver, planner_of

from jchameleon.errors import ConfigError
from jchameleon.runtime.policy.admission import Capacity
from jchameleon.runtime.policy.chameleon import Chameleon
from jchameleon.runtime.policy.predictor import Oracle
from jchameleon.runtime.policy.registry import create_policy
from jchameleon.runtime.policy.request import Request

BLOCK_TOKENS = 10


class Times:
    """Run times from a function of (prompt, output, pages to load)."""

    def __init__(self, run_s):
        self._run_s = run_s

    def run_s(self, *, prefill_tokens, output_tokens, load_pages=0, decode_rows=1):
        return self._run_s(prefill_tokens, output_tokens, load_pages)


class Engine:
    """An `AdmissionView` that lasts: pages, adapters and requests in plain books.

    Reserves for max_tokens, predicts expected_tokens, loads at once. `left_s` says when
    running requests are predicted to end. Counts how often each request is overtaken.
    """

    def __init__(self, pages=100, max_running=64, adapters=(), run_s=None):
        self.pages = pages
        self.max_running = max_running
        self.adapters = {"shared": (8, 1), **dict(adapters)}  # uid: (rank, pages)
        self.resident = []
        self.estimator = Times(run_s or (lambda prompt, output, load: 1.0))
        self.left_s = {}
        self.predicted = {}
        self.squash_counts = {}
        self.max_squashes = 2
        self.now_s = 0.0
        self.order = {}
        self.waiting_by_id = {}
        self.running_by_id = {}
        self.overtaken = {}
        self.charges = {}  # of running requests, as they were at their start
        self.admitted = []
        self.lane_of = {}
        self.passed = []
        self.squashed = []
        self.arrived, self.ended, self.requeued, self.outgrown = [], [], [], []

    def step(self, policy, *arrivals, end=(), now_s=None):
        """Let requests end and arrive, then admit; return the ids that started."""
        if now_s is not None:
            self.now_s = now_s
        for request_id in end:
            request = self.waiting_by_id.pop(request_id, None)
            self.ended.append(request or self.running_by_id.pop(request_id))
        for request in arrivals:
            self.arrived.append(request)
            self.waiting_by_id[request.request_id] = request
            self.order[request.request_id] = len(self.order)
            self.overtaken[request.request_id] = 0
        self.admitted, self.passed, self.squashed = [], [], []
        policy.admit(self)
        self.arrived, self.ended, self.requeued, self.outgrown = [], [], [], []
        self.check(policy)
        return self.admitted

    def requeue(self, request_id):
        """Squash a running request as the engine does when pages run out."""
        self.requeued.append(self.running_by_id[request_id])
        self._stop(self.running_by_id[request_id])

    def outgrow(self, request_id, predicted_tokens):
        self.predicted[request_id] = predicted_tokens
        self.outgrown.append(self.running_by_id[request_id])

    def check(self, policy):
        lanes = policy.lanes()
        total = self.capacity.pages * BLOCK_TOKENS
        assert sum(lane.quota_tokens for lane in lanes) == total
        assert sum(lane.waiting for lane in lanes) == len(self.waiting_by_id)
        assert sum(lane.running for lane in lanes) == len(self.running_by_id)
        uppers = [lane.upper_wrs for lane in lanes]
        assert uppers == sorted(uppers) and uppers[-1] == math.inf
        assert self._held(self.running_by_id.values()) <= self.pages

    def cost(self, request):
        return (
            request.prompt_tokens
            + self.predicted_tokens(request)
            + self.adapter_pages(request) * BLOCK_TOKENS
        )

    @property
    def capacity(self):
        max_rank = max((rank for rank, _ in self.adapters.values()), default=0)
        return Capacity(
            pages=self.pages,
            block_tokens=BLOCK_TOKENS,
            max_running=self.max_running,
            max_rank=max_rank,
        )

    @property
    def num_running(self):
        return len(self.running_by_id)

    def predicted_tokens(self, request):
        default = request.expected_tokens or request.max_tokens
        return self.predicted.get(request.request_id, default)

    def squashes(self, request):
        return self.squash_counts.get(request.request_id, 0)

    def adapter_pages(self, request):
        return self.adapters.get(request.adapter_uid, (0, 0))[1]

    def adapter_rank(self, request):
        return self.adapters.get(request.adapter_uid, (0, 0))[0]

    def adapter_absent(self, request):
        uid = request.adapter_uid
        return uid is not None and uid not in self.resident

    def missing_pages(self, request, without=()):
        assert request.request_id in self.waiting_by_id
        rest = [r for r in self.running_by_id.values() if r not in without]
        return max(0, self._held([*rest, request]) - self.pages)

    def wait_for_pages_s(self, pages):
        freed = 0
        for left_s, request_id in sorted((self.left_s[r], r) for r in self.running_ids):
            freed += self._kv_pages(self.running_by_id[request_id])
            if freed >= pages:
                return left_s
        return math.inf

    @property
    def running_ids(self):
        return list(self.running_by_id)

    def try_admit(self, request, *, lane, wrs, passing=None):
        request_id = request.request_id
        assert request_id in self.waiting_by_id, f"{request_id} does not wait"
        if len(self.running_by_id) >= self.max_running or self.missing_pages(request):
            return False
        del self.waiting_by_id[request_id]
        self.running_by_id[request_id] = request
        uid = request.adapter_uid
        if uid is not None and uid not in self.resident:
            self.resident.append(uid)
        self._evict_idle()
        self.charges[request_id] = self.cost(request)
        for other in self.waiting_by_id:
            if self.order[other] < self.order[request_id]:
                self.overtaken[other] += 1
        self.admitted.append(request_id)
        self.lane_of[request_id] = (lane, wrs)
        if passing is not None:
            assert passing.request_id in self.waiting_by_id
            self.passed.append((request_id, passing.request_id))
        return True

    def can_squash(self, request):
        assert request.request_id in self.running_by_id
        started_now = request.request_id in self.admitted
        return self.squashes(request) < self.max_squashes and not started_now

    def squash(self, request, reason):
        assert reason
        if not self.can_squash(request):
            return False
        self.squashed.append(request.request_id)
        self._stop(request)
        return True

    def _stop(self, request):
        request_id = request.request_id
        self.squash_counts[request_id] = self.squashes(request) + 1
        self.waiting_by_id[request_id] = self.running_by_id.pop(request_id)

    def _evict_idle(self):
        """Drop the adapters loaded first until the rest fits."""
        running = list(self.running_by_id.values())
        used = {request.adapter_uid for request in running}
        for uid in [uid for uid in self.resident if uid not in used]:
            idle = sum(self.adapters[u][1] for u in self.resident if u not in used)
            if self._held(running) + idle > self.pages:
                self.resident.remove(uid)

    def _kv_pages(self, request):
        return -(-(request.prompt_tokens + request.max_tokens) // BLOCK_TOKENS)

    def _held(self, requests):
        """Pages that requests hold, with their adapters; all others can be evicted."""
        uids = {request.adapter_uid for request in requests} - {None}
        adapters = sum(self.adapters[uid][1] for uid in uids)
        return adapters + sum(map(self._kv_pages, requests))


def request_of(request_id, prompt, output, adapter=None, most=None):
    return Request(
        request_id=request_id,
        prompt_tokens=prompt,
        max_tokens=most or output,
        adapter_uid=adapter,
        expected_tokens=output,
    )


def small(request_id):
    return request_of(request_id, 5, 5, "shared")


def medium(request_id):
    return request_of(request_id, 10, 10, "shared")


def large(request_id):
    return request_of(request_id, 20, 20, "shared")


def books(policy):
    return [(lane.waiting, lane.running, lane.used_tokens) for lane in policy.lanes()]


def quotas(policy):
    return [lane.quota_tokens for lane in policy.lanes()]


def three_lanes(**options):
    """A policy with lanes for small, medium and large requests.

    They cost 20, 30 and 50 tokens, run for 3, 2 and 1 s and came equally often, so the
    quotas are as 60 : 60 : 50; the total is 170. The adapter of a page that they share
    is charged to each, so tokens are scarcer than pages.
    """
    policy = Chameleon(min_samples=3, first_refresh_s=1.0, refresh_s=1000.0, **options)
    engine = Engine(pages=17, run_s=time_of_prompt)
    engine.step(policy, small("s"), medium("m"), large("l"))
    engine.step(policy, end=["s", "m", "l"], now_s=1.0)
    return policy, engine


def time_of_prompt(prompt, output, load):
    return {5: 3.0, 10: 2.0, 20: 1.0}[prompt]


# Figure 10: lanes, quotas, the pot.


def test_lanes_are_cut_between_the_sizes_and_share_the_tokens():
    policy, _ = three_lanes()
    # Sizes 0.25, 0.5 and 1: all of one rank.
    assert [lane.upper_wrs for lane in policy.lanes()] == [0.375, 0.75, math.inf]
    assert quotas(policy) == [60, 60, 50]


def test_a_size_on_a_cut_off_belongs_below_it():
    policy, engine = three_lanes()
    engine.step(policy, request_of("x", 15, 15))
    assert engine.lane_of["x"] == (1, 0.75)


def test_figure_10_a_every_lane_uses_its_own_quota():
    policy, engine = three_lanes()
    arrivals = [large("l1"), medium("m1"), medium("m2")]
    arrivals += [small(f"s{i}") for i in range(1, 5)]
    admitted = engine.step(policy, *arrivals)
    assert admitted == ["s1", "s2", "s3", "m1", "m2", "l1"]
    assert books(policy) == [(1, 3, 60), (0, 2, 60), (0, 1, 50)]
    assert engine.lane_of["s1"] == (0, 0.25)
    assert engine.lane_of["m2"] == (1, 0.5)
    assert engine.lane_of["l1"] == (2, 1.0)
    # What a medium one gives back is spare, for nobody of its lane waits.
    assert engine.step(policy, end=["m1"]) == ["s4"]


def lent(*others):
    """Figure 10 b: medium leaves 30 tokens, of which the fourth small one takes 20."""
    policy, engine = three_lanes()
    smalls = [small(f"s{i}") for i in range(1, 5)]
    admitted = engine.step(policy, large("l1"), *others, medium("m1"), *smalls)
    return policy, engine, admitted


def test_figure_10_b_what_a_lane_leaves_goes_to_small_then_not_to_large():
    policy, _, admitted = lent(large("l2"))
    # Phase 1 in each lane, then s4; the 10 left do not suffice for l2.
    assert admitted == ["s1", "s2", "s3", "m1", "l1", "s4"]
    assert books(policy) == [(0, 4, 80), (0, 1, 30), (1, 1, 50)]


def test_an_overdraft_lessens_the_pot_until_it_is_paid_back():
    policy, engine, _ = lent()
    assert engine.step(policy, small("s5")) == []  # needs 20 of 30 - 20
    assert books(policy)[0] == (1, 4, 80)
    # Medium leaves 60: two more, then 60 are lent.
    assert engine.step(policy, small("s6"), small("s7"), end=["m1"]) == ["s5", "s6"]
    assert books(policy) == [(1, 6, 120), (0, 0, 0), (0, 1, 50)]
    assert engine.step(policy, end=["s1"]) == ["s7"]
    # Large has 50 of its own again, and the pot nothing for a second one.
    assert engine.step(policy, large("l2"), large("l3"), end=["l1"]) == ["l2"]


def test_an_overdraft_lessens_what_other_lanes_may_borrow():
    policy, engine, _ = lent()
    engine.adapters["wide"] = (8, 3)
    # Costs 70: the 50 of its lane, and the pot has 30 less the 20 lent to small.
    wide = request_of("wide", 20, 20, "wide")
    assert engine.step(policy, small("s5"), wide, end=["l1"]) == []
    assert engine.step(policy, end=["s1"]) == ["s5"]
    assert engine.step(policy, end=["s2"]) == ["wide"]


def test_nobody_starts_beyond_the_rows():
    policy, engine = three_lanes()
    engine.max_running = 2
    assert engine.step(policy, large("l1"), small("s1"), small("s2")) == ["s1", "s2"]
    assert engine.step(policy, small("s3")) == []
    assert engine.step(policy, end=["s1"]) == ["s3"]


# Costs and quotas.


def test_an_adapter_is_charged_to_each_request_that_uses_it():
    policy = Chameleon()
    engine = Engine(adapters={"a": (16, 3)})
    engine.step(policy, request_of("x", 7, 4, "a"), request_of("y", 5, 2, "a"))
    assert books(policy) == [(0, 2, 11 + 30 + 7 + 30)]
    engine.step(policy, end=["x"])
    assert books(policy) == [(0, 1, 37)]
    engine.step(policy, end=["y"])
    assert books(policy) == [(0, 0, 0)]


def test_quotas_follow_worked_minima():
    policy = Chameleon(min_samples=1, first_refresh_s=3.0, slo_s=5.0, max_lanes=2)
    times = {5: 0.5, 6: 1.5, 20: 0.5}
    engine = Engine(pages=762, run_s=lambda prompt, *_: times[prompt])
    for second in range(3):
        arrivals = [small(f"s{second}"), large(f"l{second}")]
        arrivals.append(request_of(f"t{second}", 6, 5, "shared"))
        engine.step(policy, *arrivals, now_s=second)
    engine.step(policy, now_s=3.0)
    # 21 * 1.0 * (1/5 + 6/3) = 46.2 and 50 * 0.5 * (1/5 + 3/3) = 30.
    assert quotas(policy) == [4620, 3000]


def test_service_time_includes_the_load_of_the_adapter():
    policy = Chameleon(min_samples=1, first_refresh_s=1.0)
    engine = Engine(
        pages=60, adapters={"a": (8, 2)}, run_s=lambda prompt, output, load: 1.0 + load
    )
    engine.step(policy, request_of("x", 10, 10, "a"), small("y"))
    engine.step(policy, now_s=1.0)
    # 20 * 2 and 40 * 3, with the same arrivals.
    assert quotas(policy) == [150, 450]


def test_quotas_follow_the_pages_at_once():
    policy, engine = three_lanes()
    engine.pages = 34
    engine.step(policy)
    assert quotas(policy) == [120, 120, 100]


def test_a_static_lane_without_traffic_owns_nothing():
    policy = Chameleon(lanes="static", max_lanes=4, min_samples=3, first_refresh_s=1.0)
    engine = Engine(pages=126, adapters={"a": (32, 1)})
    engine.step(policy, small("s"), medium("m"), request_of("l", 20, 20, "a"))
    engine.step(policy, now_s=1.0)
    # Sizes 0.25 / 4, 0.5 / 4 and 1.
    assert [lane.upper_wrs for lane in policy.lanes()] == [0.25, 0.5, 0.75, math.inf]
    assert books(policy) == [(0, 2, 50), (0, 0, 0), (0, 0, 0), (0, 1, 50)]
    # 30 * 1 * (1/5 + 2) and 50 * 1 * (1/5 + 1).
    assert quotas(policy) == [660, 0, 0, 600]


def test_elbow_makes_one_lane_of_equal_requests_and_two_of_two_kinds():
    for prompts, lanes in (((50,), 1), ((50, 51), 2), ((5, 6, 50, 51), 2)):
        policy = Chameleon(lanes="elbow", first_refresh_s=1.0)
        engine = Engine(pages=1000)
        arrivals = [
            request_of(f"r{i}", prompts[i % len(prompts)], 9) for i in range(40)
        ]
        engine.step(policy, *arrivals)
        engine.step(policy, now_s=1.0)
        assert len(policy.lanes()) == lanes


# Refreshes.


def test_one_lane_owns_everything_until_there_are_samples():
    policy = Chameleon(min_samples=3, first_refresh_s=10.0)
    engine = Engine(pages=50)
    engine.step(policy, small("a"), large("b"), now_s=100.0)
    engine.step(policy, now_s=1000.0)
    assert quotas(policy) == [500]
    engine.step(policy, medium("c"))
    assert len(policy.lanes()) == 3


def test_lanes_are_cut_at_the_first_time_and_then_at_intervals():
    policy = Chameleon(min_samples=3, first_refresh_s=10.0, refresh_s=20.0)
    engine = Engine(pages=50)
    engine.step(policy, now_s=90.0)
    engine.step(policy, small("a"), large("b"), medium("c"), now_s=100.0)
    engine.step(policy, now_s=109.9)
    assert quotas(policy) == [500]
    engine.step(policy, now_s=110.0)
    assert len(policy.lanes()) == 3
    engine.step(policy, request_of("d", 15, 15), now_s=129.9)
    assert len(policy.lanes()) == 3
    engine.step(policy, now_s=130.0)
    assert len(policy.lanes()) == 4


def test_a_refresh_moves_waiting_requests_and_the_charges_of_running_ones():
    policy = Chameleon(min_samples=6, first_refresh_s=1.0, refresh_s=1000.0)
    engine = Engine(pages=17, run_s=time_of_prompt)
    arrivals = [small("s"), medium("m"), large("l"), large("l2"), large("l3")]
    assert engine.step(policy, *arrivals, small("s2")) == ["s", "m", "l", "l2"]
    assert books(policy) == [(2, 4, 150)]
    assert engine.step(policy, now_s=1.0) == ["s2"]
    assert books(policy) == [(0, 2, 40), (0, 1, 30), (1, 2, 100)]
    # 60 * 2.2, 60 * 1.2 and 50 * 3.2 of 364; 170 in all.
    assert quotas(policy) == [62, 33, 75]
    # 25 of its own, 22 and 3 of the others.
    assert engine.step(policy, end=["l"]) == ["l3"]
    engine.step(policy, end=["s", "m", "s2", "l2", "l3"])
    assert books(policy) == [(0, 0, 0)] * 3


def test_only_the_latest_requests_shape_the_lanes():
    policy = Chameleon(min_samples=3, window_requests=2, first_refresh_s=1.0)
    engine = Engine()
    engine.step(policy, small("a"))
    engine.step(policy, medium("b"), large("c"), now_s=1.0)
    # The small one runs still, and is charged where its size belongs.
    assert [lane.upper_wrs for lane in policy.lanes()] == [0.75, math.inf]
    assert books(policy) == [(0, 2, 50), (0, 1, 50)]


def test_sizes_are_measured_against_the_largest_of_today():
    policy = Chameleon(min_samples=1, first_refresh_s=1.0)
    engine = Engine(adapters={"a": (8, 1)})
    engine.step(policy, request_of("x", 10, 10, "a"))
    assert engine.lane_of["x"] == (0, 1.0)
    engine.adapters["b"] = (64, 8)  # registered later
    engine.step(policy, request_of("y", 20, 40, "b"), now_s=1.0)
    # x is now (0.4 * 10/20 + 0.6 * 10/40) * 8/64.
    assert policy.lanes()[0].upper_wrs == pytest.approx((0.35 / 8 + 1.0) / 2)


# Progress: the idle engine, and the bound.


def test_a_request_dearer_than_all_quotas_runs_on_an_idle_engine():
    policy = Chameleon()
    engine = Engine(pages=10)
    # Predicted to take more tokens than the pages hold, as rounding may make it.
    engine.predicted["big"] = 100
    assert engine.step(policy, small("s")) == ["s"]
    assert engine.step(policy, request_of("big", 1, 50), small("t")) == []
    assert engine.step(policy, end=["s"]) == ["big"]
    assert books(policy) == [(1, 1, 101)]
    assert engine.step(policy) == []  # t: nothing is left
    assert engine.step(policy, end=["big"]) == ["t"]


def test_a_request_dearer_than_its_lane_waits_for_an_idle_engine():
    policy, engine = three_lanes()
    engine.predicted["x"] = 85
    assert engine.step(policy, request_of("x", 90, 80), small("s1")) == ["s1"]
    assert engine.step(policy, small("s2"), end=["s1"]) == ["s2"]
    assert engine.step(policy, end=["s2"]) == ["x"]
    assert books(policy)[2] == (0, 1, 175)


def held_up(**options):
    """9 pages are free, but large2 and wide have no tokens, nor does the pot.

    Wide is of medium size and costs 100 with its adapter. It keeps the 30 tokens left
    of its lane from the pot, to which the small lane gives 40.
    """
    policy, engine = three_lanes(**options)
    engine.adapters["wide"] = (8, 8)
    wide = request_of("wide", 10, 10, "wide")
    arrivals = [small("s"), large("large1"), medium("medium"), large("large2"), wide]
    engine.step(policy, *arrivals)
    return policy, engine


def test_a_lane_with_waiting_requests_lends_nothing():
    policy, engine = held_up()
    assert engine.running_ids == ["s", "medium", "large1"]
    assert engine.step(policy) == []
    assert books(policy) == [(0, 1, 20), (1, 1, 30), (1, 1, 50)]
    assert engine.step(policy, end=["wide"]) == ["large2"]


@pytest.mark.parametrize("most", [0, 1, 7])
def test_the_oldest_is_overtaken_as_often_as_the_bound_allows_and_no_more(most):
    policy, engine = held_up(max_overtaken=most)
    for i in range(20):
        admitted = engine.step(policy, small(f"s{i}"))
        if f"s{i}" not in admitted:
            break
        assert admitted == [f"s{i}"] if i < most - 1 else [f"s{i}", "large2"]
        engine.step(policy, end=[f"s{i}"])
    assert i == engine.overtaken["large2"] == engine.overtaken["wide"] == most
    # It went beyond the quota of its lane; wide, overdue too, lacks pages.
    assert books(policy) == [(1, 1, 20), (1, 1, 30), (0, 2, 100)]


def test_nobody_starts_while_one_overdue_does_not_fit():
    policy, engine = held_up(max_overtaken=1)
    assert engine.step(policy, small("s1")) == ["s1", "large2"]
    # Wide has been overtaken once and lacks pages; s2 would fit.
    assert engine.step(policy, small("s2"), end=["s1"]) == []
    assert engine.step(policy, end=["large1"]) == []
    assert engine.step(policy, end=["medium"]) == ["wide", "s2"]


def test_cancelled_requests_leave_line_and_charges():
    policy, engine = three_lanes()
    engine.step(policy, *[large(f"l{i}") for i in range(4)], small("s"))
    assert books(policy) == [(0, 1, 20), (0, 0, 0), (1, 3, 150)]
    assert engine.step(policy, end=["l3", "l2"]) == []
    assert books(policy) == [(0, 1, 20), (0, 0, 0), (0, 2, 100)]


def test_an_id_may_come_again_with_the_end_of_the_first():
    policy = Chameleon(max_overtaken=0)
    engine = Engine(pages=5)
    engine.step(policy, large("x"), small("y"))
    assert engine.step(policy, small("x"), end=["x"]) == ["y", "x"]
    assert books(policy) == [(0, 2, 40)]


# Squashes by the engine, and outgrown predictions.


def test_who_is_requeued_returns_its_charge_and_gets_its_place_back():
    policy, engine = three_lanes()
    smalls = [small(f"s{i}") for i in range(5)]
    engine.step(policy, *smalls, medium("m1"), medium("m2"), large("l1"))
    assert books(policy) == [(2, 3, 60), (0, 2, 60), (0, 1, 50)]
    engine.requeue("s1")
    assert engine.step(policy) == ["s1"]  # before s3
    assert books(policy)[0] == (2, 3, 60)
    engine.requeue("s2")
    engine.requeue("s0")
    assert engine.step(policy, end=["s1"]) == ["s0", "s2", "s3"]


def test_who_is_requeued_and_cancelled_is_gone():
    policy = Chameleon()
    engine = Engine()
    engine.step(policy, small("a"))
    engine.outgrow("a", 9)
    engine.requeue("a")
    engine.step(policy, end=["a"])
    assert books(policy) == [(0, 0, 0)]


def test_outgrown_prediction_moves_the_charge_up_only_if_asked():
    for recharge, after in (
        (False, [(0, 1, 20), (0, 0, 0), (0, 0, 0)]),
        (True, [(0, 0, 0), (0, 1, 25), (0, 0, 0)]),
    ):
        policy, engine = three_lanes(recharge=recharge)
        engine.step(policy, small("a"))
        engine.outgrow("a", 10)
        engine.step(policy)
        assert books(policy) == after
    for predicted in (20, 40):  # no lane is above the last
        engine.outgrow("a", predicted)
        engine.step(policy)
    assert books(policy) == [(0, 0, 0), (0, 0, 0), (0, 1, 55)]
    engine.step(policy, end=["a"])
    assert books(policy) == [(0, 0, 0)] * 3


# Bypass and squash. Pages are reserved for max_tokens, so they are scarcer than tokens.

ADAPTERS = {"big": (64, 12), "tiny": (8, 1), "mid": (16, 3)}


def blocked_head(run_s=5.0, resident=("tiny",), **options):
    """20 pages: hogs hold 6 and 4, tiny 1; head lacks 3 for its absent adapter."""
    policy = Chameleon(**options)
    engine = Engine(pages=20, adapters=ADAPTERS, run_s=lambda *_: run_s)
    engine.resident = list(resident)
    engine.left_s = {"hog1": 10.0, "hog2": 20.0}
    hogs = [request_of("hog1", 5, 1, most=55), request_of("hog2", 5, 1, most=35)]
    head = request_of("head", 5, 1, "big")
    assert engine.step(policy, *hogs, head) == ["hog1", "hog2"]
    return policy, engine


def passer(request_id, adapter="tiny", most=30):
    return request_of(request_id, 5, 1, adapter, most=most)


def test_a_short_request_with_a_resident_adapter_passes_a_head_without_room():
    policy, engine = blocked_head()
    assert engine.missing_pages(engine.waiting_by_id["head"]) == 3
    assert engine.step(policy, passer("r2")) == ["r2"]
    assert engine.passed == [("r2", "head")]


def test_a_small_absent_adapter_may_pass_too_and_its_load_counts():
    policy, engine = blocked_head(resident=())
    loads = []
    engine.estimator = Times(lambda prompt, output, load: loads.append(load) or 5.0)
    assert engine.step(policy, passer("r2", "mid")) == ["r2"]
    assert loads == [3]


@pytest.mark.parametrize(("run_s", "passes"), [(9.9, True), (10.0, False)])
def test_nobody_passes_who_would_still_run_when_the_head_could_start(run_s, passes):
    policy, engine = blocked_head(run_s=run_s)
    # The 3 pages are free when the first hog ends, in 10 s.
    assert engine.step(policy, passer("r2")) == (["r2"] if passes else [])


def test_nobody_passes_when_bypass_is_off():
    policy, engine = blocked_head(bypass=False)
    assert engine.step(policy, passer("r2")) == []


def test_nobody_passes_a_head_that_lacks_pages_for_its_tokens_alone():
    policy, engine = blocked_head(resident=("tiny",))
    engine.step(policy, end=["head"])
    engine.step(policy, passer("long", "tiny", most=120), passer("r2"))
    assert engine.running_ids == ["hog1", "hog2"]


def test_nobody_passes_a_head_that_lacks_tokens():
    policy, engine = blocked_head()
    engine.predicted["head2"] = 100
    engine.step(policy, end=["head"])
    head2 = request_of("head2", 1, 1, "big")
    assert engine.step(policy, head2, passer("r2")) == []


def test_nobody_passes_without_tokens_or_pages_of_its_own():
    policy, engine = blocked_head()
    engine.predicted["dear"] = 500
    assert engine.step(policy, passer("dear"), passer("wide", most=115)) == []
    # Those behind them may.
    assert engine.step(policy, passer("r2")) == ["r2"]


def test_nobody_passes_twice_after_a_squash():
    policy, engine = blocked_head()
    engine.squash_counts["r2"] = 1
    assert engine.step(policy, passer("r2")) == []


def test_a_bypass_looks_at_eight_requests_behind_the_head():
    policy, engine = blocked_head()
    wide = [passer(f"w{i}", most=115) for i in range(8)]
    assert engine.step(policy, *wide, passer("r2")) == []
    assert engine.step(policy, end=["w3"]) == ["r2"]


def test_several_pass_while_the_test_holds():
    policy, engine = blocked_head()
    engine.left_s |= {"r2": 5.0, "r3": 5.0, "r4": 5.0}
    assert engine.step(policy, *[passer(f"r{i}", most=5) for i in (2, 3, 4)]) == [
        "r2",
        "r3",
        "r4",
    ]
    # With 4, 5 and 6 pages short the first hog is still who decides.
    assert [pair[1] for pair in engine.passed] == ["head"] * 3


def test_who_passes_changes_the_wait_for_those_behind():
    policy, engine = blocked_head()
    times = {5: 5.0, 6: 15.0}
    engine.estimator = Times(lambda prompt, output, load: times[prompt])
    engine.left_s |= {"r2": 30.0, "r3": 30.0}
    long = request_of("r3", 6, 1, "tiny")
    # Without the pages of r2, which runs for long after all, 8 are short: the second
    # hog decides, in 20 s.
    assert engine.step(policy, passer("r2"), long) == ["r2", "r3"]


def test_a_head_overtaken_too_often_is_not_passed():
    policy, engine = blocked_head(max_overtaken=1)
    engine.left_s["r2"] = 5.0
    assert engine.step(policy, passer("r2", most=5), passer("r3", most=5)) == ["r2"]
    assert engine.step(policy, passer("r4", most=5)) == []
    assert engine.overtaken["head"] == 1


def test_a_request_of_another_lane_is_no_bypass():
    policy, engine = blocked_head(min_samples=4, first_refresh_s=1.0)
    engine.step(policy, passer("r2"), now_s=1.0)
    assert engine.passed == []
    assert "r2" in engine.running_ids


def test_who_passed_is_squashed_when_its_pages_let_the_head_run():
    policy, engine = blocked_head()
    engine.left_s["r2"] = 5.0
    engine.step(policy, passer("r2"), passer("after", most=120))
    # hog1 ends early. The head lacks 2 pages; r2 holds 4 and its adapter 1.
    assert engine.step(policy, end=["hog1"]) == ["head"]
    assert engine.squashed == ["r2"]
    assert books(policy) == [(2, 2, 6 + 126)]
    # It waits where it was: before all that arrived later, and passes nobody again.
    assert engine.step(policy, passer("r3", most=5)) == []
    assert engine.step(policy, end=["hog2"]) == ["r2"]


def test_nobody_is_squashed_when_it_would_not_be_enough():
    policy, engine = blocked_head()
    engine.left_s["r2"] = 5.0
    engine.step(policy, passer("r2"))
    # hog2 ends, and the head lacks 4 of the 5 pages of r2 ...
    engine.pages -= 2  # ... then 6
    assert engine.step(policy, end=["hog2"]) == []
    assert engine.squashed == []


def test_as_few_as_needed_are_squashed_the_youngest_first():
    policy, engine = blocked_head()
    engine.left_s |= {f"r{i}": 5.0 for i in range(2, 6)}
    passers = [passer(f"r{i}", most=5) for i in range(2, 6)]
    assert len(engine.step(policy, *passers)) == 4
    # 4 + 4 + 1 pages are used and 13 needed: 2 short once hog1 has ended.
    assert engine.step(policy, end=["hog1"]) == ["head"]
    assert engine.squashed == ["r5", "r4"]
    assert set(engine.running_ids) == {"hog2", "r2", "r3", "head"}


def test_who_passed_is_squashed_when_the_head_lacks_only_its_tokens():
    policy, engine = blocked_head()
    engine.predicted["r2"] = 100
    engine.left_s["r2"] = 5.0
    # 200 - 12 - 115 leaves the head, of 126, without tokens.
    engine.step(policy, passer("r2"))
    assert books(policy) == [(1, 3, 127)]
    assert engine.step(policy, end=["hog1", "hog2"]) == ["head"]
    assert engine.squashed == ["r2"]


def test_an_overdue_head_has_those_that_passed_it_squashed():
    policy, engine = blocked_head(max_overtaken=1)
    engine.left_s["r2"] = 5.0
    engine.step(policy, passer("r2"))
    assert engine.step(policy, end=["hog1"]) == ["head"]
    assert engine.squashed == ["r2"]


def test_an_engine_that_squashes_nobody_keeps_who_passed():
    policy, engine = blocked_head()
    engine.max_squashes = 0
    engine.left_s["r2"] = 5.0
    engine.step(policy, passer("r2"))
    assert engine.step(policy, end=["hog1"]) == []
    assert engine.step(policy, end=["r2"]) == ["head"]


def test_who_passed_a_head_that_is_gone_is_not_squashed_for_the_next():
    policy, engine = blocked_head()
    engine.left_s["r2"] = 5.0
    engine.step(policy, passer("r2"))
    next_head = request_of("head2", 5, 1, "big")
    assert engine.step(policy, next_head, end=["head", "hog1"]) == []
    assert engine.squashed == []


# Any traffic.

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


# Options.


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("slo_s", 0, "slo_s=0 must be a finite number of seconds, above 1e-6"),
        ("slo_s", -1.0, "slo_s=-1.0 must be a finite number of seconds, above 1e-6"),
        ("slo_s", math.nan, "slo_s=nan must be a finite number of seconds, above 1e-6"),
        ("refresh_s", 0, "refresh_s=0 must be a finite number of seconds above 0"),
        (
            "first_refresh_s",
            -1,
            "first_refresh_s=-1 must be a finite number of seconds, 0 or more",
        ),
        ("min_samples", 0, "min_samples=0 must be a positive integer"),
        ("window_requests", 5000, "window_requests=5000 must be an integer, 1 to 1024"),
        ("max_lanes", 2.0, "max_lanes=2.0 must be an integer, 1 to 16"),
        ("lanes", "best", "lanes='best' must be 'kmeans', 'elbow' or 'static'"),
        ("elbow_gain", 1, "elbow_gain=1 must be between 0 and 1"),
        ("bypass", 1, "bypass=1 must be true or false"),
        ("max_overtaken", -1, "max_overtaken=-1 must be an integer, 0 or above"),
        ("recharge", "no", "recharge='no' must be true or false"),
    ],
)
def test_bad_option_raises_naming_value_and_rule(option, value, rule):
    with pytest.raises(ConfigError) as caught:
        create_policy("admission", "chameleon", {option: value})
    assert rule in str(caught.value)
