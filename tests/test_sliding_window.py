"""An engine of a model with a sliding window serves up to the window and ends there."""

import pytest
from model_files import write_hf

from jchameleon.errors import ConfigError, InvalidRequestError
from jchameleon.llm import LLM
from jchameleon.sampling import SamplingParams


def sliding_model(root, window):
    return write_hf(
        root / "model",
        model_type="mistral",
        sliding_window=window,
        max_position_embeddings=4096,
    )


def test_engine_of_a_sliding_model_ends_at_the_window(tmp_path):
    path = sliding_model(tmp_path, 48)
    with LLM(path, max_running=2, max_batch_tokens=64) as llm:
        assert llm.max_model_len == 48
        with pytest.raises(InvalidRequestError, match="exceeds max_model_len=48"):
            llm.generate([[3] * 40], sampling=SamplingParams(max_tokens=9))


def test_engine_beyond_the_window_is_refused(tmp_path):
    path = sliding_model(tmp_path, 48)
    with pytest.raises(ConfigError, match="max_model_len=49 exceeds.*window of 48"):
        LLM(path, max_model_len=49)
