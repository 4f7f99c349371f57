"""Which form of the device operations a step is compiled with."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numba
import numpy as np

from jchameleon.config import ModelConfig
from jchameleon.errors import ConfigError
from jchameleon.pallas import (
    cpu_attention,
    cpu_ffi,
    cpu_kv,
    cpu_lora,
    cpu_prefill_attention,
    cpu_prefill_lora,
    cpu_product,
)
from jchameleon.pallas.multi_lora import (
    LoraWork,
    build_lora_work,
    max_work_items,
    multi_lora,
)
from jchameleon.pallas.paged_attention import paged_attention, write_kv
from jchameleon.pallas.product import Product, matmul
from jchameleon.pallas.tuned import UNTUNED, TunedTable


def build_lora(
    token_adapter: np.ndarray,  # i32[T]
    adapter_pages: Sequence[np.ndarray],  # per adapter index, i32[chunks, W]
    *,
    tile: int,
    max_chunks: int,
    pages_per_chunk: int,
) -> LoraWork:
    """Return the work list of a step of tiles of `tile` tokens."""
    return LoraWork(
        **build_lora_work(
            token_adapter,
            adapter_pages,
            num_items=max_work_items(len(token_adapter), tile, max_chunks),
            pages_per_chunk=pages_per_chunk,
        )
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Operations:
    """Forms that agree on every value up to rounding; static in a traced function.

    Attributes:
      name: the backend.
      paged_attention, multi_lora: see the functions of these names.
      write_kv: see the function; the layer norms and rotates before it.
      rope_write: all three as one operation, in place of `write_kv`; see
        `gpu_kv.rope_write_gpu` and `cpu_kv.rope_write_cpu`.
      product: of base weights with tokens, see `product.matmul`.
      build_lora: the work list that `multi_lora` takes, from the host's numpy arrays.
      build_blocks: likewise the argument `blocks` of `paged_attention`; None where it
        takes none.
      sorts_rows: rows of a decode step are sorted by adapter.
    """

    name: str
    paged_attention: Callable[..., jax.Array]
    multi_lora: Callable[..., jax.Array]
    write_kv: Callable[..., jax.Array] = write_kv
    rope_write: Callable[..., tuple[jax.Array, jax.Array]] | None = None
    product: Product = matmul
    build_lora: Callable[..., Any] = build_lora
    build_blocks: Callable[..., np.ndarray | None] | None = None
    sorts_rows: bool = False


XLA = Operations(
    name="xla",
    paged_attention=paged_attention,
    multi_lora=multi_lora,
)
"""Plain XLA: any device, any element type."""

CPU = Operations(
    name="cpu",
    paged_attention=cpu_attention.paged_attention_cpu,
    multi_lora=cpu_lora.multi_lora_cpu,
    rope_write=cpu_kv.rope_write_cpu,
    product=cpu_product.product_cpu,
)
"""Loops that `compile_operations` compiles with numba; float32 on CPU."""


def pallas_operations(
    arch: str | None, *, interpret: bool = False, tuned: TunedTable = UNTUNED
) -> Operations:
    """Return the kernels for NVIDIA GPUs; float32 or bfloat16.

    Args:
      arch: "sm_80", "sm_86", "sm_90": what block sizes are chosen for.
      interpret: run them program by program on any device; for tests.
      tuned: block sizes that were measured, which go before those chosen.
    """
    return _pallas_operations(arch, interpret, tuned)


@functools.cache
def _pallas_operations(
    arch: str | None, interpret: bool, tuned: TunedTable
) -> Operations:
    # Here: nothing else needs Pallas, and a start should not wait for its import.
    from jchameleon.pallas import gpu_operations

    forms = gpu_operations.gpu_forms(arch, interpret=interpret, tuned=tuned)
    return Operations(name="pallas", **forms)


def choose_operations(
    backend: str,
    *,
    platform: str,
    dtype: np.dtype,
    model: ModelConfig,
    capability: str | None = None,
    device_kind: str | None = None,
) -> Operations:
    """Return the operations of a backend; `compile_operations` makes them ready.

    Args:
      backend: "auto", "cpu", "pallas" or "xla". "auto" takes what is written for the
        device where it serves, else XLA. "pallas" on a CPU interprets the kernels:
        right and very slow.
      platform: of the device, as jax names it.
      dtype: of the pool.
      capability: compute capability of a GPU ("8.6").
      device_kind: of a GPU ("NVIDIA A40"), whose table of block sizes is read.

    Raises:
      ConfigError: the backend does not serve this device, element type or model, or
        the GPU's table is wrong.
    """
    if backend == "xla":
        return XLA
    on_cpu = platform == "cpu"
    if backend == "cpu" or (backend == "auto" and on_cpu):
        if on_cpu and dtype == np.float32:
            return CPU
        if backend == "auto":
            return XLA
        raise ConfigError(
            f"backend='cpu' needs dtype='float32' on a CPU, got {dtype.name!r} on "
            f"{platform!r}; use backend='xla'"
        )
    try:
        arch = _pallas_arch(platform, model, capability)
    except ConfigError:
        if backend == "auto":
            return XLA
        raise
    if arch is None:
        return pallas_operations(None, interpret=True)
    if device_kind is None:
        return pallas_operations(arch)
    from jchameleon.pallas import gpu_tunables

    return pallas_operations(arch, tuned=gpu_tunables.load_tuned(device_kind))


def _pallas_arch(
    platform: str, model: ModelConfig, capability: str | None
) -> str | None:
    """Return what kernels are compiled for, None where they are interpreted."""
    from jchameleon.pallas import gpu_device, gpu_operations

    gpu_operations.check_model(model)
    if platform == "cpu":
        return None
    if platform not in ("gpu", "cuda") or capability is None:
        raise ConfigError(
            f"backend='pallas' needs an NVIDIA GPU or a CPU, got {platform!r}; use "
            "backend='xla'"
        )
    return gpu_device.arch_of(capability)


def compile_operations(ops: Operations) -> None:
    """Compile what XLA does not compile itself, or read it from the cache."""
    if ops is CPU:
        cpu_ffi.register(cpu_attention.TARGET, cpu_attention.handle)
        cpu_ffi.register(cpu_prefill_attention.TARGET, cpu_prefill_attention.handle)
        cpu_ffi.register(cpu_kv.TARGET, cpu_kv.handle)
        cpu_ffi.register(cpu_lora.TARGET, cpu_lora.handle)
        cpu_ffi.register(cpu_prefill_lora.TARGET, cpu_prefill_lora.handle)
        cpu_ffi.register(cpu_product.TARGET, cpu_product.handle)


def keep_compiled(folder: Path) -> None:
    """Cache what numba compiles under `folder`, for later processes."""
    numba.config.CACHE_DIR = str(folder)
