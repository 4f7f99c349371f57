"""The one place that touches Pallas' Triton backend, which jax moves between versions.

Kernels import what they need of it from here. Two rules hold for every kernel: compiler
parameters are always given (without them jax chooses another backend), and the kernel
is a fresh `functools.partial` of its own (jax#40847: a traced kernel is reused across
grids in some versions, and `pl.num_programs` lies; no kernel calls it).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

dot = plt.dot
load = plt.load
store = plt.store


def triton_call(
    kernel: Callable[..., None],
    *,
    name: str,
    grid: Sequence[int],
    out_shape: Any,
    num_warps: int,
    num_stages: int,
    interpret: bool,
    input_output_aliases: Mapping[int, int] | None = None,
    **statics: Any,
) -> Callable[..., Any]:
    """Return the call of a kernel whose refs are whole arrays in device memory.

    Args:
      kernel: takes the input refs, the output refs, then `statics` by keyword.
      name: of the compiled function.
      interpret: run on any device, one program after the other; for tests.
      input_output_aliases: input place -> output place that shares its memory.
    """
    return pl.pallas_call(
        functools.partial(kernel, **statics),
        name=name,
        grid=tuple(grid),
        out_shape=out_shape,
        interpret=interpret,
        input_output_aliases=dict(input_output_aliases or {}),
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=num_stages),
    )


def shape_of(array: jax.Array) -> jax.ShapeDtypeStruct:
    """Return what describes an output like `array`."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
