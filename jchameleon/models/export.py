"""Models written to directories: for Hugging Face's libraries, or with Orbax.

Both hold config.json, generation_config.json and the tokenizer's files; they differ in
what holds the weights: model.safetensors, or the Orbax checkpoint params/.
"""

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jchameleon.errors import ConfigError, ModelSaveError
from jchameleon.models.files import INDEX, WEIGHTS, one_line
from jchameleon.models.hf_config import hf_config_table
from jchameleon.models.loader import LoadedModel
from jchameleon.models.params import tensor_views

FORMATS = ("hf", "orbax")

MAX_SHARD_BYTES = 4 << 30
"""Weights beyond this are written as several files and an index."""

# What a directory may hold beside config and weights; copied byte for byte, so that
# other libraries find what they found before.
_SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def check_target(out: Path, form: str) -> None:
    """Raise ModelSaveError or ConfigError where `save_model` could not write."""
    if form not in FORMATS:
        raise ConfigError(f"format={form!r} must be one of {', '.join(FORMATS)}")
    if out.is_dir() and not out.is_symlink():
        if any(out.iterdir()):
            raise ModelSaveError(
                f"{out} exists and is not empty; nothing in it is overwritten"
            )
    elif out.exists() or out.is_symlink():
        raise ModelSaveError(f"{out} exists and is no directory")
    elif not out.parent.is_dir():
        raise ModelSaveError(f"{out.parent} is no directory")


def save_model(
    model: LoadedModel,
    out: Path,
    *,
    form: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `model` to the new directory `out`, which appears when all is written.

    Args:
      model: what is written has the dtype of its parameters.
      out: must be absent or empty.
      form: one of `FORMATS`.

    Raises:
      ConfigError: no such format.
      ModelSaveError: `out` holds something, or cannot be written; then it is as before.
    """
    out = out.absolute()
    check_target(out, form)
    try:
        with _new_directory(out) as work:
            _write_tables(model, work)
            if form == "orbax":
                from jchameleon.models.orbax_params import save_orbax_params

                save_orbax_params(model.params, work)
            else:
                views = tensor_views(model.config, model.params)
                _write_weights(views, work, max_shard_bytes)
    except ModelSaveError:
        raise
    except Exception as error:  # the storage layers raise OSError, ValueError, ...
        raise ModelSaveError(f"cannot write {out}: {one_line(error)}") from error


REMOVAL_S = 10.0
"""How long a failed save tries to leave nothing behind. Orbax raises the first error of
its threads, and the others go on for a moment."""


@contextlib.contextmanager
def _new_directory(out: Path) -> Iterator[Path]:
    """Yield a folder beside `out` that becomes `out`, or is gone after an error."""
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        yield work
        umask = os.umask(0)
        os.umask(umask)
        work.chmod(0o777 & ~umask)
        for folder, _, names in os.walk(work):
            for name in [*names, "."]:
                _sync(os.path.join(folder, name))
        os.rename(work, out)  # an empty directory may be there, a filled one not
        _sync(out.parent)
    except BaseException:
        _remove(work)
        raise


def _remove(folder: Path) -> None:
    """Remove a folder that threads of a storage layer may still write to."""
    end_s = time.monotonic() + REMOVAL_S
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
        if time.monotonic() >= end_s:
            return
        time.sleep(0.01)


def _sync(path: str | Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_tables(model: LoadedModel, work: Path) -> None:
    """Write everything but the weights."""
    dtype = model.params["embed"].dtype.name
    config = hf_config_table(model.config, dtype=dtype)
    _write_json(work / "config.json", config)
    source = Path(model.source)
    if source.is_dir():
        for name in _SIDE_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, work / name)
        if model.tokenizer is not None and not (work / "tokenizer.json").is_file():
            raise ModelSaveError(f"{source / 'tokenizer.json'} is there no more")
    elif model.tokenizer is not None:
        (work / "tokenizer.json").write_text(
            model.tokenizer.to_json(), encoding="utf-8"
        )
        _write_json(work / "tokenizer_config.json", _tokenizer_config(model))
    if not (work / "generation_config.json").is_file():
        tokens = ("bos_token_id", "eos_token_id")
        generation = {name: config[name] for name in tokens if config[name] is not None}
        _write_json(work / "generation_config.json", generation)


def _tokenizer_config(model: LoadedModel) -> dict[str, Any]:
    """Return tokenizer_config.json of a tokenizer that has none yet."""
    tokenizer, template = model.tokenizer, model.chat_template
    assert tokenizer is not None
    table: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.bos_token_id is not None:
        table["bos_token"] = tokenizer.token(tokenizer.bos_token_id)
    if tokenizer.eos_token_ids:
        table["eos_token"] = tokenizer.token(tokenizer.eos_token_ids[0])
    if template is not None:
        table |= template.special_tokens
        table["chat_template"] = template.source
    return table


def _write_weights(
    views: Mapping[str, np.ndarray], work: Path, max_shard_bytes: int
) -> None:
    """Write tensors in order, with an index where one file is not enough."""
    shards: list[dict[str, np.ndarray]] = [{}]
    shard_bytes = 0
    for name, view in views.items():
        if shards[-1] and shard_bytes + view.nbytes > max_shard_bytes:
            shards.append({})
            shard_bytes = 0
        shards[-1][name] = view
        shard_bytes += view.nbytes
    if len(shards) == 1:
        _write_shard(shards[0], work / WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file_name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        _write_shard(shard, work / file_name)
        weight_map |= dict.fromkeys(shard, file_name)
    total_bytes = sum(view.nbytes for view in views.values())
    _write_json(
        work / INDEX,
        {"metadata": {"total_size": total_bytes}, "weight_map": weight_map},
    )


def _write_shard(tensors: dict[str, np.ndarray], path: Path) -> None:
    # transformers reads only files that say which framework they are for.
    save_file(tensors, path, metadata={"format": "pt"})


def _write_json(path: Path, table: Mapping[str, Any]) -> None:
    text = json.dumps(table, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
