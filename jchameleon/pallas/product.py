"""Products of base weights with a step's tokens, in the form that XLA compiles."""

from collections.abc import Callable

import jax

Product = Callable[..., jax.Array]
"""A form of `matmul`: called with (weight, x) or (weight, x, plus)."""


def matmul(
    weight: jax.Array,  # f[N, D]
    x: jax.Array,  # f[D, T]
    plus: jax.Array | None = None,  # f[N, T]
) -> jax.Array:  # f[N, T]
    """Return weight @ x, and `plus` on top where it is given."""
    y = weight @ x
    return y if plus is None else plus + y
