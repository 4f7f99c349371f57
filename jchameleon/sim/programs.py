"""Step durations of an engine whose programs are compiled for a few sizes."""

import bisect
import dataclasses
from collections.abc import Mapping

from jchameleon.config import is_number
from jchameleon.errors import ConfigError
from jchameleon.sim.cost import StepWork
from jchameleon.sim.linear import LinearCost


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProgramCost:
    """A step pays for its programs as they are compiled, and for the work in them.

    A program takes as long for one row as for all that it has room for, but for what
    depends on adapters, contexts and single tokens. A line fitted to such steps gives
    five rows in a program of 16 too little, and all 16 too much.

    Attributes:
      work: what the work itself adds; its `prefill_s` and `decode_s` are paid as well.
      prefill_programs_s, decode_programs_s: seconds by size, in padded tokens and in
        rows. A step takes the smallest that holds it; more work than the largest holds
        costs in proportion to it.

    Raises:
      ConfigError: there are no sizes, or a size or a time is out of its range.
    """

    work: LinearCost
    prefill_programs_s: Mapping[int, float]
    decode_programs_s: Mapping[int, float]

    def __post_init__(self) -> None:
        for name in ("prefill_programs_s", "decode_programs_s"):
            programs = getattr(self, name)
            if not programs:
                raise ConfigError(f"cost {name} must hold at least one size")
            for size, value in programs.items():
                if type(size) is not int or size < 1:
                    raise ConfigError(
                        f"cost {name} has the size {size!r}, which must be a positive "
                        "integer"
                    )
                if not (is_number(value) and value >= 0):
                    raise ConfigError(
                        f"cost {name}.{size}={value!r} must be a finite number, 0 or "
                        "above"
                    )
            object.__setattr__(self, name, dict(sorted(programs.items())))

    def step_s(self, work: StepWork) -> float:
        """Return the duration of one iteration, in seconds."""
        total_s = self.work.step_s(work)
        if work.prefill_tokens:
            # Whoever says nothing of tiles has a prompt that fills them.
            tokens = max(work.prefill_tokens, work.prefill_tile_tokens)
            total_s += _program_s(self.prefill_programs_s, tokens)
        if work.decode_rows:
            total_s += _program_s(self.decode_programs_s, work.decode_rows)
        return total_s

    def scaled(self, factor: float) -> "ProgramCost":
        """Return the cost of an engine that takes `factor` times as long."""
        return ProgramCost(
            work=self.work.scaled(factor),
            prefill_programs_s=_times(self.prefill_programs_s, factor),
            decode_programs_s=_times(self.decode_programs_s, factor),
        )


def _program_s(programs: Mapping[int, float], needed: int) -> float:
    sizes = list(programs)
    index = bisect.bisect_left(sizes, needed)
    if index < len(sizes):
        return programs[sizes[index]]
    return programs[sizes[-1]] * needed / sizes[-1]


def _times(programs: Mapping[int, float], factor: float) -> dict[int, float]:
    return {size: factor * value for size, value in programs.items()}
