"""Logits and greedy tokens of random models and adapters against transformers and PEFT.

Three small Llama models, six adapters each. All adapters and two base rows run in one
batch; the reference runs each row by itself, its adapter loaded by PEFT from the same
directory.
"""

import dataclasses

import numpy as np
import pytest
from engine_harness import (
    TIE_GAP,
    ForcedRow,
    GreedyComparison,
    forced_logits,
    import_oracle,
    poison_pool,
    quiet,
    random_peft_model,
)

from jchameleon.llm import LLM
from jchameleon.sampling import SamplingParams

TOLERANCE = 1e-4
LEAST_EFFECT = 1000 * TOLERANCE
PROMPT_TOKENS = (1, 5, 16, 31, 32, 33, 47, 70)
NEW_TOKENS = 24

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCase:
    """A model and its adapters, as keywords of `LlamaConfig` and `LoraConfig`."""

    config: dict
    adapters: dict[str, dict]


CASES = {
    "mha-tied": ModelCase(
        config={
            "vocab_size": 311,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-2,
            "tie_word_embeddings": True,
        },
        adapters={
            "r8-default-targets": {"r": 8, "lora_alpha": 24},
            "r1-all-linear": {"r": 1, "lora_alpha": 3, "target_modules": "all-linear"},
            "r17-rslora-attention": {
                "r": 17,
                "lora_alpha": 12,
                "use_rslora": True,
                "target_modules": ATTENTION,
            },
            "r64-regex": {
                "r": 64,
                "lora_alpha": 16,
                "target_modules": r".*\.(self_attn\.[qv]|mlp\.down)_proj",
            },
            "r8-one-layer": {
                "r": 8,
                "lora_alpha": 4,
                "target_modules": ["o_proj", "gate_proj", "up_proj"],
                "layers_to_transform": [1],
            },
            "r64-rank-and-alpha-patterns": {
                "r": 8,
                "lora_alpha": 12,
                "target_modules": "all-linear",
                "rank_pattern": {"q_proj": 1, "v_proj": 64, "down_proj": 17},
                "alpha_pattern": {"k_proj": 3, "o_proj": 30},
            },
        },
    ),
    "gqa-llama3": ModelCase(
        config={
            "vocab_size": 384,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        adapters={
            "r8-fan-in-fan-out": {
                "r": 8,
                "lora_alpha": 16,
                "target_modules": ["q_proj", "v_proj"],
                "fan_in_fan_out": True,
            },
            "r1-rslora-alpha-pattern": {
                "r": 1,
                "lora_alpha": 2,
                "use_rslora": True,
                "target_modules": ["q_proj", "up_proj"],
                "alpha_pattern": {"q_proj": 5, r"layers\.2\.mlp\.up_proj": 0.5},
            },
            "r17-all-but": {
                "r": 17,
                "lora_alpha": 40,
                "target_modules": "all-linear",
                "exclude_modules": ["down_proj", "1.self_attn.k_proj"],
            },
            "r64-rslora-keys-values": {
                "r": 64,
                "lora_alpha": 48,
                "use_rslora": True,
                "target_modules": ["k_proj", "v_proj"],
            },
            "r64-rslora-both-patterns": {
                "r": 17,
                "lora_alpha": 6,
                "use_rslora": True,
                "target_modules": ATTENTION + MLP,
                "rank_pattern": {r"layers\.0\..*": 64, r"layers\.2\.mlp\..*": 1},
                "alpha_pattern": {r"layers\.1\..*": 9},
            },
            "r8-mlp-of-two-layers": {
                "r": 8,
                "lora_alpha": 20,
                "target_modules": MLP,
                "layers_to_transform": [0, 2],
                "layers_pattern": "layers",
            },
        },
    ),
    "gqa-wide-heads-linear": ModelCase(
        config={
            "vocab_size": 450,
            "hidden_size": 72,
            "intermediate_size": 112,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 20,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "linear",
                "rope_theta": 5000.0,
                "factor": 4.0,
            },
        },
        adapters={
            "r8-keys-output": {
                "r": 8,
                "lora_alpha": 2,
                "target_modules": ["k_proj", "o_proj"],
            },
            "r1-regex": {
                "r": 1,
                "lora_alpha": 0.5,
                "target_modules": r"model\.layers\.\d\.mlp\.(gate|up)_proj",
            },
            "r17-all-but-regex": {
                "r": 17,
                "lora_alpha": 51,
                "target_modules": "all-linear",
                "exclude_modules": r".*\.0\.(self_attn\.o|mlp\.up)_proj",
            },
            "r64-all-linear": {
                "r": 64,
                "lora_alpha": 32,
                "target_modules": "all-linear",
            },
            "r17-mixed-ranks": {
                "r": 8,
                "lora_alpha": 10,
                "use_rslora": True,
                "target_modules": ["q_proj", "o_proj", "down_proj"],
                "rank_pattern": {"o_proj": 17, "1.mlp.down_proj": 1},
                "fan_in_fan_out": True,
            },
            "r8-down-of-first-layer": {
                "r": 8,
                "lora_alpha": -24,
                "target_modules": ["down_proj"],
                "layers_to_transform": 0,
            },
        },
    ),
}


@pytest.fixture(scope="module")
def oracle():
    with import_oracle() as oracle:
        yield oracle


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """A row as transformers and PEFT run it, alone.

    Attributes:
      adapter: None for the base model.
      tokens: the greedy tokens, n of them.
      logits: f32[n, V], what each of them was chosen from.
      base_logits: f32[n, V], the base model's at the same places.
    """

    adapter: str | None
    prompt: list[int]
    tokens: list[int]
    logits: np.ndarray
    base_logits: np.ndarray


@pytest.fixture(scope="module", params=CASES)
def parity(request, oracle, tmp_path_factory):
    """Return (LLM with all adapters, references of all rows) of one model."""
    case = CASES[request.param]
    root = tmp_path_factory.mktemp("parity")
    with quiet():
        save_random_model(oracle, root / "model", case.config)
        for index, (name, config) in enumerate(case.adapters.items()):
            base = load_base(oracle, root)
            random_peft_model(
                oracle, base, root / name, seed=index, strength=0.5, **config
            )
        references = run_reference(oracle, root, case)
    with LLM(
        root / "model",
        adapters={name: root / name for name in case.adapters},
        max_running=8,
        max_batch_tokens=64,
        max_model_len=128,
        max_lora_rank=64,
        pool_bytes=32 << 20,
    ) as llm:
        poison_pool(llm)
        yield llm, references


def load_base(oracle, root):
    model = oracle.transformers.LlamaForCausalLM.from_pretrained(
        root / "model", dtype=oracle.torch.float32
    )
    return model.eval()


def save_random_model(oracle, folder, config):
    """Write a model whose logits, activations and norms are all far from trivial."""
    oracle.torch.manual_seed(len(CASES) + config["vocab_size"])
    model = oracle.transformers.LlamaForCausalLM(
        oracle.transformers.LlamaConfig(
            **config,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=None,
            initializer_range=1.2 * config["hidden_size"] ** -0.5,
        )
    )
    for name, value in model.named_parameters():
        if "norm" in name:
            value.data.uniform_(0.5, 1.5)
    model.save_pretrained(folder)


def run_reference(oracle, root, case):
    """Return the greedy run of every row."""
    rng = np.random.default_rng(7)
    base = load_base(oracle, root)
    vocab_size = case.config["vocab_size"]
    names = [*case.adapters]
    names = [None, *names[:4], None, *names[4:]]
    references = []
    for name, num_tokens in zip(names, PROMPT_TOKENS, strict=True):
        prompt = rng.integers(0, vocab_size, num_tokens).tolist()
        model = base
        if name is not None:
            model = oracle.peft.PeftModel.from_pretrained(
                load_base(oracle, root), root / name
            ).eval()
        with oracle.torch.inference_mode():
            ids = oracle.torch.tensor([prompt])
            out = model.generate(
                input_ids=ids,
                attention_mask=oracle.torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            forced = base(out.sequences[:, :-1]).logits[0, num_tokens - 1 :]
        references.append(
            Reference(
                adapter=name,
                prompt=prompt,
                tokens=out.sequences[0, num_tokens:].tolist(),
                logits=oracle.torch.cat(out.logits).numpy(),
                base_logits=forced.numpy(),
            )
        )
    return references


def test_reference_adapters_change_the_logits_at_every_position(parity):
    _, references = parity
    for reference in references:
        effect = np.abs(reference.logits - reference.base_logits).max(axis=1)
        assert effect.shape == (NEW_TOKENS,)
        if reference.adapter is None:
            assert effect.max() < TOLERANCE  # cache or no cache
        else:
            assert effect.min() >= LEAST_EFFECT, reference.adapter
        assert 1 < np.abs(reference.logits).max() < 20


@pytest.mark.parametrize("chunk_tokens", [32, 64])
def test_logits_of_all_rows_in_one_batch_are_those_of_peft(parity, chunk_tokens):
    llm, references = parity
    rows = [
        ForcedRow(prompt=r.prompt, forced=r.tokens[:-1], adapter=r.adapter)
        for r in references
    ]
    found = forced_logits(llm, rows, chunk_tokens=chunk_tokens, seed=chunk_tokens)
    for reference, logits in zip(references, found, strict=True):
        assert logits.shape == reference.logits.shape
        error = np.abs(logits - reference.logits).max(axis=1)
        print(f"{reference.adapter}: largest difference {error.max():.2g}")
        assert np.all(error <= TOLERANCE), (reference.adapter, error)


def test_greedy_tokens_of_all_rows_in_one_batch_are_those_of_peft(parity):
    llm, references = parity
    outputs = llm.generate(
        [r.prompt for r in references],
        adapters=[r.adapter for r in references],
        sampling=SamplingParams(
            max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True
        ),
    )
    assert max(len(record.decode) for record in llm.step_records) == len(references)
    comparison = GreedyComparison()
    for reference, output in zip(references, outputs, strict=True):
        assert output.finish_reason == "length"
        comparison.add(
            f"{reference.adapter}", output.token_ids, reference.logits, gap=TIE_GAP
        )
    comparison.check()
    assert len(comparison.chosen) >= 20, "a model that says little proves little"
