"""Small random models and their adapters, for parity with transformers and PEFT.

Three Llama models with six adapters each, then Llama's variants with six more.
"""

from parity_harness import ATTENTION, MLP, ModelCase

VARIANT_ADAPTERS = {
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
VARIANT_SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
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
    "mistral": ModelCase(
        family="Mistral",
        config={
            **VARIANT_SHAPE,
            "vocab_size": 300,
            "head_dim": 20,
            "sliding_window": 128,
        },
        adapters=VARIANT_ADAPTERS,
    ),
    "qwen2-tied": ModelCase(
        family="Qwen2",
        config={**VARIANT_SHAPE, "vocab_size": 310, "tie_word_embeddings": True},
        adapters=VARIANT_ADAPTERS,
    ),
    "qwen3": ModelCase(
        family="Qwen3",
        config={
            **VARIANT_SHAPE,
            "vocab_size": 320,
            "head_dim": 16,
            "rms_norm_eps": 1e-3,
        },
        adapters=VARIANT_ADAPTERS,
    ),
    "qwen3-bias-window": ModelCase(
        family="Qwen3",
        config={
            **VARIANT_SHAPE,
            "vocab_size": 330,
            "head_dim": 12,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 128,
            "max_window_layers": 1,
        },
        adapters=VARIANT_ADAPTERS,
    ),
}
