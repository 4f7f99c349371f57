"""Products of base weights with a few tokens on CPU: each weight is read once.

A decode step of a few rows is bound by the memory that weights are read from. Here
`ROWS` rows of weights go by at a time, and later ones are fetched meanwhile, while the
sums of all tokens stay in registers (`cpu_tiles`); the threads share the rows.
"""

import jax
import jax.numpy as jnp
import numba
import numpy as np

from jchameleon.pallas import cpu_ffi
from jchameleon.pallas.cpu_tiles import (
    LANES,
    ROWS,
    WIDTH,
    product,
    stream_product,
    stream_thin_product,
)
from jchameleon.pallas.product import matmul

TARGET = "jchameleon_product"

LEAST_TOKENS, MOST_TOKENS = 5, 2 * WIDTH
"""Steps of other sizes are XLA's: with fewer tokens it reads the weights as fast, with
more it is arithmetic that takes time."""

_jit = numba.njit(fastmath=cpu_ffi.FAST_MATH, error_model="numpy")


def product_cpu(
    weight: jax.Array,  # f32[N, D]
    x: jax.Array,  # f32[D, T]
    plus: jax.Array | None = None,  # f32[N, T]
) -> jax.Array:  # f32[N, T]
    """Return weight @ x, and `plus` on top where it is given; see `product`."""
    num_rows, num_tokens = weight.shape[0], x.shape[1]
    if not LEAST_TOKENS <= num_tokens <= MOST_TOKENS or num_rows % ROWS:
        return matmul(weight, x, plus)
    # Whole tiles: what pads them costs nothing, the weights are what takes time.
    width = LANES if num_tokens <= LANES else WIDTH
    padding = ((0, 0), (0, -num_tokens % width))
    x = jnp.pad(x, padding)
    operands = (weight, x) if plus is None else (weight, x, jnp.pad(plus, padding))
    parts = []
    for first, count in cpu_ffi.parts(num_rows // ROWS):
        part = jax.ShapeDtypeStruct((count * ROWS, x.shape[1]), jnp.float32)
        call = jax.ffi.ffi_call(TARGET, part)
        parts.append(call(np.int32(first * ROWS), *operands))
    return jnp.concatenate(parts)[:, :num_tokens]


def handle(frame: int) -> int:
    """Unpack XLA's call; see `product_cpu` for the arguments."""
    if cpu_ffi.answers_query(frame):
        return 0
    adds = cpu_ffi.num_arguments(frame) > 3
    _multiply(
        cpu_ffi.f32_pointer(cpu_ffi.result(frame, 0)),
        np.int64(cpu_ffi.i32_pointer(cpu_ffi.argument(frame, 0))[0]),
        cpu_ffi.f32_pointer(cpu_ffi.argument(frame, 1)),
        cpu_ffi.f32_pointer(cpu_ffi.argument(frame, 2)),
        cpu_ffi.f32_pointer(cpu_ffi.argument(frame, 3 if adds else 2)),
        adds,
        cpu_ffi.result_dim(frame, 0, 0),
        cpu_ffi.argument_dim(frame, 2, 0),
        cpu_ffi.argument_dim(frame, 2, 1),
    )
    return 0


@_jit
def _multiply(
    y,  # f32[rows, T]
    first,
    weight,  # f32[N, D]
    x,  # f32[D, T]
    plus,  # f32[N, T]
    adds,
    num_rows,
    depth,
    num_tokens,
):
    one, fresh = np.int64(1), np.int64(not adds)
    for row in range(0, num_rows, ROWS):
        at = row * num_tokens
        if adds:
            from_plus = (first + row) * num_tokens
            for n in range(ROWS * num_tokens):
                y[at + n] = plus[from_plus + n]
        rows = (weight, (first + row) * depth, depth, one)
        if num_tokens == LANES:
            stream_thin_product(
                y, at, num_tokens, *rows, x, np.int64(0), num_tokens, depth, fresh
            )
            continue
        stream_product(
            y, at, num_tokens, *rows, x, np.int64(0), num_tokens, depth, fresh
        )
        for t in range(WIDTH, num_tokens, WIDTH):  # the rows are in the cache now
            product(y, at + t, num_tokens, *rows, x, t, num_tokens, depth, fresh)
