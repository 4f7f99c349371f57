"""Small files of a model directory, and values shortened for one-line errors."""

import json
from pathlib import Path
from typing import Any

from jchameleon.errors import ModelLoadError


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
