"""The model families that one decoder computes, and what each may have."""

import dataclasses
from typing import TYPE_CHECKING, Literal

from jchameleon.errors import ConfigError

if TYPE_CHECKING:
    from jchameleon.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A family as Hugging Face writes it down.

    Attributes:
      architecture: its class for text generation in config.json.
      traits: the (qkv_bias, o_bias, qk_norm) that its models may have.
      window: "no" layer, "every" layer or "some" layers may attend to a window only.
      defaults: config.json's fields that have other defaults than in a Llama model.
    """

    architecture: str
    traits: frozenset[tuple[bool, bool, bool]]
    window: Literal["no", "every", "some"]
    defaults: dict[str, int]


_PLAIN = (False, False, False)

FAMILIES = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        traits=frozenset({_PLAIN, (True, True, False)}),
        window="no",
        defaults={},
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        traits=frozenset({_PLAIN}),
        window="every",
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        traits=frozenset({(True, False, False)}),
        window="some",
        defaults={
            "num_key_value_heads": 32,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        traits=frozenset({(False, False, True), (True, True, True)}),
        window="some",
        defaults={
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
    ),
}
"""By `model_type`; defaults are those of transformers' configuration classes."""


def check_family(model: "ModelConfig") -> None:
    """Raise ConfigError for a combination of fields that no family computes."""
    family = FAMILIES.get(model.family)
    if family is None:
        raise ConfigError(
            f"family={model.family!r} must be one of {', '.join(FAMILIES)}"
        )
    if (model.qkv_bias, model.o_bias, model.qk_norm) not in family.traits:
        raise ConfigError(
            f"qkv_bias={model.qkv_bias!r}, o_bias={model.o_bias!r} and "
            f"qk_norm={model.qk_norm!r} do not go together in a {model.family} model"
        )
    window, layers = model.sliding_window, model.sliding_layers
    if window is None and layers == ():
        return
    if type(window) is not int or window <= 0:
        raise ConfigError(
            f"sliding_window={window!r} must be a positive integer where layers slide"
        )
    if layers != tuple(sorted({i for i in layers if 0 <= i < model.num_layers})):
        raise ConfigError(
            f"sliding_layers={layers!r:.60} must be ascending layers below "
            f"{model.num_layers}"
        )
    allowed = {"no": 0, "every": model.num_layers, "some": len(layers)}[family.window]
    if not layers or len(layers) != allowed:
        raise ConfigError(
            f"sliding_layers={layers!r:.60}: {family.window} layer of a "
            f"{model.family} model slides"
        )
