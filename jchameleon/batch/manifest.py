"""What a run's rows depend on, kept beside them: only the same run may be resumed."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jchameleon import __version__
from jchameleon.batch.files import replacing
from jchameleon.batch.settings import BatchConfig
from jchameleon.errors import BatchError

if TYPE_CHECKING:
    from jchameleon.llm import LLM

FORMAT = "jchameleon batch 2"


def manifest_path(output: Path) -> Path:
    """Return where the manifest of an output lies."""
    return output.with_name(output.name + ".manifest.json")


def early_facts(config: BatchConfig, input_sha256: str) -> dict[str, Any]:
    """Return what is known before a model is loaded."""
    return {
        "format": FORMAT,
        "version": __version__,
        "input_sha256": input_sha256,
        "seed": config.seed,
        "max_line_bytes": config.max_line_bytes,
        "sampling": dataclasses.asdict(config.sampling),
    }


def engine_facts(llm: "LLM", model_name: str | None) -> dict[str, Any]:
    """Return what rows depend on besides: model, adapters, precision, context.

    The model is its content too: another file may lie where it lay.

    Args:
      model_name: what lines may call the base model besides its own name.
    """
    facts = llm.facts()
    return {
        "model": llm.model_config.name,
        "model_name": model_name,
        "model_config": dataclasses.asdict(llm.model_config),
        "model_sha256": llm.digests(),
        "dtype": facts.dtype,
        "max_model_len": llm.max_model_len,
        "lora_targets": facts.lora_targets,
        "adapters": {info.name: info.uid for info in llm.list_adapters()},
    }


def write_manifest(output: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest of a run that begins.

    Raises:
      OSError: it cannot be written.
    """
    with replacing(manifest_path(output)) as file:
        file.write(json.dumps(facts, indent=1).encode("ascii") + b"\n")


def check_manifest(output: Path, facts: Mapping[str, Any]) -> None:
    """Raise BatchError unless an output's manifest says the same as `facts`.

    What the manifest has besides is not looked at.
    """
    path = manifest_path(output)
    try:
        kept = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BatchError(
            f"output {str(output)!r} cannot be resumed: its manifest {str(path)!r} "
            f"cannot be read: {error}"
        ) from error
    if not isinstance(kept, dict):
        raise BatchError(f"{str(path)!r} is no manifest of a batch")
    # As JSON has it: tuples are lists there.
    wanted = json.loads(json.dumps(facts))
    for field, value in wanted.items():
        if kept.get(field) != value:
            where, before, now = _difference(field, kept.get(field), value)
            raise BatchError(
                f"output {str(output)!r} cannot be resumed: {where} was "
                f"{_shown(before)} and is {_shown(now)}; use another output"
            )


def _difference(field: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """Return the innermost field that differs, with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key) or (key in before) != (key in now):
                return _difference(f"{field}.{key}", before.get(key), now.get(key))
    return field, before, now


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
