"""What the clients return. Times are in seconds."""

import dataclasses
import datetime
from typing import Literal

FinishReason = Literal["stop", "length", "time_limit", "aborted"]

Logprobs = tuple[dict[int, float], ...]
"""Of each token, log-probability by token id: the token that is there first, then the
likeliest; empty for the first token of a prompt."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Where a completion's time went, as the server measured it.

    Attributes:
      queue_s: that it waited to be admitted.
      adapter_load_s: from then until its adapter was resident.
      ttft_s: until its first token; None if it ended without one.
      total_s: until it ended.
      lane: the scheduler's lane, 0 holds the smallest requests; None without lanes.
      adapter_cache_hit: its adapter was resident; None for the base model.
      wrs: its weighted request size; None without lanes.
      preemptions: times that it was sent back to wait and recomputed.
    """

    queue_s: float
    adapter_load_s: float
    ttft_s: float | None
    total_s: float
    lane: int | None
    adapter_cache_hit: bool | None
    wrs: float | None
    preemptions: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Tokens of a request: prompt, all completions together, and prompt tokens that
    were not run because their KV was cached."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One of the `n` completions of a prompt.

    Attributes:
      logprobs: of its tokens; None if not asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: Logprobs | None
    finish_reason: FinishReason
    timing: Timing


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """The answer to a prompt. What it says of a completion is of the first.

    Attributes:
      prompt_token_ids: what the model read.
      prompt_logprobs: of the prompt's tokens; None if not asked for.
      completions: all of them, by index.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: Logprobs | None
    completions: tuple[Completion, ...]
    usage: Usage

    @property
    def text(self) -> str:
        """The output."""
        return self.completions[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The output's tokens, with the one that stopped it."""
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why it ended."""
        return self.completions[0].finish_reason


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A piece of one completion of a stream.

    Attributes:
      index: which completion it is of.
      text, token_ids, logprobs: what is new.
      finish_reason, timing: in the last piece of its completion, else None.
      prompt_token_ids, prompt_logprobs: in the first piece of the stream, else None;
        logprobs only if asked for.
      usage: in the last piece of the stream, else None.
    """

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: Logprobs | None
    finish_reason: FinishReason | None
    timing: Timing | None
    prompt_token_ids: tuple[int, ...] | None
    prompt_logprobs: Logprobs | None
    usage: Usage | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """A prompt as the model reads it.

    Attributes:
      max_model_len: longest prompt and output together, in tokens.
    """

    token_ids: tuple[int, ...]
    max_model_len: int


AdapterState = Literal[
    "unspecified", "registered", "host", "loading", "device", "draining", "failed"
]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """A registered adapter.

    Attributes:
      uid: SHA-256 of its content.
      source_path: below the server's adapter root.
      size_bytes: on the device, when it is there.
      state: "registered" is on disk only; "draining" takes no new requests; "failed" is
        refused, `reason` says why.
      running, waiting: requests.
      last_used_at: None if no request has named it.
      hits, misses: admissions that found it on the device, or did not.
    """

    adapter_id: str
    uid: str
    source_path: str
    rank: int
    target_modules: tuple[str, ...]
    size_bytes: int
    state: AdapterState
    reason: str
    pinned: bool
    running: int
    waiting: int
    registered_at: datetime.datetime
    last_used_at: datetime.datetime | None
    hits: int
    misses: int
    evictions: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ServerInfo:
    """What a server is; `GetServerInfoResponse` says what the fields mean."""

    version: str
    jax_version: str
    model: str
    device: str
    backend: str
    dtype: str
    vocab_size: int
    max_model_len: int
    max_running: int
    max_lora_rank: int
    lora_targets: tuple[str, ...]
    has_tokenizer: bool
    has_chat_template: bool
    dynamic_adapters: bool
    pool_bytes: int
    policy: str
    max_waiting_requests: int
    max_waiting_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CacheStats:
    """Adapters on the device and in host memory; counters are since the start."""

    capacity_bytes: int
    used_bytes: int
    pinned_bytes: int
    idle_bytes: int
    hits: int
    misses: int
    loads: int
    evictions: int
    load_failures: int
    host_bytes: int
    host_hits: int
    disk_reads: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class QueueStats:
    """A lane of the scheduler; `wrs_max` is None for the last."""

    index: int
    wrs_min: float
    wrs_max: float | None
    quota_tokens: int
    used_tokens: int
    waiting: int
    running: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KvStats:
    """The KV cache."""

    used_bytes: int
    cached_bytes: int
    prefix_queried_tokens: int
    prefix_hit_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """The engine's loop."""

    last_progress_age_seconds: float
    waiting: int
    running: int
    preemptions: int
    bypasses: int
    programs: int
    compiles_after_warm_up: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ServerStats:
    """What a server does now; `engine.proto` says what the fields mean."""

    cache: CacheStats
    queues: tuple[QueueStats, ...]
    kv: KvStats
    engine: EngineStats
