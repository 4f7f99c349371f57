"""Rotation and page writes on CPU against a loop over tokens."""

import functools

import jax
import numpy as np
import pytest
from paged_cases import Shape
from rope_cases import EPS, PLACES, SHAPES, SMALL, arguments, check_rotated

from jchameleon.config import TRASH_PAGE
from jchameleon.pallas.cpu_kv import rope_write_cpu
from jchameleon.pallas.operations import CPU, compile_operations

compile_operations(CPU)


def rope_write(shape, args):
    call = functools.partial(
        rope_write_cpu,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        block_tokens=shape.block_tokens,
        eps=EPS,
    )
    return jax.jit(call)(**args)


@pytest.mark.parametrize("shape", [*SHAPES, Shape(heads=3, kv_heads=3, head_dim=6)])
@pytest.mark.parametrize("norms", [False, True])
def test_rope_write_matches_loop(shape, norms):
    args = arguments(shape, norms=norms)
    check_rotated(rope_write(shape, args), shape, args)


@pytest.mark.parametrize("norms", [False, True])
def test_many_tokens_are_each_rotated_as_alone(norms):
    """More tokens than are moved together, and a number that no vector divides."""
    one = arguments(SMALL, norms=norms)
    times = 9
    many = dict(one)
    many["qkv"] = np.tile(one["qkv"], times)
    many["rope"] = tuple(np.tile(table, times) for table in one["rope"])
    many["slots"] = np.tile(one["slots"], times)
    own = one["kv_pages"] + 10 * np.arange(times)[:, None]
    own[:, np.array(PLACES)[:, 0] == TRASH_PAGE] = TRASH_PAGE
    many["kv_pages"] = own.astype(np.int32).ravel()
    many["pool"] = np.full((100, SMALL.page_elems), np.nan, np.float32)
    q, pool = (np.asarray(out) for out in rope_write(SMALL, many))
    pool = pool.copy()
    for i in range(times):
        part = pool[10 * i : 10 * i + 7].copy()
        part[TRASH_PAGE] = np.nan
        pool[10 * i : 10 * i + 7] = np.nan
        tokens = slice(i * len(PLACES), (i + 1) * len(PLACES))
        check_rotated((q[:, :, tokens], part), SMALL, one)
    pool[TRASH_PAGE] = np.nan
    assert np.isnan(pool).all()
