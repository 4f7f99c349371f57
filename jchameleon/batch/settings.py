"""How a batch runs."""

import dataclasses

from jchameleon.errors import ConfigError
from jchameleon.sampling import SamplingParams

MAX_RUN_SEED = 2**63 - 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """How a batch runs; wrong values raise `ConfigError`.

    Attributes:
      sampling: of lines that say nothing themselves. Its seed must be None: one seed
        would make lines draw alike.
      seed: a sampled line without a seed of its own draws by this and its custom_id.
      resume: go on with an output that is there; lines that have a row do not run.
      retry_errors: on resuming, lines whose row is an error run again.
      ordered: rows in the order of the input, not as they are ready.
      window_lines: lines that are looked at together and grouped by adapter; none runs
        so many places from where it stands in the input. 1 keeps the input's order.
      sync_rows: rows after which the output is forced to the disk.
      max_line_bytes: a longer line becomes an error row.
      max_open: completions in the engine at once; None is twice the rows of its batch.
      max_held_rows, max_held_bytes: with `ordered`, rows that are ready wait in memory
        for earlier lines. Once they are so many or so large, only the line that they
        wait for is given to the engine.
    """

    sampling: SamplingParams = SamplingParams(max_tokens=64, temperature=0.0)
    seed: int = 0
    resume: bool = False
    retry_errors: bool = False
    ordered: bool = False
    window_lines: int = 4096
    sync_rows: int = 64
    max_line_bytes: int = 8 << 20
    max_open: int | None = None
    max_held_rows: int = 4096
    max_held_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        if not isinstance(self.sampling, SamplingParams):
            raise ConfigError(f"sampling={self.sampling!r:.60} must be SamplingParams")
        if self.sampling.seed is not None:
            raise ConfigError(
                f"sampling.seed={self.sampling.seed} must be None: all lines would "
                "draw alike; give the run's seed instead"
            )
        if type(self.seed) is not int or not 0 <= self.seed <= MAX_RUN_SEED:
            raise ConfigError(
                f"seed={self.seed!r} must be an integer from 0 to {MAX_RUN_SEED}"
            )
        for field in ("resume", "retry_errors", "ordered"):
            if type(value := getattr(self, field)) is not bool:
                raise ConfigError(f"{field}={value!r} must be True or False")
        if self.retry_errors and not self.resume:
            raise ConfigError("retry_errors=True must come with resume=True")
        if self.max_open is not None:
            self._check_positive("max_open", 1 << 30)
        for field in ("window_lines", "sync_rows", "max_held_rows"):
            self._check_positive(field, 1 << 30)
        # Lengths of lines are kept as u32.
        self._check_positive("max_line_bytes", 1 << 30)
        self._check_positive("max_held_bytes", 1 << 50)

    def _check_positive(self, field: str, most: int) -> None:
        value = getattr(self, field)
        if type(value) is not int or not 1 <= value <= most:
            raise ConfigError(f"{field}={value!r} must be an integer from 1 to {most}")
