"""Queries, keys and values to rotate and write, and what a loop makes of them."""

import math

import numpy as np
from paged_cases import Shape, put

from jchameleon.config import TRASH_PAGE

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


def check_rotated(found, shape, args, *, slack=1):
    """Hold queries and pool to a loop over tokens; values are moved bit by bit."""
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
    tolerance = slack * (1e-5 if shape.dtype == "float32" else 4e-2)
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
