"""Llama checkpoints as Hugging Face directories: config.json and safetensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Importing ml_dtypes (through params) registers bfloat16 with numpy; without it
# safetensors cannot hand out BF16 tensors as numpy arrays.
import numpy as np
from safetensors import SafetensorError, safe_open

from jchameleon.config import ModelConfig, RopeScaling
from jchameleon.errors import ConfigError, ModelLoadError
from jchameleon.models.files import one_line, read_json, short
from jchameleon.models.params import (
    Params,
    allocate,
    numpy_dtype,
    tensor_shapes,
    tensor_views,
)

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = ("F32", "F16", "BF16")

# Fields that would change what the model computes, and the values under which they
# do not. Absent and null count as neutral.
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
    "quantization_config": (),
    "sliding_window": (),
    "partial_rotary_factor": (1.0,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "use_qk_norm": (False,),
    "qk_norm": (False,),
    "num_local_experts": (0,),
}

_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
}


def load_hf_config(directory: Path) -> ModelConfig:
    """Read config.json, and the end tokens of generation_config.json where it has any.

    Raises:
      ModelLoadError: unreadable, a required field absent, or a field with a value
        that changes the maths in a way that is not supported (named with its value).
    """
    path = directory / "config.json"
    config = read_json(path)
    model_type = config.get("model_type")
    if model_type != "llama":
        raise ModelLoadError(f"{path}: model_type={model_type!r} must be 'llama'")
    for field, neutral in _NEUTRAL_VALUES.items():
        value = config.get(field)
        if value is not None and value not in neutral:
            rule = f"only {neutral[0]!r} is supported" if neutral else "not supported"
            raise ModelLoadError(f"{path}: {field}={short(value)}: {rule}")

    hidden_size = _integer(config, "hidden_size", path)
    num_heads = _integer(config, "num_attention_heads", path)
    head_dim = config.get("head_dim")
    if head_dim is None:
        if num_heads <= 0 or hidden_size % num_heads:
            raise ModelLoadError(
                f"{path}: {hidden_size=} must be a multiple of num_attention_heads="
                f"{num_heads} when head_dim is absent"
            )
        head_dim = hidden_size // num_heads
    num_kv_heads = config.get("num_key_value_heads")
    rope_theta, rope_scaling = _rope(config, path)
    try:
        return ModelConfig(
            name=directory.resolve().name,
            vocab_size=_integer(config, "vocab_size", path),
            hidden_size=hidden_size,
            intermediate_size=_integer(config, "intermediate_size", path),
            num_layers=_integer(config, "num_hidden_layers", path),
            num_heads=num_heads,
            num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
            head_dim=head_dim,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            rms_norm_eps=_number(config, "rms_norm_eps", path, default=1e-6),
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            tie_embeddings=_boolean(config, "tie_word_embeddings", path),
            bos_token_id=_bos_token_id(config, path),
            eos_token_ids=_eos_token_ids(directory, config),
        )
    except (ConfigError, TypeError) as error:
        raise ModelLoadError(f"{path}: {error}") from error


def load_hf_params(directory: Path, config: ModelConfig, *, dtype: str) -> Params:
    """Read every tensor into the parameter tree, one tensor in flight at a time.

    Args:
      dtype: "float32" or "bfloat16"; F32, F16 and BF16 tensors are converted to it
        (round to nearest even).

    Raises:
      ModelLoadError: files missing, pickled, corrupt, or not exactly the tensors and
        shapes that `config` needs.
    """
    files = _tensor_files(directory)
    needed: dict[str, tuple[int, ...]] = {}
    for name, shape in tensor_shapes(config):
        if name not in files:
            raise ModelLoadError(f"{directory}: tensor {name!r} is missing")
        needed[name] = shape
    surplus = sorted(name for name in files if name not in needed)
    tied_head = config.tie_embeddings and "lm_head.weight" in files
    if tied_head:
        surplus.remove("lm_head.weight")
        needed["lm_head.weight"] = needed["model.embed_tokens.weight"]
    if surplus:
        raise ModelLoadError(
            f"{directory}: unexpected tensor {surplus[0]!r} ({len(surplus)} in all); "
            "a Llama model of this config has no use for it"
        )
    by_file: dict[Path, list[str]] = {}
    for name in needed:
        by_file.setdefault(files[name], []).append(name)
    for path, names in by_file.items():
        with _open(path) as file:
            for name in names:
                _check_tensor(path, name, file.get_slice(name), needed[name])

    params = allocate(config, numpy_dtype(dtype))
    views = tensor_views(config, params)
    for path, names in by_file.items():
        with _open(path) as file, np.errstate(over="ignore"):
            for name in names:
                if name in views:
                    np.copyto(views[name], file.get_tensor(name), casting="unsafe")
    if tied_head:
        with _open(files["lm_head.weight"]) as file:
            head = file.get_tensor("lm_head.weight").astype(numpy_dtype(dtype))
        if not np.array_equal(head, params["embed"], equal_nan=False):
            raise ModelLoadError(
                f"{directory}: tie_word_embeddings=True, but lm_head.weight differs "
                "from model.embed_tokens.weight"
            )
    return params


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Return which file holds each tensor, RoPE buffers left out."""
    files: dict[str, Path] = {}
    if (directory / _WEIGHTS).is_file():
        path = directory / _WEIGHTS
        with _open(path) as file:
            files = {name: path for name in file.keys()}  # noqa: SIM118
    elif (directory / _INDEX).is_file():
        files = _indexed_files(directory)
    else:
        pickled = sorted(p.name for p in directory.glob("*.bin"))
        if pickled:
            raise ModelLoadError(
                f"{directory}: pickled weights ({pickled[0]}) are refused, because "
                "reading them can run code; save the model as safetensors"
            )
        raise ModelLoadError(f"{directory}: neither {_WEIGHTS} nor {_INDEX} is there")
    # Old checkpoints store the rotary frequencies, which follow from the config.
    return {n: p for n, p in files.items() if not n.endswith("rotary_emb.inv_freq")}


def _indexed_files(directory: Path) -> dict[str, Path]:
    """Return the index's tensor -> file map, checked against the files themselves."""
    index = directory / _INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{index}: weight_map must be a non-empty object")
    by_file: dict[str, set[str]] = {}
    for name, file_name in weight_map.items():
        # A bare name, so that an index cannot reach outside the directory.
        if (
            not isinstance(file_name, str)
            or Path(file_name).name != file_name
            or "\\" in file_name
            or not file_name.endswith(".safetensors")
        ):
            raise ModelLoadError(
                f"{index}: weight_map[{name!r}]={short(file_name)} must be the name "
                "of a .safetensors file in the same directory"
            )
        by_file.setdefault(file_name, set()).add(name)
    for file_name, names in by_file.items():
        with _open(directory / file_name) as file:
            held = set(file.keys())
        for name in sorted(names - held):
            raise ModelLoadError(
                f"{directory / file_name}: tensor {name!r} is missing, though {_INDEX} "
                "places it there"
            )
        for name in sorted(held - names):
            raise ModelLoadError(
                f"{directory / file_name}: tensor {name!r} is not placed there by "
                f"{_INDEX}"
            )
    return {name: directory / file_name for name, file_name in weight_map.items()}


def _open(path: Path) -> Any:
    """Open a safetensors file; its header is checked against the file's length."""
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"cannot read {path}: {one_line(error)}") from error


def _check_tensor(path: Path, name: str, tensor: Any, shape: tuple[int, ...]) -> None:
    found = tuple(tensor.get_shape())
    if found != shape:
        raise ModelLoadError(
            f"{path}: tensor {name!r} has shape {list(found)}, the config needs "
            f"{list(shape)}"
        )
    if tensor.get_dtype() not in _DTYPES:
        raise ModelLoadError(
            f"{path}: tensor {name!r} has dtype {tensor.get_dtype()}, must be one of "
            + ", ".join(_DTYPES)
        )


def _rope(config: Mapping[str, Any], path: Path) -> tuple[float, RopeScaling | None]:
    """Return (rope_theta, scaling) from either spelling.

    `rope_scaling` beside `rope_theta` is the older one; `rope_parameters` carries the
    base too.
    """
    field = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    table = config.get(field) or {}
    if not isinstance(table, Mapping):
        raise ModelLoadError(f"{path}: {field}={short(table)} must be an object")
    theta = table.get("rope_theta")
    if theta is None:
        theta = _number(config, "rope_theta", path, default=10000.0)
    kind = table.get("rope_type", table.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise ModelLoadError(
            f"{path}: {field}.rope_type={short(kind)} is not supported, must be one "
            "of default, linear, llama3"
        )
    known = _ROPE_KEYS[kind] | {"rope_type", "type", "rope_theta"}
    for key, value in table.items():
        if key not in known and not (key == "partial_rotary_factor" and value == 1):
            raise ModelLoadError(
                f"{path}: {field}.{key}={short(value)} is not supported with "
                f"rope_type={kind!r}"
            )
    numbers = {"rope_theta": theta, **{key: table.get(key) for key in _ROPE_KEYS[kind]}}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelLoadError(f"{path}: {field}.{key}={value!r} must be a number")
    if kind == "default":
        return float(theta), None
    if kind == "linear":
        return float(theta), _scaling(path, kind="linear", factor=table["factor"])
    scaling = _scaling(
        path,
        kind="llama3",
        factor=table["factor"],
        low_freq_factor=table["low_freq_factor"],
        high_freq_factor=table["high_freq_factor"],
        original_max_position=table["original_max_position_embeddings"],
    )
    return float(theta), scaling


def _scaling(path: Path, **values: Any) -> RopeScaling:
    try:
        return RopeScaling(**values)
    except ConfigError as error:
        raise ModelLoadError(f"{path}: {error}") from error


def _bos_token_id(config: Mapping[str, Any], path: Path) -> int | None:
    value = config.get("bos_token_id")
    if value is not None and type(value) is not int:
        raise ModelLoadError(f"{path}: bos_token_id={short(value)} must be an integer")
    return value


def _eos_token_ids(directory: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return generation_config.json's end tokens where it has any, else config's."""
    path = directory / "config.json"
    value = config.get("eos_token_id")
    generation_path = directory / "generation_config.json"
    if generation_path.is_file():
        generation = read_json(generation_path).get("eos_token_id")
        if generation is not None:
            value, path = generation, generation_path
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if any(type(token_id) is not int for token_id in ids):
        raise ModelLoadError(
            f"{path}: eos_token_id={short(value)} must be an integer or a list of them"
        )
    return tuple(dict.fromkeys(ids))


def _integer(config: Mapping[str, Any], field: str, path: Path) -> int:
    value = config.get(field)
    if type(value) is not int:
        raise ModelLoadError(f"{path}: {field}={short(value)} must be an integer")
    return value


def _number(
    config: Mapping[str, Any], field: str, path: Path, *, default: float
) -> float:
    value = config.get(field)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ModelLoadError(f"{path}: {field}={short(value)} must be a number")
    return float(value)


def _boolean(config: Mapping[str, Any], field: str, path: Path) -> bool:
    value = config.get(field, False)
    if not isinstance(value, bool):
        raise ModelLoadError(f"{path}: {field}={short(value)} must be true or false")
    return value
