"""The engine: one thread that plans, loads adapters, runs steps and streams tokens.

Life of a request here: `prepare` validates it on the caller's thread, `submit` puts it
into the inbox; the engine thread turns it into an `Arrival`, the planner admits it, its
adapter is loaded if it is not resident, its prompt runs in chunks, then it decodes one
token per iteration until a stop, a limit or a cancel; every token goes into the
caller's outbox at once. The thread owns planner, pool, programs and all live requests;
other threads reach it through the inbox only.
"""

import collections
import dataclasses
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jchameleon.config import EngineConfig
from jchameleon.errors import (
    CapacityError,
    EngineDeadError,
    InvalidRequestError,
    QueueFullError,
    UnknownAdapterError,
)
from jchameleon.lora.adapter import AdapterCard, HostAdapter
from jchameleon.models.tokenizer import Tokenizer
from jchameleon.runtime.adapters import check_fits
from jchameleon.runtime.block_keys import BlockKeys, check_cache_salt
from jchameleon.runtime.engine_log import EngineLog
from jchameleon.runtime.executor import Executor
from jchameleon.runtime.live import LiveRequest
from jchameleon.runtime.loads import AdapterLoads
from jchameleon.runtime.outbox import FinishReason, Outbox
from jchameleon.runtime.policy.events import (
    AdapterPinned,
    AdapterRegistered,
    Arrival,
    Cancel,
    Event,
    StepDone,
)
from jchameleon.runtime.policy.log import PlanLogWriter
from jchameleon.runtime.policy.plan import Books, Plan
from jchameleon.runtime.policy.planner import Planner
from jchameleon.runtime.policy.residency import AdapterStats
from jchameleon.runtime.question import Question
from jchameleon.runtime.records import StepRecord
from jchameleon.runtime.sampler import INVALID_TOKEN
from jchameleon.runtime.step import run_step
from jchameleon.runtime.submission import (
    Submission,
    check_limits,
    check_request_id,
    prompt_array,
)
from jchameleon.runtime.transfer import AdapterLoader, emulated_link
from jchameleon.sampling import SamplingParams

logger = logging.getLogger(__name__)

LOAD_POLL_S = 0.002
"""How often an otherwise idle engine looks whether a device copy has arrived."""

IDLE_TICK_S = 0.05
"""How often an idle engine plans for policies that wait for a moment in time."""

RECORDED_STEPS = 4096


class Engine:
    """Runs requests until closed. All public methods may be called from any thread."""

    def __init__(
        self,
        executor: Executor,
        planner: Planner,
        config: EngineConfig,
        *,
        log: PlanLogWriter | None,
        fetch: Callable[[str], HostAdapter],
        tokenizer: Tokenizer | None,
        eos_token_ids: frozenset[int],
    ):
        """Start the engine thread over a warmed-up executor.

        `log` takes every event and plan, and is closed with the engine. `fetch` returns
        a registered adapter's weights, from disk if need be; the threads that load
        call it.
        """
        self.max_model_len = executor.max_model_len
        self._executor = executor
        self._planner = planner
        self._log = EngineLog(log)
        self._config = config
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._random = np.random.default_rng(config.seed)
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        loader = AdapterLoader(
            executor.layout,
            executor.dtype,
            executor.device,
            fetch=fetch,
            notify=lambda: self._inbox.put(None),
            max_in_flight=config.max_loads_in_flight,
            link=emulated_link(config),
        )
        self._loads = AdapterLoads(loader, executor)
        self._adapters: dict[str, AdapterCard] = {}
        self._live: dict[str, LiveRequest] = {}
        self._records: collections.deque[StepRecord] = collections.deque(
            maxlen=RECORDED_STEPS
        )
        self._questions: collections.deque[Question] = collections.deque()
        self._next_events: list[AdapterPinned] = []
        self._ids_lock = threading.Lock()
        self._open_ids: set[str] = set()
        self._closing = False
        self._death: str | None = None
        self._thread = threading.Thread(
            target=self._run, name="jchameleon-engine", daemon=True
        )
        self._thread.start()

    # Any thread.

    def register_adapter(self, adapter: AdapterCard) -> None:
        """Make an adapter known; requests may name its uid from now on.

        Raises:
          AdapterError: it touches projections outside the engine's lora_targets.
          CapacityError: it can never fit in the pool.
          EngineDeadError: the engine has stopped.
        """
        self._check_alive()
        pages = check_fits(adapter, self._executor.layout, self._planner)
        self._adapters.setdefault(adapter.uid, adapter)
        self._inbox.put(AdapterRegistered(adapter.uid, adapter.rank, pages))

    def prepare(
        self,
        request_id: str,
        prompt: Sequence[int],
        sampling: SamplingParams,
        *,
        adapter_uid: str | None,
        outbox: Outbox,
        cache_salt: str | None = None,
        prefix_cache: bool = True,
    ) -> Submission:
        """Validate a request; `submit` takes the result.

        Args:
          cache_salt: shares cached blocks only with requests of the same salt.
          prefix_cache: false runs every token of the prompt, whatever is cached.

        Raises:
          InvalidRequestError: id, prompt, sampling or salt is outside the limits.
          UnknownAdapterError: no adapter with this uid is registered.
          CapacityError: it can never fit in the pool.
        """
        check_request_id(request_id)
        check_cache_salt(cache_salt)
        tokens = prompt_array(prompt, self._executor.model.vocab_size)
        check_limits(
            tokens,
            sampling,
            vocab_size=self._executor.model.vocab_size,
            max_model_len=self.max_model_len,
            has_tokenizer=self._tokenizer is not None,
        )
        pages, pinned = 0, False
        if adapter_uid is not None:
            self._check_registered(adapter_uid)
            rank = self._adapters[adapter_uid].rank
            pages = self._executor.layout.num_pages(rank)
            pinned = self._planner.is_pinned(adapter_uid)
        reason = self._planner.can_ever_fit(
            len(tokens), sampling.max_tokens, pages, pinned=pinned
        )
        if reason is not None:
            raise CapacityError(reason)
        block_keys = None
        if self._config.prefix_cache and prefix_cache:
            block_keys = BlockKeys.of(
                tokens,
                adapter_uid=adapter_uid,
                salt=cache_salt,
                block_tokens=self._config.kv_block_tokens,
            )
        return Submission(
            request_id=request_id,
            prompt=tokens,
            sampling=sampling,
            adapter_uid=adapter_uid,
            arrival_s=time.monotonic(),
            outbox=outbox,
            block_keys=block_keys,
        )

    def submit(self, submission: Submission) -> None:
        """Queue what `prepare` returned; its deltas come through its outbox.

        Raises:
          InvalidRequestError: a request of this id is in flight.
          QueueFullError: `max_waiting` requests are open beyond those that run.
          EngineDeadError: the engine has stopped.
        """
        request_id = submission.request_id
        with self._ids_lock:
            self._check_alive()
            if request_id in self._open_ids:
                raise InvalidRequestError(f"request_id={request_id!r} is in flight")
            limit = self._config.max_waiting + self._config.max_running
            if len(self._open_ids) >= limit:
                raise QueueFullError(
                    f"{limit} requests are open already; max_waiting="
                    f"{self._config.max_waiting} allows no more"
                )
            self._open_ids.add(request_id)
            # Inside the lock: after it a dying engine answers all open requests.
            self._inbox.put(dataclasses.replace(submission, arrival_s=time.monotonic()))

    def cancel(self, request_id: str) -> None:
        """End a request early with what it has; unknown ids are ignored.

        Raises:
          InvalidRequestError: the id is no string.
        """
        check_request_id(request_id)
        self._inbox.put(Cancel(request_id))

    def pin_adapter(self, uid: str, *, pinned: bool) -> None:
        """Keep a registered adapter on the device from now on, or no longer.

        Raises:
          UnknownAdapterError: no such adapter is registered.
          CapacityError: an accepted request could not run beside it any more.
        """
        self._check_registered(uid)

        def decide() -> None:
            # Others may have been decided since the last plan.
            pins = {e.uid: e.pinned for e in self._next_events}
            reason = self._planner.why_not_pin(uid, pins) if pinned else None
            if reason is not None:
                raise CapacityError(f"adapter {uid[:12]} cannot be pinned: {reason}")
            self._next_events.append(AdapterPinned(uid, pinned))

        self._ask(decide)

    def books(self) -> Books:
        """Return the planner's totals."""
        return self._ask(self._planner.books)

    def adapter_stats(self, uids: Sequence[str]) -> list[AdapterStats]:
        """Return the counters of registered adapters."""
        return self._ask(lambda: [self._planner.adapter_stats(uid) for uid in uids])

    def check(self) -> None:
        """Assert the planner's invariants on the engine thread (tests)."""
        self._ask(self._planner.check)

    def on_engine_thread(self, action: Callable[[], Any]) -> Any:
        """Run `action` between two iterations and return its result (tests, tools)."""
        return self._ask(action)

    @property
    def step_records(self) -> list[StepRecord]:
        """The last iterations, oldest first."""
        return list(self._records)

    def close(self) -> None:
        """Stop the thread; open requests end as "aborted"."""
        self._closing = True
        self._inbox.put(None)
        self._thread.join()

    # Engine thread.

    def _run(self) -> None:
        reason = "the engine was closed"
        finish: FinishReason = "aborted"
        try:
            events: list[Event] = []
            while not self._closing:
                events = self._iterate(events)
        except BaseException as error:  # nobody may wait for ever, whatever it was
            logger.exception("engine thread failed")
            reason, finish = f"engine failed: {type(error).__name__}: {error}", "error"
        self._end_all(reason, finish)

    def _iterate(self, events: list[Event]) -> list[Event]:
        """Run one iteration and return the events it caused."""
        # What ended in the last step first: a new request may bear its id again.
        events = [*events, *self._receive(block=not events), *self._loads.finish()]
        start_s = time.monotonic()
        plan = self._planner.plan(start_s, events)
        self._log.append(start_s, events, plan)
        self._apply(plan, start_s)
        while self._questions:  # after the plan: the books are settled now
            self._questions.popleft().answer()
        caused: list[Event] = [*self._next_events]
        self._next_events = []
        if plan.prefill or plan.decode:
            caused.append(self._step(plan))
        return caused

    def _receive(self, *, block: bool) -> list[Event]:
        events: list[Event] = []
        idle_wait = IDLE_TICK_S if self._planner.watches_the_clock else None
        tick_s = math.inf if idle_wait is None else time.monotonic() + idle_wait
        while True:
            wait = block and not events and not self._closing
            try:
                poll_s = LOAD_POLL_S if self._loads.in_flight else idle_wait
                message = self._inbox.get(wait, poll_s if wait else None)
            except queue.Empty:
                if not wait:
                    return events
                events += self._loads.finish()
                if events or time.monotonic() >= tick_s:
                    return events
                continue
            if message is None:  # a load may have arrived, or the engine closes
                events += self._loads.finish()
                continue
            block = False
            match message:
                case Submission():
                    events.append(self._accept(message))
                case Cancel(request_id):
                    if request_id in self._live:
                        events.append(message)
                        self._finish(request_id, "aborted")
                case Question():
                    self._questions.append(message)
                case _:
                    events.append(message)

    def _accept(self, submission: Submission) -> Event:
        sampling = submission.sampling
        if sampling.seed is None:
            # A half of the key space that no caller's seed reaches.
            high, low = self._random.integers(0, 2**31, 2).tolist()
            seed = (2**31 + high, low)
        else:
            seed = (0, sampling.seed)
        self._live[submission.request_id] = LiveRequest(
            submission, seed=seed, tokenizer=self._tokenizer
        )
        return Arrival(submission.request())

    def _apply(self, plan: Plan, now_s: float) -> None:
        for request_id, why in plan.failed:
            self._finish(request_id, "error", why)
        for request_id, _ in plan.squashed:
            live = self._live[request_id]
            self._loads.forget(live)
            live.squash(now_s)
        for evicted_uid in plan.evicted:
            self._executor.evict(evicted_uid)
        hits = set(plan.hits)
        for request_id, pages in plan.kv_pages:
            live, hit = self._live[request_id], request_id in hits
            live.admit(
                pages, max_blocks=self._executor.max_blocks, hit=hit, now_s=now_s
            )
            if not hit:
                self._loads.wait(live)
        for request_id, tokens in plan.cached:
            self._live[request_id].cached_tokens += tokens
        for request_id, lane, wrs in plan.lanes:
            self._live[request_id].enter_lane(lane, wrs)
        for _, passed_id in plan.bypasses:
            if passed_id in self._live:  # not rejected right after
                self._live[passed_id].bypasses += 1
        for request_id, block, pages in plan.swapped:
            self._live[request_id].swap(block, pages)
        for request_id, pages in plan.grown:
            self._live[request_id].grow(pages)
        for load in plan.loads:
            self._loads.start(load)

    def _step(self, plan: Plan) -> StepDone:
        start_s = time.monotonic()
        drawn = run_step(self._executor, self._live, plan)
        now_s = time.monotonic()
        self._records.append(
            StepRecord(
                start_s=start_s,
                duration_s=now_s - start_s,
                prefill=tuple((c.request_id, c.length) for c in plan.prefill),
                decode=plan.decode,
                resident=self._executor.num_resident,
            )
        )
        keys = [(i, self._live[i].filled_key()) for i, _ in drawn]
        finished = [i for i, token in drawn if self._add_token(i, token, now_s)]
        return StepDone(
            duration_s=now_s - start_s,
            produced=tuple((i, 1) for i, _ in drawn),
            finished=tuple(finished),
            block_keys=tuple((i, key) for i, key in keys if key is not None),
            spoiled=tuple(i for i, token in drawn if token == INVALID_TOKEN),
        )

    def _add_token(self, request_id: str, token: int, now_s: float) -> bool:
        """Take one drawn token; return whether the request ended."""
        if token == INVALID_TOKEN:
            self._finish(request_id, "error", "logits are not finite")
            return True
        live = self._live[request_id]
        reason = live.add(token, now_s, eos_token_ids=self._eos_token_ids)
        if reason is not None:
            self._finish(request_id, reason, token_ids=(token,))
            return True
        live.submission.outbox.put(request_id, live.delta(token))
        return False

    def _finish(
        self,
        request_id: str,
        reason: FinishReason,
        error: str | None = None,
        *,
        token_ids: tuple[int, ...] = (),
    ) -> None:
        """Send the last delta; pages return with the event that the caller reports."""
        live = self._live.pop(request_id)
        self._loads.forget(live)
        delta = live.last_delta(
            reason, time.monotonic(), error=error, token_ids=token_ids
        )
        with self._ids_lock:
            self._open_ids.discard(request_id)
        live.submission.outbox.put(request_id, delta)

    def _end_all(self, reason: str, finish: FinishReason) -> None:
        """Answer everything still open; nothing is accepted from here on."""
        with self._ids_lock:
            self._death = reason
        while True:
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                break
            if isinstance(message, Submission):
                self._accept(message)
            elif isinstance(message, Question):
                self._questions.append(message)
        for request_id in list(self._live):
            self._finish(request_id, finish, reason)
        for question in self._questions:
            question.refuse(reason)
        self._loads.close()
        self._log.close()

    # Helpers.

    def _ask(self, action: Callable[[], Any]) -> Any:
        if threading.current_thread() is self._thread:
            return action()
        question = Question(action)
        with self._ids_lock:
            self._check_alive()
            self._inbox.put(question)
        return question.wait()

    def _check_registered(self, uid: str) -> None:
        if uid not in self._adapters:
            raise UnknownAdapterError(f"no adapter with uid {uid!r:.80} is registered")

    def _check_alive(self) -> None:
        if self._death is not None:
            raise EngineDeadError(self._death)
