"""The engine: one thread that plans, loads adapters, runs steps and streams tokens.

Life of a request here: `prepare` validates it on the caller's thread, `submit` puts it
into the inbox; the engine thread turns it into an `Arrival`, the planner admits it, its
adapter is loaded if it is not resident, its prompt runs in chunks, then it decodes one
token per iteration until a stop, a limit or a cancel; every token goes into the
caller's outbox while the next step runs. The thread owns planner, pool, programs and
all live requests; other threads reach it through the inbox only.
"""

import collections
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

from jchameleon.config import EngineConfig
from jchameleon.errors import CapacityError
from jchameleon.models.tokenizer import Tokenizer
from jchameleon.runtime.deadlines import Deadlines
from jchameleon.runtime.door import Door
from jchameleon.runtime.engine_adapters import AdapterListener, EngineAdapters
from jchameleon.runtime.engine_log import EngineLog
from jchameleon.runtime.executor import Executor
from jchameleon.runtime.faults import Fault
from jchameleon.runtime.heartbeat import Heartbeat, Pulse
from jchameleon.runtime.leases import AdapterLease
from jchameleon.runtime.loads import AdapterLoads
from jchameleon.runtime.orders import carry_out
from jchameleon.runtime.outbox import FinishReason, Outbox
from jchameleon.runtime.policy.events import (
    AdapterRegistered,
    AdapterUnregistered,
    Arrival,
    Cancel,
    Event,
)
from jchameleon.runtime.policy.limits import IDLE_TICK_S
from jchameleon.runtime.policy.log import PlanLogWriter
from jchameleon.runtime.policy.plan import Books, Plan
from jchameleon.runtime.policy.planner import Planner
from jchameleon.runtime.question import Question
from jchameleon.runtime.records import StepRecord
from jchameleon.runtime.recovery import Recovery
from jchameleon.runtime.replies import Replies
from jchameleon.runtime.staging import Staging
from jchameleon.runtime.submission import RequestRules, Submission, check_request_id
from jchameleon.runtime.transfer import AdapterLoader, emulated_link
from jchameleon.sampling import SamplingParams

logger = logging.getLogger(__name__)

LOAD_POLL_S = 0.002
"""How often an otherwise idle engine looks whether a device copy has arrived."""

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
        self.max_running = config.max_running
        self._executor = executor
        self._planner = planner
        self._log = EngineLog(log)
        self._config = config
        self._rules = RequestRules(
            vocab_size=executor.model.vocab_size,
            max_model_len=executor.max_model_len,
            has_tokenizer=tokenizer is not None,
            block_tokens=config.kv_block_tokens if config.prefix_cache else None,
        )
        self._door = Door(
            max_waiting=config.max_waiting, max_running=config.max_running
        )
        self._events: list[Event] = []  # for the next plan, as they happen
        loader = AdapterLoader(
            executor.layout,
            executor.dtype,
            staging,
            notify=lambda: self._door.inbox.put(None),
            max_in_flight=config.max_loads_in_flight,
            link=emulated_link(config),
        )
        self._loads = AdapterLoads(
            loader, executor, on_lost_pool=lambda: self._recovery.start_over()
        )
        self.adapters = EngineAdapters(
            executor.layout,
            planner,
            send=self._door.inbox.put,
            ask=self.on_engine_thread,
            check_alive=self.check_alive,
            listener=listener,
        )
        self._replies = Replies(
            tokenizer=tokenizer,
            eos_token_ids=eos_token_ids,
            seed=config.seed,
            report=self._events.append,
            forget=self._loads.forget,
            note_answered=self._door.note_answered,
        )
        self._live = self._replies.live
        self._deadlines = Deadlines(self._live)
        self._recovery = Recovery(executor, self._replies, report=self._events.append)
        self._pulse = Pulse()
        self._records: collections.deque[StepRecord] = collections.deque(
            maxlen=RECORDED_STEPS
        )
        self._questions: collections.deque[Question] = collections.deque()
        self._closing = False
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
          DuplicateRequestError: a request of this id is in flight.
          QueueFullError: `max_waiting` requests are open beyond those that run.
          EngineDeadError: the engine has stopped.
        """
        self._door.submit(submission)

    def cancel(self, request_id: str) -> None:
        """End a request early with what it has; unknown ids are ignored.

        Raises:
          InvalidRequestError: the id is no string.
        """
        check_request_id(request_id)
        self._door.inbox.put(Cancel(request_id))

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
        return self._door.ask(action)

    def check_alive(self) -> None:
        """Raise EngineDeadError when the engine has ended."""
        self._door.check_alive()

    def heartbeat(self) -> Heartbeat:
        """Return signs of life, without waiting for the engine or any lock."""
        return Heartbeat(
            alive=self._thread.is_alive() and not self._door.is_shut,
            open_requests=self._door.num_open,
            stalled_s=self._pulse.stalled_s(),
        )

    @property
    def step_records(self) -> list[StepRecord]:
        """The last iterations, oldest first."""
        return list(self._records)

    def close(self) -> None:
        """Stop the thread; open requests end as "aborted"."""
        self._closing = True
        self._door.inbox.put(None)
        self._thread.join()

    # Engine thread.

    def _run(self) -> None:
        reason = "the engine was closed"
        finish: FinishReason = "aborted"
        fault: Fault = "closed"
        try:
            while not self._closing:
                self._iterate()
        except BaseException as error:  # nobody may wait for ever, whatever it was
            logger.exception("engine thread failed")
            reason = f"engine failed: {type(error).__name__}: {error}"
            finish, fault = "error", "engine"
        self._end_all(reason, finish, fault)
        self._pulse.rest()

    def _iterate(self) -> None:
        """Run one iteration; what it causes is for the next one's plan."""
        # What ended in the last step comes first: a new request may bear its id again.
        self._receive(block=not self._events)
        self._pulse.beat()
        self._events += self._loads.finish()
        start_s = time.monotonic()
        for request_id in self._deadlines.passed(start_s):
            self._events.append(Cancel(request_id))
            self._replies.finish(request_id, "time_limit")
        events = tuple(self._events)
        self._events.clear()
        plan = self._planner.plan(start_s, events)
        self._log.append(start_s, events, plan)
        self._apply(plan, start_s)
        while self._questions:  # after the plan: the books are settled now
            self._questions.popleft().answer()
        self._events += self.adapters.take_pins()
        if plan.prefill or plan.decode:
            self._step(plan, start_s)
        else:
            self._replies.deliver()

    def _receive(self, *, block: bool) -> None:
        """Take in messages, and wait for something to do if that is asked for."""
        events = self._events
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
                if wait:
                    self._pulse.rest()
                message = self._door.inbox.get(wait, poll_s if wait else None)
            except queue.Empty:
                if not wait:
                    return
                events += self._loads.finish()
                if events or time.monotonic() >= tick_s:
                    return
                continue
            if message is None:  # a load may have arrived, or the engine closes
                events += self._loads.finish()
                continue
            block = False
            match message:
                case Submission():
                    self._accept(message)
                case Cancel(request_id):
                    if request_id in self._live:
                        events.append(message)
                        why = self._live[request_id].submission.revoked
                        self._replies.finish(
                            request_id,
                            "aborted",
                            why,
                            fault="cancelled" if why is None else "unregistered",
                        )
                case AdapterRegistered(uid) | AdapterUnregistered(uid):
                    if not self.adapters.receive(message):
                        self._abort_users(uid)
                    events.append(message)
                case Question():
                    self._questions.append(message)
                case _:
                    raise AssertionError(f"{message!r} in the inbox")

    def _abort_users(self, uid: str) -> None:
        """End what still names an adapter that nobody waited for to fall idle."""
        users = [i for i, r in self._live.items() if r.submission.adapter_uid == uid]
        for request_id in users:
            self._events.append(Cancel(request_id))
            self._replies.finish(
                request_id, "aborted", UNREGISTERED, fault="unregistered"
            )

    def _accept(self, submission: Submission) -> None:
        live = self._replies.accept(submission)
        if live is None:
            return
        self._deadlines.add(live)
        uid, why = submission.adapter_uid, submission.revoked
        if why is None and uid is not None and not self.adapters.has_received(uid):
            why = UNREGISTERED
        if why is None:
            self._events.append(Arrival(submission.request()))
        else:
            self._replies.finish(
                submission.request_id, "aborted", why, fault="unregistered"
            )

    def _apply(self, plan: Plan, now_s: float) -> None:
        for request_id, why, fault in plan.failed:
            self._replies.finish(request_id, "error", why, fault=cast(Fault, fault))
        self.adapters.note_forgotten(plan.forgotten)
        carry_out(
            plan, now_s, live=self._live, loads=self._loads, executor=self._executor
        )

    def _step(self, plan: Plan, iteration_s: float) -> None:
        start_s = time.monotonic()
        output = self._recovery.run(plan)
        now_s = time.monotonic()
        self._events.append(self._replies.take(output, now_s, now_s - start_s))
        host_s = time.monotonic() - iteration_s - output.device_s
        resident = self._executor.num_resident
        self._records.append(
            StepRecord.of(plan, start_s, now_s, resident=resident, host_s=host_s)
        )

    def _end_all(self, reason: str, finish: FinishReason, fault: Fault) -> None:
        """Answer everything still open; nothing is accepted from here on."""
        for message in self._door.shut(reason):
            if isinstance(message, Submission):
                self._accept(message)
            elif isinstance(message, Question):
                self._questions.append(message)
            elif isinstance(message, AdapterRegistered | AdapterUnregistered):
                self.adapters.receive(message)
        self._replies.deliver()
        for request_id in list(self._live):
            self._replies.finish(request_id, finish, reason, fault=fault)
        for question in self._questions:
            question.refuse(reason)
        self._loads.close()
        self._log.close()
        self.adapters.end(reason)
