"""What an `adapter_config.json` asks for; whatever is not plain LoRA is refused.

Every key is accounted for: honoured, informational, or at PEFT's own default. Keys that
PEFT 0.21 does not know pass only when they are null, false or empty.
"""

import dataclasses
import math
from typing import Any

from jchameleon.errors import AdapterError
from jchameleon.lora.safetensors import short
from jchameleon.lora.targets import DEFAULT_TARGETS, TargetRules

PEFT_DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": False,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": None,
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
"""Every key that PEFT 0.21 writes, with the value it writes for a plain LoRA."""

HONOURED = frozenset(
    {
        "alpha_pattern",
        "exclude_modules",
        "fan_in_fan_out",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
"""Keys that are read and checked here."""

INFORMATIONAL = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_version",
        "revision",
        "runtime_config",
    }
)
"""Keys that say where an adapter comes from; nothing computed depends on them."""

TASK_TYPES = (
    "CAUSAL_LM",
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)

# An empty list asks for nothing in these; an empty table is no such thing in others,
# where it switches a variant on.
_EMPTY_LIST_KEYS = frozenset(
    {
        "alora_invocation_tokens",
        "layer_replication",
        "modules_to_save",
        "target_parameters",
        "trainable_token_indices",
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoraSettings:
    """What an `adapter_config.json` says, reduced to what is computed with.

    Attributes:
      rules: which modules.
      rank, alpha: of modules that no pattern matches.
      rank_pattern, alpha_pattern: by regular expression, in file order.
      use_rslora: divide alpha by sqrt(rank) in place of rank.
      even_rank: initialised in a way that PEFT refuses for odd ranks.
    """

    rules: TargetRules
    rank: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    use_rslora: bool
    even_rank: bool


def parse_config(table: dict[str, Any]) -> LoraSettings:
    """Check the keys of an `adapter_config.json`; return what they mean.

    Raises:
      AdapterError: a key has a value that is not supported; the message names it.
    """
    for key, value in table.items():
        if key not in HONOURED and key not in INFORMATIONAL:
            _check_plain(key, value)
    config = {**PEFT_DEFAULTS, **table}
    if table.get("peft_type") != "LORA":
        raise AdapterError(f"peft_type={short(table.get('peft_type'))} must be 'LORA'")
    if config["task_type"] is not None and config["task_type"] not in TASK_TYPES:
        raise AdapterError(
            f"task_type={short(config['task_type'])} must be null or one of "
            + ", ".join(TASK_TYPES)
        )
    init = config["init_lora_weights"]
    # The names and spellings that PEFT takes and that leave the base weights alone.
    gaussian = isinstance(init, str) and init.lower() == "gaussian"
    if not (isinstance(init, bool) or gaussian or init == "orthogonal"):
        raise AdapterError(
            f"init_lora_weights={short(init)} must be true, false, 'gaussian' or "
            "'orthogonal': others change the base model"
        )
    if not 0 <= _number("lora_dropout", config["lora_dropout"]) <= 1:
        raise AdapterError(f"lora_dropout={config['lora_dropout']} must be from 0 to 1")
    # PEFT resets fan_in_fan_out for nn.Linear, which all projections of a Llama model
    # are, so true and false load alike and the factors are never transposed.
    _boolean("fan_in_fan_out", config["fan_in_fan_out"])
    return LoraSettings(
        rules=_target_rules(config),
        rank=_rank("r", config["r"]),
        alpha=_number("lora_alpha", config["lora_alpha"]),
        rank_pattern={
            key: _rank(f"rank_pattern[{short(key)}]", value)
            for key, value in _table("rank_pattern", config["rank_pattern"]).items()
        },
        alpha_pattern={
            key: _number(f"alpha_pattern[{short(key)}]", value)
            for key, value in _table("alpha_pattern", config["alpha_pattern"]).items()
        },
        use_rslora=_boolean("use_rslora", config["use_rslora"]),
        even_rank=init == "orthogonal",
    )


def _check_plain(key: str, value: Any) -> None:
    """Raise AdapterError unless `value` is what a plain LoRA has for `key`."""
    if key not in PEFT_DEFAULTS:
        if value is not None and value is not False and value not in ("", [], {}):
            raise AdapterError(f"unknown key {short(key)}={short(value)} is set")
        return
    default = PEFT_DEFAULTS[key]
    if type(value) is type(default) and value == default:
        return
    if value is None and not default:
        return
    if value == [] and key in _EMPTY_LIST_KEYS:
        return
    raise AdapterError(
        f"{key}={short(value)} is not supported, must be {default!r} or absent"
    )


def _target_rules(config: dict[str, Any]) -> TargetRules:
    targets = config["target_modules"]
    layers = config["layers_to_transform"]
    pattern = config["layers_pattern"]
    if targets is None:
        targets = list(DEFAULT_TARGETS)
    if isinstance(targets, str) and (layers is not None or pattern is not None):
        field = "layers_pattern" if layers is None else "layers_to_transform"
        raise AdapterError(
            f"{field} cannot go with target_modules={short(targets)}: it must be a list"
        )
    if pattern and layers is None:
        raise AdapterError(f"layers_pattern={short(pattern)} needs layers_to_transform")
    exclude = config["exclude_modules"]
    return TargetRules(
        target_modules=_names("target_modules", targets),
        exclude_modules=() if exclude is None else _names("exclude_modules", exclude),
        layers_to_transform=_layers(layers),
        layers_pattern=(pattern,)
        if isinstance(pattern, str) and pattern
        else _strings("layers_pattern", pattern or []),
    )


def _layers(value: Any) -> int | tuple[int, ...] | None:
    if value is None or type(value) is int:
        return value
    if isinstance(value, list) and all(type(x) is int for x in value):
        return tuple(value)
    raise AdapterError(
        f"layers_to_transform={short(value)} must be an integer or a list of integers"
    )


def _names(field: str, value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else _strings(field, value)


def _strings(field: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
        raise AdapterError(
            f"{field}={short(value)} must be a string or list of strings"
        )
    return tuple(value)


def _table(field: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise AdapterError(f"{field}={short(value)} must be an object")
    return value


def _boolean(field: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise AdapterError(f"{field}={short(value)} must be true or false")
    return value


def _rank(field: str, value: Any) -> int:
    if type(value) is not int or value <= 0:
        raise AdapterError(f"{field}={short(value)} must be a positive integer")
    return value


def _number(field: str, value: Any) -> float:
    try:
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise AdapterError(f"{field}={short(value)} must be a finite number")
