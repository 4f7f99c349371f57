"""What a planner hands out: the iteration's orders, and its books on request.

Plain values of tuples, strings and integers: cheap to log, compare and replay.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Run tokens `start` to `start + length` of one request.

    They are its prompt; of a request that was squashed, prompt and output so far.
    """

    request_id: str
    start: int
    length: int


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """Copy an adapter into `pages`, which are in the order of its packed rows."""

    uid: str
    pages: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One iteration, to be applied in the order of the fields.

    Pages of requests and adapters that ended or were evicted may be handed out again
    in the same plan, so whatever read them must precede this plan on the device.

    Attributes:
      failed: (request id, reason, fault) of requests that end now without having
        finished; the fault is that of the load that failed, "capacity" where the pool
        can never hold it, "rejected" where the admission policy turned it away.
      squashed: (request id, reason) of running requests that lose their pages and wait
        again; what they produced stays. One of them may be among `admitted` again.
      evicted: uids whose pages are gone; one of them may be among `loads` again.
      forgotten: uids that were unregistered and that nothing here knows any more.
      admitted: request ids that start to run, in admission order.
      hits: those of `admitted` whose adapter was resident.
      kv_pages: (request id, pages) for `admitted`, pages in token-block order; some of
        the first may be cached ones that several requests share.
      cached: (request id, tokens) that requests need not run, because the pages behind
        those they have run hold the KV entries already.
      lanes: (request id, lane, WRS) of those of `admitted` that came through a lane.
      bypasses: (request id, passed id): the first was admitted over the second, the
        head of its lane.
      swapped: (request id, block, pages) of running requests whose pages from that
        block on are replaced by cached ones with the same KV entries.
      grown: (request id, pages) that running requests get behind those they have.
      loads: adapter copies to start, in this order.
      prefill: prompt chunks; only of requests whose adapter is resident.
      decode: request ids that produce one token each, in admission order.
    """

    failed: tuple[tuple[str, str, str], ...] = ()
    squashed: tuple[tuple[str, str], ...] = ()
    evicted: tuple[str, ...] = ()
    forgotten: tuple[str, ...] = ()
    admitted: tuple[str, ...] = ()
    hits: tuple[str, ...] = ()
    kv_pages: tuple[tuple[str, tuple[int, ...]], ...] = ()
    cached: tuple[tuple[str, int], ...] = ()
    lanes: tuple[tuple[str, int, float], ...] = ()
    bypasses: tuple[tuple[str, str], ...] = ()
    swapped: tuple[tuple[str, int, tuple[int, ...]], ...] = ()
    grown: tuple[tuple[str, tuple[int, ...]], ...] = ()
    loads: tuple[Load, ...] = ()
    prefill: tuple[PrefillChunk, ...] = ()
    decode: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LaneStats:
    """One lane of a scheduler, smallest requests first.

    Attributes:
      upper_wrs: requests up to this size belong here; infinite for the last lane.
      quota_tokens: what the lane owns.
      used_tokens: what its running requests are charged; above the quota when it
        borrowed.
      waiting, running: requests.
    """

    upper_wrs: float
    quota_tokens: int
    used_tokens: int
    waiting: int
    running: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Books:
    """A snapshot of the planner's totals.

    Attributes:
      free_pages, kv_pages, cached_pages, resident_pages, loading_pages: with the two
        reserved pages they make up the pool. A page that several running requests share
        is one of `kv_pages`; `cached_pages` are blocks that no running request uses;
        copies that wait for the link count as loading.
      hits, misses: admissions whose adapter was resident, or was not.
      loads: adapter copies started; load_failures: those of them that failed.
      waiting, running: requests in the line, and admitted ones.
      bypasses: admissions over the head of a lane.
      squashes, growth_squashes: requests sent back to wait; the second counts those
        of the first whose pages a row that outgrew its prediction took.
      grown_pages: pages given to rows beyond what they reserved at admission.
      stalls: times a row could not decode for want of a page.
      lanes: empty where the admission policy has none.
      prefix_queried_tokens: tokens that admitted requests of the prefix cache had to
        run; prefix_hit_tokens: those of them that they found there. Both again for a
        request that was squashed.
      evicted_blocks: cached blocks that made room.
    """

    free_pages: int
    kv_pages: int
    resident_pages: int
    loading_pages: int
    hits: int
    misses: int
    evictions: int
    loads: int
    load_failures: int
    waiting: int
    running: int
    bypasses: int = 0
    squashes: int = 0
    growth_squashes: int = 0
    grown_pages: int = 0
    stalls: int = 0
    lanes: tuple[LaneStats, ...] = ()
    cached_pages: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    evicted_blocks: int = 0
