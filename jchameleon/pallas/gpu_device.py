"""What the kernels must know of NVIDIA GPUs: their kinds, and tensor-core products."""

import jax
import numpy as np
from jax import lax

from jchameleon.errors import ConfigError
from jchameleon.pallas import _compat

MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_90": 132}
"""Of A100, A40 and H100."""

LEAST_CAPABILITY = (8, 0)
"""Ampere: asynchronous copies, and tensor cores for bfloat16."""

MIN_CONTRACTION = 16
"""Least contraction of a product: Triton's bf16 products of fewer are wrong, silently
(jax 0.10.2, sm_80 to sm_90: the upper half of the contraction repeats the lower)."""

MIN_ROWS = 16
"""Rows of the smallest tensor-core product; missing ones are padding."""


def arch_of(capability: str) -> str:
    """Return "sm_86" for "8.6".

    Raises:
      ConfigError: the kernels do not run there.
    """
    major, _, minor = capability.partition(".")
    if (int(major), int(minor)) < LEAST_CAPABILITY:
        raise ConfigError(
            f"backend='pallas' needs compute capability 8.0, not {capability}; "
            "use backend='xla'"
        )
    return f"sm_{major}{minor}"


def check_launch(num_warps: int, num_stages: int) -> None:
    """Raise ValueError unless Triton can launch a kernel like this."""
    if num_warps not in (1, 2, 4, 8):
        raise ValueError(f"{num_warps=} must be 1, 2, 4 or 8")
    if num_stages < 1:
        raise ValueError(f"{num_stages=} must be at least 1")


def multiprocessors(arch: str | None) -> int:
    """Return how many a GPU has; another one, or None, counts as an A100."""
    return MULTIPROCESSORS.get(arch or "", MULTIPROCESSORS["sm_80"])


def dot(
    left: jax.Array,  # f[M, K]
    right: jax.Array,  # f[K, N]
) -> jax.Array:  # f32[M, N]
    """Return a product within a kernel; float32 operands are not rounded to TF32."""
    assert left.shape[1] >= MIN_CONTRACTION
    precision = lax.Precision.HIGHEST if left.dtype == np.float32 else None
    return _compat.dot(left, right, precision=precision)
