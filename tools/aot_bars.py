"""What compiled kernels and steps must keep to, whatever the GPU.

The figures were set with the first kernels that met them: what they used, and a little
room. A kernel here is one of ours; what XLA generates has fewer bars.
"""

from typing import Any

from aot_kernels import Kernel

DECODE_REGISTERS = 128
PREFILL_REGISTERS = 200
DECODE_SHARED_BYTES = 32 << 10
"""Three blocks on a multiprocessor of the smallest target."""

KERNELS_PER_LAYER = 18
KERNELS_BESIDE_LAYERS = 8
LEAST_TEMP_BYTES = 8_000_000
DECODE_TEMP_BYTES = 500_000
"""Temporary memory of decode, for each row."""

PREFILL_TEMP_BYTES = 130_000
"""Temporary memory of prefill, for each token."""

COMPILE_S = 60.0
"""Ten seconds are expected; a busy machine takes longer, a broken program much more."""


def kernel_faults(kernel: Kernel, *, decode: bool) -> list[str]:
    """Return a line for each bar that one of our kernels misses."""
    faults = generated_faults(kernel)
    if kernel.spill_bytes:
        faults.append(f"{kernel.name}: spills {kernel.spill_bytes} bytes")
    most = DECODE_REGISTERS if decode else PREFILL_REGISTERS
    if kernel.registers > most:
        faults.append(f"{kernel.name}: {kernel.registers} registers, at most {most}")
    if decode and kernel.shared_bytes > DECODE_SHARED_BYTES:
        faults.append(
            f"{kernel.name}: {kernel.shared_bytes} bytes of shared memory, at most "
            f"{DECODE_SHARED_BYTES}"
        )
    if kernel.instructions.mma and not kernel.vector_loads:
        faults.append(f"{kernel.name}: products without 16-byte loads")
    if kernel.instructions.mma and kernel.instructions.loads_2:
        faults.append(
            f"{kernel.name}: {kernel.instructions.loads_2} loads of one bf16 each"
        )
    return faults


def generated_faults(kernel: Kernel) -> list[str]:
    """Return a line for each bar that any kernel misses, XLA's included."""
    faults = []
    if kernel.instructions.halved:
        faults.append(
            f"{kernel.name}: {kernel.instructions.halved} products sum half of a "
            "contraction twice; contractions of bf16 need at least 16"
        )
    return faults


def program_faults(program: Any, *, layers: int, pool_bytes: int) -> list[str]:
    """Return a line for each bar that an `aot_programs.Program` misses."""
    kind, _, size = program.name.rstrip("]").partition("[")
    faults = []

    def check(passed: bool, fault: str) -> None:
        if not passed:
            faults.append(f"{program.name}: {fault}")

    check(not program.weight_copies, f"{program.weight_copies} copies of weights")
    check(not program.pool_copies, f"{program.pool_copies} copies of a pool")
    check(not program.remat_ops, f"{program.remat_ops} values computed twice")
    check(
        program.alias_bytes == pool_bytes,
        f"{program.alias_bytes} bytes updated in place, the pools have {pool_bytes}",
    )
    check(program.compile_s <= COMPILE_S, f"took {program.compile_s:.0f} s to compile")
    for kernel in program.kernels:
        if kernel.name in program.own_kernels:
            faults += kernel_faults(kernel, decode=kind == "decode")
        else:
            faults += generated_faults(kernel)
    if not program.own_kernels:
        return faults  # the bars below are of steps made of our kernels
    per_token = DECODE_TEMP_BYTES if kind == "decode" else PREFILL_TEMP_BYTES
    most_temp = max(LEAST_TEMP_BYTES, per_token * int(size))
    check(
        program.temp_bytes <= most_temp,
        f"{program.temp_bytes} temporary bytes, at most {most_temp}",
    )
    most = KERNELS_PER_LAYER * layers + KERNELS_BESIDE_LAYERS
    check(program.launches <= most, f"{program.launches} launches, at most {most}")
    check(
        program.command_buffers == 1,
        f"{program.command_buffers} command buffers instead of one",
    )
    return faults
