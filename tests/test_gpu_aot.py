"""The gate for GPUs: what compilers say of our programs for machines that are not here.

Needs the compiler's wheels and a process that has not imported jax: `make test-gpu-aot`
sets both up. Nothing runs on a GPU.
"""

import itertools
import re

import aot_bars
import aot_report
import aot_target
import pytest

MISSING = aot_target.missing_wheels()
if MISSING is not None:
    pytest.skip(MISSING, allow_module_level=True)

CONTEXT_TOKENS = 1024


@pytest.fixture(scope="module")
def dump_dir(tmp_path_factory):
    """Return where XLA dumps; from here on jax compiles for absent GPUs."""
    folder = tmp_path_factory.mktemp("dump")
    try:
        aot_target.prepare(folder)
    except RuntimeError:
        pytest.skip("jax is imported already: run this file by itself")
    return folder


def pytest_generate_tests(metafunc):
    targets = metafunc.config.getoption("--gpu-target") or ["a40"]
    models = metafunc.config.getoption("--gpu-model") or ["smollm2-135m"]
    steps = metafunc.config.getoption("--gpu-step") or ["16,256"]
    if "report" in metafunc.fixturenames:
        cases = list(itertools.product(targets, models, steps))
        metafunc.parametrize("report", cases, indirect=True, scope="module")
    elif "target" in metafunc.fixturenames:
        metafunc.parametrize("target", targets)


@pytest.fixture(scope="module")
def report(request, dump_dir):
    target, model, step = request.param
    rows, tokens = map(int, step.split(","))
    return aot_report.report(
        target,
        model,
        dump_dir,
        rows=rows,
        prefill_tokens=tokens,
        context_tokens=min(CONTEXT_TOKENS, tokens),
    )


def test_programs_keep_to_the_bars(report):
    pools = report.shapes.pools
    pool_bytes = sum(pool.size * pool.dtype.itemsize for pool in pools)
    faults = [
        fault
        for program in report.programs
        for fault in aot_bars.program_faults(
            program,
            layers=len(pools),
            pool_bytes=pool_bytes,
            capability=report.target.capability,
        )
    ]
    assert faults == []
    kinds = [program.name.partition("[")[0] for program in report.programs]
    assert kinds == ["decode", "prefill", "commit"]
    assert all(program.kernels for program in report.programs)


def test_programs_move_little_more_than_the_floor_says(report):
    for program, floor, moved in zip(
        report.programs, report.floors, report.moved, strict=True
    ):
        assert floor.seconds(report.target) > 0
        assert moved.moved_bytes >= floor.fewest_bytes
        assert moved.kernels.keys() == {
            re.sub(r"_+\d+$", "", name) for name in program.own_kernels
        }
        assert all(moved.kernels.values())
        faults = aot_bars.traffic_faults(
            program.name,
            floor,
            moved.moved_bytes,
            report.target,
            model=report.shapes.model.name,
        )
        assert faults == []


def test_commit_that_keeps_its_input_copies_every_pool(report, dump_dir):
    import aot_hlo
    import jax
    import numpy as np

    from jchameleon.runtime.programs import commit_load

    pools = report.shapes.pools
    block = jax.ShapeDtypeStruct(
        (len(pools), 4, pools[0].shape[1]), pools[0].dtype, sharding=pools[0].sharding
    )
    kept = jax.jit(commit_load).lower(pools, np.zeros(4, np.int32), block).compile()
    module = aot_hlo.parse_module(kept.as_text())
    assert len(aot_hlo.pool_copies(module, {pools[0].size})) == len(pools)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("rows", [8, 16, 64])
@pytest.mark.parametrize(("contraction", "halved"), [(8, True), (16, False)])
def test_contraction_below_sixteen_is_caught(
    target, dump_dir, rows, contraction, halved
):
    """Triton takes it without complaint and doubles the product."""
    import jax
    import jax.numpy as jnp
    from aot_kernels import read_kernels

    from jchameleon.pallas import _compat

    def multiply(a, b, out):
        out[...] = _compat.dot(a[...], b[...])

    described = aot_target.read_target(target)
    sharding = jax.sharding.SingleDeviceSharding(aot_target.open_device(described))
    a, b = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
        for shape in ((rows, contraction), (contraction, 16))
    )
    call = _compat.triton_call(
        multiply,
        name=f"multiply_{rows}_{contraction}",
        grid=(1,),
        out_shape=jax.ShapeDtypeStruct((rows, 16), jnp.float32),
        num_warps=4,
        num_stages=2,
        interpret=False,
    )
    before = set(dump_dir.glob("*.ptx"))
    jax.jit(call).lower(a, b).compile()
    (kernel,) = read_kernels(set(dump_dir.glob("*.ptx")) - before, {}, described)
    assert kernel.instructions.mma > 0
    assert (kernel.instructions.halved > 0) == halved
    faults = aot_bars.generated_faults(kernel)
    assert bool(faults) == halved, faults
