"""config.json of Hugging Face directories: read to a ModelConfig, and written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jchameleon.config import MOST_LAYERS, ModelConfig, RopeScaling
from jchameleon.errors import ConfigError, ModelLoadError
from jchameleon.families import FAMILIES
from jchameleon.models.files import read_json, short

# Fields that would change what the model computes, and the values under which they
# do not. Absent and null count as neutral.
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
    "quantization_config": (),
    "partial_rotary_factor": (1.0,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "use_qk_norm": (False,),
    "qk_norm": (False,),
    "num_local_experts": (0,),
    "num_experts": (0,),
    "clip_qkv": (),
    "no_rope_layers": (),
}

# Fields that a family itself has no use for: what its class in transformers computes
# does not change with them, so any other value means another model.
_FAMILY_NEUTRAL: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {"sliding_window": (), "use_sliding_window": (False,)},
    "mistral": {"attention_bias": (False,), "use_sliding_window": (True,)},
    "qwen2": {"attention_bias": (True,)},
    "qwen3": {},
}

_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
}


def load_hf_config(directory: Path) -> ModelConfig:
    """Read config.json, and the end tokens of generation_config.json where it has any.

    Raises:
      ModelLoadError: unreadable, a required field absent, or a field with a value
        that changes the maths in a way that is not supported (named with its value).
    """
    path = directory / "config.json"
    config = read_json(path)
    name = _family_name(config, path)
    config = {**FAMILIES[name].defaults, **config}
    for field, neutral in {**_NEUTRAL_VALUES, **_FAMILY_NEUTRAL[name]}.items():
        value = config.get(field)
        if value is not None and value not in neutral:
            rule = f"only {neutral[0]!r} is supported" if neutral else "not supported"
            raise ModelLoadError(
                f"{path}: {field}={short(value)} in a {name} model: {rule}"
            )

    hidden_size = _integer(config, "hidden_size", path)
    num_heads = _integer(config, "num_attention_heads", path)
    head_dim = config.get("head_dim")
    if head_dim is None:
        if num_heads <= 0 or hidden_size % num_heads:
            raise ModelLoadError(
                f"{path}: {hidden_size=} must be a multiple of num_attention_heads="
                f"{num_heads} when head_dim is absent"
            )
        head_dim = hidden_size // num_heads
    num_kv_heads = config.get("num_key_value_heads")
    num_layers = _integer(config, "num_hidden_layers", path)
    if num_layers > MOST_LAYERS:  # before any list of them
        raise ModelLoadError(
            f"{path}: num_hidden_layers={num_layers} must be at most {MOST_LAYERS}"
        )
    rope_theta, rope_scaling = _rope(config, path)
    window, sliding_layers = _window(config, name, num_layers, path)
    bias = name in ("llama", "qwen3") and _boolean(config, "attention_bias", path)
    try:
        return ModelConfig(
            name=directory.resolve().name,
            vocab_size=_integer(config, "vocab_size", path),
            hidden_size=hidden_size,
            intermediate_size=_integer(config, "intermediate_size", path),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
            head_dim=head_dim,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            rms_norm_eps=_number(config, "rms_norm_eps", path, default=1e-6),
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            tie_embeddings=_boolean(config, "tie_word_embeddings", path),
            bos_token_id=_bos_token_id(config, path),
            eos_token_ids=_eos_token_ids(directory, config),
            family=name,
            qkv_bias=bias or name == "qwen2",
            o_bias=bias,
            qk_norm=name == "qwen3",
            sliding_window=window,
            sliding_layers=sliding_layers,
        )
    except (ConfigError, TypeError) as error:
        raise ModelLoadError(f"{path}: {error}") from error


def hf_config_table(config: ModelConfig, *, dtype: str) -> dict[str, Any]:
    """Return what config.json says of a model; `load_hf_config` reads it back.

    Args:
      dtype: of the weights beside it.
    """
    eos = list(config.eos_token_ids)
    table: dict[str, Any] = {
        "architectures": [FAMILIES[config.family].architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling_table(config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "torch_dtype": dtype,
    }
    if config.family in ("llama", "qwen3"):
        table["attention_bias"] = config.o_bias
    window = FAMILIES[config.family].window
    if window != "no":
        table["sliding_window"] = config.sliding_window
    if window == "some":
        table["use_sliding_window"] = config.sliding_window is not None
        # Layers from here on slide where layer_types does not say which do.
        table["max_window_layers"] = config.num_layers
        if config.sliding_layers:
            table["layer_types"] = [
                "sliding_attention" if i in config.sliding_layers else "full_attention"
                for i in range(config.num_layers)
            ]
    return table


def _rope_scaling_table(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    table: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        table["low_freq_factor"] = scaling.low_freq_factor
        table["high_freq_factor"] = scaling.high_freq_factor
        table["original_max_position_embeddings"] = scaling.original_max_position
    return table


def _family_name(config: Mapping[str, Any], path: Path) -> str:
    """Return the family that model_type names and architectures confirm."""
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ModelLoadError(
            f"{path}: model_type={short(name)} must be one of {', '.join(FAMILIES)}"
        )
    found = config.get("architectures")
    expected = FAMILIES[name].architecture
    # Early Llama checkpoints write LLaMAForCausalLM.
    if found is not None and not (
        isinstance(found, list)
        and len(found) == 1
        and str(found[0]).lower() == expected.lower()
    ):
        raise ModelLoadError(
            f"{path}: architectures={short(found)} must be [{expected!r}] for "
            f"model_type={name!r}"
        )
    return name


def _window(
    config: Mapping[str, Any], name: str, num_layers: int, path: Path
) -> tuple[int | None, tuple[int, ...]]:
    """Return (sliding window, layers that slide), (None, ()) where none does."""
    mode = FAMILIES[name].window
    window = config.get("sliding_window")
    if mode == "some" and not _boolean(config, "use_sliding_window", path):
        window = None
    if window is not None and type(window) is not int:
        raise ModelLoadError(
            f"{path}: sliding_window={short(window)} must be an integer"
        )
    kinds = config.get("layer_types")
    if kinds is None:
        if window is None:
            return None, ()
        first = 0 if mode == "every" else _integer(config, "max_window_layers", path)
        layers = tuple(range(max(0, first), num_layers))
        return (window, layers) if layers else (None, ())
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise ModelLoadError(
            f"{path}: layer_types={short(kinds)} must list num_hidden_layers="
            f"{num_layers} kinds"
        )
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise ModelLoadError(
                f"{path}: layer_types has {short(kind)}, must be 'full_attention' or "
                "'sliding_attention'"
            )
    layers = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    if (layers and window is None) or (
        # Every layer of a Mistral model slides, whatever layer_types says.
        mode == "every" and window is not None and len(layers) != num_layers
    ):
        raise ModelLoadError(
            f"{path}: layer_types={short(kinds)} contradicts sliding_window={window}"
        )
    return (window, layers) if layers else (None, ())


def _rope(config: Mapping[str, Any], path: Path) -> tuple[float, RopeScaling | None]:
    """Return (rope_theta, scaling) from either spelling.

    `rope_scaling` beside `rope_theta` is the older one; `rope_parameters` carries the
    base too.
    """
    field = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    table = config.get(field) or {}
    if not isinstance(table, Mapping):
        raise ModelLoadError(f"{path}: {field}={short(table)} must be an object")
    theta = table.get("rope_theta")
    if theta is None:
        theta = _number(config, "rope_theta", path, default=10000.0)
    kind = table.get("rope_type", table.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise ModelLoadError(
            f"{path}: {field}.rope_type={short(kind)} is not supported, must be one "
            "of default, linear, llama3"
        )
    known = _ROPE_KEYS[kind] | {"rope_type", "type", "rope_theta"}
    for key, value in table.items():
        if key not in known and not (key == "partial_rotary_factor" and value == 1):
            raise ModelLoadError(
                f"{path}: {field}.{key}={short(value)} is not supported with "
                f"rope_type={kind!r}"
            )
    numbers = {"rope_theta": theta, **{key: table.get(key) for key in _ROPE_KEYS[kind]}}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelLoadError(f"{path}: {field}.{key}={value!r} must be a number")
    if kind == "default":
        return float(theta), None
    if kind == "linear":
        return float(theta), _scaling(path, kind="linear", factor=table["factor"])
    scaling = _scaling(
        path,
        kind="llama3",
        factor=table["factor"],
        low_freq_factor=table["low_freq_factor"],
        high_freq_factor=table["high_freq_factor"],
        original_max_position=table["original_max_position_embeddings"],
    )
    return float(theta), scaling


def _scaling(path: Path, **values: Any) -> RopeScaling:
    try:
        return RopeScaling(**values)
    except ConfigError as error:
        raise ModelLoadError(f"{path}: {error}") from error


def _bos_token_id(config: Mapping[str, Any], path: Path) -> int | None:
    value = config.get("bos_token_id")
    if value is not None and type(value) is not int:
        raise ModelLoadError(f"{path}: bos_token_id={short(value)} must be an integer")
    return value


def _eos_token_ids(directory: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return generation_config.json's end tokens where it has any, else config's."""
    path = directory / "config.json"
    value = config.get("eos_token_id")
    generation_path = directory / "generation_config.json"
    if generation_path.is_file():
        generation = read_json(generation_path).get("eos_token_id")
        if generation is not None:
            value, path = generation, generation_path
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if any(type(token_id) is not int for token_id in ids):
        raise ModelLoadError(
            f"{path}: eos_token_id={short(value)} must be an integer or a list of them"
        )
    return tuple(dict.fromkeys(ids))


def _integer(config: Mapping[str, Any], field: str, path: Path) -> int:
    value = config.get(field)
    if type(value) is not int:
        raise ModelLoadError(f"{path}: {field}={short(value)} must be an integer")
    return value


def _number(
    config: Mapping[str, Any], field: str, path: Path, *, default: float
) -> float:
    value = config.get(field)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ModelLoadError(f"{path}: {field}={short(value)} must be a number")
    return float(value)


def _boolean(config: Mapping[str, Any], field: str, path: Path) -> bool:
    value = config.get(field)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise ModelLoadError(f"{path}: {field}={short(value)} must be true or false")
    return value
