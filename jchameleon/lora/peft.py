"""Load PEFT adapter directories: exactly as PEFT applies them, or not at all.

Semantics are those of PEFT 0.21 on a causal Llama model. Per module, with the first
matching entry of `rank_pattern` and `alpha_pattern` in place of r and lora_alpha:
scale = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`.
"""

import math
import os
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jchameleon.config import PROJECTIONS, ModelConfig
from jchameleon.errors import AdapterError
from jchameleon.lora.adapter import HostAdapter, LoraPair, ModuleKey
from jchameleon.lora.patterns import MatchBudget, PatternTable
from jchameleon.lora.safetensors import (
    MAX_HEADER_BYTES,
    open_regular,
    parse_json,
    read_exactly,
    read_failure,
    read_safetensors,
    short,
)
from jchameleon.lora.settings import LoraSettings, parse_config
from jchameleon.lora.targets import linear_modules, select_modules

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
MAX_CONFIG_BYTES = 1_000_000

_TENSOR_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight"
)

_LARGEST = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)


def load_peft_adapter(
    path: str | os.PathLike[str], model: ModelConfig, *, max_rank: int
) -> HostAdapter:
    """Read and check the PEFT directory `path` for `model`.

    Returns factors in the dtype of the file (float32, float16 or bfloat16).

    Raises:
      AdapterError: PEFT would apply the adapter otherwise than `HostAdapter` can say,
        the files are damaged or do not fit the model, or a rank exceeds `max_rank`.
        The message names field, module and numbers.
      AdapterReadError: a file is there and cannot be read now.
    """
    directory = Path(path)
    try:
        modules = _load_modules(directory, model, max_rank)
        return HostAdapter.build(modules, source=str(directory))
    except AdapterError as error:
        raise type(error)(f"adapter {str(directory)!r}: {error}") from error


def _load_modules(
    directory: Path, model: ModelConfig, max_rank: int
) -> dict[ModuleKey, LoraPair]:
    settings = parse_config(_read_config(directory))
    ranks_and_scales = _expected_modules(settings, model, max_rank)
    weights = directory / WEIGHTS_NAME
    if not os.path.lexists(weights) and os.path.lexists(directory / PICKLE_NAME):
        raise AdapterError(
            f"{PICKLE_NAME} is a pickle, which can run code when read; "
            f"{WEIGHTS_NAME} is needed"
        )
    most_bytes = (
        4
        * max_rank
        * model.num_layers
        * sum(sum(model.projection_shape(projection)) for projection in PROJECTIONS)
    )
    tensors = read_safetensors(weights, max_bytes=8 + MAX_HEADER_BYTES + most_bytes)
    factors = _sort_tensors(tensors)
    linear = linear_modules(model)
    _check_same_modules(factors, ranks_and_scales, linear, model)
    modules = {}
    for name, (rank, scale) in ranks_and_scales.items():
        key = linear[name]
        d_in, d_out = model.projection_shape(key[1])
        a, b = factors[name]["A"], factors[name]["B"]
        a_max = _check_tensor(
            f"{name}.lora_A.weight", a, (rank, d_in), f"{rank=}, {d_in=}"
        )
        b_max = _check_tensor(
            f"{name}.lora_B.weight", b, (d_out, rank), f"{d_out=}, {rank=}"
        )
        if max(a_max, b_max, b_max * abs(scale)) > _LARGEST:
            raise AdapterError(
                f"{name}: A up to {a_max:.3g}, B up to {b_max:.3g} at {scale=:.3g} "
                f"exceed {_LARGEST:.3g}, the largest bfloat16"
            )
        modules[key] = LoraPair(a=a, b=b, scale=scale)
    return modules


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        present = directory.is_dir()
    except (OSError, ValueError) as error:
        raise read_failure("the directory", error) from error
    if not present:
        raise AdapterError("there is no such directory")
    file, file_bytes = open_regular(directory / CONFIG_NAME, max_bytes=MAX_CONFIG_BYTES)
    with file:
        data = bytearray(file_bytes)
        read_exactly(file, memoryview(data), name=CONFIG_NAME)
    return parse_json(bytes(data), name=CONFIG_NAME)


def _expected_modules(
    settings: LoraSettings, model: ModelConfig, max_rank: int
) -> dict[str, tuple[int, float]]:
    """Return (rank, scale) of every module that the config selects."""
    budget = MatchBudget()
    ranks = PatternTable("rank_pattern", settings.rank_pattern, budget=budget)
    alphas = PatternTable("alpha_pattern", settings.alpha_pattern, budget=budget)
    expected = {}
    for name in select_modules(settings.rules, model, budget=budget):
        rank = int(ranks.get(name, settings.rank))
        if rank > max_rank:
            raise AdapterError(f"r={rank} of {name} exceeds {max_rank=}")
        if settings.even_rank and rank % 2:
            raise AdapterError(
                f"r={rank} of {name} must be even: init_lora_weights='orthogonal'"
            )
        alpha = alphas.get(name, settings.alpha)
        scale = alpha / math.sqrt(rank) if settings.use_rslora else alpha / rank
        if not abs(scale) <= _LARGEST:
            raise AdapterError(f"lora_alpha={alpha} of {name} is too large at r={rank}")
        expected[name] = (rank, scale)
    return expected


def _sort_tensors(tensors: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Return the tensors by module name and factor "A" or "B"."""
    factors: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        match = _TENSOR_KEY.fullmatch(key)
        if match is None:
            raise AdapterError(f"tensor {short(key)} {_why_unknown(key)}")
        pair = factors.setdefault(match["module"], {})
        if match["factor"] in pair:
            raise AdapterError(
                f"tensor {short(key)} gives lora_{match['factor']} of "
                f"{short(match['module'])} a second time"
            )
        pair[match["factor"]] = tensor
    return factors


def _why_unknown(key: str) -> str:
    for part, what in (
        ("lora_embedding_", "adapts an embedding, which is not supported"),
        ("lora_magnitude_vector", "belongs to DoRA, which is not supported"),
        (".bias", "is a bias, which is not supported"),
        ("modules_to_save", "is a saved module, which is not supported"),
    ):
        if part in key:
            return what
    return "must be base_model.model.<module>.lora_A.weight or .lora_B.weight"


def _check_same_modules(
    factors: dict[str, dict[str, np.ndarray]],
    expected: dict[str, tuple[int, float]],
    linear: dict[str, ModuleKey],
    model: ModelConfig,
) -> None:
    extra = sorted(set(factors) - set(expected))
    foreign = [name for name in extra if name not in linear]
    if foreign:
        raise AdapterError(
            f"{len(foreign)} modules with tensors are no projection of a model with "
            f"{model.num_layers} layers, such as {short(foreign[0])}"
        )
    if extra:
        raise AdapterError(
            f"{len(extra)} modules have tensors but are not targeted by {CONFIG_NAME}, "
            f"such as {extra[0]!r}"
        )
    missing = [
        f"{name}.lora_{factor}.weight"
        for name in expected
        for factor in "AB"
        if factor not in factors.get(name, {})
    ]
    if missing:
        raise AdapterError(
            f"{len(missing)} tensors of targeted modules are missing, such as "
            f"{missing[0]!r}"
        )


def _check_tensor(
    name: str, tensor: np.ndarray, shape: tuple[int, int], why: str
) -> float:
    """Return the largest magnitude of a tensor of the right shape, all finite."""
    if tensor.shape != shape:
        raise AdapterError(f"{name} has shape {tensor.shape}, must be {shape} ({why})")
    # As integers, magnitudes sort like their values, and Inf and NaN above all.
    unsigned = np.dtype(f"u{tensor.dtype.itemsize}")
    sign = unsigned.type(1 << (8 * unsigned.itemsize - 1))
    magnitude = tensor.view(unsigned) & ~sign
    infinity = np.array(np.inf, tensor.dtype).view(unsigned)
    top = magnitude.max()
    if top >= infinity:
        raise AdapterError(
            f"{name} has {np.count_nonzero(magnitude >= infinity)} NaN or Inf among "
            f"{tensor.size} values"
        )
    return float(top.view(tensor.dtype))
