"""The device operations of NVIDIA GPUs: one object per compute capability."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jchameleon.config import ModelConfig
from jchameleon.errors import ConfigError
from jchameleon.pallas.gpu_attention import paged_attention_gpu
from jchameleon.pallas.gpu_kv import rope_write_gpu
from jchameleon.pallas.gpu_lora import multi_lora_gpu
from jchameleon.pallas.gpu_lora_work import GpuLoraWork, build_gpu_lora_work
from jchameleon.pallas.gpu_pages import HEAD_DIMS
from jchameleon.pallas.gpu_prefill_attention import (
    attention_block_tiles,
    build_attention_blocks,
)
from jchameleon.pallas.tuned import TunedTable


def check_model(model: ModelConfig) -> None:
    """Raise ConfigError where the kernels do not serve a model."""
    if model.head_dim not in HEAD_DIMS:
        raise ConfigError(
            "backend='pallas' needs a head_dim that is a multiple of 8 from 16 to 256, "
            f"{model.name} has {model.head_dim}; use backend='xla'"
        )


def build_lora(
    token_adapter: np.ndarray,  # i32[T]
    adapter_pages: Sequence[np.ndarray],
    *,
    tile: int,
    max_chunks: int,
    pages_per_chunk: int,
) -> GpuLoraWork:
    """Return the work list of a step of tiles of `tile` tokens."""
    lists = build_gpu_lora_work(
        token_adapter,
        adapter_pages,
        prefill=tile > 1,
        max_chunks=max_chunks,
        pages_per_chunk=pages_per_chunk,
    )
    return GpuLoraWork(**lists)


def build_blocks(
    page_table: np.ndarray,  # i32[NT, NB]
    positions: np.ndarray,  # i32[T]
    context_tokens: np.ndarray,  # i32[NT]
    *,
    model: ModelConfig,
    dtype: np.dtype,
) -> np.ndarray | None:  # i32[NT, 3]
    """Return the tiles that prefill attention takes together; None in decode."""
    tile = len(positions) // len(page_table)
    if tile == 1:
        return None
    together = attention_block_tiles(
        model.num_heads, model.num_kv_heads, model.head_dim, dtype, tile_tokens=tile
    )
    return build_attention_blocks(
        page_table, positions, context_tokens, block_tiles=together
    )


@functools.cache
def gpu_forms(
    arch: str | None, *, interpret: bool, tuned: TunedTable
) -> dict[str, Any]:
    """Return the fields of `Operations` for a GPU, the same objects every time."""
    of: dict[str, Any] = {"interpret": interpret, "tuned": tuned}
    return {
        "rope_write": functools.partial(rope_write_gpu, **of),
        "paged_attention": functools.partial(paged_attention_gpu, arch=arch, **of),
        "multi_lora": functools.partial(multi_lora_gpu, arch=arch, **of),
        "build_lora": build_lora,
        "build_blocks": build_blocks,
        "sorts_rows": True,
    }
