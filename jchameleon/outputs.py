"""What the front doors return: outputs, pieces of them, adapters and totals."""

import dataclasses

from jchameleon.runtime.outbox import FinishReason, RequestTiming
from jchameleon.runtime.policy.plan import LaneStats


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RequestOutput:
    """A finished request.

    Attributes:
      request_id: unique within the engine.
      adapter: name it was asked for under; None is the base model.
      prompt_token_ids: what the model read.
      token_ids: what it produced, with the token that stopped it.
      text: the tokens as text, without special tokens and before a stop string.
      finish_reason: "stop", "length", "aborted" or "error".
      error: what went wrong, or why the engine cut it off.
      timing: where the time went.
    """

    request_id: str
    adapter: str | None
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    error: str | None
    timing: RequestTiming


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RequestDelta:
    """A piece of one request's output while it runs.

    Attributes:
      index: place of the prompt in the call.
      request_id: unique within the engine.
      text, token_ids: what is new since the delta before.
      finish_reason, error, timing: set in the request's last delta only.
    """

    index: int
    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    error: str | None
    timing: RequestTiming | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdapterInfo:
    """One registered adapter as the engine sees it now.

    Attributes:
      name, uid, rank, targets, source: identity.
      device_bytes: what it takes in the pool when resident.
      resident: it is on the device.
      in_host_memory: its weights need not be read from disk for the next load.
      pinned: it is kept there.
      hits, misses: admissions that found it resident, or did not; a request that was
        squashed is admitted again.
      loads, evictions: copies to the device, and removals.
      load_failures: loads that failed; requests for it failed with them.
    """

    name: str
    uid: str
    rank: int
    targets: tuple[str, ...]
    source: str
    device_bytes: int
    resident: bool
    in_host_memory: bool
    pinned: bool
    hits: int
    misses: int
    loads: int
    evictions: int
    load_failures: int


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
