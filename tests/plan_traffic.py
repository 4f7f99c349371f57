"""A loose engine that runs random traffic through a planner and logs it."""

import dataclasses
import math
import random
from contextlib import closing

from jchameleon.runtime.policy.events import (
    AdapterPinned,
    AdapterRegistered,
    AdapterUnregistered,
    Arrival,
    Cancel,
    DeviceLost,
    LoadDone,
    StepDone,
)
from jchameleon.runtime.policy.limits import PlannerConfig
from jchameleon.runtime.policy.log import PlanLogWriter
from jchameleon.runtime.policy.planner import Planner
from jchameleon.runtime.policy.presets import build_policies, load_policy
from jchameleon.runtime.policy.request import Request

CONFIG = PlannerConfig(
    num_pages=50,
    block_tokens=4,
    max_running=8,
    max_batch_tokens=64,
    max_loads_in_flight=2,
    prefill_tile_tokens=8,
)

FIFO = {
    "admission": {"name": "fifo"},
    "eviction": {"name": "lru"},
    "predictor": {"name": "max_tokens"},
    "prefetch": {"name": "none"},
}


class LooseEngine:
    """Does what plans say, at odd times and with odd results, and checks nothing."""

    def __init__(self, planner, seed, priorities=(0,), *, loses_device=False):
        self.planner = planner
        self.loses_device = loses_device
        self.priorities = priorities
        self.rng = random.Random(seed)
        self.now_s = 1000 * self.rng.random()
        sizes = enumerate((2, 3, 1, 5, 8, 12, 16))
        self.sizes = {f"adapter-{i}": num_pages for i, num_pages in sizes}
        self.adapters = dict(self.sizes)  # those registered
        self.events = [
            AdapterRegistered(uid, 2**i, num_pages)
            for i, (uid, num_pages) in enumerate(self.adapters.items())
        ]
        self.count = 0
        self.lengths = {}
        self.left = {}  # tokens that each live request has yet to produce
        self.names = {}  # the adapter that each live request names
        self.prompts = {}  # prompt tokens, with those produced before it was squashed
        self.texts = {}  # what a request says: equal texts of one adapter begin alike
        self.keyed = {}  # blocks of each request that have keys
        self.loading = []

    def key(self, request_id, block):
        return f"{self.texts[request_id]}/{block}"

    def arrive(self):
        rng = self.rng
        self.count += 1
        # Mostly small; now and then a large one blocks the line or outgrows its pages.
        prompt = rng.choice(
            [rng.randint(1, 12), rng.randint(1, 12), rng.randint(1, 60)]
        )
        limit = rng.choice([rng.randint(1, 6), rng.randint(1, 6), rng.randint(6, 60)])
        uid = rng.choice([None, *self.adapters, *list(self.adapters)[:2]])
        if self.planner.can_ever_fit(prompt, limit, self.adapters.get(uid, 0)):
            return
        request_id = f"r{self.count}"
        self.texts[request_id] = rng.choice([f"{uid}", f"{uid}", f"{uid}-{request_id}"])
        self.keyed[request_id] = prompt // CONFIG.block_tokens
        blocks = range(self.keyed[request_id])
        request = Request(
            request_id=request_id,
            prompt_tokens=prompt,
            max_tokens=limit,
            adapter_uid=uid,
            arrival_s=self.now_s,
            expected_tokens=rng.choice([None, rng.randint(1, limit)]),
            priority=rng.choice(self.priorities) if len(self.priorities) > 1 else 0,
            block_keys=tuple(self.key(request_id, block) for block in blocks),
        )
        self.left[request.request_id] = rng.choice([limit, rng.randint(1, limit)])
        self.prompts[request.request_id] = prompt
        self.names[request.request_id] = uid
        self.events.append(Arrival(request))

    def come_or_go(self, uid):
        """Unregister an adapter unless a live request names it, or register it."""
        if uid not in self.adapters:
            self.adapters[uid] = self.sizes[uid]
            rank = 2 ** list(self.sizes).index(uid)
            self.events.append(AdapterRegistered(uid, rank, self.sizes[uid]))
        elif uid not in [self.names[name] for name in self.left]:
            del self.adapters[uid]
            self.events.append(AdapterUnregistered(uid))

    def tick(self):
        """Return (now_s, events, plan) of one iteration, and run it."""
        rng = self.rng
        self.now_s += rng.choice([0.01, 0.3, 1.5]) * rng.random()
        for uid in [uid for uid in self.loading if rng.random() < 0.5]:
            self.loading.remove(uid)
            error = "disk is on fire" if rng.random() < 0.1 else None
            self.events.append(LoadDone(uid, error, "adapter_io"))
        for _ in range(rng.choice([0, 0, 0, 0, 0, 0, 1, 3])):
            self.arrive()
        if self.left and rng.random() < 0.1:
            gone = rng.choice(list(self.left))
            del self.left[gone]
            self.events.append(Cancel(gone))
        if rng.random() < 0.02:
            uid = rng.choice(list(self.sizes)[:2])
            if uid in self.adapters:
                self.events.append(AdapterPinned(uid, rng.random() < 0.5))
        if rng.random() < 0.05:
            self.come_or_go(rng.choice(list(self.sizes)))
        events, self.events = tuple(self.events), []
        plan = self.planner.plan(self.now_s, events)
        self.run(plan)
        return self.now_s, events, plan

    def run(self, plan):
        self.loading += [load.uid for load in plan.loads]
        for request_id, *_ in plan.failed:
            self.left.pop(request_id, None)
        done = list(plan.decode)
        for chunk in plan.prefill:
            if chunk.start + chunk.length == self.prompts[chunk.request_id]:
                done.append(chunk.request_id)
        works = bool(plan.prefill or plan.decode)
        if works and self.loses_device and self.rng.random() < 0.03:
            self.events.append(DeviceLost())
            done = done[: len(done) // 2]  # what was saved of the step
        finished, keys, spoiled = [], [], []
        for request_id in done:
            blocks, inside = divmod(self.prompts[request_id], CONFIG.block_tokens)
            if not inside and blocks > self.keyed[request_id]:
                keys.append((request_id, self.key(request_id, blocks - 1)))
                self.keyed[request_id] = blocks
            self.left[request_id] -= 1
            self.prompts[request_id] += 1
            if self.left[request_id] == 0:
                del self.left[request_id]
                finished.append(request_id)
                if self.rng.random() < 0.05:
                    spoiled.append(request_id)
        produced = tuple((request_id, 1) for request_id in done)
        if works:
            step = StepDone(
                0.2 * self.rng.random(),
                produced,
                tuple(finished),
                tuple(keys),
                tuple(spoiled),
            )
            self.events.append(step)


class Sizeless:
    """Admit in arrival order through a lane, without a size."""

    def admit(self, view):
        for request in view.waiting:
            view.try_admit(request, lane=0, wrs=math.nan)


def record(path, policy=FIFO, *, seed=0, steps=200, priorities=(0,)):
    """Log a random run at `path` and return its (now_s, events, plan)."""
    policy = load_policy(policy)
    config = dataclasses.replace(
        CONFIG, kv_reserve=policy.kv_reserve, max_squashes=policy.max_squashes
    )
    planner = Planner(config, **build_policies(policy))
    # Losses leave little time for rare things to happen: half of the runs have none.
    engine = LooseEngine(planner, seed, priorities, loses_device=seed % 2 == 1)
    iterations = []
    with closing(PlanLogWriter(path, config, policy)) as log:
        for _ in range(steps):
            iterations.append(engine.tick())
            log.append(*iterations[-1])
    return iterations
