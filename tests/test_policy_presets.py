"""Policies from presets, files and tables."""

import dataclasses
import json
from pathlib import Path

import pytest

from jchameleon.config import EngineConfig
from jchameleon.errors import ConfigError
from jchameleon.resources import configs_dir
from jchameleon.runtime.policy.presets import (
    PolicyConfig,
    PolicySpec,
    build_policies,
    load_policy,
    policy_preset_names,
)
from jchameleon.runtime.policy.registry import POLICY_KINDS

# By hand, from the papers' descriptions: admission, eviction, predictor, prefetch.
PRESETS = {
    "adaptive": "paced gdsf quantile queued",
    "chameleon": "chameleon chameleon quantile queued",
    "chameleon-nocache": "chameleon drop quantile queued",
    "chameleon-nosched": "fifo chameleon quantile queued",
    "drop": "chameleon drop quantile queued",
    "fairshare": "chameleon fairshare quantile queued",
    "fifo-lru": "fifo lru max_tokens none",
    "gdsf": "chameleon gdsf quantile queued",
    "histogram": "chameleon chameleon quantile histogram",
    "lru": "chameleon lru quantile queued",
    "s-lora": "s-lora drop quantile queued",
    "sjf": "sjf drop quantile queued",
    "vtc": "vtc chameleon quantile queued",
}

WHOLE = {
    "admission": {"name": "chameleon", "slo_s": 2.0},
    "eviction": {"name": "lru"},
    "predictor": {"name": "max_tokens"},
    "prefetch": {"name": "none"},
}


def names(config):
    return " ".join(getattr(config, kind).name for kind in POLICY_KINDS)


def options(config, kind):
    return dict(getattr(config, kind).options)


def test_presets_are_what_they_are_named_for():
    found = {name: names(load_policy(name)) for name in policy_preset_names()}
    assert found == PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_preset_reserves_by_prediction_except_the_plain_engine(name):
    config = load_policy(name)
    expected = "max_tokens" if name == "fifo-lru" else "predicted"
    assert (config.kv_reserve, config.max_squashes) == (expected, 2)
    assert config.source == name


@pytest.mark.parametrize("name", PRESETS)
def test_preset_sets_no_option_but_the_rule_for_lanes_and_our_own_quantile(name):
    config = load_policy(name)
    scheduled = config.admission.name == "chameleon"
    set_here = {"admission": {"lanes": "kmeans"}} if scheduled else {}
    if name == "adaptive":
        set_here = {"predictor": {"quantile": 0.5}}
    for kind in POLICY_KINDS:
        assert options(config, kind) == set_here.get(kind, {})


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_built_and_says_where_it_is_from(name):
    assert tuple(build_policies(load_policy(name))) == POLICY_KINDS
    text = (configs_dir() / "policies" / f"{name}.toml").read_text("utf-8")
    comment = text[: text.index("\n", text.rindex("# "))]
    assert text.startswith("# ")
    assert "paper" in comment or "et al." in comment or "Cherkasova" in comment


def test_default_policy_is_a_preset():
    assert EngineConfig().policy in policy_preset_names()


def test_table_without_a_preset_names_all_four():
    config = load_policy(WHOLE)
    assert names(config) == "chameleon lru max_tokens none"
    assert options(config, "admission") == {"slo_s": 2.0}
    assert (config.kv_reserve, config.max_squashes) == ("predicted", 2)
    partial = {kind: WHOLE[kind] for kind in ("admission", "prefetch")}
    with pytest.raises(ConfigError, match="table: eviction, predictor must be there"):
        load_policy(partial)


def test_same_name_merges_options_and_another_replaces_them():
    base = {"preset": "chameleon"}
    merged = load_policy({**base, "admission": {"slo_s": 9.0}})
    assert options(merged, "admission") == {"lanes": "kmeans", "slo_s": 9.0}
    named = load_policy({**base, "admission": {"name": "chameleon", "lanes": "static"}})
    assert options(named, "admission") == {"lanes": "static"}
    other = load_policy({**base, "admission": {"name": "s-lora"}})
    assert other.admission == PolicySpec(name="s-lora")
    assert names(other) == "s-lora chameleon quantile queued"
    # A preset that starts from another one is no special case.
    assert names(load_policy({"preset": "sjf"})) == PRESETS["sjf"]


def test_kv_section_changes_what_it_names():
    config = load_policy({"preset": "fifo-lru", "kv": {"max_squashes": 0}})
    assert (config.kv_reserve, config.max_squashes) == ("max_tokens", 0)
    config = load_policy({"preset": "fifo-lru", "kv": {"reserve": "predicted"}})
    assert (config.kv_reserve, config.max_squashes) == ("predicted", 2)


@pytest.mark.parametrize("kind", [str, Path])
def test_toml_file_is_read_as_a_table(tmp_path, kind):
    path = tmp_path / "own.toml"
    path.write_text(
        'preset = "chameleon"\n'
        '[eviction]\nname = "gdsf"\n'
        "[admission]\nmax_lanes = 3\n"
        "[kv]\nmax_squashes = 5\n"
    )
    config = load_policy(kind(path))
    assert config.source == str(path)
    assert names(config) == "chameleon gdsf quantile queued"
    assert options(config, "admission") == {"lanes": "kmeans", "max_lanes": 3}
    assert config.max_squashes == 5


def test_source_of_a_table_is_its_preset_or_what_it_says():
    assert load_policy(WHOLE).source == "table"
    assert load_policy({"preset": "lru"}).source == "table on lru"
    assert load_policy({"preset": "lru", "source": "run 7"}).source == "run 7"


@pytest.mark.parametrize("value", [*PRESETS, WHOLE, {"preset": "sjf", "kv": {}}])
def test_to_dict_makes_the_same_again(value):
    config = load_policy(value)
    table = json.loads(json.dumps(config.to_dict()))
    assert load_policy(table) == config
    table["source"] = "x"
    assert load_policy(table) != config


def test_resolved_policies_do_not_change_with_what_they_came_from():
    table = {**WHOLE, "predictor": {"name": "noisy-oracle", "rows": [[1, 2], [3, 4]]}}
    config = load_policy(table)
    table["predictor"]["rows"][0][0] = 99
    config.to_dict()["predictor"]["rows"][0][0] = 98
    assert config.predictor.options["rows"] == [[1, 2], [3, 4]]
    with pytest.raises(TypeError):
        config.predictor.options["rows"] = 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.max_squashes = 0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("chamelon", r"^policy='chamelon' is no preset; did you mean 'chameleon'\?"),
        ("zzz", "^policy='zzz' is no preset; presets are adaptive, .*, vtc; or give"),
        ("", "^policy='' is no preset"),
        ("../policies/lru", "is no preset"),
        ("no/such.toml", "cannot read config 'no/such.toml'"),
        ({"preset": "chamelion"}, "preset='chamelion' is no preset; did you mean 'cha"),
        ({"preset": "own.toml"}, "preset='own.toml' is no preset"),
        ({"preset": 3}, "preset=3 must be a string"),
        ({"preset": "lru", "source": ""}, "source='' must be a string"),
        (
            {"preset": "lru", "evictoin": {}},
            r"^policy table on lru: unknown section 'evictoin'; did you mean 'evic",
        ),
        ({"preset": "lru", 4: {}}, "unknown section 4; known are preset"),
        ({"preset": "lru", "eviction": "gdsf"}, "eviction='gdsf' must be a table"),
        ({"preset": "lru", "kv": 1}, "kv=1 must be a table"),
        (
            {"preset": "lru", "kv": {"reserved": "x"}},
            "kv has no key 'reserved'; did you",
        ),
        ({"preset": "lru", "kv": {"reserve": "all"}}, "kv.reserve='all' must be 'pred"),
        ({"preset": "lru", "kv": {"reserve": []}}, r"kv.reserve=\[\] must be"),
        ({"preset": "lru", "kv": {"max_squashes": -1}}, "kv.max_squashes=-1 must be"),
        ({"preset": "lru", "kv": {"max_squashes": True}}, "kv.max_squashes=True"),
        ({"preset": "lru", "kv": {"max_squashes": 1.0}}, "kv.max_squashes=1.0"),
        (
            {"preset": "lru", "eviction": {"name": 5}},
            "eviction.name=5 must be the name",
        ),
        ({"preset": "lru", "eviction": {5: 5}}, "eviction has the key 5, no string"),
        ({**WHOLE, "eviction": {}}, "eviction.name=None must be the name"),
        ({}, "table: admission, eviction, predictor, prefetch must be there"),
    ],
)
def test_wrong_table_is_a_config_error(value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_policy(value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"eviction": {"name": "lur"}},
            "^policy table on lru: eviction='lur' is no po",
        ),
        (
            {"eviction": {"wieght": 1}},
            "^policy table on lru: eviction='lru' has no opt",
        ),
        ({"admission": {"slo": 1}}, "no option 'slo'; did you mean 'slo_s'"),
        ({"admission": {"slo_s": 0}}, "admission='chameleon': slo_s=0"),
        ({"prefetch": {"name": "no_such_module:X"}}, "cannot import 'no_such_module'"),
    ],
)
def test_policy_that_cannot_be_built_names_where_it_stands(section, message):
    config = load_policy({"preset": "lru", **section})
    with pytest.raises(ConfigError, match=message):
        build_policies(config)


def test_config_refuses_values_whoever_builds_it():
    specs = {kind: PolicySpec(name="x") for kind in POLICY_KINDS}
    with pytest.raises(ConfigError, match="policy mine: kv.max_squashes='2'"):
        PolicyConfig(source="mine", **specs, max_squashes="2")
