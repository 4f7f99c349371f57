"""What an engine sends back for a request, and where the caller picks it up."""

import collections
import dataclasses
import threading
from typing import Literal, NamedTuple

from jchameleon.runtime.faults import Fault

FinishReason = Literal["stop", "length", "time_limit", "aborted", "error"]

TokenLogprobs = dict[int, float]
"""Log-probability by token id: the token that is there first, then the likeliest."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RequestTiming:
    """Where a request's time went, in seconds.

    Attributes:
      queue_s: that it waited to be admitted, again too if it was squashed.
      adapter_load_s: from admission until its adapter was resident, over all its
        admissions; 0 for a hit.
      ttft_s: from its arrival until its first token.
      total_s: from its arrival until it ended.
      adapter_cache_hit: its adapter was resident at its first admission; None for the
        base model.
      lane: the scheduler's lane that it was last admitted through, 0 holds the
        smallest requests; None where the scheduler has no lanes.
      wrs: its weighted request size there (Chameleon, section 4.3).
      bypasses: times that a younger request was admitted over it while it was the head
        of its lane.
      squashes: times that it was sent back to wait and recomputed.
      cached_tokens: tokens that were not run because their KV entries were in the
        prefix cache; again too if it was squashed.
    """

    queue_s: float
    adapter_load_s: float
    ttft_s: float | None
    total_s: float
    adapter_cache_hit: bool | None
    lane: int | None = None
    wrs: float | None = None
    bypasses: int = 0
    squashes: int = 0
    cached_tokens: int = 0


class Delta(NamedTuple):
    """Output of one request since the delta before it.

    A named tuple, since one is made for every token: a frozen dataclass of so many
    fields takes three times as long.

    Attributes:
      token_ids: new tokens; a token that ended the request is included.
      text: new text that no later token can change.
      logprobs: of each new token, if the request asks for them.
      prompt_logprobs: of all prompt tokens, None for the first; once, in a delta with
        the first token or with none.
      finish_reason: set in the last delta only.
      error: why, where finish_reason is "error", or "aborted" by the engine.
      fault: what kind of reason, where finish_reason is "error" or "aborted".
      timing: set in the last delta only.
    """

    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    fault: Fault | None = None
    timing: RequestTiming | None = None

    def then(self, later: "Delta") -> "Delta":
        """Return both deltas as one."""
        logprobs = self.logprobs
        if later.logprobs is not None:
            logprobs = (logprobs or ()) + later.logprobs
        return Delta(
            token_ids=self.token_ids + later.token_ids,
            text=self.text + later.text,
            logprobs=logprobs,
            prompt_logprobs=self.prompt_logprobs or later.prompt_logprobs,
            finish_reason=later.finish_reason,
            error=later.error,
            fault=later.fault,
            timing=later.timing,
        )


class Outbox:
    """Deltas of several requests on their way to one caller.

    Bounded without ever blocking the engine: at most one delta waits per request, and
    a further one is merged into it, so a slow reader costs no more memory than the
    output itself.
    """

    def __init__(self) -> None:
        self._waiting: collections.OrderedDict[str, Delta] = collections.OrderedDict()
        self._filled = threading.Condition()

    def put(self, request_id: str, delta: Delta) -> None:
        """Add a delta (engine thread)."""
        with self._filled:
            before = self._waiting.get(request_id)
            self._waiting[request_id] = delta if before is None else before.then(delta)
            self._filled.notify()

    def get(self, timeout_s: float | None = None) -> tuple[str, Delta]:
        """Wait for the next (request id, delta).

        Raises:
          TimeoutError: nothing came within `timeout_s`.
        """
        with self._filled:
            if not self._filled.wait_for(lambda: bool(self._waiting), timeout_s):
                raise TimeoutError(f"no output within {timeout_s} s")
            return self._waiting.popitem(last=False)
