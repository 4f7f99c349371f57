"""Rotate queries and keys and write keys and values into pages on NVIDIA GPUs.

One launch does what the layer does between its fused projection and attention. Program
(token tile, head) moves one head of `rows` tokens, once: 2 * rows * HD elements, and
the pool is updated in place.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jchameleon.pallas import _compat
from jchameleon.pallas import gpu_pages as pages
from jchameleon.pallas.gpu_device import check_launch
from jchameleon.pallas.tuned import UNTUNED, Key, TunedTable, make_key


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KvConfig:
    """How the kernels are compiled.

    Attributes:
      rows: tokens of a program, a power of two.
      num_warps, num_stages: of Triton.
    """

    rows: int
    num_warps: int = 1
    num_stages: int = 1

    def __post_init__(self) -> None:
        if self.rows < 1 or self.rows & (self.rows - 1):
            raise ValueError(f"rows={self.rows} must be a power of two")
        check_launch(self.num_warps, self.num_stages)


def kv_config(num_tokens: int, heads: int) -> KvConfig:
    """Return the configuration for a step; not measured on hardware yet.

    One warp moves 4 tokens of a head in wide accesses; fewer tokens than that are
    spread over more programs.
    """
    return KvConfig(rows=4 if num_tokens * heads >= 4 * 512 else 1)


def rope_write_key(
    num_tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    block_tokens: int,
    norms: bool,
    dtype: Any,
) -> Key:
    """Return what a table knows a call by; decode and prefill are one kernel."""
    return make_key(
        "rope_write",
        phase="any",
        dtype=dtype,
        tokens=num_tokens,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_tokens=block_tokens,
        norms=int(norms),
    )


def rope_write_gpu(
    qkv: jax.Array,  # f[N, T], rows q | k | v
    pool: jax.Array,  # f[P, E], donate it: the result takes its memory
    rope: tuple[jax.Array, jax.Array],  # cos, sin: f32[HD / 2, T]
    kv_pages: jax.Array,  # i32[T], page of each token; the trash page for padding
    slots: jax.Array,  # i32[T], place of each token in its block
    *,
    heads: int,
    kv_heads: int,
    block_tokens: int,
    q_norm: jax.Array | None = None,  # f[HD]
    k_norm: jax.Array | None = None,  # f[HD]
    eps: float = 1e-6,
    interpret: bool = False,
    tuned: TunedTable = UNTUNED,
    config: KvConfig | None = None,
) -> tuple[jax.Array, jax.Array]:  # q f[H, HD, T], pool f[P, E]
    """Return rotated queries, and the pool with rotated keys and values in their pages.

    As `head_norm` (where there are norms) and `apply_rope` of the layer and then
    `write_kv`, but computed in float32 and rounded once, at the end.

    Args:
      tuned: configurations that were measured.
      config: instead of one of `tuned`, or, where it has none, that of `kv_config`.

    Raises:
      ValueError: the kernel does not serve these shapes or types.
    """
    num_features, num_tokens = qkv.shape
    if num_features % (heads + 2 * kv_heads):
        raise ValueError(
            f"qkv rows {num_features} must be a multiple of "
            f"heads + 2 kv_heads = {heads + 2 * kv_heads}"
        )
    head_dim = num_features // (heads + 2 * kv_heads)
    pages.check_pool(pool, kv_heads, block_tokens, head_dim)
    pages.check_integers(kv_pages=kv_pages, slots=slots)
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm must be given together or not at all")
    norms = () if q_norm is None or k_norm is None else (q_norm, k_norm)
    _check_operands(qkv, rope, norms, kv_pages, slots, head_dim)
    key = rope_write_key(
        num_tokens,
        heads,
        kv_heads,
        head_dim,
        block_tokens=block_tokens,
        norms=bool(norms),
        dtype=pool.dtype,
    )
    config = config or tuned.find(key) or kv_config(num_tokens, heads + 2 * kv_heads)
    operands = (qkv.T, *(table.T for table in rope), *norms, kv_pages, slots)
    q, rows = _compat.triton_call(
        _rope_write_kernel,
        name="rope_write",
        grid=(pl.cdiv(num_tokens, config.rows), heads + 2 * kv_heads),
        out_shape=(
            jax.ShapeDtypeStruct((num_tokens, heads, head_dim), qkv.dtype),
            _compat.shape_of(pages.as_rows(pool, kv_heads, block_tokens)),
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
        input_output_aliases={len(operands): 1},
        eps=eps,
        tile_rows=config.rows,
    )(*operands, pages.as_rows(pool, kv_heads, block_tokens))
    return q.transpose(1, 2, 0), rows.reshape(pool.shape)


def _check_operands(
    qkv: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    norms: tuple[jax.Array, ...],
    kv_pages: jax.Array,
    slots: jax.Array,
    head_dim: int,
) -> None:
    """Raise ValueError where the kernel would read beyond an array, or misread it."""
    num_tokens = qkv.shape[1]
    if qkv.dtype.name not in pages.DTYPES:
        raise ValueError(f"qkv dtype={qkv.dtype.name} must be one of {pages.DTYPES}")
    expected = [
        *(("rope", table, (head_dim // 2, num_tokens)) for table in rope),
        *(("norm", norm, (head_dim,)) for norm in norms),
        ("kv_pages", kv_pages, (num_tokens,)),
        ("slots", slots, (num_tokens,)),
    ]
    for name, array, shape in expected:
        if array.shape != shape:
            raise ValueError(f"{name} shape {array.shape} must be {shape}")


def _rope_write_kernel(
    qkv_ref,  # f[T, N]
    cos_ref,  # f32[T, HD / 2]
    sin_ref,  # f32[T, HD / 2]
    *refs,  # the norms f[HD] if any, pages and slots i32[T], pool, q and pool again
    eps: float,
    tile_rows: int,
):
    # The pool is only written, and only through the output: both refs are one memory.
    *norms, page_ref, slot_ref, _, q_ref, pool_ref = refs
    num_tokens, heads, head_dim = q_ref.shape
    kv_heads = pool_ref.shape[1] // 2
    head = pl.program_id(1)
    half = head_dim // 2
    token = pl.program_id(0) * tile_rows + jnp.arange(tile_rows, dtype=jnp.int32)
    feature = jnp.arange(pages.power_of_two(half), dtype=jnp.int32)
    mask = (token < num_tokens)[:, None] & (feature < half)[None, :]

    def read(ref, *column) -> jax.Array:
        values = _compat.load(ref.at[column], mask=mask, other=0.0)
        return values.astype(jnp.float32)

    def halves() -> tuple[jax.Array, jax.Array]:
        column = head * head_dim + feature[None, :]
        rows = token[:, None]
        return read(qkv_ref, rows, column), read(qkv_ref, rows, column + half)

    def rotated(norm_ref) -> tuple[jax.Array, jax.Array]:
        first, second = halves()
        if norm_ref is not None:
            squares = (first * first + second * second).sum(axis=1, keepdims=True)
            scale = lax.rsqrt(squares / head_dim + eps)
            live = feature < half
            weights = (
                _compat.load(norm_ref.at[feature + n], mask=live, other=0.0)
                for n in (0, half)
            )
            first, second = (
                x * scale * weight.astype(jnp.float32)[None, :]
                for x, weight in zip((first, second), weights, strict=True)
            )
        cos = read(cos_ref, token[:, None], feature[None, :])
        sin = read(sin_ref, token[:, None], feature[None, :])
        return first * cos - second * sin, second * cos + first * sin

    def write_page(row: jax.Array, values: tuple[jax.Array, jax.Array]) -> None:
        live = token < num_tokens
        page = _compat.load(page_ref.at[token], mask=live, other=0)
        slot = _compat.load(slot_ref.at[token], mask=live, other=0)
        for n, x in enumerate(values):
            column = feature[None, :] + n * half
            place = pool_ref.at[page[:, None], row, slot[:, None], column]
            _compat.store(place, x.astype(pool_ref.dtype), mask=mask)

    q_norm, k_norm = norms or (None, None)

    @pl.when(head < heads)
    def write_query() -> None:
        for n, x in enumerate(rotated(q_norm)):
            place = q_ref.at[token[:, None], head, feature[None, :] + n * half]
            _compat.store(place, x.astype(q_ref.dtype), mask=mask)

    @pl.when((head >= heads) & (head < heads + kv_heads))
    def write_key() -> None:
        write_page(pages.key_row(head - heads, kv_heads), rotated(k_norm))

    @pl.when(head >= heads + kv_heads)
    def write_value() -> None:
        write_page(pages.value_row(head - heads - kv_heads, kv_heads), halves())
