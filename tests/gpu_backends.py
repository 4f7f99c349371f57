"""The backends that a test of the GPU's kernels runs on, the same cases on each.

  reference  the plain form of `pallas/reference.py`
  interpret  the kernel, one program after the other, on any device
  compiled   the kernel as Triton compiles it; skipped where there is no NVIDIA GPU

Interpreted kernels are held to the bounds of the tests, compiled ones to `SLACK` times
as much: tensor cores add bfloat16 products in float32 in an order of their own, `exp2`
and `rsqrt` are approximations of 2 units in the last place, and sums are split
otherwise. float32 products are IEEE's in kernels (`gpu_device.dot`), never TF32, whose
error of 3e-4 no test would let through.
"""

import jax
import pytest

SLACK = {"reference": 1, "interpret": 1, "compiled": 4}
"""Times a test's bound, by backend."""


def jit(function, backend):
    """Compile for a test, in half the time where the program runs for milliseconds."""
    quick = {"xla_backend_optimization_level": 0}
    return jax.jit(function, compiler_options=None if backend == "compiled" else quick)


def has_nvidia_gpu():
    """Return whether jax has an NVIDIA GPU that the kernels compile for."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    return device.platform in ("gpu", "cuda") and capability is not None


NEEDS_GPU = pytest.mark.skipif(not has_nvidia_gpu(), reason="no NVIDIA GPU was seen")
COMPILED = pytest.param("compiled", marks=NEEDS_GPU)

on_kernels = pytest.mark.parametrize("backend", ["interpret", COMPILED])
"""For cases that tell configurations apart: plain operations have none."""

on_all = pytest.mark.parametrize("backend", ["reference", "interpret", COMPILED])
