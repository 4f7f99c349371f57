"""Models, adapters and work lists that tests of the GPU's LoRA kernels share."""

import dataclasses
import functools

import numpy as np
from lora_world import MAX_CHUNKS, ODD, QKVO, group_of, make_world

from jchameleon.pallas.gpu_lora_config import choose_expand, choose_shrink
from jchameleon.pallas.gpu_lora_work import build_gpu_lora_work, work_sizes

SMALL = dataclasses.replace(
    ODD,
    name="small",
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)
# Rows of A, 192 long, do not divide pages; a third of one, 64 long, does.
WIDE = dataclasses.replace(
    SMALL, name="wide", hidden_size=192, num_heads=3, num_kv_heads=1, head_dim=64
)
SHAPES = {"static": (SMALL, 1024), "hoist": (WIDE, 2048), "element": (ODD, 192)}
GPU_RANKS = (1, 8, 17, 24, 128, 64, 5)


@functools.cache
def world_of(shape, dtype="float32", targets=QKVO):
    model, page_elems = SHAPES[shape]
    return make_world(model, targets, GPU_RANKS, dtype=dtype, page_elems=page_elems)


def build(world, token_adapter, *, prefill, max_chunks=MAX_CHUNKS):
    return build_gpu_lora_work(
        np.asarray(token_adapter, np.int32),
        world.pages,
        prefill=prefill,
        max_chunks=max_chunks,
        pages_per_chunk=world.layout.pages_per_chunk,
    )


def configs(world, name, num_tokens, *, prefill, programs=3, **changes):
    """Return block sizes as chosen, but with so few programs that they take turns."""
    group, page_elems = group_of(world.layout, name), world.pool.shape[1]
    blocks, items, _ = work_sizes(num_tokens, prefill=prefill, max_chunks=MAX_CHUNKS)
    shrink = choose_shrink(group, page_elems, num_items=items, prefill=prefill)
    expand = choose_expand(group, page_elems, num_blocks=blocks, prefill=prefill)
    return {
        "shrink": dataclasses.replace(shrink, programs=programs, **changes),
        "expand": dataclasses.replace(expand, programs=min(programs, 2)),
    }
