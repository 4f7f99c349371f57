"""PEFT itself, for the tests that read adapters as it does."""

import types

import pytest
from peft_files import MODEL, quiet


@pytest.fixture(scope="module")
def oracle():
    """torch, PEFT and a maker of small Llama models with fixed random weights."""
    reason = "oracle: Python 3.11 only"
    with quiet():
        torch = pytest.importorskip("torch", reason=reason)
        transformers = pytest.importorskip("transformers", reason=reason)
        peft = pytest.importorskip("peft", reason=reason)
        safetensors = pytest.importorskip("safetensors.torch", reason=reason)

    def base():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=MODEL.vocab_size,
            hidden_size=MODEL.hidden_size,
            intermediate_size=MODEL.intermediate_size,
            num_hidden_layers=MODEL.num_layers,
            num_attention_heads=MODEL.num_heads,
            num_key_value_heads=MODEL.num_kv_heads,
            head_dim=MODEL.head_dim,
        )
        return transformers.LlamaForCausalLM(config)

    return types.SimpleNamespace(
        torch=torch, peft=peft, safetensors=safetensors, base=base
    )
