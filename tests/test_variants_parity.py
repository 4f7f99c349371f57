"""Logits and greedy tokens of Llama's variants against transformers and PEFT.

Checkpoints are written by transformers itself; adapters touch all projections.
"""

import json

import pytest
from engine_harness import import_oracle, quiet
from model_files import write_hf
from parity_harness import (
    ATTENTION,
    MLP,
    ModelCase,
    check_effects,
    check_greedy_tokens,
    check_logits,
    run_case,
)

from jchameleon.errors import AdapterError, ConfigError, InvalidRequestError
from jchameleon.llm import LLM
from jchameleon.lora.peft import load_peft_adapter
from jchameleon.models.hf_config import load_hf_config
from jchameleon.sampling import SamplingParams

ADAPTERS = {
    "r8-attention": {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION},
    "r3-mlp": {"r": 3, "lora_alpha": 9, "target_modules": MLP},
    "r16-all-linear": {"r": 16, "lora_alpha": 8, "target_modules": "all-linear"},
    "r1-default-targets": {"r": 1, "lora_alpha": 2},
    "r17-rslora-regex": {
        "r": 17,
        "lora_alpha": 12,
        "use_rslora": True,
        "target_modules": r"model\.layers\.\d\.self_attn\.(k|v)_proj",
    },
    "r8-one-layer": {
        "r": 8,
        "lora_alpha": 24,
        "target_modules": ATTENTION + MLP,
        "layers_to_transform": [1],
    },
}
SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CASES = {
    "mistral": ModelCase(
        family="Mistral",
        config={**SHAPE, "vocab_size": 300, "head_dim": 20, "sliding_window": 128},
        adapters=ADAPTERS,
    ),
    "qwen2-tied": ModelCase(
        family="Qwen2",
        config={**SHAPE, "vocab_size": 310, "tie_word_embeddings": True},
        adapters=ADAPTERS,
    ),
    "qwen3": ModelCase(
        family="Qwen3",
        config={**SHAPE, "vocab_size": 320, "head_dim": 16, "rms_norm_eps": 1e-3},
        adapters=ADAPTERS,
    ),
    "qwen3-bias-window": ModelCase(
        family="Qwen3",
        config={
            **SHAPE,
            "vocab_size": 330,
            "head_dim": 12,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 128,
            "max_window_layers": 1,
        },
        adapters=ADAPTERS,
    ),
}


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


@pytest.mark.parametrize("targets", [["q_norm"], r".*self_attn\.q_.*"])
def test_adapter_that_selects_a_head_norm_is_refused_as_by_peft(
    oracle, tmp_path, targets
):
    with quiet():
        config = oracle.transformers.Qwen3Config(**SHAPE, vocab_size=96, head_dim=8)
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
