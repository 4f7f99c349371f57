"""Options that several commands share, and what they print and write."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jchameleon.errors import ConfigError

DEFAULT_MODEL = "smollm2-135m"


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add `--model`, by default the preset whose weights are fetched on first use."""
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="M",
        help="preset, model directory or .gguf file (default: %(default)s)",
    )


def comma_names(text: str) -> tuple[str, ...]:
    """Return the names of a list that is written with commas."""
    return tuple(name.strip() for name in text.split(","))


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report as JSON.

    Raises:
      ConfigError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def print_facts(facts: Mapping[str, Any]) -> None:
    """Print one fact a line, values in one column."""
    width = max(map(len, facts))
    for key, value in facts.items():
        print(f"{key:<{width}}  {_plain(value)}")


def _plain(value: Any) -> str:
    """Return a fact as people write it."""
    if isinstance(value, dict):
        return "; ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
