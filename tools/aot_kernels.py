"""Read compiled kernels: PTX text, and what its assembler says of it.

PTX is what XLA and Triton emit. `ptxas -v` turns it into machine code and reports
registers, spills and static shared memory; threads and dynamic shared memory stand in
the launch.
"""

import concurrent.futures
import dataclasses
import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from aot_target import Target, ptxas_path

WARP = 32
REGISTERS_PER_ALLOCATION = 256
"""Registers are given to a warp in multiples of this (compute capability 8 and 9)."""

RESERVED_SHARED_BYTES = 1024
"""What the system takes of every block's shared memory, capability 8 and 9."""

_MMA = re.compile(
    r"\b(?P<op>mma\.sync|wgmma\.mma_async)[\w.:]*\s*(?P<operands>[^;]*)", re.DOTALL
)
_BRACES = re.compile(r"\{([^{}]*)\}")
_COPY_16 = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?,\s*(?:0x10|16)\b")
_LOAD = re.compile(r"\bld\.global[\w.:]*?(?:\.v(?P<lanes>\d))?\.[bufs](?P<bits>\d+)\b")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """How a kernel is started."""

    threads: int
    dynamic_shared_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What `ptxas -v` says of one kernel; registers per thread."""

    registers: int
    spill_bytes: int
    shared_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Instructions:
    """What one kernel's PTX holds, counted in the text.

    Attributes:
      mma: tensor core products.
      halved: those that sum one half of the contraction twice.
      copies_16: asynchronous copies of 16 bytes into shared memory.
      loads_16: loads of 16 bytes into registers.
      loads_2: loads of 2 bytes, which bring a bf16 one at a time.
    """

    mma: int
    halved: int
    copies_16: int
    loads_16: int
    loads_2: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """One kernel on one target.

    Attributes:
      shared_bytes: static and dynamic.
      blocks: resident on a multiprocessor at once.
      occupancy: share of a multiprocessor's warps that they fill.
    """

    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    threads: int
    blocks: int
    occupancy: float
    instructions: Instructions

    @property
    def vector_loads(self) -> int:
        """Copies and loads of 16 bytes."""
        return self.instructions.copies_16 + self.instructions.loads_16

    @property
    def buffered_bytes(self) -> int:
        """Shared memory of all resident blocks: room for what is on its way there."""
        return self.shared_bytes * self.blocks


def read_kernels(
    ptx_files: Iterable[Path], launches: Mapping[str, Launch], target: Target
) -> list[Kernel]:
    """Assemble every file and return its kernels; a launch is found by kernel name.

    Raises:
      RuntimeError: the assembler refuses a file.
    """
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        read = threads.map(
            lambda path: _read_file(path, launches, target), sorted(ptx_files)
        )
        return [kernel for kernels in read for kernel in kernels]


def read_usage(report: str) -> dict[str, Usage]:
    """Return by kernel what a report of `ptxas -v` says."""
    found = {}
    parts = re.split(r"Compiling entry function '([^']+)'", report)
    for name, text in zip(parts[1::2], parts[2::2], strict=True):

        def number(pattern: str, text: str = text) -> int:
            match = re.search(pattern, text)
            return int(match[1]) if match else 0

        found[name] = Usage(
            registers=number(r"Used (\d+) registers"),
            spill_bytes=number(r"(\d+) bytes spill stores")
            + number(r"(\d+) bytes spill loads"),
            shared_bytes=number(r"(\d+)(?:\+\d+)? bytes smem"),
        )
    return found


def read_instructions(ptx: str) -> Instructions:
    """Count what matters in the text of one kernel."""
    products = [match for match in _MMA.finditer(ptx)]
    loads = [
        int(match["bits"]) // 8 * int(match["lanes"] or 1)
        for match in _LOAD.finditer(ptx)
    ]
    return Instructions(
        mma=len(products),
        halved=sum(_sums_half_twice(match["operands"]) for match in products),
        copies_16=len(_COPY_16.findall(ptx)),
        loads_16=loads.count(16),
        loads_2=loads.count(2),
    )


def resident_blocks(
    *, registers: int, shared_bytes: int, threads: int, target: Target
) -> int:
    """Return the blocks that one multiprocessor holds at once.

    CUDA C++ Programming Guide, "Hardware Multithreading": warps, registers and shared
    memory each set a limit.
    """
    warps = -(-threads // WARP)
    per_warp = -(-registers * WARP // REGISTERS_PER_ALLOCATION)
    per_warp *= REGISTERS_PER_ALLOCATION
    limits = [
        target.blocks_per_core,
        target.threads_per_core // WARP // warps,
        target.shared_bytes_per_core // (shared_bytes + RESERVED_SHARED_BYTES),
    ]
    if registers:
        limits.append(target.registers_per_core // per_warp // warps)
    return min(limits)


def _sums_half_twice(operands: str) -> bool:
    """Return whether an `mma` reads the same registers for both contraction halves.

    Of a contraction below 16 (bf16) Triton fills half the operand and repeats it: A is
    {a0, a1, a0, a1} and B is {b0, b0}, and the product comes out doubled. Repeated
    rows ({a0, a0, a1, a1}, fewer than 16 of them) are harmless.
    """
    groups = [
        [register.strip() for register in group.split(",")]
        for group in _BRACES.findall(operands)
    ]
    if len(groups) != 4 or len(groups[1]) != 4 or len(groups[2]) != 2:
        return False
    a, b = groups[1], groups[2]
    return a[:2] == a[2:] and b[0] == b[1]


def _read_file(
    path: Path, launches: Mapping[str, Launch], target: Target
) -> list[Kernel]:
    ptx = path.read_text("utf-8")
    arch = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    bodies = re.split(r"\.visible \.entry (\w+)", ptx)
    if arch is None or len(bodies) == 1:
        return []  # constants only
    done = subprocess.run(
        [ptxas_path(), "-v", f"-arch={arch[1]}", "-o", "/dev/null", path],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"ptxas refuses {path.name}: {done.stderr.strip()}")
    usage = read_usage(done.stderr)
    kernels = []
    for name, body in zip(bodies[1::2], bodies[2::2], strict=True):
        launch = launches.get(name) or Launch(
            threads=_required_threads(body), dynamic_shared_bytes=0
        )
        used = usage[name]
        shared_bytes = used.shared_bytes + launch.dynamic_shared_bytes
        blocks = resident_blocks(
            registers=used.registers,
            shared_bytes=shared_bytes,
            threads=launch.threads,
            target=target,
        )
        kernels.append(
            Kernel(
                name=name,
                registers=used.registers,
                spill_bytes=used.spill_bytes,
                shared_bytes=shared_bytes,
                threads=launch.threads,
                blocks=blocks,
                occupancy=blocks
                * -(-launch.threads // WARP)
                / (target.threads_per_core // WARP),
                instructions=read_instructions(body),
            )
        )
    return kernels


def _required_threads(body: str) -> int:
    found = re.search(r"\.(?:reqntid|maxntid) (\d+)", body)
    return int(found[1]) if found else 1
