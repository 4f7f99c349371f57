"""What the report on absent GPUs reads: texts written by hand, no compiler."""

import subprocess
import sys
from types import SimpleNamespace

import aot_bars
import aot_hlo
import aot_kernels
import aot_target
import pytest
from aot_kernels import Instructions, Kernel, Launch

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'shrink' for 'sm_86'
ptxas info    : Function properties for shrink
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 72 registers, used 1 barriers, 2048 bytes smem, 376 bytes cmem[0]
ptxas info    : Compiling entry function 'attend' for 'sm_86'
ptxas info    : Function properties for attend
    64 bytes stack frame, 48 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, 400 bytes cmem[0]
"""

MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "

MODULE = """\
HloModule jit_step, is_scheduled=true

%fused_update (p0: bf16[1000,64], p1: s32[4], p2: bf16[4,64]) -> bf16[1000,64] {
  %p0 = bf16[1000,64]{1,0} parameter(0)
  %p1 = s32[4]{0} parameter(1)
  %p2 = bf16[4,64]{1,0} parameter(2)
  ROOT %scatter.1 = bf16[1000,64]{1,0} scatter(%p0, %p1, %p2), to_apply=%sum
}

%fused_gather (p0.1: bf16[1000,64], p1.1: s32[4]) -> f32[4,64] {
  %p0.1 = bf16[1000,64]{1,0} parameter(0)
  %p1.1 = s32[4]{0} parameter(1)
  %bitcast.1 = bf16[1000,1,64]{2,1,0} bitcast(%p0.1)
  %gather.1 = bf16[4,64]{1,0} gather(%bitcast.1, %p1.1), slice_sizes={1,64}
  ROOT %convert.1 = f32[4,64]{1,0} convert(%gather.1)
}

%fused_slice (p0.2: bf16[2,32,64], p1.2: s32[]) -> bf16[32,64] {
  %p0.2 = bf16[2,32,64]{2,1,0} parameter(0)
  %p1.2 = s32[] parameter(1)
  %dynamic-slice.1 = bf16[1,32,64]{2,1,0} dynamic-slice(%p0.2, %p1.2)
  ROOT %bitcast.2 = bf16[32,64]{1,0} bitcast(%dynamic-slice.1)
}

%body (carry: (s32[], f32[4,64])) -> (s32[], f32[4,64]) {
  %carry = (s32[], f32[4,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %acc = f32[4,64]{1,0} get-tuple-element(%carry), index=1
  %copy.5 = f32[4,64]{1,0} copy(%acc)
  ROOT %tuple.5 = (s32[], f32[4,64]{1,0}) tuple(%i, %copy.5)
}

%condition (carry.1: (s32[], f32[4,64])) -> pred[] {
  %carry.1 = (s32[], f32[4,64]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (pool: bf16[1000,64], w: bf16[32,64], ids: s32[4], kv: bf16[4,64]) -> f32[] {
  %pool = bf16[1000,64]{1,0} parameter(0)
  %w = bf16[32,64]{1,0} parameter(1)
  %ids = s32[4]{0} parameter(2)
  %kv = bf16[4,64]{1,0} parameter(3)
  %stack = bf16[2,32,64]{2,1,0} parameter(4)
  %zero = s32[] constant(0)
  %update = bf16[1000,64]{1,0} fusion(%pool, %ids, %kv), kind=kInput, calls=%fused_update
  %read = f32[4,64]{1,0} fusion(%update, %ids), kind=kLoop, calls=%fused_gather
  %tuple = (s32[], f32[4,64]{1,0}) tuple(%zero, %read)
  %loop = (s32[], f32[4,64]{1,0}) while(%tuple), condition=%condition, body=%body, metadata={op_name="jit(step)/multi_lora/while"}
EXTRA
  ROOT %done = f32[4,64]{1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501

THUNKS = """\
000: kCommandBuffer [source        | next=003 (1) ]
    001: kCopy         [source       | next=002 (1)] kCopy
    002: kCustomKernel [source       | sink] shrink grid: [2, 4, 1] threads: [64, 1, 1]  shared_memory: 32768 bytes
003: kWhile         [prev=000 (1)  | next=006 (1) ]
condition:
    004: kCustomKernel [source | sink] compare grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
  body:
    000: kCommandBuffer [source | sink]
        005: kCustomKernel [source       | next=020 (4)] add grid: [9, 1, 1] threads: [16, 8, 1]  shared_memory: 0 bytes
006: kCustomKernel  [prev=003 (1)  | next=007 (1) ] shrink grid: [2, 4, 1] threads: [64, 1, 1]  shared_memory: 32768 bytes
"""  # noqa: E501


def module_with(extra: str = "") -> aot_hlo.Module:
    return aot_hlo.parse_module(MODULE.replace("EXTRA\n", extra))


def kernel(**changes) -> Kernel:
    fields = {
        "name": "shrink",
        "registers": 72,
        "spill_bytes": 0,
        "shared_bytes": 32768,
        "threads": 64,
        "blocks": 3,
        "occupancy": 0.125,
        "instructions": Instructions(
            mma=8, halved=0, copies_16=12, loads_16=0, loads_2=0
        ),
    }
    return Kernel(**(fields | changes))


def test_usage_reads_registers_spills_and_shared_bytes_of_each_kernel():
    usage = aot_kernels.read_usage(PTXAS)
    assert usage["shrink"] == aot_kernels.Usage(
        registers=72, spill_bytes=0, shared_bytes=2048
    )
    assert usage["attend"] == aot_kernels.Usage(
        registers=255, spill_bytes=64, shared_bytes=0
    )


@pytest.mark.parametrize(
    ("a", "b", "halved"),
    [
        ("%r1, %r2, %r1, %r2", "%r5, %r5", 1),
        ("%r1, %r1, %r1, %r1", "%r5, %r5", 1),
        ("%r1, %r2, %r3, %r4", "%r5, %r6", 0),
        # Eight rows instead of sixteen: rows repeat, the contraction does not.
        ("%r1, %r1, %r3, %r3", "%r5, %r6", 0),
        # One value on both sides of one operand only is data, not the pattern.
        ("%r1, %r2, %r3, %r4", "%r5, %r5", 0),
    ],
)
def test_product_that_repeats_a_contraction_half_is_found(a, b, halved):
    ptx = f"{MMA}{{ %f1, %f2, %f3, %f4 }}, {{ {a} }}, {{ {b} }}, {{ 0, 0, 0, 0 }};"
    found = aot_kernels.read_instructions(ptx)
    assert (found.mma, found.halved) == (1, halved)


def test_wide_copies_and_narrow_loads_are_counted_apart():
    found = aot_kernels.read_instructions(
        """
        @%p1 cp.async.cg.shared.global [ %r1 + 0 ], [ %rd2 + 0 ], 0x10, %r3;
        cp.async.ca.shared.global [ %r1 + 0 ], [ %rd2 + 0 ], 0x8, 0x8;
        cp.async.commit_group;
        @%p2 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        ld.global.nc.L1::evict_first.v2.b64 {%rd1, %rd2}, [%rd3];
        ld.global.nc.v2.b32 {%r1, %r2}, [%rd3];
        ld.global.b16 %rs1, [%rd1];
        ld.global.nc.u16 %rs2, [%rd1];
        """
    )
    assert (found.copies_16, found.loads_16, found.loads_2) == (1, 2, 2)


@pytest.mark.parametrize(
    ("target", "blocks"),
    # Shrink of the 7B model by hand: registers allow 14 (72 a thread, 64 threads),
    # shared memory 100, 164 and 228 KiB over 33 KiB.
    [("a40", 3), ("a100", 4), ("h100", 6)],
)
def test_resident_blocks_follow_shared_memory(target, blocks):
    found = aot_kernels.resident_blocks(
        registers=72,
        shared_bytes=32768,
        threads=64,
        target=aot_target.read_target(target),
    )
    assert found == blocks


def test_resident_blocks_follow_registers_and_threads():
    a40 = aot_target.read_target("a40")
    # 255 registers round up to 256: 8192 a warp, 8 warps fill a core's 65536.
    few = dict(shared_bytes=0, target=a40)
    assert aot_kernels.resident_blocks(registers=255, threads=128, **few) == 2
    assert aot_kernels.resident_blocks(registers=16, threads=1024, **few) == 1
    assert aot_kernels.resident_blocks(registers=16, threads=32, **few) == 16


def test_thunks_nest_by_indentation():
    thunks = aot_hlo.read_thunks(THUNKS)
    assert (thunks.command_buffers, thunks.commands, thunks.kernels) == (2, 3, 4)
    assert thunks.launches["shrink"] == Launch(threads=64, dynamic_shared_bytes=32768)
    assert thunks.launches["add"].threads == 128


@pytest.mark.parametrize(
    ("extra", "weights", "pools"),
    [
        ("", 0, 0),  # the pool is updated in place
        ("  %c = bf16[1000,64]{1,0} copy(%pool)\n", 0, 1),
        ("  %c = bf16[32,64]{0,1} copy(%w)\n", 1, 0),
        ("  %c = f32[32,64]{1,0} convert(%w)\n", 1, 0),
        ("  %c = bf16[4,64]{1,0} copy(%kv)\n", 0, 0),
        (
            "  %c = bf16[32,64]{1,0} fusion(%stack, %zero), kind=kLoop, "
            "calls=%fused_slice\n",
            1,
            0,
        ),
    ],
)
def test_copies_of_weights_and_pools_are_counted(extra, weights, pools):
    module = module_with(extra)
    assert len(aot_hlo.weight_copies(module, {32 * 64})) == weights
    assert len(aot_hlo.pool_copies(module, {1000 * 64})) == pools


def test_gather_of_a_weights_size_is_no_copy_of_a_weight():
    assert "read" not in aot_hlo.weight_copies(module_with(), {4 * 64})


def test_rematerialised_operations_are_counted_by_name():
    module = module_with("  %read.remat = f32[4,64]{1,0} copy(%read)\n")
    assert aot_hlo.count_rematerialised(module) == 1


@pytest.mark.parametrize("trips", [1, 3])
def test_moved_bytes_count_what_is_gathered_and_what_is_updated(trips):
    ids, kv, wide = 4 * 4, 4 * 64 * 2, 4 * 64 * 4
    update = ids + kv + kv  # reads indices and values, writes the values
    read = ids + kv + wide
    copy = 2 * wide
    moved = aot_hlo.moved_bytes(module_with(), lambda _: trips, lambda _: 0)
    assert moved == update + read + trips * copy


def test_moved_bytes_of_own_kernels_are_those_that_are_counted():
    module = module_with(
        "  %k = f32[4,64]{1,0} custom-call(%kv), "
        'metadata={op_name="jit(step)/multi_lora/shrink/pallas_call"}\n'
    )
    plain = aot_hlo.moved_bytes(module_with(), lambda _: 1, lambda _: 0)
    assert aot_hlo.own_kernels(module) == {"shrink"}
    assert aot_hlo.moved_bytes(module, lambda _: 1, lambda _: 7) == plain + 7


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"spill_bytes": 8}, "spills"),
        ({"registers": 129}, "registers"),
        ({"shared_bytes": 33000}, "shared"),
        (
            {
                "instructions": Instructions(
                    mma=8, halved=2, copies_16=12, loads_16=0, loads_2=0
                )
            },
            "contraction",
        ),
        (
            {
                "instructions": Instructions(
                    mma=8, halved=0, copies_16=0, loads_16=0, loads_2=96
                )
            },
            "16-byte",
        ),
    ],
)
def test_kernel_bars_name_what_is_wrong(changes, fault):
    faults = aot_bars.kernel_faults(kernel(**changes), decode=True)
    assert faults == [] if fault is None else any(fault in line for line in faults)


def test_compile_slower_than_on_an_idle_machine_warns():
    program = SimpleNamespace(name="decode[16]", compile_s=9.9)
    assert aot_bars.compile_warnings(program) == []
    program.compile_s = 12.0
    (warning,) = aot_bars.compile_warnings(program)
    assert warning.startswith("decode[16] took 12 s to compile")


def test_unknown_target_is_refused():
    with pytest.raises(ValueError, match="target='b200' must be one of a40"):
        aot_target.read_target("b200")


def test_report_without_wheels_says_what_to_install(tmp_path):
    if aot_target.missing_wheels() is None:
        pytest.skip("needs a Python without the wheels: it reads how that is refused")
    tool = aot_target.ROOT / "tools" / "aot_report.py"
    command = [sys.executable, tool, "--target", "a40", "--model", "smollm2-135m"]
    command += ["--rows", "4", "--prefill-tokens", "64"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install --no-deps jax-cuda12-plugin==" in done.stderr
