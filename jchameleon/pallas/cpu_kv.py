"""Rotate queries and keys and write keys and values into pages on CPU, in one call.

XLA makes of the same a dozen passes on one thread: a concatenation of halves, one
transposition of keys and values, a scatter. Here features stay rows, so that tokens are
the lanes of a vector, and a key or value moves once, into its page. The pool is updated
in place.
"""

import math

import jax
import jax.numpy as jnp
import numba
import numpy as np

from jchameleon.pallas import cpu_ffi

TARGET = "jchameleon_rope_write"

_BLOCK = 16
"""Tokens whose features are moved together: one cache line of each row."""

_jit = numba.njit(fastmath=cpu_ffi.FAST_MATH, error_model="numpy")


def rope_write_cpu(
    qkv: jax.Array,  # f32[N, T], rows q | k | v
    pool: jax.Array,  # f32[P, E], donate it: the result takes its memory
    rope: tuple[jax.Array, jax.Array],  # cos, sin: f32[HD / 2, T]
    kv_pages: jax.Array,  # i32[T], page of each token; the trash page for padding
    slots: jax.Array,  # i32[T], place of each token in its block
    *,
    heads: int,
    kv_heads: int,
    block_tokens: int,
    q_norm: jax.Array | None = None,  # f32[HD]
    k_norm: jax.Array | None = None,  # f32[HD]
    eps: float = 1e-6,
) -> tuple[jax.Array, jax.Array]:  # q f32[H, HD, T], pool f32[P, E]
    """Return rotated queries, and the pool with rotated keys and values in their pages.

    As `head_norm` (where there are norms) and `apply_rope` of the layer and then
    `write_kv`.
    """
    num_features, num_tokens = qkv.shape
    head_dim = num_features // (heads + 2 * kv_heads)
    norms = jnp.zeros((2, 0), jnp.float32)  # none
    if q_norm is not None and k_norm is not None:
        norms = jnp.stack([q_norm, k_norm])
    call = jax.ffi.ffi_call(
        TARGET,
        (
            jax.ShapeDtypeStruct((heads, head_dim, num_tokens), jnp.float32),
            jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        ),
        input_output_aliases={1: 1},
    )
    shape = np.array([kv_heads, block_tokens], np.int32)
    q, pool = call(
        qkv, pool, *rope, kv_pages, slots, norms, shape, np.full(1, eps, np.float32)
    )
    return q, pool


def handle(frame: int) -> int:
    """Unpack XLA's call; see `rope_write_cpu` for the arguments."""
    if cpu_ffi.answers_query(frame):
        return 0
    shape = cpu_ffi.i32_pointer(cpu_ffi.argument(frame, 7))
    _rope_write(
        cpu_ffi.f32_pointer(cpu_ffi.result(frame, 0)),
        cpu_ffi.f32_pointer(cpu_ffi.result(frame, 1)),
        cpu_ffi.f32_pointer(cpu_ffi.argument(frame, 0)),
        cpu_ffi.f32_pointer(cpu_ffi.argument(frame, 2)),
        cpu_ffi.f32_pointer(cpu_ffi.argument(frame, 3)),
        cpu_ffi.i32_pointer(cpu_ffi.argument(frame, 4)),
        cpu_ffi.i32_pointer(cpu_ffi.argument(frame, 5)),
        cpu_ffi.f32_pointer(cpu_ffi.argument(frame, 6)),
        cpu_ffi.argument_dim(frame, 6, 1) > 0,
        cpu_ffi.f32_pointer(cpu_ffi.argument(frame, 8))[0],
        cpu_ffi.result_dim(frame, 0, 0),
        cpu_ffi.result_dim(frame, 0, 1),
        cpu_ffi.result_dim(frame, 0, 2),
        cpu_ffi.result_dim(frame, 1, 1),
        np.int64(shape[0]),
        np.int64(shape[1]),
    )
    return 0


@_jit
def _rope_write(
    q,  # f32[H, HD, T]
    pool,  # f32[P, E]
    qkv,  # f32[N, T]
    cos,  # f32[HD / 2, T]
    sin,  # f32[HD / 2, T]
    kv_pages,  # i32[T]
    slots,  # i32[T]
    norms,  # f32[2, HD], of q and k
    has_norms,
    eps,
    heads,
    head_dim,
    num_tokens,
    page_elems,
    kv_heads,
    block_tokens,
):
    head_elems = head_dim * num_tokens
    for head in range(heads):
        at = head * head_elems
        _rotate(
            q,
            at,
            qkv,
            at,
            cos,
            sin,
            norms,
            0,
            has_norms,
            eps,
            head_dim,
            num_tokens,
        )
    key = np.empty(head_elems, np.float32)
    places = np.empty(num_tokens, np.int64)
    for t in range(num_tokens):
        places[t] = np.int64(kv_pages[t]) * page_elems + slots[t] * head_dim
    for kv in range(kv_heads):
        _rotate(
            key,
            0,
            qkv,
            (heads + kv) * head_elems,
            cos,
            sin,
            norms,
            head_dim,
            has_norms,
            eps,
            head_dim,
            num_tokens,
        )
        row = block_tokens * head_dim
        _write(pool, places, kv * row, key, 0, head_dim, num_tokens)
        value = (heads + kv_heads + kv) * head_elems
        _write(pool, places, (kv_heads + kv) * row, qkv, value, head_dim, num_tokens)


@_jit
def _rotate(
    out,  # f32[HD, T] at `o`
    o,
    x,  # f32[HD, T] at `i`
    i,
    cos,
    sin,
    norms,
    w,
    has_norms,
    eps,
    head_dim,
    num_tokens,
):
    """Norm and rotate one head of all tokens."""
    half = head_dim // 2 * num_tokens
    if not has_norms:
        for n in range(half):
            first, second = x[i + n], x[i + half + n]
            out[o + n] = first * cos[n] - second * sin[n]
            out[o + half + n] = second * cos[n] + first * sin[n]
        return
    scale = np.zeros(num_tokens, np.float32)
    for d in range(head_dim):
        for t in range(num_tokens):
            value = x[i + d * num_tokens + t]
            scale[t] += value * value
    for t in range(num_tokens):
        mean = scale[t] / np.float32(head_dim)
        scale[t] = np.float32(1.0) / np.float32(math.sqrt(mean + eps))
    for d in range(head_dim // 2):
        low, high = norms[w + d], norms[w + head_dim // 2 + d]
        for t in range(num_tokens):
            n = d * num_tokens + t
            first = x[i + n] * scale[t] * low
            second = x[i + half + n] * scale[t] * high
            out[o + n] = first * cos[n] - second * sin[n]
            out[o + half + n] = second * cos[n] + first * sin[n]


@_jit
def _write(pool, places, offset, x, i, head_dim, num_tokens):
    """Move one head f32[HD, T] at `i` to the tokens' places in the pool."""
    for begin in range(0, num_tokens, _BLOCK):
        end = min(begin + _BLOCK, num_tokens)
        for d in range(head_dim):
            for t in range(begin, end):
                pool[places[t] + offset + d] = x[i + d * num_tokens + t]
