"""What a GPU's memory goes to, by the arithmetic that an engine starts with."""

import dataclasses
from typing import Any

from jchameleon.config import EngineConfig, ModelConfig
from jchameleon.errors import ConfigError
from jchameleon.lora.layout import ChunkLayout
from jchameleon.models.params import num_parameters, numpy_dtype
from jchameleon.runtime.memory import DeviceMemory, fit_pages, page_range, staging_bytes
from jchameleon.runtime.shapes import largest_temp_bytes, returned_bytes
from jchameleon.runtime.xla_env import MEM_FRACTION
from jchameleon.sim.profile import Profile
from jchameleon.sim.roofline import Gpu


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """How the memory of a GPU is split.

    Attributes:
      device_bytes: of the GPU.
      memory: what XLA may have of them, and what it needs beside the pool.
      page_bytes: of a page in all layers.
      pool_pages: the reserved ones included.
    """

    device_bytes: int
    memory: DeviceMemory
    page_bytes: int
    pool_pages: int

    @property
    def pool_bytes(self) -> int:
        """Bytes of KV blocks and adapters together."""
        return self.pool_pages * self.page_bytes

    def to_dict(self) -> dict[str, int]:
        """Return the terms in bytes; with `unused_bytes` they sum to the device's."""
        memory = self.memory
        return {
            "device_bytes": self.device_bytes,
            "context_bytes": self.device_bytes - memory.limit_bytes,
            "weights_bytes": memory.in_use_bytes,
            "temporaries_bytes": memory.temp_bytes,
            "logits_bytes": memory.output_bytes,
            "staging_bytes": memory.staging_bytes,
            "reserve_bytes": memory.reserve_bytes,
            "pool_bytes": self.pool_bytes,
            "unused_bytes": memory.room_bytes - self.pool_bytes,
            "page_bytes": self.page_bytes,
            "pool_pages": self.pool_pages,
        }


def split_memory(
    model: ModelConfig,
    gpu_name: str,
    gpu: Gpu,
    engine: EngineConfig,
    layout: ChunkLayout,
) -> Footprint:
    """Return how an engine on a GPU that nothing else uses splits its memory.

    As an engine does it at its start, but for the temporaries: without a compile they
    are the bars that programs are held to, so a real pool is a little larger.

    Args:
      engine: names `max_model_len`; its `max_lora_rank` is the largest that is served.

    Raises:
      ConfigError: the weights, an adapter or one request do not fit.
    """
    assert engine.max_model_len is not None
    item_bytes = numpy_dtype(engine.dtype).itemsize
    page_bytes = layout.page_elems * item_bytes * model.num_layers
    memory = DeviceMemory(
        limit_bytes=int(float(MEM_FRACTION) * gpu.memory_bytes),
        in_use_bytes=item_bytes * num_parameters(model),
        temp_bytes=largest_temp_bytes(engine),
        output_bytes=returned_bytes(engine, model, item_bytes),
        staging_bytes=staging_bytes(engine, layout, page_bytes),
    )
    if memory.in_use_bytes > memory.limit_bytes:
        raise ConfigError(
            f"model={model.name!r} has {memory.in_use_bytes} bytes of {engine.dtype} "
            f"weights and must fit into gpu={gpu_name!r}, where XLA may have "
            f"{memory.limit_bytes}"
        )
    rank = engine.max_lora_rank
    adapter_bytes = layout.num_pages(rank) * page_bytes
    if adapter_bytes > memory.limit_bytes - memory.in_use_bytes:
        raise ConfigError(
            f"ranks has {rank}: an adapter of that rank takes {adapter_bytes} bytes "
            f"and must fit into what weights leave of gpu={gpu_name!r}, "
            f"{memory.limit_bytes - memory.in_use_bytes}"
        )
    least, useful = page_range(engine, layout, engine.max_model_len)
    pages = fit_pages(
        memory, page_bytes=page_bytes, least_pages=least, useful_pages=useful
    )
    return Footprint(
        device_bytes=gpu.memory_bytes,
        memory=memory,
        page_bytes=page_bytes,
        pool_pages=pages,
    )


def pool_facts(profile: Profile) -> dict[str, Any]:
    """Return what a profile's pool holds: KV tokens, adapters, or both.

    `adapters_fit` counts adapters, the most popular of every rank first, that are
    resident at once beside the largest request; `kv_tokens_beside` is what is then left
    for KV blocks, that request's own included. `kv_tokens` is without any adapter.
    """
    block_tokens = profile.engine.kv_block_tokens
    adapters = profile.sim_adapters()
    usable = profile.usable_pages
    room = usable - profile.largest_request_pages
    fit = taken = 0
    for adapter in adapters:
        if taken + adapter.num_pages > room:
            break
        taken += adapter.num_pages
        fit += 1
    return {
        "kv_tokens": usable * block_tokens,
        "adapters_fit": fit,
        "adapters_fit_bytes": taken * profile.page_bytes,
        "kv_tokens_beside": (usable - taken) * block_tokens,
        "adapters_bytes": sum(a.num_pages for a in adapters) * profile.page_bytes,
        "adapter_bytes_by_rank": {
            str(rank): profile.layout.num_pages(rank) * profile.page_bytes
            for rank in profile.adapters.ranks
        },
    }
