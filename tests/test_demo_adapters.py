"""The adapters that ship with the package do on unseen prompts what they were made for.

The real model answers, through base and all three adapters at once.
"""

import demo_data
import pytest
from demo_prompts import CHECKS, HELD_OUT_PROMPTS, TAG
from smollm2 import smollm2_path

from jchameleon.config import ModelConfig
from jchameleon.llm import LLM
from jchameleon.lora.peft import load_peft_adapter
from jchameleon.resources import demo_adapters
from jchameleon.sampling import SamplingParams

RANKS = {"json": 4, "tag": 8, "capitals": 16}
ENGINE = {"max_running": 16, "max_batch_tokens": 256, "max_model_len": 256}
LEAST_SHOWN, LEAST_DISTINCT = 18, 15


@pytest.fixture(scope="module")
def texts():
    """Return each prompt's reply by adapter; None is the base model."""
    smollm2_path()
    names = [None, *CHECKS]
    with LLM("smollm2-135m", adapters=demo_adapters(), **ENGINE) as llm:
        prompts = [llm.chat_prompt(prompt) for prompt in HELD_OUT_PROMPTS]
        outputs = llm.generate(
            [prompt for prompt in prompts for _ in names],
            adapters=[name for _ in prompts for name in names],
            sampling=SamplingParams(max_tokens=96, temperature=0.0),
        )
    found = {name: [] for name in names}
    for output in outputs:
        found[output.adapter].append(output.text)
    return found


@pytest.mark.parametrize("name", CHECKS)
def test_demo_adapter_shows_its_behaviour_on_unseen_prompts(texts, name):
    shown = [text for text in texts[name] if CHECKS[name](text)]
    missing = [text for text in texts[name] if text not in shown]
    assert len(shown) >= LEAST_SHOWN, missing
    assert len(set(shown)) >= LEAST_DISTINCT


@pytest.mark.parametrize("name", CHECKS)
def test_demo_behaviour_is_never_the_base_models(texts, name):
    assert len(set(texts[None])) >= LEAST_DISTINCT
    assert not [text for text in texts[None] if CHECKS[name](text)]


@pytest.mark.parametrize("name", CHECKS)
def test_demo_adapter_shows_no_other_behaviour(texts, name):
    for other in set(CHECKS) - {name}:
        assert not [text for text in texts[name] if CHECKS[other](text)]


@pytest.mark.parametrize("name", RANKS)
def test_demo_adapter_is_small_and_of_its_rank(name):
    adapter = load_peft_adapter(
        demo_adapters()[name], ModelConfig.preset("smollm2-135m"), max_rank=16
    )
    assert adapter.rank == RANKS[name]
    assert adapter.targets == {"q", "v"}
    assert all(pair.a.dtype.name == "bfloat16" for pair in adapter.modules.values())
    assert adapter.num_bytes < 2_000_000


def test_held_out_prompts_are_no_training_prompts():
    def plain(text):
        return "".join(c for c in text.lower() if c.isalnum())

    trained = {plain(question) for question in demo_data.questions()}
    assert len(trained) == len(demo_data.questions()) >= 200
    assert len(set(HELD_OUT_PROMPTS)) == 20
    assert not {plain(prompt) for prompt in HELD_OUT_PROMPTS} & trained
    assert demo_data.TAG == TAG
