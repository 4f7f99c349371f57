"""Checkpoints as GGUF files: metadata to config, tensors dequantised.

Architectures are llama (Mistral models too go by it), qwen2 and qwen3. Only what the
engine computes exactly is accepted: an unknown key of the architecture's section, an
unknown tensor or tensor type is refused by name.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from jchameleon.config import ModelConfig, RopeScaling
from jchameleon.errors import ConfigError, ModelLoadError
from jchameleon.models.files import short
from jchameleon.models.gguf_file import GgufFile, GgufTensor
from jchameleon.models.params import (
    Params,
    allocate,
    numpy_dtype,
    tensor_shapes,
    tensor_views,
)

_CHUNK_ELEMS = 1 << 18  # dequantised at once: 1 MiB of f32, stays in the L2 cache

_TENSOR_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}

_ARCHITECTURES = ("llama", "qwen2", "qwen3")

# Keys of the architecture's section that are read below or change nothing here.
_KNOWN_KEYS = {
    "vocab_size",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "tensor_data_layout",
}
_ZERO_KEYS = {"expert_count", "expert_used_count"}


def gguf_config(file: GgufFile) -> ModelConfig:
    """Translate the metadata of a file.

    Raises:
      ModelLoadError: another architecture, a required key absent, or a value that
        changes the maths in a way that is not supported.
    """
    meta = _Meta(file)
    architecture = meta.architecture
    if architecture not in _ARCHITECTURES:
        raise meta.error(
            "general.architecture",
            architecture,
            f"must be one of {', '.join(_ARCHITECTURES)}",
        )
    meta.check_known()
    embed = file.tensors.get("token_embd.weight")
    if embed is None or len(embed.shape) != 2:
        raise ModelLoadError(f"{file.path}: tensor 'token_embd.weight' is missing")
    hidden_size = meta.integer("embedding_length")
    num_heads = meta.integer("attention.head_count")
    if num_heads <= 0:
        raise meta.error(
            f"{architecture}.attention.head_count", num_heads, "must be positive"
        )
    head_dim = meta.integer("attention.key_length", hidden_size // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if meta.integer(key, head_dim) != head_dim:
            raise meta.error(
                f"{architecture}.{key}",
                meta.integer(key),
                f"must equal the head width {head_dim}",
            )
    theta = meta.number("rope.freq_base", 10000.0)
    try:
        return ModelConfig(
            name=str(file.metadata.get("general.name") or file.path.stem),
            vocab_size=embed.shape[0],
            hidden_size=hidden_size,
            intermediate_size=meta.integer("feed_forward_length"),
            num_layers=meta.integer("block_count"),
            num_heads=num_heads,
            num_kv_heads=meta.integer("attention.head_count_kv", num_heads),
            head_dim=head_dim,
            rope_theta=theta,
            rope_scaling=_rope_scaling(file, meta, theta, head_dim),
            rms_norm_eps=meta.number("attention.layer_norm_rms_epsilon"),
            max_position_embeddings=meta.integer("context_length"),
            tie_embeddings="output.weight" not in file.tensors,
            bos_token_id=gguf_token_id(file, "bos_token_id"),
            eos_token_ids=gguf_eos_token_ids(file),
            family=architecture,
            qkv_bias=architecture == "qwen2",
            qk_norm=architecture == "qwen3",
        )
    except ConfigError as error:
        raise ModelLoadError(f"{file.path}: {error}") from error


def gguf_token_id(file: GgufFile, name: str) -> int | None:
    """Return the integer `tokenizer.ggml.<name>`, or None where the file has none."""
    value = file.metadata.get(f"tokenizer.ggml.{name}")
    if value is not None and type(value) is not int:
        raise _Meta(file).error(f"tokenizer.ggml.{name}", value, "must be an integer")
    return value


def gguf_eos_token_ids(file: GgufFile) -> tuple[int, ...]:
    """Return the ids that end a reply: end of sequence, of turn, of message."""
    names = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [gguf_token_id(file, name) for name in names]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def load_gguf_params(file: GgufFile, config: ModelConfig, *, dtype: str) -> Params:
    """Dequantise every tensor into the parameter tree, in threads.

    Query and key rows of a Llama file are put back from the interleaved order in which
    GGUF stores them (see `unpermuted_rows`); Qwen files keep Hugging Face's order.

    Raises:
      ModelLoadError: a tensor is missing, unexpected, of another shape, or of a type
        that the `gguf` package does not dequantise.
    """
    sources: dict[str, GgufTensor] = {}
    for tensor in file.tensors.values():
        name = _checkpoint_name(tensor.name)
        if name is None:
            if tensor.name == "rope_freqs.weight":  # became config.rope_scaling
                continue
            raise ModelLoadError(
                f"{file.path}: unexpected tensor {tensor.name!r}; a {config.family} "
                "model of this metadata has no use for it"
            )
        sources[name] = tensor
    needed = set()
    for name, shape in tensor_shapes(config):
        source = sources.get(name)
        if source is None:
            raise ModelLoadError(f"{file.path}: the tensor for {name!r} is missing")
        if source.shape != shape:
            raise ModelLoadError(
                f"{file.path}: tensor {source.name!r} has shape {list(source.shape)}, "
                f"the metadata needs {list(shape)}"
            )
        needed.add(name)
    for name, source in sources.items():
        if name not in needed:
            raise ModelLoadError(f"{file.path}: unexpected tensor {source.name!r}")
    _check_types(file)

    params = allocate(config, numpy_dtype(dtype))
    rows: dict[str, np.ndarray] = {}
    if config.family == "llama":
        rows["q_proj.weight"] = unpermuted_rows(config.num_heads, config.head_dim)
        rows["k_proj.weight"] = unpermuted_rows(config.num_kv_heads, config.head_dim)
    # Numpy releases the interpreter lock inside its loops, so threads do help.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        jobs = [
            pool.submit(
                _fill, view, sources[name], rows.get(name.rpartition("attn.")[2])
            )
            for name, view in tensor_views(config, params).items()
        ]
        for job in jobs:
            job.result()
    return params


def gguf_dtype(file: GgufFile) -> str:
    """Return the parameter dtype that holds every dequantised value exactly."""
    kinds = {tensor.type for tensor in file.tensors.values()}
    return "bfloat16" if kinds == {GGMLQuantizationType.BF16} else "float32"


def unpermuted_rows(num_heads: int, head_dim: int) -> np.ndarray:
    """Return, for each row of a GGUF q or k matrix, its row in the HF matrix, i64[n].

    GGUF keeps Meta's order, in which RoPE rotates neighbours: stored row 2j + s of a
    head, s in {0, 1}, is the s-th member of rotary pair j. HF rotates halves, where
    that member is row s * head_dim / 2 + j.
    """
    order = np.arange(num_heads * head_dim).reshape(num_heads, 2, head_dim // 2)
    return order.swapaxes(1, 2).reshape(-1)


def _fill(view: np.ndarray, tensor: GgufTensor, rows: np.ndarray | None) -> None:
    """Dequantise `tensor` into `view`, its row i going to row `rows[i]` if given."""
    view = np.atleast_2d(view)
    count, columns = view.shape
    raw = tensor.data.reshape(count, -1)
    step = max(1, _CHUNK_ELEMS // columns)
    with np.errstate(all="ignore"):
        for start in range(0, count, step):
            # One long row: `dequantize` works through sixteen rows at a time, which
            # for narrow matrices means thousands of tiny numpy calls.
            block = raw[start : start + step].reshape(1, -1)
            values = dequantize(block, tensor.type).reshape(-1, columns)
            if rows is None:
                view[start : start + step] = values
            else:
                view[rows[start : start + step]] = values


def _check_types(file: GgufFile) -> None:
    """Refuse tensor types that cannot be dequantised, by trying one block of each."""
    first: dict[GGMLQuantizationType, str] = {}
    for tensor in file.tensors.values():
        first.setdefault(tensor.type, tensor.name)
    for kind, name in first.items():
        block = np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8)
        try:
            dequantize(block, kind)
        except NotImplementedError as error:
            raise ModelLoadError(
                f"{file.path}: tensor {name!r} has type {kind.name}, which the gguf "
                "package does not dequantise"
            ) from error


def _checkpoint_name(name: str) -> str | None:
    if name in _TENSOR_NAMES:
        return _TENSOR_NAMES[name]
    prefix, _, rest = name.partition(".")
    layer, _, suffix = rest.partition(".")
    if prefix != "blk" or not layer.isdecimal() or suffix not in _LAYER_NAMES:
        return None
    return f"model.layers.{int(layer)}.{_LAYER_NAMES[suffix]}"


class _Meta:
    """Typed access to the architecture's section of the metadata."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.architecture = file.metadata.get("general.architecture")

    def error(self, key: str, value: Any, rule: str) -> ModelLoadError:
        return ModelLoadError(f"{self.file.path}: {key}={short(value)} {rule}")

    def check_known(self) -> None:
        """Raise for a key that may change the maths in a way unknown here."""
        for key, value in self.file.metadata.items():
            section, _, field = key.partition(".")
            if section != self.architecture or field in _KNOWN_KEYS:
                continue
            if not (field in _ZERO_KEYS and value == 0):
                raise self.error(key, value, "is not supported")

    def get(self, field: str, default: Any) -> Any:
        value = self.file.metadata.get(f"{self.architecture}.{field}", default)
        if value is None:
            raise ModelLoadError(
                f"{self.file.path}: {self.architecture}.{field} is missing"
            )
        return value

    def integer(self, field: str, default: int | None = None) -> int:
        value = self.get(field, default)
        if type(value) is not int:
            raise self.error(
                f"{self.architecture}.{field}", value, "must be an integer"
            )
        return value

    def number(self, field: str, default: float | None = None) -> float:
        value = self.get(field, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(f"{self.architecture}.{field}", value, "must be a number")
        return float(value)


def _rope_scaling(
    file: GgufFile, meta: _Meta, theta: float, head_dim: int
) -> RopeScaling | None:
    """Return the RoPE scaling that the metadata or the `rope_freqs` tensor asks for."""
    kind = meta.get("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise meta.error(
            f"{meta.architecture}.rope.scaling.type", kind, "must be none or linear"
        )
    # Files from before rope.scaling.* carry the factor as rope.scale_linear.
    factor = meta.number("rope.scaling.factor", meta.number("rope.scale_linear", 1.0))
    if kind == "none" and f"{meta.architecture}.rope.scaling.type" in file.metadata:
        factor = 1.0
    linear = RopeScaling(kind="linear", factor=factor) if factor != 1.0 else None
    tensor = file.tensors.get("rope_freqs.weight")
    if tensor is None:
        return linear
    if tensor.type != GGMLQuantizationType.F32 or tensor.shape != (head_dim // 2,):
        raise ModelLoadError(
            f"{file.path}: tensor 'rope_freqs.weight' must be F32 [{head_dim // 2}], "
            f"is {tensor.type.name} {list(tensor.shape)}"
        )
    divisors = tensor.data.view("<f4").astype(np.float64)
    if np.all(divisors == 1.0):
        return linear
    if linear is not None:
        raise meta.error(
            f"{meta.architecture}.rope.scaling.factor",
            factor,
            "beside rope_freqs.weight",
        )
    scaling = _fit_llama3(divisors, theta, head_dim)
    if scaling is None:
        raise ModelLoadError(
            f"{file.path}: tensor 'rope_freqs.weight' does not follow llama3 scaling "
            "with low_freq_factor 1 and high_freq_factor 4"
        )
    return scaling


def _fit_llama3(
    divisors: np.ndarray,  # f64[head_dim / 2]
    theta: float,
    head_dim: int,
) -> RopeScaling | None:
    """Recover llama3 scaling from the divisors of the rotary frequencies.

    GGUF stores those instead of the four parameters. Every Llama 3.1 to 3.3 release
    uses low_freq_factor 1 and high_freq_factor 4; the factor is the largest divisor,
    and the original context, a power of two, is found by trying.
    """
    factor = round(float(divisors.max()), 4)
    if not np.all(np.isfinite(divisors)) or factor < 1.0:
        return None
    for original in (1 << exponent for exponent in range(10, 18)):
        scaling = RopeScaling(
            kind="llama3", factor=factor, original_max_position=original
        )
        if np.allclose(
            divisors, _llama3_divisors(scaling, theta, head_dim), rtol=1e-4, atol=0
        ):
            return scaling
    return None


def _llama3_divisors(scaling: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
    """Return what llama3 scaling divides each rotary frequency by, f64[head_dim / 2].

    Llama 3.1 release, `apply_scaling`: turns = original context / wavelength; the
    kept share of a frequency grows from 0 at low_freq_factor turns to 1 at
    high_freq_factor turns.
    """
    frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = scaling.original_max_position * frequency / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - kept) / scaling.factor + kept)
