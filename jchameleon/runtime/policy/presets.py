"""The policies of one engine together: shipped presets, TOML files and tables.

A table has a section for each kind of policy, `[admission]`, `[eviction]`,
`[predictor]` and `[prefetch]`, with the policy's `name` and its options, and a section
`[kv]`. Either it names all four policies, or it starts from a `preset` and says what
differs. docs/policies.md shows examples.
"""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from jchameleon.config import load_toml, nearest, plain_table
from jchameleon.errors import ConfigError
from jchameleon.resources import configs_dir
from jchameleon.runtime.policy.registry import POLICY_KINDS, create_policy

_TOP_KEYS = ("preset", "source", *POLICY_KINDS, "kv")
_KV_FIELDS = {"reserve": "kv_reserve", "max_squashes": "max_squashes"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PolicySpec:
    """One policy: its short name or "package.module:Class", and its options."""

    name: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        options = MappingProxyType(plain_table(self.options))
        object.__setattr__(self, "options", options)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PolicyConfig:
    """Everything that decides when requests run and adapters come and go.

    Attributes:
      source: preset name, path or label that messages and results call this by.
      admission, eviction, predictor, prefetch: the four policies.
      kv_reserve: pages taken at admission: for the "predicted" output, or for all of
        "max_tokens".
      max_squashes: times a request may be sent back to wait; then it reserves for
        max_tokens and keeps what it has.
    """

    source: str
    admission: PolicySpec
    eviction: PolicySpec
    predictor: PolicySpec
    prefetch: PolicySpec
    kv_reserve: Literal["predicted", "max_tokens"] = "predicted"
    max_squashes: int = 2

    def __post_init__(self) -> None:
        if self.kv_reserve not in ("predicted", "max_tokens"):
            raise ConfigError(
                f"policy {self.source}: kv.reserve={self.kv_reserve!r} must be "
                "'predicted' or 'max_tokens'"
            )
        if type(self.max_squashes) is not int or self.max_squashes < 0:
            raise ConfigError(
                f"policy {self.source}: kv.max_squashes={self.max_squashes!r} must be "
                "an integer, 0 or above"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return a table of plain types; `load_policy` makes the same of it again."""
        sections = {}
        for kind in POLICY_KINDS:
            spec: PolicySpec = getattr(self, kind)
            sections[kind] = {"name": spec.name, **plain_table(spec.options)}
        kv = {"reserve": self.kv_reserve, "max_squashes": self.max_squashes}
        return {"source": self.source, **sections, "kv": kv}


def policy_preset_names() -> list[str]:
    """Return the names of the policy presets that ship with the package, sorted."""
    return sorted(path.stem for path in (configs_dir() / "policies").glob("*.toml"))


def load_policy(value: str | Path | Mapping[str, Any]) -> PolicyConfig:
    """Return the policies that `value` names.

    Args:
      value: the name of a preset, a path that ends in .toml, or a table.

    Raises:
      ConfigError: unknown preset, section or key; a section that is missing or of a
        wrong type. That policies exist and take their options, `build_policies` finds.
    """
    if isinstance(value, Mapping):
        preset = value.get("preset")
        return _from_table(value, "table" if preset is None else f"table on {preset}")
    name, known = str(value), policy_preset_names()
    if name in known:
        return _from_table(load_toml(configs_dir() / "policies" / f"{name}.toml"), name)
    if name.endswith(".toml"):
        return _from_table(load_toml(Path(name)), name)
    raise ConfigError(
        f"policy={name!r} is no preset{nearest(name, known)}; presets are "
        f"{', '.join(known)}; or give the path of a .toml file or a table"
    )


def build_policies(config: PolicyConfig) -> dict[str, Any]:
    """Return a new policy of each kind, by kind.

    Raises:
      ConfigError: a policy is unknown or refuses its options.
    """
    policies = {}
    for kind in POLICY_KINDS:
        spec: PolicySpec = getattr(config, kind)
        try:
            policies[kind] = create_policy(kind, spec.name, spec.options)
        except ConfigError as error:
            raise ConfigError(f"policy {config.source}: {error}") from error
    return policies


def _from_table(table: Mapping[str, Any], source: str) -> PolicyConfig:
    source = _text(table, "source", source) or source
    _check_names(table, _TOP_KEYS, f"policy {source}: unknown section")
    base = _base(table, source)
    missing = [kind for kind in POLICY_KINDS if base is None and kind not in table]
    if missing:
        raise ConfigError(
            f"policy {source}: {', '.join(missing)} must be there, or a preset to "
            "start from, such as preset = 'chameleon'"
        )
    kv = _section(table, "kv", source)
    _check_names(kv, _KV_FIELDS, f"policy {source}: kv has no key")
    values: dict[str, Any] = {
        kind: _spec(kind, table, None if base is None else getattr(base, kind), source)
        for kind in POLICY_KINDS
    }
    for key, field in _KV_FIELDS.items():
        if key in kv:
            values[field] = kv[key]
        elif base is not None:
            values[field] = getattr(base, field)
    return PolicyConfig(source=source, **values)


def _base(table: Mapping[str, Any], source: str) -> PolicyConfig | None:
    """Return the preset that `table` starts from, if it names one."""
    preset = _text(table, "preset", source)
    if preset is None:
        return None
    known = policy_preset_names()
    if preset not in known:
        raise ConfigError(
            f"policy {source}: preset={preset!r} is no preset"
            f"{nearest(preset, known)}; presets are {', '.join(known)}"
        )
    return load_policy(preset)


def _spec(
    kind: str, table: Mapping[str, Any], base: PolicySpec | None, source: str
) -> PolicySpec:
    """Return one policy; options of the base stay where its name does."""
    options = dict(_section(table, kind, source))
    name = options.pop("name", None if base is None else base.name)
    if not isinstance(name, str):
        raise ConfigError(
            f"policy {source}: {kind}.name={name!r} must be the name of a policy"
        )
    if base is not None and name == base.name:
        options = {**base.options, **options}
    return PolicySpec(name=name, options=options)


def _section(table: Mapping[str, Any], name: str, source: str) -> Mapping[str, Any]:
    section = table.get(name, {})
    if not isinstance(section, Mapping):
        raise ConfigError(f"policy {source}: {name}={section!r} must be a table")
    for key in section:
        if not isinstance(key, str):
            raise ConfigError(f"policy {source}: {name} has the key {key!r}, no string")
    return section


def _text(table: Mapping[str, Any], key: str, source: str) -> str | None:
    value = table.get(key)
    if value is not None and not (isinstance(value, str) and value):
        raise ConfigError(f"policy {source}: {key}={value!r} must be a string")
    return value


def _check_names(
    table: Mapping[str, Any], known: Collection[str], problem: str
) -> None:
    for name in table:
        if name not in known:
            raise ConfigError(
                f"{problem} {name!r}{nearest(name, known)}; known are "
                + ", ".join(known)
            )
