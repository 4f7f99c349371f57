"""What each iteration ran: for tests, tuning and cost models."""

import dataclasses
from typing import Self

from jchameleon.runtime.policy.plan import Plan


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """What one iteration ran, for tests, tuning and cost models.

    Attributes:
      start_s: on the engine's monotonic clock.
      duration_s: device work and read-back of the iteration.
      prefill: (request id, prompt tokens run) of each chunk.
      decode: ids of the requests that decoded.
      resident: adapters on the device.
      host_s: of the whole iteration, what did not go into device calls and waits:
        planning, building the batch, bookkeeping, detokenising.
    """

    start_s: float
    duration_s: float
    prefill: tuple[tuple[str, int], ...]
    decode: tuple[str, ...]
    resident: int
    host_s: float

    @classmethod
    def of(
        cls, plan: Plan, start_s: float, end_s: float, *, resident: int, host_s: float
    ) -> Self:
        """Return the record of a plan that ran from `start_s` to `end_s`."""
        return cls(
            start_s=start_s,
            duration_s=end_s - start_s,
            prefill=tuple((c.request_id, c.length) for c in plan.prefill),
            decode=plan.decode,
            resident=resident,
            host_s=host_s,
        )
