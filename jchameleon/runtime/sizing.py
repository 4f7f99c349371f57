"""The size of the pool: as configured, or what the device has room for."""

import logging
import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jchameleon.config import RESERVED_PAGES, EngineConfig, ModelConfig
from jchameleon.errors import ConfigError
from jchameleon.lora.layout import ChunkLayout
from jchameleon.runtime.executor import Executor
from jchameleon.runtime.memory import (
    DeviceMemory,
    check_pool,
    fit_pages,
    page_range,
    staging_bytes,
)

logger = logging.getLogger(__name__)

DEFAULT_POOL_BYTES = 1 << 30
"""Pool where neither the configuration nor the device names a size."""

PROVISIONAL_PAGES = 1024
"""Pages of the pool that programs are compiled for to learn their temporaries, which
do not depend on it: compiled for A40 and H100 (jax 0.10.2), Llama-7B and SmolLM2, they
are the same to the byte. One number, so that those are in the compilation cache."""


def memory_stats(device: jax.Device) -> Mapping[str, int] | None:
    """Return what an allocator says of its device; None from those that do not."""
    stats = device.memory_stats()
    return stats if stats and "bytes_limit" in stats else None


def page_elems(config: EngineConfig, model: ModelConfig) -> int:
    """Return elements of a page in one layer: keys and values of one block."""
    return model.kv_elems * config.kv_block_tokens


def resolve_num_pages(
    config: EngineConfig, model: ModelConfig, layout: ChunkLayout, max_model_len: int
) -> int:
    """Return the pages of a pool whose device says nothing, the reserved ones included.

    Raises:
      ConfigError: pool_bytes holds not even one block beside the reserved pages.
    """
    page_bytes = _page_bytes(config, layout)
    if config.pool_bytes is not None:
        if config.pool_bytes > host_memory_bytes() and jax.default_backend() == "cpu":
            raise ConfigError(
                f"pool_bytes={config.pool_bytes} exceeds this machine's memory of "
                f"{host_memory_bytes()} bytes"
            )
        pages = config.pool_bytes // page_bytes
        if pages <= RESERVED_PAGES:
            raise ConfigError(
                f"pool_bytes={config.pool_bytes} must hold at least "
                f"{RESERVED_PAGES + 1} pages of {page_bytes} bytes"
            )
        return pages
    least, useful = page_range(config, layout, max_model_len)
    return max(least, min(useful, DEFAULT_POOL_BYTES // page_bytes))


def measure_num_pages(executor: Executor) -> int:
    """Return the pages that the device of an executor has room for.

    Args:
      executor: has the parameters and no pool; its largest programs are compiled.

    Raises:
      ConfigError: there is no room for the smallest pool; names every term.
    """
    executor.compile_largest()
    memory = _measure(executor)
    assert memory is not None, "the device reports its memory"
    least, useful = page_range(executor.config, executor.layout, executor.max_model_len)
    return fit_pages(
        memory,
        page_bytes=executor.pool_bytes // executor.num_pages,
        least_pages=least,
        useful_pages=useful,
    )


def check_memory(executor: Executor) -> None:
    """Check that all programs and the pool, not placed yet, fit together; log the sum.

    Raises:
      ConfigError: they do not; names every term.
    """
    memory = _measure(executor)
    if memory is None:
        return
    check_pool(memory, executor.pool_bytes)
    logger.info("pool of %d bytes; device memory: %s", executor.pool_bytes, memory)


def host_memory_bytes() -> int:
    """Return the physical memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _page_bytes(config: EngineConfig, layout: ChunkLayout) -> int:
    """Return the bytes of a page in all layers."""
    itemsize = jnp.dtype(config.dtype).itemsize
    return layout.page_elems * itemsize * layout.model.num_layers


def _measure(executor: Executor) -> DeviceMemory | None:
    """Return what the executor's device holds beside a pool, if it says so."""
    jax.block_until_ready(executor.params.leaves)  # copies may hold memory of their own
    stats = memory_stats(executor.device)
    if stats is None:
        return None
    config, layout = executor.config, executor.layout
    return DeviceMemory(
        limit_bytes=stats["bytes_limit"],
        in_use_bytes=stats["bytes_in_use"],
        temp_bytes=executor.temp_bytes,
        output_bytes=executor.output_bytes,
        staging_bytes=staging_bytes(config, layout, _page_bytes(config, layout)),
    )
