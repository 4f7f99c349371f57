"""The requests that are open in an engine, and what they are sent.

What belongs to one request - its text, its logit edits, its log-probabilities - may
fail, and then ends that request alone.
"""

import logging
import time
from collections.abc import Callable

import numpy as np

from jchameleon.models.tokenizer import Tokenizer
from jchameleon.runtime.drawing import DrawnToken
from jchameleon.runtime.faults import Fault
from jchameleon.runtime.live import LiveRequest
from jchameleon.runtime.outbox import Delta, FinishReason, RequestTiming
from jchameleon.runtime.policy.events import Cancel, Event, StepDone
from jchameleon.runtime.sampler import INVALID_TOKEN
from jchameleon.runtime.step import StepOutput
from jchameleon.runtime.submission import Submission

logger = logging.getLogger(__name__)


class Replies:
    """Live requests from their acceptance to their last delta. Engine thread only.

    Attributes:
      live: those that have not ended, by id.
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer | None,
        eos_token_ids: frozenset[int],
        seed: int,
        report: Callable[[Event], None],
        forget: Callable[[LiveRequest], None],
        note_answered: Callable[[str], None],
    ) -> None:
        """Start without requests.

        Args:
          seed: of the draws of requests that have none.
          report: takes what the planner is to hear of requests that fail.
          forget: hears of a request that ends; note_answered: of its id, when its last
            delta goes out.
        """
        self.live: dict[str, LiveRequest] = {}
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._random = np.random.default_rng(seed)
        self._report = report
        self._forget = forget
        self._note_answered = note_answered
        self._undelivered: dict[str, tuple[LiveRequest, DrawnToken]] = {}

    def accept(self, submission: Submission) -> LiveRequest | None:
        """Take in a request; one that fails at that is answered, and None returned."""
        try:
            live = LiveRequest(
                submission,
                seed=submission.seed(self._random),
                tokenizer=self._tokenizer,
                eos_token_ids=self._eos_token_ids,
            )
        except Exception as error:
            age_s = time.monotonic() - submission.arrival_s
            timing = RequestTiming(
                queue_s=age_s,
                adapter_load_s=0.0,
                ttft_s=None,
                total_s=age_s,
                adapter_cache_hit=None,
            )
            logger.exception("request %s failed", submission.request_id)
            self._send_last(submission, _failure(error, timing))
            return None
        self.live[submission.request_id] = live
        return live

    def take(self, output: StepOutput, now_s: float, duration_s: float) -> StepDone:
        """Take what a step produced, end who ends with it and return the event.

        Some of those that ran may have ended meanwhile.
        """
        for request_id, packed in output.scored:
            if request_id in self.live:
                try:
                    self.live[request_id].add_scores(packed)
                except Exception as error:
                    self.fail(request_id, error)
        finished: list[str] = []
        keys: list[tuple[str, str]] = []
        for request_id, drawn in output.drawn:
            live = self.live.get(request_id)
            if live is None:
                continue
            try:
                key = live.filled_key()
                if key is not None:
                    keys.append((request_id, key))
                if self._add(request_id, live, drawn, now_s):
                    finished.append(request_id)
            except Exception as error:
                self.fail(request_id, error)
        return StepDone(
            duration_s=duration_s,
            produced=tuple((i, 1) for i, _ in output.drawn),
            finished=tuple(finished),
            block_keys=tuple(keys),
            spoiled=tuple(i for i, d in output.drawn if d.token == INVALID_TOKEN),
        )

    def _add(
        self, request_id: str, live: LiveRequest, drawn: DrawnToken, now_s: float
    ) -> bool:
        """Take one drawn token; return whether the request ended."""
        if drawn.token == INVALID_TOKEN:
            why = "logits are not finite"
            self.finish(request_id, "error", why, fault="not_finite")
            return True
        reason = live.add(drawn.token, now_s)
        if reason is not None:
            self.finish(request_id, reason, drawn=drawn)
            return True
        self._undelivered[request_id] = live, drawn
        return False

    def deliver(self) -> None:
        """Turn the last step's tokens into text and send them, while the next one runs.

        Detokenising and waking readers takes longer than planning does.
        """
        undelivered, self._undelivered = self._undelivered, {}
        for request_id, (live, drawn) in undelivered.items():
            self._deliver(request_id, live, drawn)

    def _deliver(self, request_id: str, live: LiveRequest, drawn: DrawnToken) -> None:
        try:
            live.submission.outbox.put(request_id, live.delta(drawn))
        except Exception as error:
            self.fail(request_id, error)

    def fail(self, request_id: str, error: Exception) -> None:
        """End a live request that failed by itself, and report it to the planner."""
        logger.error("request %s failed", request_id, exc_info=error)
        self._report(Cancel(request_id))
        self.finish(request_id, "error", _reason(error), fault="internal")

    def finish(
        self,
        request_id: str,
        reason: FinishReason,
        error: str | None = None,
        *,
        fault: Fault | None = None,
        drawn: DrawnToken | None = None,
    ) -> None:
        """Send the last delta; pages return with the event that the caller reports."""
        # Removed first: who fails at this must not meet it again at its end.
        undelivered = self._undelivered.pop(request_id, None)
        if undelivered is not None:
            self._deliver(request_id, *undelivered)
        live = self.live.get(request_id)
        if live is None:
            return  # it failed at that
        now_s = time.monotonic()
        try:
            delta = live.last_delta(
                reason, now_s, error=error, fault=fault, drawn=drawn
            )
        except Exception as failure:
            logger.exception("request %s failed at its end", request_id)
            delta = _failure(failure, live.timing(now_s))
            if reason in ("error", "aborted"):
                # Only its last text is lost: it ends for the reason that it had.
                delta = delta._replace(finish_reason=reason, error=error, fault=fault)
        # Until here it is open: there was no answer.
        del self.live[request_id]
        live.leave()
        self._forget(live)
        self._send_last(live.submission, delta)

    def _send_last(self, submission: Submission, delta: Delta) -> None:
        self._note_answered(submission.request_id)
        submission.release()
        submission.outbox.put(submission.request_id, delta)


def _reason(error: Exception) -> str:
    return f"the request failed: {type(error).__name__}: {error}"


def _failure(error: Exception, timing: RequestTiming) -> Delta:
    return Delta(
        finish_reason="error", error=_reason(error), fault="internal", timing=timing
    )
