"""Products of base weights with few tokens on CPU, against sums in float64."""

import jax
import numpy as np
import pytest

from jchameleon.pallas import cpu_ffi, cpu_product


@pytest.fixture(scope="module", autouse=True)
def compiled():
    cpu_ffi.register(cpu_product.TARGET, cpu_product.handle)


# Whole tiles and parts of them, fewer rows than calls, inner sizes of no multiple.
ROWS = (8, 72, 968)
DEPTHS = (1, 5, 64, 577)
TOKENS = (1, 5, 8, 15, 16, 17, 32, 33, 63, 64, 65)


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("adds", [False, True])
def test_product_equals_sums_in_float64(num_rows, adds):
    rng = np.random.default_rng(num_rows)
    for depth in DEPTHS:
        for num_tokens in TOKENS:
            weight = rng.standard_normal((num_rows, depth), dtype=np.float32)
            x = rng.standard_normal((depth, num_tokens), dtype=np.float32)
            plus = rng.standard_normal((num_rows, num_tokens), dtype=np.float32)
            operands = (weight, x, plus) if adds else (weight, x)
            got = np.asarray(jax.jit(cpu_product.product_cpu)(*operands))
            want = weight.astype(np.float64) @ x
            want += plus if adds else 0
            scale = np.abs(weight) @ np.abs(x) + 1
            where = f"{depth=} {num_tokens=}"
            assert got.shape == want.shape, where
            assert (np.abs(got - want) <= 1e-6 * scale).all(), where


def lowered(num_rows, num_tokens):
    shapes = [(num_rows, 64), (64, num_tokens)]
    operands = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    return jax.jit(cpu_product.product_cpu).lower(*operands).as_text()


def test_only_steps_that_memory_bounds_leave_xla():
    most = cpu_product.MOST_TOKENS
    for num_tokens in (cpu_product.LEAST_TOKENS, most):
        assert cpu_product.TARGET in lowered(64, num_tokens)
    for num_tokens in (cpu_product.LEAST_TOKENS - 1, most + 1):
        assert cpu_product.TARGET not in lowered(64, num_tokens)
    assert cpu_product.TARGET not in lowered(61, most)  # no whole tiles of rows


def test_a_token_that_is_not_finite_spoils_no_other():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 40), dtype=np.float32)
    x = rng.standard_normal((40, 20), dtype=np.float32)
    good = np.asarray(jax.jit(cpu_product.product_cpu)(weight, x))
    x[3, 7], x[5, 11] = np.nan, np.inf
    bad = np.asarray(jax.jit(cpu_product.product_cpu)(weight, x))
    others = [t for t in range(20) if t not in (7, 11)]
    assert np.isnan(bad[:, 7]).all()
    assert not np.isfinite(bad[:, 11]).any()
    np.testing.assert_array_equal(bad[:, others], good[:, others])
