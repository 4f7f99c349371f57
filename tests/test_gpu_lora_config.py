"""Which block sizes the GPU's LoRA kernels take, and which are chosen."""

import dataclasses

import pytest
from gpu_lora_cases import configs, world_of
from lora_world import ODD, QKVO, group_of

from jchameleon.config import PROJECTIONS
from jchameleon.lora.layout import ChunkLayout
from jchameleon.pallas.gpu_lora_config import (
    check_expand,
    check_shrink,
    choose_expand,
    choose_shrink,
)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"block_k": 48}, "block_k=48 must be a power of two >= 16"),
        ({"block_k": 8}, "block_k=8 must be a power of two >= 16"),
        ({"splits": 2}, "d_in=192 must be a multiple of splits . block_k = 128"),
        ({"splits": 0}, "splits=0 must be at least 1"),
        ({"splits": 1, "lookup": "hoist"}, "lookup='hoist' cannot find runs of 192"),
        ({"lookup": "static"}, "lookup='static' cannot find runs of 64"),
        ({"lookup": "element"}, "splits=3 must be 1 with lookup='element'"),
        ({"programs": 0}, "programs=0 must be at least 1"),
        ({"num_warps": 3}, "num_warps=3 must be 1, 2, 4 or 8"),
        ({"num_stages": 0}, "num_stages=0 must be at least 1"),
    ],
)
def test_shrink_block_sizes_that_do_not_fit_are_refused(changes, rule):
    world = world_of("hoist")
    chosen = configs(world, "qkv", 16, prefill=False)["shrink"]
    group = group_of(world.layout, "qkv")
    check_shrink(chosen, group, 2048)
    with pytest.raises(ValueError, match=rule):
        check_shrink(dataclasses.replace(chosen, **changes), group, 2048)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"block_n": 128}, "block_n=128 must divide 64"),
        ({"block_n": 24}, "block_n=24 must be a power of two >= 16"),
        ({"lookup": "select"}, "lookup='select' must be 'hoist' or 'element'"),
    ],
)
def test_expand_block_sizes_that_do_not_fit_are_refused(changes, rule):
    world = world_of("hoist")
    chosen = configs(world, "qkv", 16, prefill=False)["expand"]
    group = group_of(world.layout, "qkv")
    check_expand(chosen, group, 2048)
    with pytest.raises(ValueError, match=rule):
        check_expand(dataclasses.replace(chosen, **changes), group, 2048)


def test_pages_of_odd_elements_are_refused():
    world = world_of("hoist")
    chosen = configs(world, "qkv", 16, prefill=False)
    group = group_of(world.layout, "qkv")
    with pytest.raises(ValueError, match="page_elems=2044 must be a multiple of 8"):
        check_shrink(chosen["shrink"], group, 2044)
    with pytest.raises(ValueError, match="page_elems=2044 must be a multiple of 8"):
        check_expand(chosen["expand"], group, 2044)


def test_chosen_block_sizes_fit_every_known_shape():
    """(hidden, ffn, heads, KV heads, head width): Llama, SmolLM2, Qwen2, Mistral."""
    shapes = [
        (4096, 11008, 32, 32, 128),
        (4096, 14336, 32, 8, 128),
        (2048, 8192, 32, 8, 64),
        (3072, 8192, 24, 8, 128),
        (576, 1536, 9, 3, 64),
        (960, 2560, 15, 5, 64),
        (896, 4864, 14, 2, 64),
        (3584, 18944, 28, 4, 128),
        (64, 128, 4, 2, 16),
    ]
    for hidden, ffn, heads, kv_heads, head_dim in shapes:
        model = dataclasses.replace(
            ODD,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
        )
        page_elems = 2 * kv_heads * 16 * head_dim
        for targets in (QKVO, ("q", "v"), PROJECTIONS):
            for group in ChunkLayout(model, targets, page_elems).groups:
                for prefill in (False, True):
                    shrink = choose_shrink(
                        group, page_elems, num_items=512, prefill=prefill
                    )
                    expand = choose_expand(
                        group, page_elems, num_blocks=64, prefill=prefill
                    )
                    check_shrink(shrink, group, page_elems)
                    check_expand(expand, group, page_elems)
                    assert shrink.lookup != "element", (model, group)
                    assert expand.lookup == "hoist", (model, group)
