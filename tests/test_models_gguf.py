"""GGUF files: container, metadata, dequantised tensors, row order of q and k."""

import struct

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_files import interleave, tiny_tensors, write_gguf
from smollm2 import smollm2_path, transformers_smollm2

from jchameleon.config import ModelConfig, RopeScaling
from jchameleon.errors import ModelLoadError
from jchameleon.models.gguf import gguf_config, load_gguf_params, unpermuted_rows
from jchameleon.models.gguf_file import read_gguf
from jchameleon.models.params import tensor_views

Type = gguf.GGMLQuantizationType


def load_views(path, dtype="float32"):
    file = read_gguf(path)
    config = gguf_config(file)
    return tensor_views(config, load_gguf_params(file, config, dtype=dtype))


def llama3_divisors(theta, head_dim, factor, original):
    """Llama 3.1's `apply_scaling`, frequency by frequency, as a divisor."""
    divisors = []
    for j in range(head_dim // 2):
        wavelength = 2 * np.pi * theta ** (2 * j / head_dim)
        if wavelength < original / 4.0:
            divisors.append(1.0)
        elif wavelength > original / 1.0:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - 1.0) / (4.0 - 1.0)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def test_config_tiny_file_translates(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", general__name="a model")
    assert gguf_config(read_gguf(path)) == ModelConfig(
        name="a model",
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,  # the decimal, not the f32 nearest to it
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def test_config_optional_fields_absent_take_defaults(tmp_path):
    path = write_gguf(
        tmp_path / "tiny.gguf",
        tensors=tiny_tensors(tied=True),
        llama__attention__head_count_kv=None,
        llama__rope__dimension_count=None,
        llama__rope__freq_base=None,
        tokenizer__ggml__bos_token_id=None,
        tokenizer__ggml__eot_token_id=5,
    )
    config = gguf_config(read_gguf(path))
    assert config.name == "tiny"
    assert config.num_kv_heads == 4
    assert config.rope_theta == 10000.0
    assert config.tie_embeddings
    assert config.bos_token_id is None
    assert config.eos_token_ids == (2, 5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"architecture": "gemma"}, ["general.architecture", "gemma"]),
        ({"llama__block_count": None}, ["llama.block_count", "missing"]),
        ({"llama__attention__layer_norm_rms_epsilon": None}, ["rms_epsilon"]),
        ({"llama__expert_count": 8}, ["llama.expert_count", "8"]),
        ({"llama__logit_scale": 2.0}, ["llama.logit_scale", "2.0"]),
        ({"llama__attention__sliding_window": 64}, ["sliding_window", "64"]),
        ({"llama__rope__dimension_count": 4}, ["rope.dimension_count", "4"]),
        ({"llama__attention__value_length": 4}, ["value_length", "4"]),
        ({"llama__rope__scaling__type": "yarn"}, ["rope.scaling.type", "yarn"]),
        ({"llama__attention__head_count": [4, 4]}, ["head_count", "[4, 4]"]),
        ({"llama__attention__head_count": 0}, ["head_count", "0"]),
        ({"llama__attention__head_count_kv": 3}, ["num_kv_heads", "3"]),
        ({"llama__rope__freq_base": "x"}, ["freq_base", "'x'"]),
        ({"tokenizer__ggml__eos_token_id": 96}, ["96"]),
        ({"tokenizer__ggml__eos_token_id": "x"}, ["eos_token_id"]),
    ],
)
def test_config_unsupported_metadata_is_refused_by_name(tmp_path, fields, words):
    path = write_gguf(tmp_path / "x.gguf", **fields)
    with pytest.raises(ModelLoadError) as raised:
        gguf_config(read_gguf(path))
    assert "\n" not in str(raised.value)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"llama__rope__scaling__type": "none"}, None),
        (
            {
                "llama__rope__scaling__type": "linear",
                "llama__rope__scaling__factor": 4.0,
            },
            RopeScaling(kind="linear", factor=4.0),
        ),
        (
            {"llama__rope__scale_linear": 2.0},
            RopeScaling(kind="linear", factor=2.0),
        ),
    ],
)
def test_config_linear_rope_scaling_translates(tmp_path, fields, expected):
    path = write_gguf(tmp_path / "x.gguf", **fields)
    assert gguf_config(read_gguf(path)).rope_scaling == expected


@pytest.mark.parametrize(
    ("factor", "original"), [(8.0, 8192), (32.0, 8192), (4.0, 2048)]
)
def test_config_rope_freqs_of_llama3_are_recovered(tmp_path, factor, original):
    divisors = llama3_divisors(500000.0, 128, factor, original)
    path = write_gguf(
        tmp_path / "x.gguf",
        extra={"rope_freqs.weight": divisors},
        llama__rope__freq_base=500000.0,
        llama__attention__key_length=128,
        llama__attention__value_length=128,
        llama__rope__dimension_count=128,
    )
    assert gguf_config(read_gguf(path)).rope_scaling == RopeScaling(
        kind="llama3", factor=factor, original_max_position=original
    )


def test_config_rope_freqs_of_ones_are_no_scaling(tmp_path):
    ones = np.ones(4, np.float32)
    path = write_gguf(tmp_path / "x.gguf", extra={"rope_freqs.weight": ones})
    assert gguf_config(read_gguf(path)).rope_scaling is None
    assert load_views(path)


@pytest.mark.parametrize(
    "divisors", [[1, 1, 2, 8.1], [1, 1, 1, np.inf], [1, 2, 3, 4, 5], [0.5, 1, 1, 1]]
)
def test_config_rope_freqs_of_other_shape_or_law_are_refused(tmp_path, divisors):
    extra = {"rope_freqs.weight": np.array(divisors, np.float32)}
    path = write_gguf(tmp_path / "x.gguf", extra=extra)
    with pytest.raises(ModelLoadError, match="rope_freqs.weight"):
        gguf_config(read_gguf(path))


def test_unpermuted_rows_undo_interleaving():
    for num_heads, head_dim in ((1, 2), (4, 8), (9, 64)):
        hf = np.arange(num_heads * head_dim)[:, None]
        stored = interleave(hf, num_heads)
        restored = np.empty_like(hf)
        restored[unpermuted_rows(num_heads, head_dim)] = stored
        np.testing.assert_array_equal(restored, hf)


def test_unpermuted_rows_make_both_rope_conventions_agree():
    rng = np.random.default_rng(1)
    head_dim = 8
    stored_q, stored_k = rng.standard_normal((2, head_dim, 16))
    x, y = rng.standard_normal((2, 16))
    rows = unpermuted_rows(1, head_dim)
    angle_of = 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)

    def rotate_neighbours(v, position):
        pairs = v.reshape(-1, 2) @ [1, 1j] * np.exp(1j * position * angle_of)
        return np.stack([pairs.real, pairs.imag], axis=1).reshape(-1)

    def rotate_halves(v, position):
        first, second = np.split(v, 2)
        cos, sin = np.cos(position * angle_of), np.sin(position * angle_of)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin])

    hf_q, hf_k = np.empty_like(stored_q), np.empty_like(stored_k)
    hf_q[rows], hf_k[rows] = stored_q, stored_k
    expected = rotate_neighbours(stored_q @ x, 7) @ rotate_neighbours(stored_k @ y, 3)
    got = rotate_halves(hf_q @ x, 7) @ rotate_halves(hf_k @ y, 3)
    np.testing.assert_allclose(got, expected)


@pytest.mark.parametrize(
    "kind",
    [
        Type.F32,
        Type.F16,
        Type.BF16,
        Type.Q8_0,
        Type.Q4_0,
        Type.Q4_1,
        Type.Q5_0,
        Type.Q5_1,
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_params_every_quantisable_type_round_trips(tmp_path, kind, dtype):
    tensors = tiny_tensors(seed=5)
    types = {name: kind for name in tensors if "norm" not in name}
    path = write_gguf(tmp_path / "x.gguf", tensors=tensors, types=types)
    views = load_views(path, dtype)
    assert set(views) == set(tensors)
    for name, tensor in tensors.items():
        if name in types:  # rows are quantised one by one, so their order is free
            tensor = gguf.quants.dequantize(gguf.quants.quantize(tensor, kind), kind)
        np.testing.assert_array_equal(views[name], tensor.astype(views[name].dtype))


@pytest.mark.parametrize("kind", [Type.Q2_K, Type.Q4_K, Type.Q6_K, Type.IQ4_NL])
def test_params_other_block_types_match_the_gguf_package(tmp_path, kind):
    block_elems, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    ffn = 512  # rows of ffn_down are whole blocks
    raw = np.random.default_rng(2).integers(
        0, 60, (32, ffn // block_elems * block_bytes), dtype=np.uint8
    )  # f16 scales of such bytes are finite
    tensors = tiny_tensors()
    for i in range(2):
        layer = f"model.layers.{i}.mlp."
        for name in ("gate", "up"):
            tensors[f"{layer}{name}_proj.weight"] = np.zeros((ffn, 32), np.float32)
        del tensors[layer + "down_proj.weight"]
    path = write_gguf(
        tmp_path / "x.gguf",
        tensors=tensors,
        extra={f"blk.{i}.ffn_down.weight": (raw, kind) for i in range(2)},
        llama__feed_forward_length=ffn,
    )
    view = load_views(path)["model.layers.1.mlp.down_proj.weight"]
    np.testing.assert_array_equal(view, gguf.quants.dequantize(raw, kind))
    assert np.ptp(view) > 0


def test_params_type_that_gguf_cannot_dequantise_is_refused(tmp_path):
    path = write_gguf(tmp_path / "x.gguf")
    data = bytearray(path.read_bytes())
    # The type of a tensor follows its name, rank and two dimensions in the table.
    at = data.index(b"blk.0.attn_o") + len("blk.0.attn_output.weight") + 4 + 16
    assert struct.unpack_from("<I", data, at)[0] == Type.F32
    struct.pack_into("<I", data, at, Type.I32)
    path.write_bytes(data)
    with pytest.raises(ModelLoadError, match=r"attn_output.weight.*I32"):
        load_views(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), ["up_proj", "missing"]),
        (lambda t: t.pop("model.embed_tokens.weight"), ["token_embd", "missing"]),
        (
            lambda t: t.update({"model.norm.weight": np.ones(64, np.float32)}),
            ["output_norm.weight", "[64]", "[32]"],
        ),
    ],
)
def test_params_other_tensors_than_needed_are_refused(tmp_path, change, words):
    tensors = tiny_tensors()
    change(tensors)
    path = write_gguf(tmp_path / "x.gguf", tensors=tensors)
    with pytest.raises(ModelLoadError) as raised:
        load_views(path)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    "name", ["blk.0.attn_q.bias", "blk.2.attn_norm.weight", "blk.0.ffn_gate_inp.weight"]
)
def test_params_unexpected_tensor_is_refused(tmp_path, name):
    extra = {name: np.ones(32, np.float32)}
    path = write_gguf(tmp_path / "x.gguf", extra=extra)
    with pytest.raises(ModelLoadError, match=name):
        load_views(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "too short"),
        (b"GGUF", "too short"),
        (b"GGML" + bytes(40), "begin with 'GGUF'"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "ends at byte 24"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "ends at byte 24"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 63), "ends at byte 32"),
        (
            b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 1 << 50),
            "strings cannot fit",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 1 << 62),
            "ends at byte",
        ),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77), "unknown type 77"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"\xff", 4), "not UTF-8"),
    ],
)
def test_read_malformed_header_is_refused_in_one_line(tmp_path, content, words):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError) as raised:
        read_gguf(path)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_read_absent_file_is_refused(tmp_path):
    with pytest.raises(ModelLoadError, match="cannot read"):
        read_gguf(tmp_path / "none.gguf")


@pytest.fixture(scope="module")
def tiny_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    return write_gguf(path, tokenizer__ggml__tokens=["a", "b"]).read_bytes()


@settings(max_examples=150)
@given(cut=st.floats(0, 1, exclude_max=True))
def test_read_truncated_anywhere_is_refused(tmp_path_factory, tiny_bytes, cut):
    path = tmp_path_factory.getbasetemp() / "cut.gguf"
    path.write_bytes(tiny_bytes[: int(cut * len(tiny_bytes))])
    with pytest.raises(ModelLoadError):
        read_gguf(path)


@settings(max_examples=300)
@given(data=st.data())
def test_load_corrupt_header_loads_or_is_refused(tmp_path_factory, tiny_bytes, data):
    # Bytes of the header only: weights have no redundancy to check.
    header = tiny_bytes.index(b"blk.1.ffn_down.weight") + 60
    broken = bytearray(tiny_bytes)
    for _ in range(data.draw(st.integers(1, 3))):
        broken[data.draw(st.integers(0, header))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "broken.gguf"
    path.write_bytes(broken)
    try:
        load_views(path)
    except ModelLoadError as error:
        assert "\n" not in str(error)


def test_params_tiny_file_equals_the_import_of_transformers(tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="oracle: Python 3.11 only"
    )
    path = write_gguf(
        tmp_path / "x.gguf",
        general__file_type=0,
        tokenizer__ggml__model="gpt2",
        tokenizer__ggml__tokens=[chr(65 + i) for i in range(96)],
        tokenizer__ggml__merges=["A B"],
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="x.gguf"
    )
    views = load_views(path)
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(views[name], tensor.numpy())


def test_params_smollm2_equal_the_import_of_transformers():
    state = transformers_smollm2().state_dict()
    views = load_views(smollm2_path())
    assert set(state) - set(views) == {"lm_head.weight"}  # tied
    assert set(views) <= set(state)
    for name, view in views.items():
        np.testing.assert_array_equal(view, state[name].numpy(), err_msg=name)


VARIANTS = {"qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", VARIANTS)
def test_variant_file_is_what_transformers_makes_of_it(tmp_path, architecture, tied):
    tensors = tiny_tensors(tied=tied, **VARIANTS[architecture])
    path = write_gguf(
        tmp_path / "x.gguf",
        tensors=tensors,
        architecture=architecture,
        **{
            f"{architecture}__attention__key_length": 8,
            f"{architecture}__attention__value_length": 8,
            f"{architecture}__vocab_size": 96,
        },
    )
    config = gguf_config(read_gguf(path))
    assert config.family == architecture
    assert config.qkv_bias == (architecture == "qwen2")
    assert config.qk_norm == (architecture == "qwen3")
    assert config.tie_embeddings == tied
    views = load_views(path)
    assert set(views) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(views[name], tensor)
    if architecture == "qwen3":  # transformers takes 128 for the width of its heads
        return
    transformers = pytest.importorskip(
        "transformers", reason="oracle: Python 3.11 only"
    )
    torch = pytest.importorskip("torch", reason="oracle: Python 3.11 only")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    assert theirs.config.model_type == architecture
    for name, tensor in theirs.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            np.testing.assert_array_equal(views[name], tensor.numpy())


@pytest.mark.parametrize(
    ("architecture", "tensors", "words"),
    [
        ("llama", {"qkv_bias": True}, ["attn_q.bias", "unexpected"]),
        ("qwen2", {}, ["q_proj.bias", "missing"]),
        ("qwen2", {"qkv_bias": True, "qk_norm": True}, ["attn_q_norm", "unexpected"]),
        ("qwen3", {"qk_norm": True, "qkv_bias": True}, ["attn_q.bias", "unexpected"]),
        ("qwen3moe", {}, ["general.architecture", "llama, qwen2, qwen3"]),
    ],
)
def test_variant_other_tensors_than_needed_are_refused(
    tmp_path, architecture, tensors, words
):
    path = write_gguf(
        tmp_path / "x.gguf", tensors=tiny_tensors(**tensors), architecture=architecture
    )
    with pytest.raises(ModelLoadError) as raised:
        load_views(path)
    for word in words:
        assert word in str(raised.value)
