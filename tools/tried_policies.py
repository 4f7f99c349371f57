"""Policies from the literature, as plug-ins: what `tools/exp_tried.py` compares.

They are not shipped presets: docs/experiments.md says what each gave. Any of them runs
on the engine as it is, with this folder on PYTHONPATH:

    [eviction]
    name = "tried_policies:Elora"
"""

import collections
from typing import Any

import numpy as np

from jchameleon.config import is_number
from jchameleon.errors import ConfigError
from jchameleon.runtime.policy.admission import AdmissionView
from jchameleon.runtime.policy.candidates import Candidates
from jchameleon.runtime.policy.chameleon import Chameleon
from jchameleon.runtime.policy.eviction import ChameleonScore
from jchameleon.runtime.policy.lanes import Entry, Lane
from jchameleon.runtime.policy.vtc import Turns


class PerByte:
    """Evict what saves least loading time for its pages: uses x reload seconds / pages.

    The greedy rule of fractional caching with known frequencies; uses are those within
    the window that all scores see.
    """

    def score(self, table: Candidates) -> np.ndarray:
        """Return uses in the window x reload seconds / pages, f64[n]."""
        return table.frequency * table.load_s * table.per_page


class Elora:
    """ELORA's retention value: reload seconds x share of uses x recency.

    Equation 5 of "FastLibra / ELORA" (arXiv 2505.03756): cost x visit frequency x
    (1 - sigmoid(t)), t the time since the last use. The paper gives t no unit, so
    `scale_s` is ours. Its factor for a short supply of adapters (equation 4) is left
    out: as printed it makes adapters cheaper to evict the fewer there are, and what it
    is meant to do, to keep room for adapters, is for admission (`paced`). Evicts only
    when pages are needed, without the paper's timer.

    Raises:
      ConfigError: `scale_s` is no finite number above 0.
    """

    def __init__(self, *, scale_s: float = 60.0) -> None:
        _check_positive("scale_s", scale_s)
        self._scale_s = scale_s

    def score(self, table: Candidates) -> np.ndarray:
        """Return the retention value of each adapter, f64[n]."""
        age = (table.now_s - table.last_used_s) / self._scale_s
        recency = 1.0 / (1.0 + np.exp(np.minimum(age, 500.0)))
        return table.load_s * table.frequency * recency


class TailSafe(ChameleonScore):
    """Evict first what can be loaded again without harm to the tail.

    An analogue for adapters of tail-optimised LRU (arXiv 2510.15152), our derivation:
    there blocks go first that a request can do without and still answer in time; here
    adapters whose reload takes at most `budget_s`. Within either half Chameleon's score
    decides. `budget_s` is what the target leaves after waiting and prefill.

    Raises:
      ConfigError: `budget_s` is no finite number above 0.
    """

    def __init__(self, *, budget_s: float = 0.01) -> None:
        super().__init__()
        _check_positive("budget_s", budget_s)
        self._budget_s = budget_s

    def score(self, table: Candidates) -> np.ndarray:
        """Return Chameleon's score, 2 more where a reload takes too long, f64[n]."""
        # Its three weights sum to 1, so 2 keeps the halves apart.
        return super().score(table) + 2.0 * (table.load_s > self._budget_s)


class Ghosts:
    """Chameleon's three terms, weighted by what evictions turned out to be mistakes.

    As LeCaR does for two caches (Vietri et al., HotStorage '18), for three terms: an
    adapter that comes back after its eviction is a mistake of the terms that wanted it
    gone. Each loses weight by exp(-`rate` x `discount`^age x blame), its blame 1 less
    what it scored the adapter, age the evictions since; `discount` is 0.005 to the
    power of 1 / `remembered`, as there.

    Raises:
      ConfigError: an option is out of its range.
    """

    def __init__(self, *, rate: float = 0.45, remembered: int = 100) -> None:
        _check_positive("rate", rate)
        if type(remembered) is not int or remembered < 1:
            raise ConfigError(f"remembered={remembered!r} must be a positive integer")
        self._rate = rate
        self._discount = 0.005 ** (1 / remembered)
        self._remembered = remembered
        self.weights = np.full(3, 1 / 3)
        self._scores: dict[int, np.ndarray] = {}  # by order, at the last question
        self._ghosts: collections.OrderedDict[int, tuple[int, np.ndarray]] = (
            collections.OrderedDict()
        )
        self._evictions = 0

    def score(self, table: Candidates) -> np.ndarray:
        """Return the weighted sum of the terms, each brought to 0 .. 1, f64[n]."""
        age_s = table.now_s - table.last_used_s
        terms = np.stack(
            [
                table.frequency / max(table.frequency.max(), 1),
                1.0 - age_s / max(age_s.max(), 1e-9),
                table.num_pages / max(table.num_pages.max(), 1),
            ]
        )
        self._scores = dict(zip(table.order.tolist(), terms.T, strict=True))
        return self.weights @ terms

    def evicted(self, order: int, score: float) -> None:
        """Remember what each term said of it."""
        del score
        self._evictions += 1
        said = self._scores.get(order)
        if said is None:  # expired: nobody was asked
            return
        self._ghosts[order] = (self._evictions, said)
        self._ghosts.move_to_end(order)
        if len(self._ghosts) > self._remembered:
            self._ghosts.popitem(last=False)

    def used(self, order: int) -> None:
        """Take weight from the terms that wanted it gone, if it was evicted."""
        ghost = self._ghosts.pop(order, None)
        if ghost is None:
            return
        at, said = ghost
        regret = self._discount ** (self._evictions - at)
        self.weights = self.weights * np.exp(-self._rate * regret * (1.0 - said))
        # None ever vanishes: traffic may change back.
        self.weights = np.maximum(self.weights / self.weights.sum(), 0.01)
        self.weights = self.weights / self.weights.sum()

    def forget(self, order: int) -> None:
        """Forget an adapter that was unregistered."""
        self._ghosts.pop(order, None)
        self._scores.pop(order, None)


class Epochs:
    """Keep a set of adapters that is chosen anew only now and then.

    The slow controller of POLAR (arXiv 2604.16583): after every `epoch_uses` uses those
    with the largest uses x reload seconds, while they fill at most `share` of what is
    resident or was, are kept; all others go by last use. Where the set stays as it was
    the next epoch is twice as long, up to `most_uses` (its "+" variant doubles always).
    Its router, which picks the adapter for a request, has no place here.

    Raises:
      ConfigError: an option is out of its range.
    """

    def __init__(
        self, *, epoch_uses: int = 200, most_uses: int = 3200, share: float = 0.5
    ) -> None:
        for name, value in (("epoch_uses", epoch_uses), ("most_uses", most_uses)):
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name}={value!r} must be a positive integer")
        if not (is_number(share) and 0 < share <= 1):
            raise ConfigError(f"share={share!r} must be a number above 0, at most 1")
        self._first_uses = self._epoch_uses = epoch_uses
        self._most_uses = most_uses
        self._share = share
        self._uses: collections.Counter[int] = collections.Counter()
        self._left = epoch_uses
        self._kept: frozenset[int] = frozenset()
        self._facts: dict[int, tuple[float, int]] = {}  # reload seconds, pages
        self._pages = 0  # most that candidates have held

    def score(self, table: Candidates) -> np.ndarray:
        """Return the time of last use, later than any for what is kept, f64[n]."""
        self._pages = max(self._pages, table.total_pages)
        orders = table.order.tolist()
        facts = zip(table.load_s.tolist(), table.num_pages.tolist(), strict=True)
        self._facts.update(zip(orders, facts, strict=True))
        if self._left <= 0:
            self._choose()
        kept = np.array([order in self._kept for order in orders])
        return table.last_used_s + kept * (table.now_s + 1.0)

    def used(self, order: int) -> None:
        """Count a use."""
        self._uses[order] += 1
        self._left -= 1

    def forget(self, order: int) -> None:
        """Forget an adapter that was unregistered."""
        self._uses.pop(order, None)
        self._facts.pop(order, None)
        self._kept = self._kept - {order}

    def _choose(self) -> None:
        room = self._share * self._pages
        kept = []
        ranked = sorted(
            (order for order in self._uses if order in self._facts),
            key=lambda order: (-self._uses[order] * self._facts[order][0], order),
        )
        for order in ranked:
            if self._facts[order][1] <= room:
                room -= self._facts[order][1]
                kept.append(order)
        same = frozenset(kept) == self._kept
        self._kept = frozenset(kept)
        longer = min(2 * self._epoch_uses, self._most_uses)
        self._epoch_uses = longer if same else self._first_uses
        self._left = self._epoch_uses
        self._uses.clear()


class TurnLanes(Chameleon):
    """Chameleon's lanes, and within each turns by adapter as in `Vtc`.

    Lanes, quotas, borrowing and who was overtaken too often are Chameleon's. Of those
    that wait in a lane, the first is whose adapter was given least, not who came first;
    nobody passes it, whatever `bypass` says. Looks at all that wait in a lane for each
    that starts: for comparison, not for use.

    Raises:
      ConfigError: as `Chameleon`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._turns = Turns(prompt_weight=1.0, output_weight=2.0)

    def admit(self, view: AdmissionView) -> None:
        """Take in what happened, then as `Chameleon`."""
        self._turns.take_in(view)
        super().admit(view)

    def forget(self, uid: str) -> None:
        """Forget what an adapter that was unregistered had been given."""
        self._turns.forget(uid)

    def _admit_from(
        self, view: AdmissionView, lane: Lane, borrow: bool, stuck: list[Lane]
    ) -> bool:
        entry = min([lane.head(), *lane.behind_head(len(lane))], key=self._place)
        self._predict(view, entry)
        if entry.cost_tokens > self._tokens(lane, borrow):
            return False
        if not self._start(view, entry):
            stuck.append(lane)
            return False
        return True

    def _place(self, entry: Entry) -> tuple[int, float, int]:
        request = entry.request
        return request.priority, self._turns.given(request.adapter_uid), entry.seq

    def _start(
        self, view: AdmissionView, entry: Entry, passed: Entry | None = None
    ) -> bool:
        if not super()._start(view, entry, passed):
            return False
        self._turns.started(entry.request)
        return True


def _check_positive(name: str, value: float) -> None:
    if not (is_number(value) and value > 0):
        raise ConfigError(f"{name}={value!r} must be a finite number above 0")
