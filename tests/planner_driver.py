"""A planner and someone who plays its engine, keeping books of every page and token."""

from jchameleon.runtime.policy.admission import Fifo
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
from jchameleon.runtime.policy.eviction import Lru
from jchameleon.runtime.policy.limits import PlannerConfig
from jchameleon.runtime.policy.planner import Planner
from jchameleon.runtime.policy.predictor import MaxTokens
from jchameleon.runtime.policy.prefetch import NoPrefetch
from jchameleon.runtime.policy.request import Request

CONFIG = PlannerConfig(
    num_pages=34,
    block_tokens=16,
    max_running=8,
    max_batch_tokens=72,
    max_loads_in_flight=2,
    prefill_tile_tokens=32,
)


def planner_of(config=CONFIG, **policies):
    chosen = {
        "admission": Fifo(),
        "eviction": Lru(),
        "predictor": MaxTokens(),
        "prefetch": NoPrefetch(),
        **policies,
    }
    return Planner(config, **chosen)


def request_of(request_id, prompt_tokens=20, max_tokens=5, adapter_uid=None):
    return Request(
        request_id=request_id,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        adapter_uid=adapter_uid,
    )


class QueueAhead:
    """Prefetch what the line names."""

    def candidates(self, view):
        return [r.adapter_uid for r in view.waiting if r.adapter_uid is not None]


class Text:
    """Tokens of a request that takes part in the prefix cache, and where it stands.

    Prompt and output are laid down from the start; requests of the same `space` (an
    adapter and a salt) may share what they begin with.
    """

    def __init__(self, space, prompt, output):
        self.space, self.prompt = space, tuple(prompt)
        self.tokens = (*prompt, *output)
        # One value stands for a token and all before it, as its KV entry does.
        self.entries = []
        before = hash(space)
        for token in self.tokens:
            before = hash((before, token))
            self.entries.append(before)

    def key(self, block, block_tokens):
        return f"{self.space}:{self.tokens[: (block + 1) * block_tokens]}"

    def request(self, request_id, block_tokens=CONFIG.block_tokens, **fields):
        blocks = range(len(self.prompt) // block_tokens)
        return Request(
            request_id=request_id,
            prompt_tokens=len(self.prompt),
            max_tokens=len(self.tokens) - len(self.prompt),
            adapter_uid=self.space[0],
            block_keys=tuple(self.key(block, block_tokens) for block in blocks),
            **fields,
        )


class Driver:
    """Executes plans and checks each against books of its own.

    `lengths` says after how many tokens a request ends (its limit otherwise);
    `load_steps` how many steps a load takes; `fails` whether it fails; `spoils` whether
    a request ends for logits that are not finite; `breaks` whether the device loses
    what it holds in a step, of whose rows every other one is saved.
    """

    def __init__(self, planner):
        self.planner = planner
        self.config = planner.config
        self.step = 0
        self.events = []
        self.log = []
        self.plans = []
        self.requests = {}
        self.lengths = {}
        self.load_steps = lambda uid: 1
        self.fails = lambda uid: False
        self.spoils = lambda request_id: False
        self.breaks = lambda step: False
        self.lost = False
        self.outcome = {}
        self.admission_order = []
        self.kv = {}
        self.resident = {}
        self.loading = {}
        self.prefilled = {}
        self.produced = {}
        # Tokens to prefill, since the last admission: prompt and output by then.
        self.to_prefill = {}
        self.squashes = {}
        self.pinned = set()
        self.leaving = set()
        # The prefix cache: texts by request, blocks that have a key, tokens found
        # there, and what the device holds: page -> entries.
        self.texts = {}
        self.keyed = {}
        self.cached = {}
        self.memory = {}

    def register(self, uid, num_pages, rank=8):
        self.events.append(AdapterRegistered(uid, rank, num_pages))
        self.leaving.discard(uid)

    def unregister(self, uid):
        """Forget an adapter that no open request names."""
        self.events.append(AdapterUnregistered(uid))
        self.pinned.discard(uid)
        self.leaving.add(uid)

    def is_named(self, uid):
        """Whether an open request names the adapter."""
        return any(
            request.adapter_uid == uid
            for request_id, request in self.requests.items()
            if request_id not in self.outcome
        )

    def arrive(self, request, length=None):
        self.events.append(Arrival(request))
        self.requests[request.request_id] = request
        self.lengths[request.request_id] = length or request.max_tokens

    def arrive_text(self, request_id, text, length=None, **fields):
        request = text.request(request_id, self.config.block_tokens, **fields)
        self.arrive(request, length)
        self.texts[request_id] = text
        self.keyed[request_id] = len(request.block_keys)

    def pin(self, uid, pinned=True):
        self.events.append(AdapterPinned(uid, pinned))
        (self.pinned.add if pinned else self.pinned.discard)(uid)

    def cancel(self, request_id):
        self.events.append(Cancel(request_id))
        if request_id in self.requests and request_id not in self.outcome:
            self.end(request_id, "cancelled")

    def end(self, request_id, outcome):
        assert request_id not in self.outcome, f"{request_id} ended twice"
        self.outcome[request_id] = outcome
        self.kv.pop(request_id, None)
        if request_id in self.admission_order:
            self.admission_order.remove(request_id)

    def users(self, uid):
        return [r for r in self.admission_order if self.requests[r].adapter_uid == uid]

    def tick(self):
        """Deliver loads and events, take one plan, check it, run it."""
        for uid in [u for u, (due, _) in self.loading.items() if due <= self.step]:
            _, pages = self.loading.pop(uid)
            if self.fails(uid):
                self.events.append(LoadDone(uid, "disk is on fire", "adapter_io"))
            else:
                self.events.append(LoadDone(uid))
                self.resident[uid] = pages
        events, self.events = tuple(self.events), []
        self.lost = any(isinstance(event, DeviceLost) for event in events)
        self.log.append(events)
        plan = self.planner.plan(self.step * 0.01, events)
        self.plans.append(plan)
        self.planner.check()
        self.accept(plan)
        self.run(plan)
        self.step += 1
        return plan

    def accept(self, plan):
        config = self.config
        for request_id, reason, fault in plan.failed:
            assert reason and fault in ("capacity", "rejected", "adapter_io")
            self.end(request_id, "failed")
        for request_id, reason in plan.squashed:
            assert reason
            self.admission_order.remove(request_id)
            del self.kv[request_id]
            if not self.lost:
                self.squashes[request_id] = self.squashes.get(request_id, 0) + 1
                assert self.squashes[request_id] <= config.max_squashes
        if self.lost:
            # Nothing of before is relied on: neither entries nor pages in use.
            assert not self.kv and set(self.resident) == set(plan.evicted)
        for uid in plan.evicted:
            assert self.lost or uid not in self.pinned, (
                f"{uid} was evicted though pinned"
            )
            users = [r for r in self.users(uid) if r not in plan.admitted]
            assert not users, f"{uid} was evicted under {users}"
            del self.resident[uid]
        for uid in plan.forgotten:
            self.leaving.remove(uid)
            assert uid not in self.resident and uid not in self.loading
            assert not self.planner.knows(uid)
        # Only a copy that is still under way keeps one that was unregistered.
        assert self.leaving <= self.loading.keys()
        assert tuple(r for r, _ in plan.kv_pages) == plan.admitted
        for request_id, pages in plan.kv_pages:
            assert request_id not in self.outcome, "admitted after its end"
            request = self.requests[request_id]
            hit = request_id in plan.hits
            assert hit == (request.adapter_uid in self.resident)
            produced = self.produced.setdefault(request_id, 0)
            tokens = request.prompt_tokens + request.max_tokens - 1
            assert (len(pages) - 1) * config.block_tokens < tokens
            if config.kv_reserve == "predicted":
                tokens = request.prompt_tokens + produced
            assert len(pages) * config.block_tokens >= tokens
            self.kv[request_id] = pages
            self.prefilled[request_id] = 0
            assert len(set(pages)) == len(pages)
            self.to_prefill[request_id] = request.prompt_tokens + produced
            self.admission_order.append(request_id)
        for request_id, block, pages in plan.swapped:
            assert request_id in self.texts and request_id not in plan.admitted
            had = self.kv[request_id]
            assert not set(had) & set(pages)
            end = block + len(pages)
            assert end <= len(had)
            self.kv[request_id] = (*had[:block], *pages, *had[end:])
        for request_id, tokens in plan.cached:
            assert tokens > 0 and tokens % config.block_tokens == 0
            self.prefilled[request_id] += tokens
            assert self.prefilled[request_id] < self.to_prefill[request_id]
            self.cached[request_id] = self.cached.get(request_id, 0) + tokens
        assert not dict(plan.grown).keys() & dict(plan.squashed).keys()
        for request_id, pages in plan.grown:
            assert config.kv_reserve == "predicted" and pages
            self.kv[request_id] += pages
        for request_id, lane, wrs in plan.lanes:
            assert request_id in plan.admitted and lane >= 0 and wrs > 0
        for request_id, passed in plan.bypasses:
            assert request_id in plan.admitted and passed not in self.admission_order
        for load in plan.loads:
            assert load.uid not in self.resident and load.uid not in self.loading
            due = self.step + self.load_steps(load.uid)
            self.loading[load.uid] = (due, load.pages)
            for page in load.pages:
                self.memory.pop(page, None)
        assert len(self.loading) <= config.max_loads_in_flight
        assert len(self.admission_order) <= config.max_running

        used = [page for pages in self.kv.values() for page in pages]
        assert self.texts or len(used) == len(set(used)), "a page has two owners"
        held = list(set(used))
        held += [page for pages in self.resident.values() for page in pages]
        held += [page for _, pages in self.loading.values() for page in pages]
        assert len(held) == len(set(held)), "a page has two owners"
        assert all(2 <= page < config.num_pages for page in held)
        books = self.planner.books()
        assert len(held) <= config.num_pages - 2 - books.free_pages
        assert books.kv_pages == len(set(used))
        kept = len(held) + books.free_pages + books.cached_pages
        # Of adapters whose copy waits for the link the driver does not know.
        assert kept + self.lined_up() == config.num_pages - 2
        assert books.resident_pages == sum(map(len, self.resident.values()))
        assert books.running == len(self.admission_order)
        for uid, pages in self.resident.items():
            assert self.planner.resident_pages(uid) == pages

        rows = [
            r
            for r in self.admission_order
            if self.prefilled[r] == self.to_prefill[r] and self.has_room(r)
        ]
        assert list(plan.decode) == rows, "not exactly the rows that can decode"
        tile = config.prefill_tile_tokens
        padded = sum(-(-chunk.length // tile) * tile for chunk in plan.prefill)
        assert padded + len(rows) <= config.max_batch_tokens

    def lined_up(self):
        pages = sum(len(pages) for _, pages in self.loading.values())
        return self.planner.books().loading_pages - pages

    def write(self, request_id, start, end):
        """Run tokens of a text: all before them must be where it will look for them."""
        block_tokens, pages = self.config.block_tokens, self.kv[request_id]
        text = self.texts.get(request_id)
        if text is None:
            for at in range(start, end):
                self.memory.pop(pages[at // block_tokens], None)
            return
        for at in range(0, start, block_tokens):
            page = self.memory[pages[at // block_tokens]]
            entries = text.entries[at : min(at + block_tokens, start)]
            assert page[: len(entries)] == entries, f"{request_id}: not its KV at {at}"
        for at in range(start, end):
            page = self.memory.setdefault(pages[at // block_tokens], [])
            # Whoever owned the page before, entries behind this one count no more.
            page[at % block_tokens :] = [text.entries[at]]
            assert len(page) == at % block_tokens + 1

    def has_room(self, request_id):
        """Whether the KV entry of the next token has a page."""
        tokens = self.requests[request_id].prompt_tokens + self.produced[request_id]
        return tokens <= len(self.kv[request_id]) * self.config.block_tokens

    def run(self, plan):
        done = list(plan.decode)
        order = [self.admission_order.index(c.request_id) for c in plan.prefill]
        assert order == sorted(set(order)), "chunks out of admission order"
        for chunk in plan.prefill:
            request = self.requests[chunk.request_id]
            assert request.adapter_uid is None or request.adapter_uid in self.resident
            assert chunk.start == self.prefilled[chunk.request_id]
            assert chunk.length >= 1
            end = chunk.start + chunk.length
            self.write(chunk.request_id, chunk.start, end)
            self.prefilled[chunk.request_id] = end
            assert end <= self.to_prefill[chunk.request_id]
            if end == self.to_prefill[chunk.request_id]:
                done.append(chunk.request_id)
            else:
                assert chunk.length % self.config.prefill_tile_tokens == 0
        for request_id in plan.decode:
            tokens = self.requests[request_id].prompt_tokens + self.produced[request_id]
            self.write(request_id, tokens - 1, tokens)
        broke = self.breaks(self.step)
        if broke:
            done = done[::2]
            self.memory.clear()
            self.events.append(DeviceLost())
        finished, keys = [], []
        for request_id in done:
            text = self.texts.get(request_id)
            tokens = self.requests[request_id].prompt_tokens + self.produced[request_id]
            blocks, inside = divmod(tokens, self.config.block_tokens)
            if text and not inside and blocks > self.keyed[request_id]:
                key = text.key(blocks - 1, self.config.block_tokens)
                keys.append((request_id, key))
                self.keyed[request_id] = blocks
            self.produced[request_id] += 1
            if self.produced[request_id] == self.lengths[request_id]:
                finished.append(request_id)
        produced = tuple((request_id, 1) for request_id in done)
        for request_id in finished:
            self.end(request_id, "finished")
        spoiled = tuple(filter(self.spoils, finished))
        if done or not broke:
            self.events.append(
                StepDone(0.01, produced, tuple(finished), tuple(keys), spoiled)
            )

    def drain(self, most_steps):
        for _ in range(most_steps):
            if len(self.outcome) == len(self.requests):
                self.tick()  # tell the planner of the last end
                return
            self.tick()
        left = self.requests.keys() - self.outcome.keys()
        raise AssertionError(f"{sorted(left)} never ended in {most_steps} steps")
