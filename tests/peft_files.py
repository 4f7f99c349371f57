"""PEFT directories of a small model, made by hand."""

import contextlib
import json
import warnings

import numpy as np

from jchameleon.config import ModelConfig
from jchameleon.lora import load_peft_adapter
from jchameleon.lora.targets import linear_modules

MODEL = ModelConfig(
    name="small",
    vocab_size=64,
    hidden_size=48,
    intermediate_size=80,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
)
PREFIX = "base_model.model."
Q0 = "model.layers.0.self_attn.q_proj"
LISTED_NAMES = (
    "q_proj",
    "down_proj",
    "self_attn.v_proj",
    "0.mlp.up_proj",
    "layers.1.self_attn.o_proj",
    "model.layers.2.mlp.gate_proj",
    "model.layers.0.self_attn.q_proj",
    "mlp",
    "lm_head",
    "proj",
)
"""Names as configs write them: whole, shortened, and some that select nothing."""


def write_safetensors(path, tensors):
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
    header, at = {}, 0
    for name, value in tensors.items():
        header[name] = {
            "dtype": names[value.dtype.name],
            "shape": list(value.shape),
            "data_offsets": [at, at + value.nbytes],
        }
        at += value.nbytes
    text = json.dumps(header).encode()
    data = b"".join(value.tobytes() for value in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def make_tensors(projections=("q", "v"), *, rank=4, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, (_, projection) in linear_modules(MODEL).items():
        if projection in projections:
            d_in, d_out = MODEL.projection_shape(projection)
            a = rng.standard_normal((rank, d_in)).astype(dtype)
            b = rng.standard_normal((d_out, rank)).astype(dtype)
            tensors[f"{PREFIX}{name}.lora_A.weight"] = a
            tensors[f"{PREFIX}{name}.lora_B.weight"] = b
    return tensors


def make_config(**changes):
    return {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
        **changes,
    }


def write_adapter(folder, *, config=None, tensors=None):
    folder.mkdir(exist_ok=True)
    text = json.dumps(make_config() if config is None else config)
    (folder / "adapter_config.json").write_text(text)
    write_safetensors(
        folder / "adapter_model.safetensors",
        make_tensors() if tensors is None else tensors,
    )
    return folder


def load(folder, *, max_rank=64):
    return load_peft_adapter(folder, MODEL, max_rank=max_rank)


@contextlib.contextmanager
def quiet():
    """Let the oracle warn as it likes; what we raise is asserted on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
