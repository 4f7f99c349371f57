"""The link that adapters are copied over: one after the other."""

import collections
import dataclasses

from jchameleon.config import is_number
from jchameleon.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LinkConfig:
    """A link from host to device.

    Attributes:
      bytes_per_s: what it carries.
      latency_s: between a copy's end on the link and its arrival; delays nobody else,
        as with the engine's emulated link.
      stall: seconds that the engine stands still for every second that a copy takes,
        when it starts; 0 where copies and steps overlap.
    """

    bytes_per_s: float
    latency_s: float = 0.0
    stall: float = 0.0

    def __post_init__(self) -> None:
        if not (is_number(self.bytes_per_s) and self.bytes_per_s > 0):
            raise ConfigError(
                f"link bytes_per_s={self.bytes_per_s!r} must be a finite number above 0"
            )
        for name in ("latency_s", "stall"):
            value = getattr(self, name)
            if not (is_number(value) and value >= 0):
                raise ConfigError(
                    f"link {name}={value!r} must be a finite number, 0 or above"
                )

    def copy_s(self, num_bytes: int) -> float:
        """Return how long a copy takes that nothing holds up."""
        return num_bytes / self.bytes_per_s + self.latency_s


class Link:
    """Copies under way, first in, first out.

    Attributes:
      busy_s: time in which it carried anything, or will have when all has arrived.
    """

    def __init__(self, config: LinkConfig) -> None:
        self.config = config
        self.busy_s = 0.0
        self._free_s = 0.0
        self._under_way: collections.deque[tuple[float, str]] = collections.deque()

    def start(self, now_s: float, uid: str, num_bytes: int) -> float:
        """Begin a copy; return for how long the engine stands still."""
        carried_s = num_bytes / self.config.bytes_per_s
        self._free_s = max(now_s, self._free_s) + carried_s
        self.busy_s += carried_s
        self._under_way.append((self._free_s + self.config.latency_s, uid))
        return self.config.stall * self.config.copy_s(num_bytes)

    def arrived(self, now_s: float) -> list[str]:
        """Return the copies that arrived by now and were not returned yet."""
        found = []
        while self._under_way and self._under_way[0][0] <= now_s:
            found.append(self._under_way.popleft()[1])
        return found

    @property
    def next_s(self) -> float | None:
        """When the next copy arrives, if there is one."""
        return self._under_way[0][0] if self._under_way else None
