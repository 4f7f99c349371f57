"""The limits that a planner keeps to."""

import dataclasses
from typing import Literal

from jchameleon.config import RESERVED_PAGES
from jchameleon.errors import ConfigError

IDLE_TICK_S = 0.05
"""How often an idle engine plans for policies that wait for a moment in time."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PlannerConfig:
    """Limits of one planner.

    Attributes:
      num_pages: pages of the pool, with the two reserved ones.
      block_tokens: tokens whose KV entries fill one page.
      max_running: requests admitted at once.
      max_batch_tokens: tokens of one iteration, decode rows and padded chunks.
      max_loads_in_flight: adapter copies under way at once.
      prefill_tile_tokens: prompt chunks are padded to multiples of this.
      kv_reserve: admission takes the pages of all the output a request may produce
        ("max_tokens"), or of what it is predicted to ("predicted"); then a row that
        produces more takes pages as it goes.
      max_squashes: how often one request may be sent back to wait; once it was, it
        reserves all it may need and is left alone.
    """

    num_pages: int
    block_tokens: int
    max_running: int
    max_batch_tokens: int
    max_loads_in_flight: int
    prefill_tile_tokens: int
    kv_reserve: Literal["predicted", "max_tokens"] = "max_tokens"
    max_squashes: int = 2

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("kv_reserve", "max_squashes"):
                continue
            if type(value) is not int or value < 1:
                raise ConfigError(f"{field.name}={value!r} must be a positive integer")
        if self.kv_reserve not in ("predicted", "max_tokens"):
            raise ConfigError(
                f"kv_reserve={self.kv_reserve!r} must be 'predicted' or 'max_tokens'"
            )
        if type(self.max_squashes) is not int or self.max_squashes < 0:
            raise ConfigError(
                f"max_squashes={self.max_squashes!r} must be 0 or a positive integer"
            )
        if self.num_pages <= RESERVED_PAGES:
            raise ConfigError(
                f"num_pages={self.num_pages} must be above {RESERVED_PAGES}, which "
                "the pool keeps for itself"
            )
        least = self.max_running + self.prefill_tile_tokens
        if self.max_batch_tokens < least:
            raise ConfigError(
                f"max_batch_tokens={self.max_batch_tokens} must be at least "
                f"max_running + prefill_tile_tokens = {least}"
            )

    @property
    def usable_pages(self) -> int:
        """Pages of the pool that can be handed out."""
        return self.num_pages - RESERVED_PAGES

    def kv_pages(self, prompt_tokens: int, output_tokens: int) -> int:
        """Return the pages of a request's KV entries; the last token needs none."""
        return -(-(prompt_tokens + output_tokens - 1) // self.block_tokens)
