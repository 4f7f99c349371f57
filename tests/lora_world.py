"""Adapters in the pages of one layer's pool, and their products by address."""

import dataclasses
import functools

import ml_dtypes
import numpy as np

from jchameleon.config import ModelConfig
from jchameleon.lora.adapter import HostAdapter, LoraPair
from jchameleon.lora.layout import ChunkLayout

QKVO = ("q", "k", "v", "o")
FUSED = {
    "qkv": ("q", "k", "v"),
    "o": ("o",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}
RANKS = (1, 8, 17, 24, 64, 128, 200)
MORE_RANKS = RANKS * 2 + (16, 2) + (1, 8, 5, 9) * 12
"""64 adapters: a decode step of 64 rows may bring one each."""
MAX_CHUNKS = 25

# Widths that are no multiples of 64, so that blocks are padded and straddle pages.
ODD = ModelConfig(
    name="odd",
    vocab_size=8,
    hidden_size=24,
    intermediate_size=20,
    num_layers=1,
    num_heads=3,
    num_kv_heads=1,
    head_dim=6,
)
WIDE_HEADS = dataclasses.replace(
    ODD, name="wide", hidden_size=20, num_heads=4, num_kv_heads=2, head_dim=10
)


def random_adapter(model, targets, rank, *, seed):
    rng = np.random.default_rng(seed)
    modules = {}
    for projection in targets:
        d_in, d_out = model.projection_shape(projection)
        modules[0, projection] = LoraPair(
            a=rng.standard_normal((rank, d_in), dtype=np.float32),
            b=rng.standard_normal((d_out, rank), dtype=np.float32),
            scale=0.75,
        )
    return HostAdapter.build(modules, source="test")


def block_offsets(model, targets):
    """Return {group: (A offset, B offset)} and the elements of a chunk.

    For each group in layer order the A block [P, 8, d_in], then the B block
    [8, sum d_out], each from a multiple of 64 elements on.
    """
    offsets, end = {}, 0
    for name, members in FUSED.items():
        present = [p for p in members if p in targets]
        if present:
            a = end
            d_in = model.projection_shape(present[0])[0]
            b = (a + len(present) * 8 * d_in + 63) // 64 * 64
            width = sum(model.projection_shape(p)[1] for p in present)
            offsets[name] = (a, b)
            end = (b + 8 * width + 63) // 64 * 64
    return offsets, end


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """Adapters in pages of one layer's pool; everything that is not theirs is NaN."""

    model: ModelConfig
    targets: tuple[str, ...]
    layout: ChunkLayout
    adapters: list[HostAdapter]
    pool: np.ndarray  # [P, E]
    pages: list[np.ndarray]  # per adapter, [chunks, W]


def make_world(model, targets, ranks, *, dtype="float32", page_elems=192, seed=0):
    layout = ChunkLayout(model, targets, page_elems)
    width = layout.pages_per_chunk
    adapters = [
        random_adapter(model, targets, rank, seed=[seed, i])
        for i, rank in enumerate(ranks)
    ]
    total = sum(layout.num_pages(rank) for rank in ranks)
    order = np.random.default_rng(seed).permutation(total + 5) + 2
    pool = np.full((total + 7, page_elems), np.nan, np.dtype(dtype))
    pool[0] = 0
    used = np.zeros(width * page_elems, bool)
    offsets, _ = block_offsets(model, targets)
    for name, (a, b) in offsets.items():
        present = [p for p in FUSED[name] if p in targets]
        for projection in present:
            d_in, d_out = model.projection_shape(projection)
            used[a : a + 8 * d_in], a = True, a + 8 * d_in
            used[b : b + 8 * d_out], b = True, b + 8 * d_out
    pages = []
    for adapter in adapters:
        packed = layout.pack(adapter, dtype=dtype)[0].reshape(-1, used.size)
        packed[:, ~used] = np.nan  # gaps between blocks, tails of chunks
        own, order = order[: len(packed) * width], order[len(packed) * width :]
        pool[own] = packed.reshape(-1, page_elems)
        pages.append(own.astype(np.int32).reshape(-1, width))
    return World(model, targets, layout, adapters, pool, pages)


@functools.cache
def mixed_world(targets=QKVO, dtype="float32", model=ODD, page_elems=192):
    """Return `MORE_RANKS` of the plain case, else `RANKS`; one world, one program."""
    plain = (targets, dtype, model, page_elems) == (QKVO, "float32", ODD, 192)
    ranks = MORE_RANKS if plain else RANKS
    return make_world(model, targets, ranks, dtype=dtype, page_elems=page_elems)


def group_of(layout, name):
    return next(group for group in layout.groups if group.name == name)


def fused_width(model, name):
    return sum(model.projection_shape(p)[1] for p in FUSED[name])


def random_inputs(world, name, num_tokens, *, seed=0):
    """Return y [N, T] and x [d_in, T] in the pool's dtype."""
    rng = np.random.default_rng([seed, num_tokens])
    d_in = world.model.projection_shape(FUSED[name][0])[0]
    y = rng.standard_normal((fused_width(world.model, name), num_tokens))
    x = rng.standard_normal((d_in, num_tokens))
    return y.astype(world.pool.dtype), x.astype(world.pool.dtype)


def by_address(world, name, y, x, token_adapter):
    """Return the product in float64, and the sum of its terms' magnitudes.

    Element e of chunk c is element e % E of page c * W + e // E of its adapter.
    """
    page_elems = world.pool.shape[1]
    pool = world.pool.astype(np.float64)
    out, x = y.astype(np.float64), x.astype(np.float64)
    size = np.abs(out)
    present = [p for p in FUSED[name] if p in world.targets]
    widths = [world.model.projection_shape(p)[1] for p in present]
    d_in = x.shape[0]
    a_offset, b_offset = block_offsets(world.model, world.targets)[0][name]
    rows = dict(
        zip(
            FUSED[name],
            np.cumsum([0] + [world.model.projection_shape(p)[1] for p in FUSED[name]]),
            strict=False,
        )
    )
    for adapter in set(token_adapter.tolist()) - {-1}:
        tokens = np.flatnonzero(token_adapter == adapter)
        for pages in world.pages[adapter]:

            def read(start, count, pages=pages):
                e = np.arange(start, start + count)
                return pool[pages[e // page_elems], e % page_elems]

            for p, projection in enumerate(present):
                own = np.arange(widths[p])[:, None] + rows[projection]
                for r in range(8):
                    a = read(a_offset + (p * 8 + r) * d_in, d_in)
                    column = b_offset + r * sum(widths) + sum(widths[:p])
                    b = read(column, widths[p])[:, None]
                    out[own, tokens] += b * (a @ x[:, tokens])
                    size[own, tokens] += abs(b) * (abs(a) @ abs(x[:, tokens]))
    return out, size


def assert_product(found, y, token_adapter, expected, size, label="", *, slack=1):
    """Hold a result to `by_address`, and its base tokens to the bits of y."""
    assert found.dtype == y.dtype
    # A rounding of each factor, product and sum; float32 sums have more of them.
    eps = 2.0**-8 if y.dtype == ml_dtypes.bfloat16 else 2.0**-20
    error = np.abs(found.astype(np.float64) - expected)
    assert (error <= slack * eps * size).all(), (label, np.nanmax(error / size))
    bits = f"u{y.dtype.itemsize}"
    base = np.asarray(token_adapter) < 0
    assert (found[:, base].view(bits) == y[:, base].view(bits)).all(), label
