"""The device operations of NVIDIA GPUs: one object per compute capability."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jchameleon.config import ModelConfig
from jchameleon.errors import ConfigError
from jchameleon.lora.layout import GroupLayout
from jchameleon.pallas.gpu_attention import paged_attention_gpu
from jchameleon.pallas.gpu_kv import rope_write_gpu, write_kv_gpu
from jchameleon.pallas.gpu_lora import multi_lora_gpu
from jchameleon.pallas.gpu_lora_work import GpuLoraWork, build_gpu_lora_work
from jchameleon.pallas.gpu_pages import HEAD_DIMS
from jchameleon.pallas.gpu_prefill_attention import (
    attention_block_tiles,
    build_attention_blocks,
)

LEAST_CAPABILITY = (8, 0)
"""Ampere: asynchronous copies and tensor cores for bfloat16."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PhasedLoraWork:
    """A work list and the kind of step that it was built for.

    Attributes:
      work: see `GpuLoraWork`.
      prefill: tiles have several tokens; static, kernels differ by it.
    """

    work: GpuLoraWork
    prefill: bool = dataclasses.field(metadata={"static": True})


def arch_of(capability: str) -> str:
    """Return "sm_86" for "8.6"; ConfigError where the kernels do not run."""
    major, _, minor = capability.partition(".")
    if (int(major), int(minor)) < LEAST_CAPABILITY:
        raise ConfigError(
            f"backend='pallas' needs compute capability 8.0, not {capability}; "
            "use backend='xla'"
        )
    return f"sm_{major}{minor}"


def why_not(model: ModelConfig) -> str | None:
    """Return why the kernels do not serve a model, None where they do."""
    if model.head_dim not in HEAD_DIMS:
        return (
            f"backend='pallas' needs a head_dim that is a multiple of 8 from 16 to "
            f"256, {model.name} has {model.head_dim}"
        )
    return None


def build_lora(
    token_adapter: np.ndarray,  # i32[T]
    adapter_pages: Sequence[np.ndarray],
    *,
    tile: int,
    max_chunks: int,
    pages_per_chunk: int,
) -> PhasedLoraWork:
    """Return the work list of a step of tiles of `tile` tokens."""
    lists: dict[str, Any] = build_gpu_lora_work(
        token_adapter,
        adapter_pages,
        prefill=tile > 1,
        max_chunks=max_chunks,
        pages_per_chunk=pages_per_chunk,
    )
    return PhasedLoraWork(GpuLoraWork(**lists), prefill=tile > 1)


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


def multi_lora(
    y: jax.Array,  # f[N, T]
    x: jax.Array,  # f[d_in, T]
    pool: jax.Array,  # f[P, E]
    lora: PhasedLoraWork,
    *,
    group: GroupLayout,
    arch: str | None,
    interpret: bool,
) -> jax.Array:  # f[N, T]
    """Return `y + B_a A_a x` per token, a being the token's adapter."""
    return multi_lora_gpu(
        y,
        x,
        pool,
        lora.work,
        group=group,
        prefill=lora.prefill,
        arch=arch,
        interpret=interpret,
    )


@functools.cache
def gpu_forms(arch: str | None, *, interpret: bool) -> dict[str, Any]:
    """Return the fields of `Operations` for a GPU, the same objects every time."""
    return {
        "write_kv": functools.partial(write_kv_gpu, interpret=interpret),
        "rope_write": functools.partial(rope_write_gpu, interpret=interpret),
        "paged_attention": functools.partial(
            paged_attention_gpu, arch=arch, interpret=interpret
        ),
        "multi_lora": functools.partial(multi_lora, arch=arch, interpret=interpret),
        "build_lora": build_lora,
        "build_blocks": build_blocks,
        "sorts_rows": True,
    }
