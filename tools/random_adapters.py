"""Random LoRA adapters as PEFT directories, for benches and tests."""

import json
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jchameleon.config import ModelConfig
from jchameleon.lora.targets import PROJECTION_PATHS

DTYPES = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}

STRENGTH = 0.5
"""Size of B A x beside x: changes most tokens, and leaves all activations finite."""


def write_random_adapter(
    path: str | Path,
    model_config: ModelConfig,
    *,
    rank: int,
    targets: Sequence[str],
    seed: int,
    dtype: str = "float32",
) -> Path:
    """Write a PEFT directory with non-zero A and B in every layer and return its path.

    The same arguments write the same tensors. The scale alpha / r is 1; A is normal
    with variance 1 / d_in, B with variance `STRENGTH`**2 / rank.

    Args:
      path: a directory, made when it is not there.
      targets: short names out of `jchameleon.config.PROJECTIONS`.
      dtype: of the tensors, one of `DTYPES`.
    """
    if rank < 1:
        raise ValueError(f"{rank=} must be at least 1")
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(model_config.num_layers):
        for target in targets:
            d_in, d_out = model_config.projection_shape(target)
            name = f"base_model.model.model.layers.{layer}.{PROJECTION_PATHS[target]}"
            a = rng.standard_normal((rank, d_in), np.float32) * d_in**-0.5
            b = rng.standard_normal((d_out, rank), np.float32) * STRENGTH * rank**-0.5
            tensors[f"{name}.lora_A.weight"] = a.astype(DTYPES[dtype])
            tensors[f"{name}.lora_B.weight"] = b.astype(DTYPES[dtype])
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [PROJECTION_PATHS[t].rpartition(".")[2] for t in targets],
        "inference_mode": True,
    }
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8"
    )
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
