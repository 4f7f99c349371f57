"""What the front doors return: outputs, pieces of them, adapters and totals."""

import dataclasses
from typing import Any, Literal, Self

from jchameleon.runtime.outbox import (
    Fault,
    FinishReason,
    RequestTiming,
    TokenLogprobs,
)
from jchameleon.runtime.policy.plan import Books, LaneStats


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CompletionOutput:
    """A finished completion of a prompt.

    Attributes:
      index: which one it is, from 0.
      token_ids: what the model produced, with the token that stopped it.
      text: the tokens as text, without special tokens and before a stop string.
      logprobs: of each token, if asked for: token id -> log-probability, the token
        itself first, then the likeliest.
      finish_reason: "stop", "length", "time_limit", "aborted" or "error".
      error: what went wrong, or why the engine cut it off.
      fault: what kind of reason that was, for programs to act on; see
        `jchameleon.runtime.faults`. None unless finish_reason is "aborted" or "error".
      timing: where the time went.
    """

    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason
    error: str | None
    fault: Fault | None
    timing: RequestTiming


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RequestOutput:
    """A finished request. What it says of a completion is of the first.

    Attributes:
      request_id: unique within the engine.
      adapter: name it was asked for under; None is the base model.
      prompt_token_ids: what the model read.
      prompt_logprobs: if asked for, of each of them as in `CompletionOutput`, None for
        the first; None also where the request ended before all were read.
      outputs: all completions, as many as `SamplingParams.n`.
    """

    request_id: str
    adapter: str | None
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None
    outputs: tuple[CompletionOutput, ...]

    @property
    def token_ids(self) -> tuple[int, ...]:
        """What the model produced, with the token that stopped it."""
        return self.outputs[0].token_ids

    @property
    def text(self) -> str:
        """The tokens as text."""
        return self.outputs[0].text

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        """Log-probabilities of each token, if asked for."""
        return self.outputs[0].logprobs

    @property
    def finish_reason(self) -> FinishReason:
        """Why it ended."""
        return self.outputs[0].finish_reason

    @property
    def error(self) -> str | None:
        """What went wrong, or why the engine cut it off."""
        return self.outputs[0].error

    @property
    def fault(self) -> Fault | None:
        """What kind of reason that was."""
        return self.outputs[0].fault

    @property
    def timing(self) -> RequestTiming:
        """Where the time went."""
        return self.outputs[0].timing


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RequestDelta:
    """A piece of one completion's output while it runs.

    Attributes:
      index: place of the prompt in the call.
      completion: which completion of the prompt, from 0.
      request_id: of the request, unique within the engine.
      text, token_ids: what is new since the completion's delta before.
      logprobs: of the new tokens, if asked for.
      prompt_logprobs: if asked for, once, at the first completion's first token.
      finish_reason, error, fault, timing: set in the completion's last delta only.
    """

    index: int
    completion: int
    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None
    finish_reason: FinishReason | None
    error: str | None
    fault: Fault | None
    timing: RequestTiming | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineFacts:
    """What an engine is; nothing of it changes.

    Attributes:
      device: as jax names it.
      backend: of the device operations.
      lora_targets: projections that adapters may touch.
      pool_bytes: device memory for KV blocks and adapters.
      policy: name of the scheduling policy.
    """

    device: str
    backend: str
    dtype: str
    lora_targets: tuple[str, ...]
    pool_bytes: int
    policy: str


AdapterTier = Literal["device", "loading", "host", "disk"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdapterInfo:
    """One registered adapter as the engine sees it now.

    What follows `host_bytes` is of its content: names of one content share it.

    Attributes:
      name, uid, rank, targets, source: identity.
      tier: the nearest place where it is: on the "device", "loading" to it (pages are
        reserved), in "host" memory, on "disk".
      draining: the name was unregistered or stands for other content by now; requests
        accepted before go on, and this entry goes with the last of them.
      pinned: this name keeps it on the device.
      requests: accepted under this name and not ended, those not submitted yet too.
      size_bytes: what it takes on the device when it is there.
      device_bytes, host_bytes: what it holds there now; 0 where it is not.
      hits, misses: admissions that found it resident, or did not; a request that was
        squashed is admitted again.
      loads, evictions: copies to the device, and removals.
      load_failures: loads that failed; requests for it failed with them.
      running, waiting: requests in the engine.
    """

    name: str
    uid: str
    rank: int
    targets: tuple[str, ...]
    source: str
    tier: AdapterTier
    draining: bool
    pinned: bool
    requests: int
    size_bytes: int
    device_bytes: int
    host_bytes: int
    hits: int
    misses: int
    loads: int
    evictions: int
    load_failures: int
    running: int
    waiting: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """Totals of an engine.

    Attributes:
      page_bytes: device bytes of one page over all layers.
      total_pages: pages that KV blocks and adapters share.
      kv_pages, cached_pages, adapter_pages, free_pages: how they are used now: by
        running requests, by KV blocks that are kept for later ones, by adapters.
      hits, misses, loads, load_failures, evictions: adapter cache since the start.
      host_bytes, host_adapters: weights in host memory now.
      host_hits, disk_reads: loads whose weights came from there, or from disk.
      emulated_link: bandwidth and latency that delay every load, or None.
      bypasses: admissions over the head of a lane (Chameleon, section 4.3).
      squashes: requests sent back to wait and recomputed; growth_squashes: those whose
        pages a request that outgrew its predicted length took.
      grown_pages: pages given to such requests; stalls: times that one skipped a step.
      lanes: the scheduler's lanes, smallest requests first; empty where it has none.
      prefix_queried_tokens: tokens of admitted prompts that may use the prefix cache,
        those of squashed requests again; prefix_hit_tokens: how many it spared them.
      evicted_blocks: cached KV blocks whose pages were needed.
      waiting, running: requests.
      programs: compiled programs; all of them were compiled during warm-up.
    """

    page_bytes: int
    total_pages: int
    kv_pages: int
    cached_pages: int
    adapter_pages: int
    free_pages: int
    hits: int
    misses: int
    loads: int
    load_failures: int
    evictions: int
    host_bytes: int
    host_adapters: int
    host_hits: int
    disk_reads: int
    emulated_link: str | None
    bypasses: int
    squashes: int
    growth_squashes: int
    grown_pages: int
    stalls: int
    lanes: tuple[LaneStats, ...]
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    evicted_blocks: int
    waiting: int
    running: int
    programs: int

    @classmethod
    def of(cls, books: Books, **engine: Any) -> Self:
        """Return the planner's totals and, by field, what only the engine knows."""
        known = {field.name for field in dataclasses.fields(cls)}
        totals = {
            field.name: getattr(books, field.name)
            for field in dataclasses.fields(books)
            if field.name in known
        }
        adapter_pages = books.resident_pages + books.loading_pages
        return cls(**totals, adapter_pages=adapter_pages, **engine)
