"""How large the pool of a device can be: arithmetic over bytes, without a device."""

import dataclasses

from jchameleon.config import RESERVED_PAGES, EngineConfig
from jchameleon.errors import ConfigError
from jchameleon.lora.layout import ChunkLayout
from jchameleon.runtime.shapes import staged_pages

RESERVE_BYTES = 256 << 20
"""Left free for what no term names: holes between arrays, inputs of steps. Chosen, not
measured: nothing has run on a GPU yet."""

EXACT_BITS = 7
"""Leading bits that a page count keeps, which costs less than 1/64 of the pool."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DeviceMemory:
    """What a device holds beside the pool, in bytes.

    Attributes:
      limit_bytes: what XLA may allocate there.
      in_use_bytes: the parameters, and whatever else is there before the pool.
      temp_bytes: temporaries of the largest program; programs run one after another.
      output_bytes: logits, as they are and edited, and streams of an iteration.
      staging_bytes: adapters on their way into the pool.
      reserve_bytes: see `RESERVE_BYTES`.
    """

    limit_bytes: int
    in_use_bytes: int
    temp_bytes: int
    output_bytes: int
    staging_bytes: int
    reserve_bytes: int = RESERVE_BYTES

    @property
    def room_bytes(self) -> int:
        """What is left for the pool; negative if even that does not fit."""
        taken = (
            self.in_use_bytes
            + self.temp_bytes
            + self.output_bytes
            + self.staging_bytes
            + self.reserve_bytes
        )
        return self.limit_bytes - taken

    def __str__(self) -> str:
        return (
            f"{self.limit_bytes} bytes - {self.in_use_bytes} in use (parameters) - "
            f"{self.temp_bytes} temporaries - {self.output_bytes} logits and streams - "
            f"{self.staging_bytes} staged adapters - {self.reserve_bytes} reserve = "
            f"{self.room_bytes}"
        )


def fit_pages(
    memory: DeviceMemory, *, page_bytes: int, least_pages: int, useful_pages: int
) -> int:
    """Return the pages of the largest pool that fits and can be of use.

    Rounded down to `EXACT_BITS` leading bits where `least_pages` allows it: pages are
    part of every program's shape, and a start that finds a little more or less in use
    than the last one did should find its programs in the compilation cache.

    Args:
      page_bytes: of a page in all layers together.
      least_pages: without which a request or an adapter may not fit.
      useful_pages: more are never used.

    Raises:
      ConfigError: `least_pages` do not fit; names every term.
    """
    pages = max(0, memory.room_bytes) // page_bytes
    if pages < least_pages:
        raise ConfigError(
            f"the model leaves {pages} pages of {page_bytes} bytes for the pool, which "
            f"needs {least_pages}: {memory}; lower max_model_len, max_lora_rank, "
            "max_loads_in_flight or max_batch_tokens, or name pool_bytes"
        )
    shift = max(0, pages.bit_length() - EXACT_BITS)
    pages = pages >> shift << shift
    return max(least_pages, min(useful_pages, pages))


def check_pool(memory: DeviceMemory, pool_bytes: int) -> None:
    """Raise ConfigError, naming every term, if the pool takes more than the reserve."""
    if pool_bytes > memory.room_bytes + memory.reserve_bytes:
        raise ConfigError(
            f"a pool of {pool_bytes} bytes does not fit on the device: {memory}; lower "
            "pool_bytes"
        )


def page_range(
    config: EngineConfig, layout: ChunkLayout, max_model_len: int
) -> tuple[int, int]:
    """Return the fewest pages that serve any request, and the most that are of use."""
    # More than all rows at full length, and as much again in adapters, is never used.
    blocks = -(-max_model_len // config.kv_block_tokens)
    useful = 2 * config.max_running * blocks
    return RESERVED_PAGES + blocks + layout.num_pages(config.max_lora_rank), useful


def staging_bytes(config: EngineConfig, layout: ChunkLayout, page_bytes: int) -> int:
    """Return the bytes of adapters on their way into the pool, at the most.

    Args:
      page_bytes: of a page in all layers.
    """
    # Without targets every adapter is refused.
    staged = staged_pages(layout, config.max_lora_rank) if layout.targets else 0
    return staged * page_bytes * config.max_loads_in_flight
