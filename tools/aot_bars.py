"""What compiled kernels and steps must keep to, whatever the GPU.

The figures were set with the first kernels that met them: what they used, and a little
room. A kernel here is one of ours; what XLA generates has fewer bars.
"""

import math
from typing import Any

from aot_kernels import Kernel

from jchameleon.runtime.shapes import most_temp_bytes

DECODE_REGISTERS = 128
PREFILL_REGISTERS = 200
DECODE_SHARED_BYTES = 32 << 10
"""Three blocks on a multiprocessor of the smallest target."""

KERNELS_PER_LAYER = 18
KERNELS_BESIDE_LAYERS = 8

MOST_MOVED = 1.15
"""Of the fewest bytes, where memory bounds a program."""

MOST_MOVED_SMALL = 1.25
"""The same of a model so narrow that values between launches show (docs/gpu.md)."""

SMALL_MODELS = frozenset({"smollm2-135m"})

IN_FLIGHT_BYTES = {"8.6": 10 << 10, "8.0": 20 << 10, "9.0": 30 << 10}
"""By compute capability: what a multiprocessor must have on its way to hide the latency
of memory (bandwidth x latency / multiprocessors: about 5, 10 and 15 KB on A40, A100 and
H100), twice."""

IDLE_COMPILE_S = 10.0
"""Expected of an idle machine; the report warns beyond."""

COMPILE_S = 60.0
"""A busy machine takes longer than an idle one, a broken program much longer."""


def kernel_faults(
    kernel: Kernel, *, decode: bool, capability: str | None = None
) -> list[str]:
    """Return a line for each bar that one of our kernels misses."""
    faults = generated_faults(kernel)
    least = IN_FLIGHT_BYTES.get(capability or "", 0)
    if kernel.instructions.mma and kernel.buffered_bytes < least:
        faults.append(
            f"{kernel.name}: buffers for {kernel.buffered_bytes} bytes on a "
            f"multiprocessor, at least {least}"
        )
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


def program_faults(
    program: Any, *, layers: int, pool_bytes: int, capability: str | None = None
) -> list[str]:
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
            faults += kernel_faults(
                kernel, decode=kind == "decode", capability=capability
            )
        else:
            faults += generated_faults(kernel)
    if not program.own_kernels:
        return faults  # the bars below are of steps made of our kernels
    most_temp = most_temp_bytes(int(size), decode=kind == "decode")
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


def compile_warnings(program: Any) -> list[str]:
    """Return a line if a program compiled slower than on an idle machine."""
    if program.compile_s <= IDLE_COMPILE_S:
        return []
    return [
        f"{program.name} took {program.compile_s:.0f} s to compile, more than the "
        f"{IDLE_COMPILE_S:.0f} s of an idle machine"
    ]


def traffic_faults(
    name: str, floor: Any, moved_bytes: int, target: Any, *, model: str = ""
) -> list[str]:
    """Return a line if a decode step that memory bounds moves too much.

    A prefill is bound by operations, or nearly, and has time to move more: what it
    computes is written and read between launches.
    """
    share = MOST_MOVED_SMALL if model in SMALL_MODELS else MOST_MOVED
    most = math.ceil(share * floor.fewest_bytes)
    is_bound = name.startswith("decode") and floor.is_memory_bound(target)
    if moved_bytes <= most or not is_bound:
        return []
    return [f"{name}: moves {moved_bytes} bytes, at most {most}"]
