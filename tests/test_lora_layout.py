"""The page layout against a plain statement of where each element lies."""

import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jchameleon.config import PROJECTIONS, ModelConfig
from jchameleon.errors import AdapterError, ConfigError
from jchameleon.lora.adapter import HostAdapter, LoraPair
from jchameleon.lora.inspect import describe_adapter
from jchameleon.lora.layout import ChunkLayout

QKVO = ("q", "k", "v", "o")
FUSED = [("q", "k", "v"), ("o",), ("gate", "up"), ("down",)]

# Widths that are no multiples of 64, so that padding occurs.
ODD = ModelConfig(
    name="odd",
    vocab_size=8,
    hidden_size=24,
    intermediate_size=20,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    head_dim=6,
)


def random_adapter(model, ranks, *, seed=0, dtype=np.float32, scale=0.75):
    """Adapter with the given rank per (layer, projection)."""
    rng = np.random.default_rng(seed)
    modules = {}
    for (layer, projection), rank in ranks.items():
        d_in, d_out = model.projection_shape(projection)
        modules[layer, projection] = LoraPair(
            a=rng.standard_normal((rank, d_in)).astype(dtype),
            b=rng.standard_normal((d_out, rank)).astype(dtype),
            scale=scale,
        )
    return HostAdapter.build(modules, source="test")


def everywhere(model, targets, rank):
    return {(i, p): rank for i in range(model.num_layers) for p in targets}


def page_elems(model, block_tokens=16):
    return 2 * model.num_kv_heads * block_tokens * model.head_dim


def bf16_bits(value):
    """Round a float32 to bfloat16, to nearest even, by its bits."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


def expected_elements(model, targets, adapter):
    """Return {(layer, chunk, element): float32 value} and the elements of a chunk.

    The layout in words: for each group in layer order the A block [P, 8, d_in], then
    the B block [8, sum d_out], each from a multiple of 64 elements on.
    """
    found = {}
    offset = 0
    chunks = (adapter.rank + 7) // 8
    for members in FUSED:
        present = [p for p in members if p in targets]
        if not present:
            continue
        d_in = model.projection_shape(present[0])[0]
        widths = [model.projection_shape(p)[1] for p in present]
        a_start = offset
        b_start = (a_start + len(present) * 8 * d_in + 63) // 64 * 64
        offset = (b_start + 8 * sum(widths) + 63) // 64 * 64
        for layer in range(model.num_layers):
            for index, projection in enumerate(present):
                pair = adapter.modules.get((layer, projection))
                if pair is None:
                    continue
                column = sum(widths[:index])
                a = pair.a.astype(np.float32).tolist()
                b = (pair.b.astype(np.float32) * np.float32(pair.scale)).tolist()
                for rank in range(len(a)):
                    chunk, row = rank // 8, rank % 8
                    assert chunk < chunks
                    for k in range(d_in):
                        at = a_start + (index * 8 + row) * d_in + k
                        found[layer, chunk, at] = a[rank][k]
                    for n in range(widths[index]):
                        at = b_start + row * sum(widths) + column + n
                        found[layer, chunk, at] = b[n][rank]
    return found, offset


@pytest.mark.parametrize("rank", [1, 8, 17, 64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("targets", [QKVO, PROJECTIONS, ("k", "v"), ("up", "down")])
def test_pack_every_element_lies_where_the_layout_says(rank, dtype, targets):
    adapter = random_adapter(ODD, everywhere(ODD, targets, rank))
    layout = ChunkLayout(ODD, targets, 192)
    pages = layout.pack(adapter, dtype=dtype)
    expected, chunk_elems = expected_elements(ODD, targets, adapter)
    width = -(-chunk_elems // 192)
    chunks = -(-rank // 8)
    assert layout.chunk_elems == chunk_elems
    assert layout.pages_per_chunk == width
    assert pages.shape == (2, chunks * width, 192)
    assert pages.dtype == (np.float32 if dtype == "float32" else ml_dtypes.bfloat16)
    bits = pages.view(np.uint32 if dtype == "float32" else np.uint16).tolist()
    zeros = 0
    for layer in range(2):
        for page in range(chunks * width):
            for at in range(192):
                element = (page % width) * 192 + at
                value = expected.pop((layer, page // width, element), None)
                found = bits[layer][page][at]
                if value is None:
                    assert found == 0
                    zeros += 1
                elif dtype == "float32":
                    assert found == struct.unpack("<I", struct.pack("<f", value))[0]
                else:
                    assert found == bf16_bits(value)
    assert not expected
    assert zeros > 0


def test_pack_mixed_ranks_and_absent_modules_are_zero():
    ranks = {(0, "q"): 3, (0, "v"): 17, (1, "o"): 8, (1, "down"): 1}
    adapter = random_adapter(ODD, ranks)
    layout = ChunkLayout(ODD, PROJECTIONS, 64)
    pages = layout.pack(adapter, dtype="float32")
    assert adapter.rank == 17
    assert pages.shape == (2, layout.num_pages(17), 64)
    flat = pages.reshape(2, 3, -1)
    expected, _ = expected_elements(ODD, PROJECTIONS, adapter)
    want = np.zeros_like(flat)
    for index, value in expected.items():
        want[index] = value
    np.testing.assert_array_equal(flat, want)


def test_pack_blocks_of_a_group_reproduce_the_delta_weights():
    adapter = random_adapter(ODD, everywhere(ODD, PROJECTIONS, 17), scale=0.5)
    layout = ChunkLayout(ODD, PROJECTIONS, 128)
    chunks = layout.pack(adapter, dtype="float32").reshape(2, 3, -1)
    for group in layout.groups:
        a = chunks[:, :, group.a_offset :][..., : np.prod(group.a_shape)]
        b = chunks[:, :, group.b_offset :][..., : np.prod(group.b_shape)]
        a = a.reshape(2, 3, *group.a_shape)
        b = b.reshape(2, 3, *group.b_shape)
        for index, projection in enumerate(group.projections):
            start, size = group.columns[projection]
            columns = b[..., start : start + size]
            delta = np.einsum("lcrn,lcrk->lnk", columns, a[:, :, index])
            for layer in range(2):
                pair = adapter.modules[layer, projection]
                want = pair.scale * pair.b @ pair.a
                np.testing.assert_allclose(delta[layer], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_pack_file_dtype_folds_the_scale_in_float32(dtype):
    adapter = random_adapter(ODD, {(1, "k"): 5}, dtype=dtype, scale=1 / 3)
    layout = ChunkLayout(ODD, ("k",), 64)
    pages = layout.pack(adapter, dtype="bfloat16").reshape(2, -1)
    group = layout.groups[0]
    pair = adapter.modules[1, "k"]
    for rank in range(5):
        for n in range(6):
            product = np.float32(pair.b[n, rank]) * np.float32(1 / 3)
            found = pages[1, group.b_offset + rank * 6 + n].view(np.uint16)
            assert found == bf16_bits(float(product))
        for k in range(24):
            found = pages[1, group.a_offset + rank * 24 + k].view(np.uint16)
            assert found == bf16_bits(float(pair.a[rank, k]))


@given(st.lists(st.integers(0, 2**32 - 1), min_size=24, max_size=24))
def test_pack_bfloat16_rounds_to_nearest_even(patterns):
    # Exponents that round to infinity are kept out when an adapter is loaded.
    bits = [p & 0xFF7FFFFF if p & 0x7F800000 == 0x7F800000 else p for p in patterns]
    # Exact halves between neighbours, where the rule matters.
    bits[:8] = [(b & 0xFFFF0000) | 0x8000 for b in bits[:8]]
    values = np.array(bits, np.uint32).view(np.float32)
    pair = LoraPair(a=values[None], b=np.ones((6, 1), np.float32), scale=1.0)
    adapter = HostAdapter.build({(0, "k"): pair}, source="test")
    pages = ChunkLayout(ODD, ("k",), 64).pack(adapter, dtype="bfloat16")
    found = pages[0].reshape(-1)[:24].view(np.uint16).tolist()
    assert found == [(b + 0x7FFF + ((b >> 16) & 1)) >> 16 for b in bits]


@pytest.mark.parametrize(
    ("preset", "targets", "elems", "pages"),
    [
        ("llama-7b", QKVO, 262_144, 2),
        ("llama-7b", ("q", "k", "v"), 196_608, 2),
        ("llama-7b", PROJECTIONS, 624_640, 5),
        ("llama-3-8b", QKVO, 212_992, 7),
        ("llama-3-8b", ("q", "k", "v"), 147_456, 5),
        ("llama-3-8b", PROJECTIONS, 655_360, 20),
        ("smollm2-135m", QKVO, 30_720, 5),
        ("smollm2-135m", PROJECTIONS, 81_408, 14),
    ],
)
def test_layout_known_models_have_the_published_sizes(preset, targets, elems, pages):
    model = ModelConfig.preset(preset)
    layout = ChunkLayout(model, targets, page_elems(model))
    assert layout.chunk_elems == elems
    assert layout.pages_per_chunk == pages
    assert [layout.num_chunks(r) for r in (1, 8, 9, 64)] == [1, 1, 2, 8]
    assert layout.num_pages(64) == 8 * pages


@given(
    hidden=st.integers(1, 70),
    intermediate=st.integers(1, 70),
    kv_heads=st.integers(1, 3),
    repeat=st.integers(1, 3),
    half=st.integers(1, 9),
    targets=st.sets(st.sampled_from(PROJECTIONS), min_size=1),
    page=st.integers(1, 20),
)
def test_layout_any_shape_has_aligned_disjoint_blocks(
    hidden, intermediate, kv_heads, repeat, half, targets, page
):
    model = ModelConfig(
        name="any",
        vocab_size=4,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=1,
        num_heads=kv_heads * repeat,
        num_kv_heads=kv_heads,
        head_dim=2 * half,
    )
    layout = ChunkLayout(model, tuple(targets), 64 * page)
    assert layout.targets == tuple(p for p in PROJECTIONS if p in targets)
    blocks = []
    for group in layout.groups:
        assert group.a_shape == (len(group.projections), 8, group.d_in)
        widths = [model.projection_shape(p)[1] for p in group.projections]
        assert group.b_shape == (8, sum(widths))
        assert {model.projection_shape(p)[0] for p in group.projections} == {group.d_in}
        blocks.append((group.a_offset, int(np.prod(group.a_shape))))
        blocks.append((group.b_offset, int(np.prod(group.b_shape))))
        ends = [group.columns[p][0] + group.columns[p][1] for p in group.projections]
        assert [0, *ends[:-1]] == [group.columns[p][0] for p in group.projections]
        assert ends[-1] == group.b_shape[1]
    assert [p for g in layout.groups for p in g.projections] == list(layout.targets)
    end = 0
    for offset, elems in blocks:
        assert offset % 64 == 0
        assert end <= offset < end + 64
        end = offset + elems
    assert end <= layout.chunk_elems < end + 64
    spare = layout.pages_per_chunk * layout.page_elems - layout.chunk_elems
    assert 0 <= spare < layout.page_elems


def test_layout_out_columns_are_rows_of_the_fused_base_matrix():
    layout = ChunkLayout(ODD, ("v", "q", "up", "o", "down"), 64)
    assert layout.targets == ("q", "v", "o", "up", "down")
    assert [g.name for g in layout.groups] == ["qkv", "o", "gate_up", "down"]
    qkv, o, gate_up, down = layout.groups
    assert dict(qkv.columns) == {"q": (0, 18), "v": (18, 6)}
    assert dict(qkv.out_columns) == {"q": (0, 18), "v": (24, 6)}
    assert dict(o.out_columns) == {"o": (0, 24)}
    assert dict(gate_up.columns) == {"up": (0, 20)}
    assert dict(gate_up.out_columns) == {"up": (20, 20)}
    assert dict(down.out_columns) == {"down": (0, 24)}


def test_layout_equal_arguments_compare_and_hash_equal():
    first = ChunkLayout(ODD, ("q", "o"), 64)
    assert first == ChunkLayout(ODD, ("o", "q"), 64)
    assert hash(first) == hash(ChunkLayout(ODD, ("o", "q"), 64))
    assert first != ChunkLayout(ODD, ("q", "o"), 128)


@pytest.mark.parametrize(
    ("targets", "elems", "message"),
    [
        (("q", "lm_head"), 64, "lm_head"),
        (("q",), 0, "page_elems=0"),
        (("q",), 96, "page_elems=96 must be a positive multiple of 64"),
    ],
)
def test_layout_bad_arguments_are_refused(targets, elems, message):
    with pytest.raises(ConfigError, match=message):
        ChunkLayout(ODD, targets, elems)


def test_layout_rank_below_one_is_refused():
    with pytest.raises(AdapterError, match="rank=0"):
        ChunkLayout(ODD, ("q",), 64).num_chunks(0)


def test_pack_more_targets_than_the_layout_is_refused():
    adapter = random_adapter(ODD, {(0, "q"): 2, (0, "up"): 2, (1, "down"): 2})
    layout = ChunkLayout(ODD, QKVO, 64)
    with pytest.raises(AdapterError, match="touches up, down, but .* q, k, v, o"):
        layout.pack(adapter, dtype="float32")


def test_pack_adapter_of_another_model_is_refused():
    layout = ChunkLayout(ODD, QKVO, 64)
    deep = random_adapter(ODD, {(0, "q"): 2})
    deep = HostAdapter.build({(2, "q"): deep.modules[0, "q"]}, source="test")
    with pytest.raises(AdapterError, match="layer 2, the model has 2"):
        layout.pack(deep, dtype="float32")
    swapped = random_adapter(ODD, {(0, "q"): 2})
    swapped = HostAdapter.build({(0, "k"): swapped.modules[0, "q"]}, source="test")
    with pytest.raises(AdapterError, match=r"layer 0 k: .*\(18, 2\).*\(6, 2\)"):
        layout.pack(swapped, dtype="float32")


def test_pack_other_dtype_is_refused():
    adapter = random_adapter(ODD, {(0, "q"): 2})
    with pytest.raises(ConfigError, match="dtype=float16"):
        ChunkLayout(ODD, QKVO, 64).pack(adapter, dtype="float16")


def test_uid_depends_on_content_only():
    ranks = {(0, "q"): 3, (1, "v"): 2}
    first = random_adapter(ODD, ranks)
    reordered = dict(reversed(first.modules.items()))
    assert HostAdapter.build(reordered, source="elsewhere").uid == first.uid
    uids = {first.uid}
    for key in ranks:
        pair = first.modules[key]
        a, b = pair.a.copy(), pair.b.copy()
        a.view(np.uint8)[0, 0] ^= 1
        b.view(np.uint8)[-1, -1] ^= 128
        cast = pair.a.view(np.uint32).astype(np.uint32).view(np.float32)
        for other in (
            LoraPair(a=a, b=pair.b, scale=pair.scale),
            LoraPair(a=pair.a, b=b, scale=pair.scale),
            LoraPair(a=pair.a, b=pair.b, scale=np.nextafter(pair.scale, 1)),
            LoraPair(a=cast.astype(np.float16), b=pair.b, scale=pair.scale),
        ):
            changed = {**first.modules, key: other}
            uids.add(HostAdapter.build(changed, source="test").uid)
    moved = {(0, "q"): first.modules[0, "q"], (1, "k"): first.modules[1, "v"]}
    uids.add(HostAdapter.build(moved, source="test").uid)
    assert len(uids) == 10


def test_describe_lists_what_an_adapter_touches():
    adapter = random_adapter(ODD, {(0, "q"): 3, (1, "q"): 8, (1, "down"): 2})
    described = describe_adapter(adapter)
    assert described == {
        "uid": adapter.uid,
        "source": "test",
        "rank": 8,
        "ranks": {"q": [3, 8], "down": [2]},
        "targets": ["q", "down"],
        "layers": [0, 1],
        "num_modules": 3,
        "scales": [0.75],
        "dtypes": ["float32"],
        "num_bytes": 4 * (3 * (24 + 18) + 8 * (24 + 18) + 2 * (20 + 24)),
    }


def test_layout_without_targets_refuses_every_adapter():
    layout = ChunkLayout(ODD, (), page_elems(ODD))
    assert layout.groups == ()
    adapter = random_adapter(ODD, everywhere(ODD, ("q",), 4))
    with pytest.raises(AdapterError, match="touches q, but .* none: LoRA is off"):
        layout.check_targets(adapter)
