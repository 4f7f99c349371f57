"""Lanes: waiting requests of like size, and the tokens that those running may use."""

import dataclasses
import itertools
from collections.abc import Sequence

from jchameleon.runtime.policy.line import PriorityLine
from jchameleon.runtime.policy.request import Request


@dataclasses.dataclass(slots=True, eq=False)
class Entry:
    """A request as a scheduler with lanes keeps it.

    Attributes:
      seq: its place in the order of arrival.
      joined_at, passed_at: `joins` and `passed` of its priority's tally when it came.
      chunks: adapter size in units of rank 8.
      adapter_pages: 0 for the base model.
      predicted_tokens: expected output.
      cost_tokens: what it borrows from its lane while it runs.
      wrs: its size when it arrived or when lanes were last cut.
      lane: index of its lane.
      passed: the entry that it overtook by a bypass when it started.
      passers: running entries whose `passed` this one is, by seq.
    """

    request: Request
    seq: int
    chunks: int
    adapter_pages: int
    predicted_tokens: int = 0
    cost_tokens: int = 0
    wrs: float = 0.0
    lane: int = 0
    running: bool = False
    joined_at: int = 0
    passed_at: int = 0
    passed: "Entry | None" = None
    passers: dict[int, "Entry"] = dataclasses.field(default_factory=dict)

    def unlink(self) -> None:
        """Forget whom it passed and who passed it."""
        if self.passed is not None:
            del self.passed.passers[self.seq]
            self.passed = None
        for passer in self.passers.values():
            passer.passed = None
        self.passers.clear()


@dataclasses.dataclass(slots=True, eq=False)
class Tally:
    """What a scheduler counts of the requests of one priority.

    Attributes:
      members: that wait or run; waiting: those of them that wait.
      joins: times that one joined the line, by arriving or coming back.
      passed: times that a less urgent one started while some of these waited and no
        more urgent one did.
    """

    members: int = 0
    waiting: int = 0
    joins: int = 0
    passed: int = 0


class Lane:
    """Waiting entries by priority and seq, and the books of running ones.

    Attributes:
      upper_wrs: requests up to this size belong here.
      least_tokens: the quota that its traffic asks for.
      quota_tokens: the quota that it has.
      used_tokens: costs of its running requests; above the quota when it borrowed.
      running: how many they are.
    """

    def __init__(self, *, upper_wrs: float, least_tokens: float) -> None:
        self.upper_wrs = upper_wrs
        self.least_tokens = least_tokens
        self.quota_tokens = 0
        self.used_tokens = 0
        self.running = 0
        self._waiting: PriorityLine[int, Entry] = PriorityLine()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def left_tokens(self) -> int:
        """Tokens of the quota that nobody uses; negative when it borrowed."""
        return self.quota_tokens - self.used_tokens

    def add(self, entry: Entry) -> None:
        """Let an entry wait here, before those of its priority that arrived later.

        O(1) for one that arrived last, as `PriorityLine.insert`.
        """
        self._waiting.insert(entry.seq, entry, entry.request.priority)

    def remove(self, entry: Entry) -> None:
        """Take out a waiting entry; O(1)."""
        self._waiting.pop(entry.seq)

    def head(self) -> Entry:
        """Return the first waiting entry, of which there must be one; O(1)."""
        return next(self._waiting.values())

    def behind_head(self, count: int) -> list[Entry]:
        """Return up to `count` entries that wait behind the head, in order."""
        return list(itertools.islice(self._waiting.values(), 1, 1 + count))

    def charge(self, entry: Entry) -> None:
        """Lend a request that starts to run its tokens."""
        self.used_tokens += entry.cost_tokens
        self.running += 1

    def refund(self, entry: Entry) -> None:
        """Take back the tokens of a request that no longer runs."""
        self.used_tokens -= entry.cost_tokens
        self.running -= 1


def least_tokens(
    *, largest_tokens: float, service_s: float, arrivals_per_s: float, slo_s: float
) -> float:
    """Return the quota with which a lane, taken as an M/M/1 queue, meets its SLO.

    Tok_min = S * D * (1 / SLO + lambda) (Chameleon, section 4.3): with T tokens it
    runs T / S requests at once and ends T / (S * D) a second; such a queue answers
    after 1 / (T / (S * D) - lambda) seconds in the mean, which shall be the SLO.

    Args:
      largest_tokens: S, cost of the lane's dearest request.
      service_s: D, mean time of its requests on an idle engine.
      arrivals_per_s: lambda.
    """
    return largest_tokens * service_s * (1 / slo_s + arrivals_per_s)


def split_tokens(total_tokens: int, least: Sequence[float]) -> list[int]:
    """Return each lane's quota in whole tokens; they add up to `total_tokens`.

    Each gets its minimum and, in proportion to it, what is left (Chameleon, section
    4.3); minima above the total are scaled down in proportion (our own choice). Both
    come to total * minimum / sum of minima. Equal shares when all minima are 0.
    """
    weights = list(least) if any(least) else [1.0] * len(least)
    # Not sum(): it rounds in another way from Python 3.12 on.
    *_, whole = ends_at = list(itertools.accumulate(weights))
    # Differences of rounded sums, so that no token is lost or invented.
    ends = [round(total_tokens * (end / whole)) for end in ends_at]
    ends[-1] = total_tokens
    return [end - start for start, end in itertools.pairwise([0, *ends])]
