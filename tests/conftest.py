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
