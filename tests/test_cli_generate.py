"""How large a program `jchameleon generate` prepares for the prompts that it has."""

import dataclasses

import pytest

from jchameleon.cli.generate import _enough, _lengths, _templated
from jchameleon.config import PREFILL_TILE_TOKENS as TILE
from jchameleon.config import EngineConfig
from jchameleon.llm import LLM
from jchameleon.models.chat import ChatTemplate
from jchameleon.models.loader import load_model

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
PROMPTS = ["a", "two words", "ä" * 40]


@pytest.mark.parametrize("template", [None, ChatTemplate(CHAT)])
def test_lengths_are_those_of_what_the_engine_gets(template):
    model = load_model("tiny", dtype="float32")
    model = dataclasses.replace(model, chat_template=template)
    options = {"max_running": 2, "max_batch_tokens": 64, "max_model_len": 128}
    with LLM(model, **options) as llm:
        for chat in (None, False) if template is None else (None, True, False):
            inputs = _templated(llm, PROMPTS, chat=chat)
            wanted = [
                len(llm.tokenizer.encode(one) if isinstance(one, str) else one)
                for one in inputs
            ]
            assert list(_lengths(model, PROMPTS, chat=chat)) == wanted
        if template is not None:
            assert wanted != list(_lengths(model, PROMPTS, chat=None))


def test_what_the_engine_refuses_has_no_length():
    model = load_model("tiny", dtype="float32")
    assert list(_lengths(model, PROMPTS, chat=True)) == [0, 0, 0]
    mute = dataclasses.replace(model, tokenizer=None)
    assert list(_lengths(mute, PROMPTS, chat=None)) == [0, 0, 0]


@pytest.mark.parametrize(
    ("lengths", "rows", "tiles"),
    [
        ([1], 1, 2),
        ([TILE + 1], 1, 2),
        ([2 * TILE + 1], 1, 3),
        ([1, TILE, TILE + 1], 3, 4),
        ([1] * 100, 64, 100),
        ([0], TILE, 2),
        ([0], TILE + 1, 3),
    ],
)
def test_all_prompts_fit_at_once_and_an_engine_takes_it(lengths, rows, tiles):
    tokens = _enough(lengths, rows)
    assert tokens == tiles * TILE
    EngineConfig(max_running=rows, max_batch_tokens=tokens)
