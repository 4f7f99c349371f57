"""When a call is tried again, and how long to wait before."""

import dataclasses
import random
import time

from jchameleon.client.errors import CallError
from jchameleon.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """Exponential backoff with jitter, for calls of which nothing was run.

    A try that fails waits `first_s`, doubled with each further one up to `most_s`, less
    up to a half by chance; but at least what the server asks for.

    Attributes:
      attempts: tries in all; 1 never tries again.
    """

    attempts: int = 5
    first_s: float = 0.1
    most_s: float = 10.0

    def __post_init__(self) -> None:
        if type(self.attempts) is not int or self.attempts < 1:
            raise ConfigError(f"attempts={self.attempts!r} must be a positive integer")
        if not 0 < self.first_s <= self.most_s:
            raise ConfigError(
                f"first_s={self.first_s!r} must be above 0 and at most most_s="
                f"{self.most_s!r}"
            )


class Attempts:
    """The tries of one call, within one deadline."""

    def __init__(
        self, policy: RetryPolicy, timeout_s: float | None, *, repeatable: bool
    ) -> None:
        """Start the clock.

        Args:
          repeatable: that it was run, and the answer lost, does no harm.
        """
        self._policy = policy
        self._deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._repeatable = repeatable
        self._failed = 0

    @property
    def left_s(self) -> float | None:
        """Seconds until the deadline, None without one."""
        if self._deadline_s is None:
            return None
        return max(0.0, self._deadline_s - time.monotonic())

    def wait_s(self, error: CallError) -> float:
        """Return how long to wait before the next try.

        Raises:
          CallError: `error` itself, there is none.
        """
        policy = self._policy
        self._failed += 1
        # Without the server's word the call may have been run.
        is_safe = self._repeatable or error.retry_after_s is not None
        if not (error.may_be_retried and is_safe and self._failed < policy.attempts):
            raise error
        backoff_s = min(policy.most_s, policy.first_s * 2 ** (self._failed - 1))
        half_s = backoff_s / 2
        wait_s = max(error.retry_after_s or 0.0, half_s) + random.uniform(0, half_s)
        left_s = self.left_s
        if left_s is not None and wait_s >= left_s:
            raise error
        return wait_s
