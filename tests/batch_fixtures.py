"""An engine for batches in this process, each test file with its own."""

import dataclasses

import pytest
from adapter_versions import write_version
from batch_rig import SMALL

from jchameleon.llm import LLM
from jchameleon.models.chat import ChatTemplate
from jchameleon.models.loader import load_model

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with PEFT directories v0 to v5."""
    path = tmp_path_factory.mktemp("adapters")
    for number in range(6):
        write_version(path / f"v{number}", number)
    return path


@pytest.fixture(scope="module")
def llm(folder):
    """An engine with a chat template that keeps adapters on disk."""
    model = load_model("tiny", dtype="float32")
    model = dataclasses.replace(model, chat_template=ChatTemplate(CHAT))
    adapters = {f"v{number}": folder / f"v{number}" for number in range(6)}
    with LLM(model, adapters=adapters, host_cache_bytes=1, **SMALL) as llm:
        yield llm
