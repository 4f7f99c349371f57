"""Rotation and page writes against a loop, interpreted and on a GPU."""

import functools
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
from gpu_backends import SLACK, jit, on_all, on_kernels
from paged_cases import Shape, put

from jchameleon.config import TRASH_PAGE
from jchameleon.models.llama import apply_rope, head_norm
from jchameleon.pallas import gpu_pages
from jchameleon.pallas.gpu_kv import KvConfig, kv_config, rope_write_gpu
from jchameleon.pallas.reference import write_kv_reference

SHAPES = [
    Shape(heads=4, kv_heads=2, head_dim=16),
    Shape(heads=3, kv_heads=1, head_dim=64),
    Shape(heads=2, kv_heads=2, head_dim=80),
    Shape(heads=5, kv_heads=1, head_dim=96, block_tokens=24),
    Shape(heads=8, kv_heads=1, head_dim=128),
]
SMALL = SHAPES[0]
EPS = 1e-5

# (page, slot) of each token: one page twice, its edges, padding at the end.
PLACES = [(3, 0), (3, 15), (2, 7), (5, 0), (4, 1), (TRASH_PAGE, 0), (TRASH_PAGE, 0)]


def arguments(shape, *, norms, seed=0):
    rng = np.random.default_rng(seed)
    dtype = np.dtype(shape.dtype)
    num_heads = shape.heads + 2 * shape.kv_heads
    num_tokens = len(PLACES)
    pages, slots = np.array(PLACES, np.int32).T
    position = rng.integers(0, 4096, num_tokens)
    frequency = 10000.0 ** (-np.arange(shape.head_dim // 2) / (shape.head_dim // 2))
    angle = frequency[:, None] * position
    qkv = rng.standard_normal((num_heads * shape.head_dim, num_tokens)).astype(dtype)
    weights = rng.uniform(0.5, 2, (2, shape.head_dim)).astype(dtype)
    return {
        "qkv": qkv,
        "pool": np.full((7, shape.page_elems), np.nan, dtype),
        "rope": (np.cos(angle).astype("f4"), np.sin(angle).astype("f4")),
        "kv_pages": pages,
        "slots": slots,
        "q_norm": weights[0] if norms else None,
        "k_norm": weights[1] if norms else None,
    }


def rope_write(shape, args, config=None, *, backend="interpret"):
    if backend == "reference":
        return jit(functools.partial(layer_and_write, shape), backend)(**args)
    call = functools.partial(
        rope_write_gpu,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        block_tokens=shape.block_tokens,
        eps=EPS,
        interpret=backend == "interpret",
        config=config,
    )
    return jit(call, backend)(**args)


def layer_and_write(shape, *, qkv, pool, rope, kv_pages, slots, q_norm, k_norm):
    """Norm and rotate as the layer does, in float32, then write token by token."""
    x = qkv.reshape(-1, shape.head_dim, len(PLACES)).astype(jnp.float32)
    q, k, v = jnp.split(x, (shape.heads, shape.heads + shape.kv_heads))
    if q_norm is not None:
        q = head_norm(q, q_norm.astype(jnp.float32), EPS)
        k = head_norm(k, k_norm.astype(jnp.float32), EPS)
    q, k = apply_rope(q, rope), apply_rope(k, rope)
    block_tokens = shape.block_tokens
    pool = write_kv_reference(pool, k, v, kv_pages, slots, block_tokens=block_tokens)
    return q.astype(qkv.dtype), pool


def rotate(x, cos, sin, weight):
    """Norm and rotate one head [HD] pair by pair, in float64."""
    x = x.astype(np.float64)
    if weight is not None:
        x = x / math.sqrt(float(x @ x) / len(x) + EPS) * weight.astype(np.float64)
    out = x.copy()
    half = len(x) // 2
    for i in range(half):
        a, b = x[i], x[i + half]
        out[i] = a * cos[i] - b * sin[i]
        out[i + half] = b * cos[i] + a * sin[i]
    return out


def check_rope_write(shape, args, config=None, *, backend="interpret"):
    """Hold the launch to a loop over tokens and heads; values are moved bit by bit."""
    found = rope_write(shape, args, config, backend=backend)
    q, pool = (np.asarray(out) for out in found)
    cos, sin = (table.astype(np.float64) for table in args["rope"])
    x = args["qkv"].reshape(-1, shape.head_dim, len(PLACES))
    expected_q = np.empty((shape.heads, shape.head_dim, len(PLACES)))
    expected = args["pool"].astype(np.float64)
    for t, (page, slot) in enumerate(PLACES):
        heads = [rotate(h, cos[:, t], sin[:, t], args["q_norm"]) for h in x[..., t]]
        expected_q[..., t] = heads[: shape.heads]
        k = [
            rotate(h, cos[:, t], sin[:, t], args["k_norm"])
            for h in x[shape.heads : -shape.kv_heads, :, t]
        ]
        put(expected, shape, page, slot, np.array(k), x[-shape.kv_heads :, :, t])
    tolerance = SLACK[backend] * (1e-5 if shape.dtype == "float32" else 4e-2)
    assert q.dtype == args["qkv"].dtype
    assert (np.abs(q.astype(np.float64) - expected_q) <= tolerance).all()
    assert pool.dtype == args["pool"].dtype
    found = pool.astype(np.float64)
    found[TRASH_PAGE] = expected[TRASH_PAGE] = 0
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    blocks = found.reshape(-1, 2, shape.kv_heads, shape.block_tokens, shape.head_dim)
    for t, (page, slot) in enumerate(PLACES[:5]):
        v = x[-shape.kv_heads :, :, t].astype(np.float64)
        assert (blocks[page, 1, :, slot] == v).all()


@on_all
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norms", [False, True])
def test_rope_write_matches_loop(shape, norms, backend):
    check_rope_write(shape, arguments(shape, norms=norms), backend=backend)


@on_kernels
@pytest.mark.parametrize("rows", [2, 4, 8])
def test_rope_write_in_token_tiles_matches_loop(rows, backend):
    args = arguments(SMALL, norms=True)
    check_rope_write(SMALL, args, KvConfig(rows=rows), backend=backend)


@on_all
@pytest.mark.parametrize("norms", [False, True])
def test_rope_write_in_bfloat16_matches_loop(norms, backend):
    shape = Shape(heads=6, kv_heads=2, head_dim=16, dtype="bfloat16")
    check_rope_write(shape, arguments(shape, norms=norms), backend=backend)


def test_rope_write_matches_the_layer():
    args = arguments(SMALL, norms=True)
    q, _ = rope_write(SMALL, args)
    x = jnp.asarray(args["qkv"].reshape(-1, 16, len(PLACES)))
    rope = tuple(jnp.asarray(table) for table in args["rope"])
    expected = apply_rope(head_norm(x[:4], jnp.asarray(args["q_norm"]), EPS), rope)
    np.testing.assert_allclose(q, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "defect"),
    [
        ("value_row", lambda head, kv_heads: head + kv_heads - 1),
        ("key_row", lambda head, kv_heads: head + kv_heads),
    ],
)
def test_defect_in_kernel_is_noticed(monkeypatch, name, defect):
    monkeypatch.setattr(gpu_pages, name, defect)
    with pytest.raises(AssertionError):
        check_rope_write(SMALL, arguments(SMALL, norms=False))


def test_config_gives_few_tokens_a_program_each():
    assert kv_config(1, 96).rows == 1
    assert kv_config(512, 48).rows == 4


def test_unsupported_arguments_name_rule_and_value():
    def refused(rule, **changes):
        args = arguments(SMALL, norms=False) | changes
        with pytest.raises(ValueError, match=re.escape(rule)):
            rope_write(SMALL, args)

    refused(
        "qkv rows 100 must be a multiple of heads + 2 kv_heads = 8",
        qkv=np.ones((100, 7)),
    )
    refused("head_dim=12 must be a multiple of 8", qkv=np.ones((96, 7), "f4"))
    refused("pool dtype=float16 must be", pool=np.ones((7, 1024), "f2"))
    refused("slots dtype=float32 must be int32", slots=np.ones(7, "f4"))
    refused("q_norm and k_norm must be given together", q_norm=np.ones(16, "f4"))
    norms = {"q_norm": np.ones(16, "f4"), "k_norm": np.ones(8, "f4")}
    refused("norm shape (8,) must be (16,)", **norms)
    refused("qkv dtype=float16 must be one of", qkv=np.ones((128, 7), "f2"))
    short = np.ones((8, 6), "f4")
    refused("rope shape (8, 6) must be (8, 7)", rope=(short, short))
    refused("kv_pages shape (6,) must be (7,)", kv_pages=np.ones(6, "i4"))
    refused("slots shape (8,) must be (7,)", slots=np.ones(8, "i4"))
    with pytest.raises(ValueError, match="num_warps=5 must be 1, 2, 4 or 8"):
        KvConfig(rows=1, num_warps=5)
    with pytest.raises(ValueError, match="num_stages=0 must be at least 1"):
        KvConfig(rows=1, num_stages=0)
    with pytest.raises(ValueError, match="rows=3 must be a power of two"):
        KvConfig(rows=3)
