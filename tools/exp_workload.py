"""The many-adapter workload: who asks when, for which adapter, how much.

Set-up of Chameleon, section 5.1: lengths of a conversation trace scaled by a constant,
Poisson arrivals, ranks 8 to 128 with equally many adapters each, ranks equally popular,
adapters within a rank by a power law.
"""

import csv
import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One request of a trace.

    Attributes:
      arrival: in mean inter-arrival times from the start, so that one trace serves
        every load; see `arrival_s`.
      output_tokens: how long its output shall be.
      adapter: name of its adapter, of rank `rank`.
      seed: of its prompt and of its sampling.
    """

    request_id: str
    arrival: float
    prompt_tokens: int
    output_tokens: int
    adapter: str
    rank: int
    seed: int

    def arrival_s(self, rate_rps: float) -> float:
        """Return when it arrives at a mean rate, in seconds from the start."""
        return self.arrival / rate_rps

    def prompt(self, vocab_size: int) -> list[int]:
        """Return its prompt: random token ids, the same at each call."""
        rng = np.random.default_rng(self.seed)
        return rng.integers(0, vocab_size, self.prompt_tokens).tolist()


Trace = tuple[Request, ...]
"""Requests by arrival."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Lognormal:
    """Lengths by a lognormal law, cut off at `most`."""

    median: float
    sigma: float
    most: int

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Return f64[count]."""
        values = self.median * np.exp(self.sigma * rng.standard_normal(count))
        return np.minimum(values, self.most)

    def percentile(self, percent: float) -> float:
        """Return the length that `percent` of all draws do not exceed."""
        z = statistics.NormalDist().inv_cdf(percent / 100)
        return min(self.median * math.exp(self.sigma * z), self.most)


SYNTHETIC_INPUT = Lognormal(median=1020, sigma=0.641, most=14_050)
SYNTHETIC_OUTPUT = Lognormal(median=129, sigma=0.724, most=1_000)
"""Input and output of the Azure LLM inference trace 2023, conversation service.

Fitted to its published percentiles (median, P90, P99, maximum; CC-BY 4.0, Patel et al.,
"Splitwise", ISCA 2024): sigma is the least-squares slope of log(percentile / median)
over the normal quantile. P90 and P99 come out at 2,320 and 4,530 for 2,734 and 4,142,
and at 326 and 695 for 424 and 601; input and output are drawn independently (in the
trace their correlation is -0.11).
"""


class Lengths:
    """Where prompt and output lengths come from, before scaling.

    Attributes:
      source: for the report.
      most_output: no output is longer, in tokens.
      median_prompt, p99_prompt: 50 and 99 of 100 prompts are no longer, in tokens.
    """

    def __init__(self, path: Path | None = None):
        """Read a trace with columns ContextTokens and GeneratedTokens.

        Without `path` lengths are synthetic.

        Raises:
          ValueError: the file has no such columns, or no rows.
        """
        self._rows: np.ndarray | None = None  # f64[n, 2]
        if path is None:
            self.source = f"synthetic: {SYNTHETIC_INPUT}, {SYNTHETIC_OUTPUT}"
            self.most_output = SYNTHETIC_OUTPUT.most
            self.median_prompt = SYNTHETIC_INPUT.percentile(50)
            self.p99_prompt = SYNTHETIC_INPUT.percentile(99)
            return
        with path.open(newline="", encoding="utf-8") as file:
            try:
                self._rows = np.array(
                    [
                        (float(row["ContextTokens"]), float(row["GeneratedTokens"]))
                        for row in csv.DictReader(file)
                    ]
                )
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path} must have numbers in columns ContextTokens and "
                    f"GeneratedTokens: {error!r}"
                ) from error
        if not len(self._rows):
            raise ValueError(f"{path} has no rows")
        self.source = f"{path.name}, {len(self._rows)} rows drawn with replacement"
        self.most_output = int(self._rows[:, 1].max())
        self.median_prompt, self.p99_prompt = (
            float(x) for x in np.percentile(self._rows[:, 0], (50, 99))
        )

    def context_tokens(self, scale: float) -> int:
        """Return a context for 99 of 100 prompts and every output, once scaled.

        In whole steps of 16, the tokens of a KV block.
        """
        most = scaled(self.p99_prompt, scale) + scaled(self.most_output, scale)
        return -(-most // 16) * 16

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Return f64[count, 2], prompt and output lengths of independent requests."""
        if self._rows is not None:
            return self._rows[rng.integers(0, len(self._rows), count)]
        return np.stack(
            [SYNTHETIC_INPUT.draw(rng, count), SYNTHETIC_OUTPUT.draw(rng, count)], 1
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What all traces of an experiment share.

    Attributes:
      scale: all lengths are multiplied by it.
      max_model_len: longest prompt + output; longer prompts are cut.
      num_adapters: a multiple of the number of ranks.
      zipf: popularity of the k-th adapter of a rank is proportional to k ** -zipf.
    """

    num_requests: int
    scale: float
    max_model_len: int
    num_adapters: int = 100
    ranks: tuple[int, ...] = (8, 16, 32, 64, 128)
    zipf: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale={self.scale} must be above 0")
        if self.num_requests < 1:
            raise ValueError(f"num_requests={self.num_requests} must be at least 1")
        if self.num_adapters < 1 or self.num_adapters % len(self.ranks):
            raise ValueError(
                f"num_adapters={self.num_adapters} must be a multiple of "
                f"{len(self.ranks)}, the number of ranks"
            )

    def adapters(self) -> dict[str, int]:
        """Return name -> rank, the most popular of each rank first."""
        each = self.num_adapters // len(self.ranks)
        return {f"r{rank}-{k}": rank for rank in self.ranks for k in range(each)}

    def max_tokens(self, lengths: Lengths) -> int:
        """Return the limit that every request sets: the longest output, scaled.

        Raises:
          ValueError: it leaves no room for a prompt.
        """
        most = scaled(lengths.most_output, self.scale)
        if most >= self.max_model_len:
            raise ValueError(
                f"outputs of up to {most} tokens leave no room for a prompt in "
                f"max_model_len={self.max_model_len}: lower scale={self.scale}"
            )
        return most


def scaled(tokens: float, scale: float) -> int:
    """Return a length times `scale`, rounded, at least 1."""
    return max(1, round(tokens * scale))


def make_trace(shape: Shape, lengths: Lengths, seed: int) -> Trace:
    """Return the requests of one seed; the same arguments give the same trace."""
    rng = np.random.default_rng([seed, 0x7ACE])
    count = shape.num_requests
    most = shape.max_tokens(lengths)
    arrivals = np.cumsum(rng.exponential(1.0, count))
    adapters = list(shape.adapters().items())
    each = shape.num_adapters // len(shape.ranks)
    popularity = np.arange(1, each + 1) ** -shape.zipf
    rank_index = rng.integers(0, len(shape.ranks), count)
    within = rng.choice(each, count, p=popularity / popularity.sum())
    seeds = rng.integers(0, 2**32, count)
    trace = []
    for i, (prompt, output) in enumerate(lengths.draw(rng, count)):
        name, rank = adapters[rank_index[i] * each + within[i]]
        trace.append(
            Request(
                request_id=f"{seed}-{i}",
                arrival=float(arrivals[i]),
                prompt_tokens=min(
                    scaled(prompt, shape.scale), shape.max_model_len - most
                ),
                output_tokens=scaled(output, shape.scale),
                adapter=name,
                rank=rank,
                seed=int(seeds[i]),
            )
        )
    return tuple(trace)


def choose_stop(tokens: Sequence[int], length: int) -> int:
    """Return the length nearest to `length` at which a stop token can end an output.

    Only a token that has not come before can: a stop token ends an output where it
    first occurs. Of two such lengths equally near the longer is taken, as repetition
    makes outputs shorter than they should be.

    Args:
      tokens: an output of the model, longer than `length` where there is more of it.
    """
    seen: set[int] = set()
    best = 1  # the first token is always new
    for position, token in enumerate(tokens, start=1):
        if token not in seen and abs(position - length) <= abs(best - length):
            best = position
        seen.add(token)
    return best
