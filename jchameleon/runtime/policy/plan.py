"""What a planner hands out: the iteration's orders, and its books on request.

Plain values of tuples, strings and integers: cheap to log, compare and replay.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Run prompt tokens `start` to `start + length` of one request."""

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
      failed: (request id, reason) of requests that end now without having finished.
      evicted: uids whose pages are gone; one of them may be among `loads` again.
      admitted: request ids that start to run, in admission order.
      hits: those of `admitted` whose adapter was resident.
      kv_pages: (request id, pages) for `admitted`, pages in token-block order.
      loads: adapter copies to start, in this order.
      prefill: prompt chunks; only of requests whose adapter is resident.
      decode: request ids that produce one token each, in admission order.
    """

    failed: tuple[tuple[str, str], ...] = ()
    evicted: tuple[str, ...] = ()
    admitted: tuple[str, ...] = ()
    hits: tuple[str, ...] = ()
    kv_pages: tuple[tuple[str, tuple[int, ...]], ...] = ()
    loads: tuple[Load, ...] = ()
    prefill: tuple[PrefillChunk, ...] = ()
    decode: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Books:
    """A snapshot of the planner's totals.

    Attributes:
      free_pages, kv_pages, resident_pages, loading_pages: with the two reserved
        pages they make up the pool; copies that wait for the link count as loading.
      hits, misses: admissions whose adapter was resident, or was not.
      loads: adapter copies started; load_failures: those of them that failed.
      waiting, running: requests in the line, and admitted ones.
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
