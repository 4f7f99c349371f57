"""An engine of plain counters for admission policies with lanes, and its requests."""

import math

from jchameleon.runtime.policy.admission import Capacity
from jchameleon.runtime.policy.chameleon import Chameleon
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
