"""How often each adapter was used lately: counts over a sliding window of time."""

import math

import numpy as np

from jchameleon.errors import ConfigError


class UseWindow:
    """Uses per adapter order within the last `window_s` seconds, in `buckets` buckets.

    Chameleon, section 4.2, ranks by "usage frequency in a time window"; its length and
    the buckets are our choice. A bucket is forgotten as a whole, so a use counts for
    more than window_s * (1 - 1 / buckets) and at most window_s.

    Raises:
      ConfigError: `window_s` is not a positive number, `buckets` no positive integer.
    """

    def __init__(self, window_s: float = 300.0, buckets: int = 10) -> None:
        if not 0 < window_s < math.inf:
            raise ConfigError(f"window_s={window_s!r} must be a positive number")
        if type(buckets) is not int or buckets < 1:
            raise ConfigError(f"buckets={buckets!r} must be a positive integer")
        self._bucket_s = window_s / buckets
        self._newest = 0  # number of the newest bucket, counted from time 0
        self._uses = np.zeros((buckets, 16), np.int64)  # bucket b is row b % buckets
        self.counts = np.zeros(16, np.int64)  # their sum over the buckets

    def grow(self, num_orders: int) -> None:
        """Make room for the orders 0 .. `num_orders` - 1."""
        more = max(num_orders, 2 * self.counts.size) - self.counts.size
        if num_orders > self.counts.size:
            self.counts = np.pad(self.counts, (0, more))
            self._uses = np.pad(self._uses, ((0, 0), (0, more)))

    def note(self, order: int, now_s: float) -> None:
        """Count a use; a time before the newest bucket counts as the newest one."""
        self.advance(now_s)
        self.grow(order + 1)
        self._uses[self._newest % len(self._uses), order] += 1
        self.counts[order] += 1

    def forget(self, order: int) -> None:
        """Forget all uses of an order, which another adapter may get."""
        if order < self.counts.size:
            self._uses[:, order] = 0
            self.counts[order] = 0

    def advance(self, now_s: float) -> None:
        """Forget the buckets that have left the window; going back changes nothing."""
        newest = math.floor(now_s / self._bucket_s)
        for bucket in range(
            max(self._newest + 1, newest - len(self._uses) + 1), newest + 1
        ):
            row = bucket % len(self._uses)
            self.counts -= self._uses[row]
            self._uses[row] = 0
        self._newest = max(self._newest, newest)
