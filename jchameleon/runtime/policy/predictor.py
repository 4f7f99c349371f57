"""How many tokens a request will produce."""

import bisect
import hashlib
import itertools
from collections.abc import Sequence
from typing import Protocol

from jchameleon.config import is_number
from jchameleon.errors import ConfigError
from jchameleon.runtime.policy.quantile import SlidingQuantile
from jchameleon.runtime.policy.request import Request


class LengthPredictor(Protocol):
    """Estimates output lengths and learns from requests that finished.

    A policy may also have a method `forget(uid: str)`: the adapter was unregistered,
    and what is kept under its uid should go.
    """

    def predict(self, request: Request) -> int:
        """Return the expected output, in tokens, 1 .. request.max_tokens."""

    def observe(self, request: Request, produced_tokens: int) -> None:
        """Learn that `request` ended by itself after `produced_tokens`."""


class MaxTokens:
    """Expect every request to use all it may."""

    def predict(self, request: Request) -> int:
        """Return the request's limit."""
        return request.max_tokens

    def observe(self, request: Request, produced_tokens: int) -> None:
        """Learn nothing."""
        del request, produced_tokens


class Oracle:
    """Believe the caller's estimate, which in experiments is the true length."""

    def predict(self, request: Request) -> int:
        """Return what the caller expects, or the request's limit where it is silent."""
        if request.expected_tokens is None:
            return request.max_tokens
        return request.expected_tokens

    def observe(self, request: Request, produced_tokens: int) -> None:
        """Learn nothing."""
        del request, produced_tokens


class NoisyOracle:
    """Err as a learnt classifier of lengths does: by a confusion matrix.

    Stands in for a proxy model in experiments that know true lengths. Class i holds
    cuts[i-1] < tokens <= cuts[i]. The defaults are the 25, 50, 75 and 99 % points of
    the output lengths that the SSJF predictor was trained on (Qiu et al., "Efficient
    Interactive LLM Serving with Proxy Model-based Sequence Length Prediction", arXiv
    2404.08509) and its accuracy over these classes, 60 %, and 93 % within one class.
    The "about 80 %" that Chameleon (section 4.3) quotes is the same model over three:
    cuts=(141, 503), accuracy=0.807, within_one=0.997.

    A classifier knows no more than the class, so the prediction is the middle of the
    class (of what max_tokens leaves of it), even when the class is right. The middle
    halves the largest error, and pages are linear in tokens; the geometric middle
    would call 1 .. 42 tokens 6. All of this but the figures is our choice.

    Options:
      cuts: upper ends of all classes but the last, in tokens, increasing.
      accuracy: share of requests whose class is right.
      within_one: share whose class is right or a neighbour's; both neighbours are as
        likely, and so are all classes farther away. A row without any of those gives
        their share to its neighbours.
      matrix: row per true class, column per predicted class, rows that sum to 1;
        replaces `accuracy` and `within_one`.
      seed: the error of a request depends on this and its id alone, never on the
        order of calls.

    Raises:
      ConfigError: an option is out of its range.
    """

    def __init__(
        self,
        *,
        cuts: Sequence[int] = (42, 141, 294, 503),
        accuracy: float = 0.6,
        within_one: float = 0.93,
        matrix: Sequence[Sequence[float]] | None = None,
        seed: int = 0,
    ) -> None:
        if type(seed) is not int:
            raise ConfigError(f"seed={seed!r} must be an integer")
        self._cuts = _checked_cuts(cuts)
        if matrix is None:
            matrix = _confusion_matrix(len(self._cuts) + 1, accuracy, within_one)
        else:
            _check_matrix(matrix, len(self._cuts) + 1)
        self._seed = seed
        # Divided by the total, so that rounding never leaves a gap below 1.
        self._cumulative = [
            [part / total[-1] for part in total]
            for total in (list(itertools.accumulate(row)) for row in matrix)
        ]

    def predict(self, request: Request) -> int:
        """Return the middle of the class drawn for the caller's estimate.

        Without an estimate there is no truth to blur: the request's limit.
        """
        if request.expected_tokens is None:
            return request.max_tokens
        true_class = bisect.bisect_left(self._cuts, request.expected_tokens)
        drawn = bisect.bisect_right(
            self._cumulative[true_class], self._uniform(request.request_id)
        )
        least = self._cuts[drawn - 1] + 1 if drawn else 1
        most = request.max_tokens
        if drawn < len(self._cuts):
            most = min(most, self._cuts[drawn])
        return min((least + most) // 2, request.max_tokens)

    def observe(self, request: Request, produced_tokens: int) -> None:
        """Learn nothing."""
        del request, produced_tokens

    def _uniform(self, request_id: str) -> float:
        """Return a number in [0, 1) that looks random but is a request's own."""
        # An id is any string, also one that UTF-8 has no bytes for.
        text = f"{self._seed}:{request_id}".encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(text, digest_size=8).digest()
        return (int.from_bytes(digest, "big") >> 11) / 2**53


class Quantile:
    """Expect what most recent requests of the same adapter stayed within.

    An adapter is one tenant's task, and tasks differ in length more than requests of
    one task do. The quantile is high because errors cost unequally: who was predicted
    too short may outgrow its pages and be squashed, its tokens computed twice; who was
    predicted too long holds a few pages more. An output cut at max_tokens counts as it
    is. Our choice: Chameleon (section 4.3) asks a language model instead.

    Options:
      quantile: share of outputs that the prediction shall cover, 0 < quantile <= 1.
      window: latest outputs per adapter (the base model counts as one) that count.
      min_samples: with fewer outputs of the adapter, the last 4 * window over all
        adapters count; with fewer of those, the request's limit is predicted.

    Raises:
      ConfigError: an option is out of its range.
    """

    def __init__(
        self, *, quantile: float = 0.9, window: int = 64, min_samples: int = 8
    ) -> None:
        if not is_number(quantile) or not 0 < quantile <= 1:
            raise ConfigError(f"quantile={quantile!r} must be above 0 and at most 1")
        if type(window) is not int or window < 1:
            raise ConfigError(f"window={window!r} must be a positive integer")
        if type(min_samples) is not int or not 1 <= min_samples <= window:
            raise ConfigError(
                f"min_samples={min_samples!r} must be an integer, 1 to window={window}"
            )
        self._quantile = quantile
        self._window = window
        self._min_samples = min_samples
        self._by_adapter: dict[str | None, SlidingQuantile] = {}
        self._all = SlidingQuantile(4 * window)

    def predict(self, request: Request) -> int:
        """Return the quantile of like requests' outputs, at most the limit."""
        outputs = self._by_adapter.get(request.adapter_uid)
        if outputs is None or len(outputs) < self._min_samples:
            outputs = self._all
        if len(outputs) < self._min_samples:
            return request.max_tokens
        return min(max(outputs.at(self._quantile), 1), request.max_tokens)

    def observe(self, request: Request, produced_tokens: int) -> None:
        """Add an output to those of its adapter and to those of all."""
        outputs = self._by_adapter.get(request.adapter_uid)
        if outputs is None:
            outputs = SlidingQuantile(self._window)
            self._by_adapter[request.adapter_uid] = outputs
        outputs.add(produced_tokens)
        self._all.add(produced_tokens)

    def forget(self, uid: str) -> None:
        """Forget an adapter's outputs; they stay among those of all."""
        self._by_adapter.pop(uid, None)


def _checked_cuts(cuts: Sequence[int]) -> tuple[int, ...]:
    """Return `cuts` as a tuple; ConfigError unless 1 <= cuts[0] < cuts[1] < ..."""
    if (
        not isinstance(cuts, list | tuple)
        or not cuts
        or any(type(cut) is not int for cut in cuts)
        or cuts[0] < 1
        or any(low >= high for low, high in itertools.pairwise(cuts))
    ):
        raise ConfigError(
            f"cuts={cuts!r} must be a list of increasing integers, at least 1"
        )
    return tuple(cuts)


def _confusion_matrix(
    classes: int, accuracy: float, within_one: float
) -> list[list[float]]:
    """Return rows of probabilities, see `NoisyOracle` for their shape."""
    if not is_number(accuracy) or not 0 <= accuracy <= 1:
        raise ConfigError(f"accuracy={accuracy!r} must be 0 to 1")
    if not is_number(within_one) or not accuracy <= within_one <= 1:
        raise ConfigError(
            f"within_one={within_one!r} must be accuracy={accuracy} to 1, "
            "it includes the right class"
        )
    rows = []
    for true_class in range(classes):
        distances = [abs(drawn - true_class) for drawn in range(classes)]
        near, far = distances.count(1), sum(d > 1 for d in distances)
        near_share = (within_one if far else 1.0) - accuracy
        rows.append(
            [
                accuracy
                if distance == 0
                else near_share / near
                if distance == 1
                else (1.0 - within_one) / far
                for distance in distances
            ]
        )
    return rows


def _check_matrix(matrix: Sequence[Sequence[float]], classes: int) -> None:
    """Raise ConfigError unless `matrix` is square, its rows probabilities."""
    if not isinstance(matrix, list | tuple) or len(matrix) != classes:
        raise ConfigError(
            f"matrix={matrix!r} must have {classes} rows, one more than cuts"
        )
    for index, row in enumerate(matrix):
        if (
            not isinstance(row, list | tuple)
            or len(row) != classes
            or not all(is_number(share) and share >= 0 for share in row)
            or abs(sum(row) - 1) > 1e-6
        ):
            raise ConfigError(
                f"matrix[{index}]={row!r} must be {classes} numbers >= 0 whose sum is 1"
            )
