"""The running softmax of attention on CPU (Milakov and Gimelshein, 2018)."""

import numba
import numpy as np

from jchameleon.pallas import cpu_ffi

SEGMENT = 32
"""Context tokens between two updates."""

FIRST = np.float32(-1e30)
"""Largest score of a query that has seen nothing."""

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)

_jit = numba.njit(fastmath=cpu_ffi.FAST_MATH, error_model="numpy")


@_jit
def exp(x):
    """Return e**x for x <= 0 to 2e-7 of it (0 below -87), as Cephes' expf does.

    x = n log 2 + r: a polynomial in r, and n goes into the exponent's bits.
    """
    low = x < np.float32(-87.0)
    x = np.float32(-87.0) if low else x
    n = cpu_ffi.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + _ONE
    p *= cpu_ffi.float_from_bits((np.int32(n) + np.int32(127)) << np.int32(23))
    return _ZERO if low else p


@numba.njit(fastmath=True, error_model="numpy")
def _largest(scores, at, seen):
    """Return the largest score that is seen; where one is NaN, any number."""
    most = FIRST
    for s in range(SEGMENT):
        score = scores[at + s] if s < seen else FIRST
        most = max(most, score)
    return most


@_jit
def weigh(scores, at, seen, best, total, i):
    """Turn a segment's scores into weights; return what earlier sums are scaled by.

    Weights of what is not seen are 0. A score that is not finite makes the total, and
    so the output, not finite.
    """
    most = max(best[i], _largest(scores, at, seen))
    keep = exp(best[i] - most)
    weight = _ZERO
    for s in range(SEGMENT):
        w = exp(scores[at + s] - most)
        w = w if s < seen else _ZERO
        scores[at + s] = w
        weight += w
    best[i] = most
    total[i] = total[i] * keep + weight
    return keep
