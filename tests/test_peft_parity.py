"""Logits and greedy tokens of random models and adapters against transformers and PEFT.

Llama and its variants, six adapters each; what PEFT refuses we refuse.
"""

import json

import pytest
from engine_harness import import_oracle, quiet
from parity_cases import CASES, VARIANT_SHAPE
from parity_harness import (
    check_effects,
    check_greedy_tokens,
    check_logits,
    run_case,
)

from jchameleon.errors import AdapterError
from jchameleon.lora.peft import load_peft_adapter
from jchameleon.models.hf_config import load_hf_config


@pytest.fixture(scope="module")
def oracle():
    with import_oracle() as oracle:
        yield oracle


@pytest.fixture(scope="module", params=CASES)
def parity(request, oracle, tmp_path_factory):
    """Return (LLM with all adapters, references of all rows) of one model."""
    root = tmp_path_factory.mktemp("parity")
    with run_case(oracle, root, CASES[request.param]) as case:
        yield case


def test_reference_adapters_change_the_logits_at_every_position(parity):
    _, references = parity
    check_effects(references)


@pytest.mark.parametrize("chunk_tokens", [32, 64])
def test_logits_of_all_rows_in_one_batch_are_those_of_peft(parity, chunk_tokens):
    llm, references = parity
    check_logits(llm, references, chunk_tokens=chunk_tokens)


def test_greedy_tokens_of_all_rows_in_one_batch_are_those_of_peft(parity):
    llm, references = parity
    check_greedy_tokens(llm, references)


@pytest.mark.parametrize("targets", [["q_norm"], r".*self_attn\.q_.*"])
def test_adapter_that_selects_a_head_norm_is_refused_as_by_peft(
    oracle, tmp_path, targets
):
    with quiet():
        config = oracle.transformers.Qwen3Config(
            **VARIANT_SHAPE, vocab_size=96, head_dim=8
        )
        model = oracle.transformers.Qwen3ForCausalLM(config)
        model.save_pretrained(tmp_path / "model")
        lora = oracle.peft.LoraConfig(r=2, target_modules=targets)
        with pytest.raises(ValueError, match="Qwen3RMSNorm.*is not supported"):
            oracle.peft.get_peft_model(model, lora)
        lora = oracle.peft.LoraConfig(r=2, target_modules=["q_proj"])
        oracle.peft.get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "target_modules": targets}))
    with pytest.raises(AdapterError, match=r"self_attn\.q_norm"):
        load_peft_adapter(
            tmp_path / "adapter", load_hf_config(tmp_path / "model"), max_rank=8
        )
