"""What compiled kernels and steps must keep to, whatever the GPU.

The figures were set with the first kernels that met them: what they used, and a little
room. A kernel here is one of ours; what XLA generates has fewer bars.
"""

from typing import TYPE_CHECKING

from aot_kernels import Kernel
from aot_target import Target

if TYPE_CHECKING:  # they import jax, which waits for `aot_target.prepare`
    from aot_floor import Floor
    from aot_programs import Program

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

MOST_TIMES_FLOOR = 1.15
"""Moved bytes alone may take this many times a program's floor. Where the floor is
bytes, as in decode, that is moved over fewest bytes."""

SMALL_WEIGHTS_BYTES = 1_000_000_000
MOST_TIMES_FLOOR_SMALL = 4.0
"""Of a model of fewer weights than that: the fewest bytes take activations to stay on
chip, and they are as many as its weights."""

LEAST_TIMES_FLIGHT = 2.0
"""Bytes under way against what fills the bus: loads do not come evenly."""

IDLE_COMPILE_S = 10.0
COMPILE_S = 60.0
"""Ten seconds are expected of an idle machine, and the report warns beyond; a busy one
takes longer, a broken program much more."""


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


def flight_faults(kernel: Kernel, target: Target) -> list[str]:
    """Return a line if a decode kernel that copies ahead has too little under way."""
    least = LEAST_TIMES_FLIGHT * target.flight_bytes
    if not kernel.instructions.bytes_ahead or kernel.flight_bytes >= least:
        return []
    return [
        f"{kernel.name}: {kernel.flight_bytes} bytes in flight on a multiprocessor, at "
        f"least {least:.0f}"
    ]


def moved_faults(
    name: str, moved_bytes: int, floor: "Floor", target: Target
) -> list[str]:
    """Return a line if what a program moves takes longer than its floor allows."""
    times = moved_bytes / target.bandwidth_bytes_per_s / floor.seconds(target)
    small = floor.weights_bytes < SMALL_WEIGHTS_BYTES
    most = MOST_TIMES_FLOOR_SMALL if small else MOST_TIMES_FLOOR
    if times <= most:
        return []
    return [
        f"{name}: moves {moved_bytes} bytes, which takes {times:.2f} times the floor, "
        f"at most {most}"
    ]


def compile_warnings(program: "Program") -> list[str]:
    """Return a line if a program compiled slower than an idle machine should."""
    if program.compile_s <= IDLE_COMPILE_S:
        return []
    return [
        f"{program.name} took {program.compile_s:.0f} s to compile; an idle machine "
        f"should take {IDLE_COMPILE_S:.0f} s at most"
    ]


def program_faults(program: "Program", *, layers: int, pool_bytes: int) -> list[str]:
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
