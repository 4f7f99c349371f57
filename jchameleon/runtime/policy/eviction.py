"""Which idle adapters leave the device when pages are needed."""

from typing import Protocol

import numpy as np

from jchameleon.config import is_number
from jchameleon.errors import ConfigError
from jchameleon.runtime.policy.candidates import Adapter, Candidates


class EvictionPolicy(Protocol):
    """Orders the eviction candidates.

    Cached KV blocks take their place in this order by themselves, see
    `PrefixCache.goes_before`.

    A policy may also have any of these methods, which the planner calls where it
    finds them:

    * `used(order: int)`: an admitted request uses the adapter. Called after what was
      evicted to make room for that request.
    * `evicted(order: int, score: float)`: the adapter is evicted; this was its score.
    * `expired(table: Candidates)`: return bool[n], the rows to evict now although
      nobody needs their pages. Asked once in a plan, and not about an empty table.
    * `forget(order: int)`: the adapter was unregistered and is gone. Another one may
      get its order from now on, and must find nothing there.
    """

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


class ChameleonScore:
    """Keep what is used often, was used lately and is large, by a weighted sum.

    Chameleon, section 4.2, with its weights; a large adapter takes longer to load
    again. Each term is brought to 0 .. 1 over the current candidates (our choice).

    Raises:
      ConfigError: a weight is negative or no finite number.
    """

    def __init__(
        self, *, frequency: float = 0.45, recency: float = 0.10, size: float = 0.45
    ) -> None:
        for name, weight in (
            ("frequency", frequency),
            ("recency", recency),
            ("size", size),
        ):
            if not is_number(weight) or weight < 0:
                raise ConfigError(
                    f"{name}={weight!r} must be a finite number, at least 0"
                )
        self._frequency = frequency
        self._recency = recency
        self._size = size

    def score(self, table: Candidates) -> np.ndarray:
        """Return frequency / max, 1 - age / max age and pages / max, weighted, f64[n].

        A term whose maximum is 0 is 0: with no age at all, recency is 1.
        """
        frequency, pages = table.frequency, table.num_pages
        score = frequency * (self._frequency / max(frequency.max(), 1))
        score += pages * (self._size / max(pages.max(), 1))
        oldest_s = table.last_used_s.min()
        max_age_s = table.now_s - oldest_s
        if max_age_s > 0:  # 1 - age / max age, with fewer roundings
            score += (table.last_used_s - oldest_s) / max_age_s * self._recency
        else:
            score += self._recency
        return score


class FairShare(ChameleonScore):
    """Chameleon's score with equal weights, one of the paper's baselines."""

    def __init__(self) -> None:
        super().__init__(frequency=1 / 3, recency=1 / 3, size=1 / 3)


class Gdsf:
    """Greedy-Dual-Size-Frequency: uses times reload seconds per page, plus a clock.

    The clock is the largest score evicted so far, and an adapter keeps the clock of
    its last use, so what is used no more falls behind (Cherkasova, HP Labs 1998).
    Uses count from one eviction to the next; a load that fails or is given up does
    not end the count.

    An adapter loaded ahead of its first use stands as if used once, at the clock of
    the first score after its load. That is the clock of the load, since the clock
    moves only after a score. Its first use replaces this one (our choice).
    """

    def __init__(self) -> None:
        self._clock = 0.0
        self._uses = np.zeros(0, np.float64)  # by order
        self._clock_at_use = np.zeros(0, np.float64)  # by order; -1 before any

    def used(self, order: int) -> None:
        """Count a use, at the present clock."""
        self._grow(order)
        self._uses[order] += 1
        self._clock_at_use[order] = self._clock

    def evicted(self, order: int, score: float) -> None:
        """Set the clock to `score` if that is later, and forget the adapter's uses."""
        self._grow(order)
        self._clock = max(self._clock, score)
        self._uses[order] = 0
        self._clock_at_use[order] = -1

    def forget(self, order: int) -> None:
        """Forget the adapter's uses and its clock; the clock of all goes on."""
        if order < self._uses.size:
            self._uses[order] = 0
            self._clock_at_use[order] = -1

    def score(self, table: Candidates) -> np.ndarray:
        """Return clock at last use + uses x reload seconds / pages, f64[n]."""
        order = table.order
        self._grow(table.largest_order)
        clock = self._clock_at_use.take(order)
        if clock.min() < 0:
            fresh = clock < 0
            clock[fresh] = self._clock
            self._clock_at_use[order[fresh]] = self._clock
        base_s, s_per_page = table.load_line
        score = table.per_page * base_s  # reload seconds / pages
        score += s_per_page
        score *= np.maximum(self._uses.take(order), 1)
        score += clock
        return score

    def _grow(self, order: int) -> None:
        more = max(order + 1, 2 * self._uses.size) - self._uses.size
        if order >= self._uses.size:
            self._uses = np.pad(self._uses, (0, more))
            self._clock_at_use = np.pad(
                self._clock_at_use, (0, more), constant_values=-1
            )


class Drop:
    """Keep nothing: an adapter goes when its last request ends, as in S-LoRA.

    One that was loaded ahead stays as long as a waiting request names it.
    """

    def score(self, table: Candidates) -> np.ndarray:
        """Return the time of last use, f64[n]."""
        return table.last_used_s

    def expired(self, table: Candidates) -> np.ndarray:
        """Return what was used since its load, or waits for nobody, bool[n]."""
        return ~table.unused | (table.queued == 0)


def choose_victims(
    policy: EvictionPolicy, table: Candidates, short_pages: int
) -> list[tuple[Adapter, float]]:
    """Return the adapters to evict, in order, so that `short_pages` become free.

    Each comes with its score. Adapters without waiting requests go first, then by
    score, then by registration order; the list ends with the one that makes it enough
    (Chameleon, section 4.2). The caller has seen that all candidates together
    suffice. Takes O(n) numpy work and sorts only as many as may be needed.

    Raises:
      ValueError: the policy's scores are not n numbers.
    """
    if short_pages <= 0:
        return []
    assert table.total_pages >= short_pages, (
        f"eviction candidates hold {table.total_pages} of {short_pages} pages"
    )
    scores = np.asarray(policy.score(table), np.float64)
    # The minimum of an array with a NaN is NaN, in one pass.
    if scores.shape != (len(table),) or np.isnan(scores.min()):
        raise ValueError(
            f"{type(policy).__name__}.score must return {len(table)} numbers without "
            f"NaN, got shape {scores.shape}"
        )
    victims: list[tuple[Adapter, float]] = []
    unwanted = table.unwanted
    for group in (unwanted, ~unwanted):
        if not group.any():
            continue
        rows = _lowest(group, scores, table, short_pages)
        freed = np.cumsum(table.num_pages[rows])
        count = min(int(np.searchsorted(freed, short_pages)) + 1, rows.size)
        victims += [(table.adapters[row], float(scores[row])) for row in rows[:count]]
        short_pages -= int(freed[count - 1])
        if short_pages <= 0:
            break
    return victims


def _lowest(
    group: np.ndarray,  # bool[n], at least one
    scores: np.ndarray,  # f64[n]
    table: Candidates,
    short_pages: int,
) -> np.ndarray:
    """Return rows of `group` whose pages suffice, or all, lowest score first.

    The single lowest is tried before the most that could be needed: one victim is the
    usual case, and a minimum is some 40 times cheaper than a partition (n = 10,000).
    """
    values = np.where(group, scores, np.inf)
    rows = np.flatnonzero(values == values[values.argmin()])
    if rows.size > 1:  # scores may be infinite too
        rows = rows[group[rows]]
    first = rows[table.order[rows].argmin()]
    if table.num_pages[first] >= short_pages:
        return np.array([first])
    most = -(-short_pages // int(table.num_pages.min()))
    most = min(most, int(np.count_nonzero(group)))
    limit = np.partition(values, most - 1)[most - 1]
    rows = np.flatnonzero((scores <= limit) & group)
    return rows[np.lexsort((table.order[rows], scores[rows]))]
