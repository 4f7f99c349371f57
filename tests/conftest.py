"""Rules that hold for every test."""

import os

import hypothesis
import pytest

# Read by jax when it is first imported, here and in the processes that tests start:
# no silent widening of dtypes, no silent broadcasting of ranks.
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

# A shared machine may stall any example, and its time says nothing about the code. The
# seed is fixed, so that a run fails for what changed and not for what was drawn.
hypothesis.settings.register_profile(
    "tests",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tests")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `make` choose what tests/test_gpu_aot.py compiles."""
    parser.addoption(
        "--gpu-target",
        action="append",
        help="a GPU to compile for, or several; a40 if none is named",
    )
    parser.addoption(
        "--gpu-model",
        action="append",
        help="a model whose programs to compile, or several; smollm2-135m if none",
    )
    parser.addoption(
        "--gpu-step",
        action="append",
        metavar="ROWS,TOKENS",
        help="rows of decode and tokens of prefill, or several pairs; 16,256 if none",
    )


# Minutes or most of one, many of them in one fixture: they begin first, or the last of
# them would hold up one process while the other has nothing left.
LONG_FILES = (
    "test_wheel.py",
    "test_bench_offline.py",
    "test_peft_parity.py",
    "test_demo_adapters.py",
    "test_serving_process.py",
    "test_smollm2_parity.py",
    "test_bench_kernels.py",
    "test_serving_start.py",
    "test_bench_server.py",
    "test_models_gguf.py",
    "test_sizing.py",
    "test_engine_gpu.py",
    "test_lifecycle_runs.py",
    "test_soak_server.py",
    "test_exp_policies.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of `LONG_FILES` first; no other order changes."""
    places = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
