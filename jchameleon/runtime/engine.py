"""The engine: one thread that plans, loads adapters, runs steps and streams tokens.

Life of a request here: `prepare` validates it on the caller's thread, `submit` puts it
into the inbox; the engine thread turns it into an `Arrival`, the planner admits it, its
adapter is loaded if it is not resident, its prompt runs in chunks, then it decodes one
token per iteration until a stop, a limit or a cancel; every token goes into the
caller's outbox while the next step runs. The thread owns planner, pool, programs and
all live requests; other threads reach it through the inbox only.
"""

import collections
import contextlib
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
)
from jchameleon.models.tokenizer import Tokenizer
from jchameleon.runtime.deadlines import Deadlines
from jchameleon.runtime.drawing import DrawnToken
from jchameleon.runtime.engine_adapters import AdapterListener, EngineAdapters
from jchameleon.runtime.engine_log import EngineLog
from jchameleon.runtime.executor import Executor
from jchameleon.runtime.leases import AdapterLease
from jchameleon.runtime.live import LiveRequest
from jchameleon.runtime.loads import AdapterLoads
from jchameleon.runtime.orders import carry_out
from jchameleon.runtime.outbox import FinishReason, Outbox
from jchameleon.runtime.policy.events import (
    AdapterRegistered,
    AdapterUnregistered,
    Arrival,
    Cancel,
    Event,
    StepDone,
)
from jchameleon.runtime.policy.log import PlanLogWriter
from jchameleon.runtime.policy.plan import Books, Plan
from jchameleon.runtime.policy.planner import Planner
from jchameleon.runtime.question import Question
from jchameleon.runtime.records import StepRecord
from jchameleon.runtime.sampler import INVALID_TOKEN
from jchameleon.runtime.staging import Staging
from jchameleon.runtime.step import run_step
from jchameleon.runtime.submission import RequestRules, Submission, check_request_id
from jchameleon.runtime.transfer import AdapterLoader, emulated_link
from jchameleon.sampling import SamplingParams

logger = logging.getLogger(__name__)

LOAD_POLL_S = 0.002
"""How often an otherwise idle engine looks whether a device copy has arrived."""

IDLE_TICK_S = 0.05
"""How often an idle engine plans for policies that wait for a moment in time."""

RECORDED_STEPS = 4096

UNREGISTERED = "its adapter was unregistered"


class Engine:
    """Runs requests until closed. Any thread may call it, and its `adapters`."""

    def __init__(
        self,
        executor: Executor,
        planner: Planner,
        config: EngineConfig,
        *,
        log: PlanLogWriter | None,
        staging: Staging,
        listener: AdapterListener | None,
        tokenizer: Tokenizer | None,
        eos_token_ids: frozenset[int],
    ):
        """Start the engine thread over a warmed-up executor.

        `log` takes every event and plan, and is closed with the engine. `staging`
        brings the weights of registered adapters to the device. `listener` hears when
        nothing is left of an adapter.
        """
        self.max_model_len = executor.max_model_len
        self._executor = executor
        self._planner = planner
        self._log = EngineLog(log)
        self._config = config
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._rules = RequestRules(
            vocab_size=executor.model.vocab_size,
            max_model_len=executor.max_model_len,
            has_tokenizer=tokenizer is not None,
            block_tokens=config.kv_block_tokens if config.prefix_cache else None,
        )
        self._random = np.random.default_rng(config.seed)
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        loader = AdapterLoader(
            executor.layout,
            executor.dtype,
            staging,
            notify=lambda: self._inbox.put(None),
            max_in_flight=config.max_loads_in_flight,
            link=emulated_link(config),
        )
        self._loads = AdapterLoads(loader, executor)
        self.adapters = EngineAdapters(
            executor.layout,
            planner,
            send=self._inbox.put,
            ask=self.on_engine_thread,
            check_alive=self.check_alive,
            listener=listener,
        )
        self._live: dict[str, LiveRequest] = {}
        self._undelivered: dict[str, tuple[LiveRequest, DrawnToken]] = {}
        self._deadlines = Deadlines(self._live)
        self._records: collections.deque[StepRecord] = collections.deque(
            maxlen=RECORDED_STEPS
        )
        self._questions: collections.deque[Question] = collections.deque()
        self._ids_lock = threading.Lock()
        self._open_ids: set[str] = set()
        self._closing = False
        self._death: str | None = None
        self._thread = threading.Thread(
            target=self._run, name="jchameleon-engine", daemon=True
        )
        self._thread.start()

    # Any thread.

    def prepare(
        self,
        request_id: str,
        prompt: Sequence[int],
        sampling: SamplingParams,
        *,
        adapter_uid: str | None,
        outbox: Outbox,
        lease: AdapterLease | None = None,
        cache_salt: str | None = None,
        prefix_cache: bool = True,
    ) -> Submission:
        """Validate a request; `submit` takes the result.

        For more than one completion see `jchameleon.runtime.completions`.

        Args:
          lease: a claim to `adapter_uid`; once submitted, it ends with the request.
          cache_salt: shares cached blocks only with requests of the same salt.
          prefix_cache: false runs every token of the prompt, whatever is cached; so
            does a request that asks for log-probabilities of its prompt.

        Raises:
          InvalidRequestError: id, prompt, sampling or salt is outside the limits.
          UnknownAdapterError: no adapter with this uid is registered.
          CapacityError: it can never fit in the pool.
        """
        submission = self._rules.accept(
            request_id,
            prompt,
            sampling,
            adapter_uid=adapter_uid,
            outbox=outbox,
            lease=lease,
            cache_salt=cache_salt,
            prefix_cache=prefix_cache,
        )
        pages, pinned = 0, False
        if adapter_uid is not None:
            pages = self.adapters.pages(adapter_uid)
            pinned = self._planner.is_pinned(adapter_uid)
        reason = self._planner.can_ever_fit(
            len(submission.prompt), sampling.max_tokens, pages, pinned=pinned
        )
        if reason is not None:
            raise CapacityError(reason)
        return submission

    def submit(self, submission: Submission) -> None:
        """Queue what `prepare` returned; its deltas come through its outbox.

        Raises:
          InvalidRequestError: a request of this id is in flight.
          QueueFullError: `max_waiting` requests are open beyond those that run.
          EngineDeadError: the engine has stopped.
        """
        request_id = submission.request_id
        with self._ids_lock:
            self.check_alive()
            if request_id in self._open_ids:
                raise InvalidRequestError(f"request_id={request_id!r} is in flight")
            limit = self._config.max_waiting + self._config.max_running
            if len(self._open_ids) >= limit:
                raise QueueFullError(
                    f"{limit} requests are open already; max_waiting="
                    f"{self._config.max_waiting} allows no more"
                )
            self._open_ids.add(request_id)
            if submission.lease is not None:
                submission.lease.submit()
            # Inside the lock: after it a dying engine answers all open requests.
            self._inbox.put(dataclasses.replace(submission, arrival_s=time.monotonic()))

    def cancel(self, request_id: str) -> None:
        """End a request early with what it has; unknown ids are ignored.

        Raises:
          InvalidRequestError: the id is no string.
        """
        check_request_id(request_id)
        self._inbox.put(Cancel(request_id))

    def books(self) -> Books:
        """Return the planner's totals."""
        return self.on_engine_thread(self._planner.books)

    def check(self) -> None:
        """Assert the planner's invariants on the engine thread (tests)."""
        self.on_engine_thread(self._planner.check)

    def on_engine_thread(self, action: Callable[[], Any]) -> Any:
        """Run `action` between two iterations and return its result."""
        if threading.current_thread() is self._thread:
            return action()
        question = Question(action)
        with self._ids_lock:
            self.check_alive()
            self._inbox.put(question)
        return question.wait()

    def check_alive(self) -> None:
        """Raise EngineDeadError when the engine has ended."""
        if self._death is not None:
            raise EngineDeadError(self._death)

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
        for request_id in self._deadlines.passed(start_s):
            events.append(Cancel(request_id))
            self._finish(request_id, "time_limit")
        plan = self._planner.plan(start_s, events)
        self._log.append(start_s, events, plan)
        self._apply(plan, start_s)
        while self._questions:  # after the plan: the books are settled now
            self._questions.popleft().answer()
        caused: list[Event] = [*self.adapters.take_pins()]
        if plan.prefill or plan.decode:
            caused.append(self._step(plan, start_s))
        else:
            self._deliver()
        return caused

    def _receive(self, *, block: bool) -> list[Event]:
        events: list[Event] = []
        idle_wait = IDLE_TICK_S if self._planner.watches_the_clock else None
        tick_s = math.inf if idle_wait is None else time.monotonic() + idle_wait
        tick_s = min(tick_s, self._deadlines.next_s)
        while True:
            wait = block and not events and not self._closing
            try:
                poll_s = LOAD_POLL_S if self._loads.in_flight else idle_wait
                if wait and tick_s < math.inf:
                    left_s = max(0.0, tick_s - time.monotonic())
                    poll_s = left_s if poll_s is None else min(left_s, poll_s)
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
                    events += self._accept(message)
                case Cancel(request_id):
                    if request_id in self._live:
                        events.append(message)
                        why = self._live[request_id].submission.revoked
                        self._finish(request_id, "aborted", why)
                case AdapterRegistered(uid) | AdapterUnregistered(uid):
                    if not self.adapters.receive(message):
                        events += self._abort_users(uid)
                    events.append(message)
                case Question():
                    self._questions.append(message)
                case _:
                    raise AssertionError(f"{message!r} in the inbox")

    def _abort_users(self, uid: str) -> list[Event]:
        """End what still names an adapter that nobody waited for to fall idle."""
        users = [i for i, r in self._live.items() if r.submission.adapter_uid == uid]
        for request_id in users:
            self._finish(request_id, "aborted", UNREGISTERED)
        return [Cancel(request_id) for request_id in users]

    def _accept(self, submission: Submission) -> list[Event]:
        live = LiveRequest(
            submission,
            seed=submission.seed(self._random),
            tokenizer=self._tokenizer,
            eos_token_ids=self._eos_token_ids,
        )
        self._live[submission.request_id] = live
        self._deadlines.add(live)
        uid, why = submission.adapter_uid, submission.revoked
        if why is None and uid is not None and not self.adapters.has_received(uid):
            why = UNREGISTERED
        if why is not None:
            self._finish(submission.request_id, "aborted", why)
            return []
        return [Arrival(submission.request())]

    def _apply(self, plan: Plan, now_s: float) -> None:
        for request_id, why in plan.failed:
            self._finish(request_id, "error", why)
        self.adapters.note_forgotten(plan.forgotten)
        carry_out(
            plan, now_s, live=self._live, loads=self._loads, executor=self._executor
        )

    def _step(self, plan: Plan, iteration_s: float) -> StepDone:
        start_s = time.monotonic()
        output = run_step(self._executor, self._live, plan, meanwhile=self._deliver)
        now_s = time.monotonic()
        for request_id, packed in output.scored:
            self._live[request_id].add_scores(packed)
        keys = [(i, self._live[i].filled_key()) for i, _ in output.drawn]
        finished = [i for i, drawn in output.drawn if self._add_token(i, drawn, now_s)]
        host_s = time.monotonic() - iteration_s - output.device_s
        resident = self._executor.num_resident
        self._records.append(
            StepRecord.of(plan, start_s, now_s, resident=resident, host_s=host_s)
        )
        return StepDone(
            duration_s=now_s - start_s,
            produced=tuple((i, 1) for i, _ in output.drawn),
            finished=tuple(finished),
            block_keys=tuple((i, key) for i, key in keys if key is not None),
            spoiled=tuple(i for i, d in output.drawn if d.token == INVALID_TOKEN),
        )

    def _add_token(self, request_id: str, drawn: DrawnToken, now_s: float) -> bool:
        """Take one drawn token; return whether the request ended."""
        if drawn.token == INVALID_TOKEN:
            self._finish(request_id, "error", "logits are not finite")
            return True
        live = self._live[request_id]
        reason = live.add(drawn.token, now_s)
        if reason is not None:
            self._finish(request_id, reason, drawn=drawn)
            return True
        self._undelivered[request_id] = live, drawn
        return False

    def _deliver(self) -> None:
        """Turn the last step's tokens into text and send them, while the next one runs.

        Detokenising and waking readers takes longer than planning does.
        """
        # Emptied first: an engine that dies of this must not meet it again.
        undelivered, self._undelivered = self._undelivered, {}
        for request_id, (live, drawn) in undelivered.items():
            live.submission.outbox.put(request_id, live.delta(drawn))

    def _finish(
        self,
        request_id: str,
        reason: FinishReason,
        error: str | None = None,
        *,
        drawn: DrawnToken | None = None,
    ) -> None:
        """Send the last delta; pages return with the event that the caller reports."""
        if request_id in self._undelivered:
            self._deliver()
        live, now_s = self._live[request_id], time.monotonic()
        # A request stays open until there is an answer.
        if self._death is None:
            delta = live.last_delta(reason, now_s, error=error, drawn=drawn)
        else:
            delta = live.delta_at_death(reason, now_s, error)
        del self._live[request_id]
        self._loads.forget(live)
        with self._ids_lock:
            self._open_ids.discard(request_id)
        live.submission.release()
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
            elif isinstance(message, AdapterRegistered | AdapterUnregistered):
                self.adapters.receive(message)
        with contextlib.suppress(Exception):  # the reason says what it died of
            self._deliver()
        for request_id in list(self._live):
            self._finish(request_id, finish, reason)
        for question in self._questions:
            question.refuse(reason)
        self._loads.close()
        self._log.close()
        self.adapters.end(reason)
