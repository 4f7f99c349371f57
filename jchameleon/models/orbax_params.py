"""Parameters as an Orbax checkpoint: the tree of `jchameleon.models.params`, no more.

A model directory keeps the checkpoint in `params/`, beside config.json and the
tokenizer's files. Importing this module takes as long as importing jax and Orbax.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jchameleon.config import ModelConfig
from jchameleon.errors import ModelLoadError
from jchameleon.models.files import (
    CHECKPOINT_MARKER,
    PARAMS_DIR,
    one_line,
    read_json,
    short,
)
from jchameleon.models.params import DTYPES, Params, numpy_dtype, param_shapes

_STORED_DTYPES = (*DTYPES, "float16")


def save_orbax_params(params: Params, directory: Path) -> None:
    """Write `params` to `directory`/params, which must not exist yet."""
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(
            (directory / PARAMS_DIR).absolute(), args=ocp.args.StandardSave(params)
        )


def load_orbax_params(directory: Path, config: ModelConfig, *, dtype: str) -> Params:
    """Restore `directory`/params into numpy arrays, one read and one copy of each.

    Args:
      dtype: "float32" or "bfloat16"; stored f32, f16 and bf16 arrays are converted to
        it (round to nearest even).

    Raises:
      ModelLoadError: no complete checkpoint, damaged, or not exactly the arrays and
        shapes that `config` needs.
    """
    path = directory / PARAMS_DIR
    target = numpy_dtype(dtype)
    _check_stored(path, _stored_arrays(path), config)
    abstract = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, target),
        param_shapes(config),
        is_leaf=lambda node: isinstance(node, tuple),
    )
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            params = checkpointer.restore(
                path.absolute(), args=ocp.args.StandardRestore(abstract)
            )
    except Exception as error:  # whatever the storage layers raise
        raise ModelLoadError(f"cannot read {path}: {_brief(error)}") from error
    return jax.tree.map(np.asarray, params)


def orbax_dtype(directory: Path) -> str:
    """Return the parameter dtype that holds every stored value exactly.

    Raises:
      ModelLoadError: no complete checkpoint.
    """
    stored = {dtype for _, dtype in _stored_arrays(directory / PARAMS_DIR).values()}
    return "bfloat16" if stored == {"bfloat16"} else "float32"


def _stored_arrays(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return (shape, dtype) by name for the arrays of a complete checkpoint."""
    marker = path / CHECKPOINT_MARKER
    if not marker.is_file():
        raise ModelLoadError(
            f"{path} is no complete Orbax checkpoint: {CHECKPOINT_MARKER}, which is "
            "written last, is missing"
        )
    committed = read_json(marker).get("commit_timestamp_nsecs")
    if type(committed) is not int:
        raise ModelLoadError(
            f"{marker}: commit_timestamp_nsecs={short(committed)} must be an integer: "
            "the checkpoint was not committed"
        )
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            found = checkpointer.metadata(path.absolute()).item_metadata
        leaves = jax.tree_util.tree_flatten_with_path(found.tree)[0]
        return {
            _name(keys): (tuple(leaf.shape), np.dtype(leaf.dtype).name)
            for keys, leaf in leaves
        }
    except Exception as error:  # whatever the storage layers raise
        raise ModelLoadError(f"cannot read {path}: {_brief(error)}") from error


def _check_stored(
    path: Path, stored: dict[str, tuple[tuple[int, ...], str]], config: ModelConfig
) -> None:
    """Refuse other arrays, shapes or dtypes than `config` needs.

    Orbax itself would pad or cut an array of another shape.
    """
    needed = {
        _name(keys): shape
        for keys, shape in jax.tree_util.tree_flatten_with_path(
            param_shapes(config), is_leaf=lambda node: isinstance(node, tuple)
        )[0]
    }
    for name, shape in needed.items():
        if name not in stored:
            raise ModelLoadError(f"{path}: array {name!r} is missing")
        found, dtype = stored[name]
        if found != shape:
            raise ModelLoadError(
                f"{path}: array {name!r} has shape {list(found)}, the config needs "
                f"{list(shape)}"
            )
        if dtype not in _STORED_DTYPES:
            raise ModelLoadError(
                f"{path}: array {name!r} has dtype {dtype}, must be one of "
                + ", ".join(_STORED_DTYPES)
            )
    surplus = sorted(set(stored) - set(needed))
    if surplus:
        raise ModelLoadError(
            f"{path}: unexpected array {surplus[0]!r} ({len(surplus)} in all); a "
            f"{config.family} model of this config has no use for it"
        )


def _name(keys: tuple[Any, ...]) -> str:
    """Return a leaf's place as "layers.3.qkv"."""
    return jax.tree_util.keystr(keys, simple=True, separator=".")


def _brief(error: BaseException) -> str:
    text = one_line(error)
    return text if len(text) <= 300 else text[:297] + "..."
