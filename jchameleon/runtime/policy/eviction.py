"""Which idle adapters leave the device when pages are needed."""

from typing import Protocol

import numpy as np

from jchameleon.runtime.policy.residency import Adapter, Candidates


class EvictionPolicy(Protocol):
    """Orders the eviction candidates."""

    def score(self, table: Candidates) -> np.ndarray:
        """Return f64[n], one score per row of `table`; the lowest is evicted first.

        The planner itself keeps adapters in use or pinned out of the table and evicts
        those that waiting requests name only after all others.
        """


class Lru:
    """Evict what was used longest ago."""

    def score(self, table: Candidates) -> np.ndarray:
        """Return the time of last use, f64[n]."""
        return table.last_used_s


def choose_victims(
    policy: EvictionPolicy, table: Candidates, short_pages: int
) -> list[Adapter]:
    """Return the adapters to evict, in order, so that `short_pages` become free.

    Adapters without waiting requests go first, then by score, then by registration
    order; the list ends with the one that makes it enough (Chameleon, section 4.2).
    The caller has seen that all candidates together suffice. Takes O(n) numpy work
    and sorts only as many as may be needed.

    Raises:
      ValueError: the policy's scores are not n numbers.
    """
    if short_pages <= 0:
        return []
    scores = np.asarray(policy.score(table), np.float64)
    if scores.shape != (len(table),) or np.isnan(scores).any():
        raise ValueError(
            f"{type(policy).__name__}.score must return {len(table)} numbers without "
            f"NaN, got shape {scores.shape}"
        )
    wanted = table.queued > 0
    victims: list[Adapter] = []
    for rows in (np.flatnonzero(~wanted), np.flatnonzero(wanted)):
        if rows.size == 0:
            continue
        rows = _lowest(rows, scores, table, short_pages)
        freed = np.cumsum(table.num_pages[rows])
        count = min(int(np.searchsorted(freed, short_pages)) + 1, rows.size)
        victims += [table.adapters[row] for row in rows[:count]]
        short_pages -= int(freed[count - 1])
        if short_pages <= 0:
            return victims
    raise AssertionError(f"eviction candidates fall {short_pages} pages short")


def _lowest(
    rows: np.ndarray,  # i64[m]
    scores: np.ndarray,  # f64[n]
    table: Candidates,
    short_pages: int,
) -> np.ndarray:
    """Return rows whose pages suffice, or all of them, lowest score first.

    The single lowest is tried before the most that could be needed: one victim is the
    usual case, and a minimum is some 40 times cheaper than a partition (n = 10,000).
    """
    values = scores[rows]
    most = min(-(-short_pages // int(table.num_pages[rows].min())), rows.size)
    for count in (1, most):
        limit = (
            values.min() if count == 1 else np.partition(values, count - 1)[count - 1]
        )
        lowest = np.flatnonzero(values <= limit)
        lowest = lowest[np.lexsort((table.order[rows[lowest]], values[lowest]))]
        if table.num_pages[rows[lowest]].sum() >= short_pages:
            break
    return rows[lowest]
