"""What a profile is asked to carry."""

import dataclasses
from typing import Any

from jchameleon.config import is_number
from jchameleon.errors import ConfigError
from jchameleon.workload.arrivals import Trace


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What one run is asked.

    Attributes:
      policy: as `LLM` takes it; None is the profile's own.
      rate_rps: mean arrivals a second.
      trace: lengths are drawn from it, instead of by the profile's law.
      duration_s: of arrivals; None is the profile's own.
      process: of arrivals, as `Workload` takes it; None is the profile's own.
    """

    policy: Any = None
    rate_rps: float
    seed: int = 0
    trace: Trace | None = None
    duration_s: float | None = None
    process: str | None = None

    def __post_init__(self) -> None:
        if not (is_number(self.rate_rps) and self.rate_rps > 0):
            raise ConfigError(f"rate={self.rate_rps!r} must be a finite number above 0")
        if type(self.seed) is not int or self.seed < 0:
            raise ConfigError(f"seed={self.seed!r} must be an integer, 0 or above")
