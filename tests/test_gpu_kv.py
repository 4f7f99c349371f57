"""Rotation and page writes against a loop, interpreted and on a GPU."""

import functools
import re

import jax.numpy as jnp
import numpy as np
import pytest
from gpu_backends import SLACK, jit, on_all, on_kernels
from paged_cases import Shape
from rope_cases import EPS, PLACES, SHAPES, SMALL, arguments, check_rotated

from jchameleon.models.llama import apply_rope, head_norm
from jchameleon.pallas import gpu_pages
from jchameleon.pallas.gpu_kv import KvConfig, kv_config, rope_write_gpu
from jchameleon.pallas.reference import write_kv_reference


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


def check_rope_write(shape, args, config=None, *, backend="interpret"):
    found = rope_write(shape, args, config, backend=backend)
    check_rotated(found, shape, args, slack=SLACK[backend])


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
