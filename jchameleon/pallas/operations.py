"""Which form of the device operations a step is compiled with."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numba
import numpy as np

from jchameleon.errors import ConfigError
from jchameleon.pallas import cpu_attention, cpu_ffi, cpu_lora
from jchameleon.pallas.multi_lora import multi_lora
from jchameleon.pallas.paged_attention import paged_attention, write_kv


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Operations:
    """Forms that agree on every value up to rounding; static in a traced function.

    Attributes:
      name: the backend.
      write_kv, paged_attention, multi_lora: see the functions of these names.
    """

    name: str
    write_kv: Callable[..., jax.Array]
    paged_attention: Callable[..., jax.Array]
    multi_lora: Callable[..., jax.Array]


XLA = Operations(
    name="xla",
    write_kv=write_kv,
    paged_attention=paged_attention,
    multi_lora=multi_lora,
)
"""Plain XLA: any device, any element type."""

CPU = Operations(
    name="cpu",
    write_kv=write_kv,
    paged_attention=cpu_attention.paged_attention_cpu,
    multi_lora=cpu_lora.multi_lora_cpu,
)
"""Loops that `compile_operations` compiles with numba; float32 on CPU."""


def choose_operations(backend: str, *, platform: str, dtype: np.dtype) -> Operations:
    """Return the operations of a backend; `compile_operations` makes them ready.

    Args:
      backend: "auto", "cpu" or "xla".
      platform: of the device, as jax names it.
      dtype: of the pool.

    Raises:
      ConfigError: the backend does not serve this device or element type.
    """
    suits = platform == "cpu" and dtype == np.float32
    if backend == "cpu" and not suits:
        raise ConfigError(
            f"backend='cpu' needs dtype='float32' on a CPU, got {dtype.name!r} on "
            f"{platform!r}; use backend='xla'"
        )
    return XLA if backend == "xla" or not suits else CPU


def compile_operations(ops: Operations) -> None:
    """Compile what XLA does not compile itself, or read it from the cache."""
    if ops is CPU:
        cpu_ffi.register(cpu_attention.TARGET, cpu_attention.handle)
        cpu_ffi.register(cpu_lora.TARGET, cpu_lora.handle)


def keep_compiled(folder: Path) -> None:
    """Cache what numba compiles under `folder`, for later processes."""
    numba.config.CACHE_DIR = str(folder)
