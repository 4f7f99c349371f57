"""Names and small files of a model directory; values cut to one line for errors."""

import json
from pathlib import Path
from typing import Any

from jchameleon.errors import ModelLoadError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

PARAMS_DIR = "params"
"""Where a model directory keeps an Orbax checkpoint."""


CHECKPOINT_MARKER = "_CHECKPOINT_METADATA"
"""What Orbax writes into a checkpoint last, so that it marks a complete one."""


def is_checkpoint(directory: Path) -> bool:
    """Tell whether `directory` itself is an Orbax checkpoint, complete or not."""
    return any((directory / name).exists() for name in (CHECKPOINT_MARKER, "_METADATA"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
      ModelLoadError: unreadable, not JSON or not an object; names the file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"cannot read {path}: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} must hold a JSON object")
    return value


def short(value: Any) -> str:
    """Return the repr of `value`, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def one_line(error: BaseException) -> str:
    """Return the message of `error` on one line, its type's name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
