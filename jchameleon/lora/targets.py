"""Which modules of a model a PEFT config selects, exactly as PEFT selects them.

Names are those of the modules of a causal Llama, Mistral or Qwen model in Hugging
Face's tree, such as "model.layers.3.self_attn.q_proj".
"""

import dataclasses
import re

from jchameleon.config import PROJECTIONS, ModelConfig
from jchameleon.errors import AdapterError
from jchameleon.lora.adapter import ModuleKey
from jchameleon.lora.patterns import MatchBudget, compile_pattern
from jchameleon.lora.safetensors import short

PROJECTION_PATHS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
"""Where each projection sits within a decoder layer."""

DEFAULT_TARGETS = ("q_proj", "v_proj")
"""What PEFT targets in a model of any of these families when a config names nothing."""

_OTHER_LAYER_PATHS = (
    "self_attn",
    "mlp",
    "mlp.act_fn",
    "input_layernorm",
    "post_attention_layernorm",
)
_NORM_PATHS = ("self_attn.q_norm", "self_attn.k_norm")
_OTHER_PATHS = (
    "model",
    "model.embed_tokens",
    "model.layers",
    "model.norm",
    "model.rotary_emb",
    "lm_head",
)

_CONDENSED_TARGETS = 20
"""From this many entries on, PEFT may rewrite a target list to shorter suffixes."""

_FIRST_INDEX = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TargetRules:
    """The fields of a config that select modules.

    Attributes:
      target_modules: names or dotted tails of names; or one regular expression that
        must match a whole name; or "all-linear" in any case.
      exclude_modules: likewise (no "all-linear"); empty excludes nothing.
      layers_to_transform: layer indices to keep; None or empty keeps all.
      layers_pattern: regular expressions of what precedes the layer index; empty
        accepts any.
    """

    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()


def linear_modules(model: ModelConfig) -> dict[str, ModuleKey]:
    """Return (layer, projection) by module name, in model order."""
    return {
        f"model.layers.{layer}.{PROJECTION_PATHS[projection]}": (layer, projection)
        for layer in range(model.num_layers)
        for projection in PROJECTIONS
    }


def module_names(model: ModelConfig) -> list[str]:
    """Return the names of all modules, linear or not."""
    layers = [f"model.layers.{layer}" for layer in range(model.num_layers)]
    paths = _OTHER_LAYER_PATHS + (_NORM_PATHS if model.qk_norm else ())
    others = [f"{name}.{path}" for name in layers for path in paths]
    return [*linear_modules(model), *layers, *others, *_OTHER_PATHS]


def select_modules(
    rules: TargetRules, model: ModelConfig, *, budget: MatchBudget
) -> list[str]:
    """Return the names of the linear modules that `rules` select, in model order.

    Raises:
      AdapterError: a rule is malformed, an entry of a target list matches no module, a
        selected module is no projection, or nothing is selected.
    """
    linear = linear_modules(model)
    names = module_names(model)
    if isinstance(rules.target_modules, str):
        matched = _match_text(rules.target_modules, names, linear, budget)
    else:
        matched = _match_list(rules, names, model, budget)
    excluded = _excluded(rules.exclude_modules, names, budget)
    selected = [name for name in names if name in matched and name not in excluded]
    for name in selected:
        if name not in linear:
            raise AdapterError(
                f"target_modules selects {name!r}, which is none of "
                + ", ".join(PROJECTION_PATHS.values())
            )
    if not selected:
        raise AdapterError(
            f"target_modules={short(rules.target_modules)} selects no module"
        )
    return selected


def _match_text(
    target: str, names: list[str], linear: dict[str, ModuleKey], budget: MatchBudget
) -> set[str]:
    if target.lower() == "all-linear":
        # PEFT leaves the output head out, so exactly the projections remain.
        return set(linear)
    return _full_matches("target_modules", target, names, budget)


def _match_list(
    rules: TargetRules, names: list[str], model: ModelConfig, budget: MatchBudget
) -> set[str]:
    entries = frozenset(rules.target_modules)
    tails = {tail for name in names for tail in _tails(name)}
    unmatched = sorted(entries - tails)
    if unmatched:
        raise AdapterError(
            f"target_modules has {short(unmatched[0])}, which matches no module of a "
            f"model with {model.num_layers} layers"
        )
    matched = {name for name in names if not entries.isdisjoint(_tails(name))}
    if rules.layers_to_transform in (None, ()):
        return matched
    wanted = rules.layers_to_transform
    layers = {wanted} if isinstance(wanted, int) else set(wanted or ())
    beyond = sorted(x for x in layers if not 0 <= x < model.num_layers)
    if beyond:
        raise AdapterError(
            f"layers_to_transform has {beyond[0]}, the model has layers 0 to "
            f"{model.num_layers - 1}"
        )
    patterns = [
        compile_pattern("layers_pattern", rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\.")
        for text in rules.layers_pattern
    ] or [_FIRST_INDEX]
    kept = set()
    for name in matched:
        if _layer_index(name, patterns) in layers:
            kept.add(name)
        budget.check("layers_pattern")
    # PEFT lets a module that is listed by its full name pass whatever its layer,
    # unless it has first condensed a long list to suffixes.
    exact = matched & entries
    if len(entries) >= _CONDENSED_TARGETS and not exact <= kept:
        raise AdapterError(
            f"target_modules lists {min(exact - kept)!r}, which layers_to_transform "
            f"leaves out, among {len(entries)} entries; which of the two counts is "
            "ambiguous"
        )
    return kept | exact


def _layer_index(name: str, patterns: list[re.Pattern[str]]) -> int | None:
    for pattern in patterns:
        if match := pattern.match(name):
            index = match.groupdict().get("idx")
            return None if index is None else int(index)
    return None


def _excluded(
    exclude: str | tuple[str, ...], names: list[str], budget: MatchBudget
) -> set[str]:
    if not exclude:
        return set()
    if isinstance(exclude, str):
        return _full_matches("exclude_modules", exclude, names, budget)
    entries = frozenset(exclude)
    return {name for name in names if not entries.isdisjoint(_tails(name))}


def _full_matches(
    field: str, pattern: str, names: list[str], budget: MatchBudget
) -> set[str]:
    regex = compile_pattern(field, pattern)
    matched = set()
    for name in names:
        if regex.fullmatch(name):
            matched.add(name)
        budget.check(field)
    return matched


def _tails(name: str) -> list[str]:
    """Return `name` and each of its tails that begins behind a dot."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]
