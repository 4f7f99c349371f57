"""What a load generator sends: when, through which adapter, how much; from a seed."""

import bisect
import dataclasses
import itertools
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from jchameleon.errors import ConfigError
from jchameleon.workload.arrivals import Process, Trace, arrivals_s


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Popularity:
    """How often each adapter is asked for.

    Attributes:
      law: "uniform"; "zipf", the i-th of all as often as i**-exponent; "power", within
        a rank the i-th as often as i**-exponent (Chameleon, section 5.1).
      rank_exponent: of "power": the j-th rank of all, in the order in which they are
        named, as often as j**-rank_exponent; 0 has ranks equally often.
    """

    law: str = "uniform"
    exponent: float = 0.0
    rank_exponent: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Popularity":
        """Read "uniform", "zipf:1.2", "power:1" or "power:1:0.5".

        Raises:
          ConfigError: it is something else.
        """
        law, *exponents = text.split(":")
        most = {"uniform": 0, "zipf": 1, "power": 2}.get(law, -1)
        try:
            values = [float(exponent) for exponent in exponents]
            if min(most, 1) <= len(values) <= most and all(
                0 <= value < math.inf for value in values
            ):
                first, second = (*values, 0.0, 0.0)[:2]
                return cls(law=law, exponent=first, rank_exponent=second)
        except ValueError:
            pass
        raise ConfigError(
            f"popularity={text!r} must be uniform, zipf:A, power:A or power:A:B, such "
            "as zipf:1.2"
        )

    def weights(self, ranks: Sequence[int | None]) -> list[float]:
        """Return the share of each adapter, given their ranks; they sum to 1."""
        # Adapters that share one series of weights.
        groups = ranks if self.law == "power" else [None] * len(ranks)
        places: Counter[int | None] = Counter()
        weights = []
        for group in groups:
            places[group] += 1
            weights.append(places[group] ** -self.exponent)
        totals: defaultdict[int | None, float] = defaultdict(float)
        for group, weight in zip(groups, weights, strict=True):
            totals[group] += weight
        shares = {
            group: place**-self.rank_exponent for place, group in enumerate(totals, 1)
        }
        whole = sum(shares.values())
        return [
            weight / totals[group] * shares[group] / whole
            for group, weight in zip(groups, weights, strict=True)
        ]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Length:
    """How many tokens a prompt or an output has: from `low` to `high`, evenly.

    Attributes:
      of_trace: what the trace says instead.
      median, sigma: by a lognormal law, cut off at `high`, instead, where `sigma` is
        above 0.
    """

    low: int = 1
    high: int = 1
    of_trace: bool = False
    median: float = 1.0
    sigma: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Length":
        """Read "128", "64:256", "lognormal:1020:0.641:14050" or "trace".

        Raises:
          ConfigError: it is something else.
        """
        if text == "trace":
            return cls(of_trace=True)
        law, *numbers = text.split(":")
        try:
            if law == "lognormal":
                median, sigma, most = numbers
                length = cls(high=int(most), median=float(median), sigma=float(sigma))
                if 1 <= length.median < math.inf and 0 < length.sigma < math.inf:
                    return length
            elif len(numbers) < 2:
                length = cls(low=int(law), high=int(numbers[0] if numbers else law))
                if 1 <= length.low <= length.high:
                    return length
        except ValueError:
            pass
        raise ConfigError(
            f"length={text!r} must be N, LOW:HIGH, lognormal:MEDIAN:SIGMA:MOST or "
            "trace, with 1 <= LOW <= HIGH, 1 <= MEDIAN and SIGMA above 0"
        )

    def draw(self, of_trace: int, scale: float, rng: random.Random) -> int:
        """Return a length; of a trace or a lognormal law, multiplied with `scale`."""
        if self.of_trace:
            return max(1, round(scale * of_trace))
        if self.sigma:
            drawn = self.median * math.exp(rng.gauss(0.0, self.sigma))
            return max(1, round(scale * min(drawn, self.high)))
        return rng.randint(self.low, self.high)


@dataclasses.dataclass(frozen=True, slots=True)
class Drawn:
    """One request, without the tokens of its prompt.

    Attributes:
      at_s: from the start.
      adapter: None is the base model, which has rank 0.
      rank: None where it is not known.
    """

    at_s: float
    adapter: str | None
    rank: int | None
    prompt_tokens: int
    output_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """One request that will be sent; fields as in `Drawn`."""

    at_s: float
    adapter: str | None
    rank: int | None
    prompt: tuple[int, ...]
    output_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Everything that a seed leaves open.

    Attributes:
      process: when they are sent, as `arrivals.Process.parse` reads it.
      rate_rps: None is the trace's own.
      num_requests: at most; None is as many as come in `duration_s`.
      duration_s: nothing is sent later; None sends `num_requests`.
      length_scale: what lengths of a trace or a lognormal law are multiplied with.
      trace_order: lengths as they are "recorded", from the first on, or pairs of them
        "drawn" with replacement.
      max_model_len: longest prompt and output together; a longer prompt is cut, and an
        output that alone is too long as well.
      vocab_size: prompts are random token ids below it.
    """

    process: str = "poisson"
    rate_rps: float | None = 1.0
    num_requests: int | None = 100
    duration_s: float | None = None
    input_len: Length = Length(low=128, high=128)
    output_len: Length = Length(low=32, high=32)
    length_scale: float = 1.0
    trace_order: Literal["recorded", "drawn"] = "recorded"
    popularity: Popularity = Popularity()
    seed: int = 0
    max_model_len: int = 2048
    vocab_size: int = 256

    def __post_init__(self) -> None:
        Process.parse(self.process)
        for field in ("rate_rps", "duration_s", "length_scale"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise ConfigError(f"{field}={value!r} must be above 0")
        if self.num_requests is None:
            if self.duration_s is None or self.rate_rps == math.inf:
                raise ConfigError("num_requests must be given: nothing else ends it")
        elif self.num_requests < 1:
            raise ConfigError(f"num_requests={self.num_requests!r} must be at least 1")
        if self.trace_order not in ("recorded", "drawn"):
            raise ConfigError(
                f"trace_order={self.trace_order!r} must be 'recorded' or 'drawn'"
            )
        if self.rate_rps is None and self.process != "trace":
            raise ConfigError("rate_rps must be given unless arrivals are a trace's")
        if self.max_model_len < 2 or self.vocab_size < 1:
            raise ConfigError(
                f"max_model_len={self.max_model_len} and vocab_size={self.vocab_size} "
                "must be at least 2 and 1"
            )

    def plan(
        self, ranks: Mapping[str | None, int | None], trace: Trace | None = None
    ) -> list[Planned]:
        """Return all requests by arrival, prompts included; as `draw`."""
        tokens = random.Random(f"{self.seed} 4")
        return [
            Planned(
                at_s=one.at_s,
                adapter=one.adapter,
                rank=one.rank,
                prompt=tuple(
                    tokens.choices(range(self.vocab_size), k=one.prompt_tokens)
                ),
                output_tokens=one.output_tokens,
            )
            for one in self.draw(ranks, trace)
        ]

    def draw(
        self, ranks: Mapping[str | None, int | None], trace: Trace | None = None
    ) -> Iterator[Drawn]:
        """Yield requests by arrival, as they are asked for.

        The same arguments give the same ones.

        Args:
          ranks: of the adapters that are asked for, in order of popularity; None is the
            base model.

        Raises:
          ConfigError: there is no adapter, or no trace where one is needed.
        """
        needs_trace = self.process == "trace" or (
            self.input_len.of_trace or self.output_len.of_trace
        )
        if trace is None and needs_trace:
            raise ConfigError("arrivals or lengths of a trace need a trace")
        if not ranks:
            raise ConfigError("there is no adapter to send requests for")
        return self._draw(ranks, trace)

    def _draw(
        self, ranks: Mapping[str | None, int | None], trace: Trace | None
    ) -> Iterator[Drawn]:
        # Streams of their own: other lengths leave the arrivals as they are.
        when, who, what = (random.Random(f"{self.seed} {k}") for k in "123")
        end_s = math.inf if self.duration_s is None else self.duration_s
        arrivals = arrivals_s(self.process, self.rate_rps, when, trace)
        names = list(ranks.items())
        # As `random.choices` does it.
        shares = list(
            itertools.accumulate(self.popularity.weights(list(ranks.values())))
        )
        lengths = trace.lengths if trace else ((1, 1),)
        for index, at_s in enumerate(itertools.islice(arrivals, self.num_requests)):
            if at_s >= end_s:
                return
            place = bisect.bisect(shares, who.random() * shares[-1], 0, len(shares) - 1)
            name, rank = names[place]
            row = index % len(lengths)
            if self.trace_order == "drawn":
                row = what.randrange(len(lengths))
            output = self.output_len.draw(lengths[row][1], self.length_scale, what)
            output = min(output, self.max_model_len - 1)
            prompt = self.input_len.draw(lengths[row][0], self.length_scale, what)
            prompt = min(prompt, self.max_model_len - output)
            yield Drawn(at_s, name, rank, prompt, output)
