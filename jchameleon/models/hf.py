"""Weights of Hugging Face directories: safetensors, whole or in shards."""

from pathlib import Path
from typing import Any

# Importing ml_dtypes (through params) registers bfloat16 with numpy; without it
# safetensors cannot hand out BF16 tensors as numpy arrays.
import numpy as np
from safetensors import SafetensorError, safe_open

from jchameleon.config import ModelConfig
from jchameleon.errors import ModelLoadError
from jchameleon.models.files import INDEX, WEIGHTS, one_line, read_json, short
from jchameleon.models.params import (
    Params,
    allocate,
    numpy_dtype,
    tensor_shapes,
    tensor_views,
)

_DTYPES = ("F32", "F16", "BF16")


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
            f"a {config.family} model of this config has no use for it"
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


def hf_dtype(directory: Path) -> str:
    """Return the parameter dtype that holds every stored value exactly.

    Raises:
      ModelLoadError: files missing, pickled or corrupt.
    """
    files = _tensor_files(directory)
    stored = set()
    for path in sorted(set(files.values())):
        with _open(path) as file:
            stored |= {
                file.get_slice(name).get_dtype()
                for name in file.keys()  # noqa: SIM118
                if files.get(name) == path
            }
    return "bfloat16" if stored == {"BF16"} else "float32"


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Return which file holds each tensor, RoPE buffers left out."""
    files: dict[str, Path] = {}
    if (directory / WEIGHTS).is_file():
        path = directory / WEIGHTS
        with _open(path) as file:
            files = {name: path for name in file.keys()}  # noqa: SIM118
    elif (directory / INDEX).is_file():
        files = _indexed_files(directory)
    else:
        pickled = sorted(p.name for p in directory.glob("*.bin"))
        if pickled:
            raise ModelLoadError(
                f"{directory}: pickled weights ({pickled[0]}) are refused, because "
                "reading them can run code; save the model as safetensors"
            )
        raise ModelLoadError(f"{directory}: neither {WEIGHTS} nor {INDEX} is there")
    # Old checkpoints store the rotary frequencies, which follow from the config.
    return {n: p for n, p in files.items() if not n.endswith("rotary_emb.inv_freq")}


def _indexed_files(directory: Path) -> dict[str, Path]:
    """Return the index's tensor -> file map, checked against the files themselves."""
    index = directory / INDEX
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
                f"{directory / file_name}: tensor {name!r} is missing, though {INDEX} "
                "places it there"
            )
        for name in sorted(held - names):
            raise ModelLoadError(
                f"{directory / file_name}: tensor {name!r} is not placed there by "
                f"{INDEX}"
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
