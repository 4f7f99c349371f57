"""Policies by name."""

import sys
import types

import pytest

from jchameleon.errors import ConfigError
from jchameleon.runtime.policy.admission import Fifo
from jchameleon.runtime.policy.eviction import Lru
from jchameleon.runtime.policy.predictor import MaxTokens
from jchameleon.runtime.policy.prefetch import NoPrefetch
from jchameleon.runtime.policy.registry import (
    POLICY_KINDS,
    create_policy,
    policy_class,
    policy_names,
)
from jchameleon.runtime.policy.request import Request


@pytest.fixture
def own_policies(monkeypatch):
    """A module on the import path, as a user would have one."""
    module = types.ModuleType("own_policies")
    module.ConfigError = ConfigError
    exec(
        "class Good:\n"
        "    def score(self, table): return table.last_used_s\n"
        "class Lacking:\n"
        "    score = None\n"
        "class HalfPredictor:\n"
        "    def predict(self, request): return 1\n"
        "class Tuned(Good):\n"
        "    def __init__(self, *, half_life_s, weight=1.0):\n"
        "        self.options = (half_life_s, weight)\n"
        "        if half_life_s == 'odd': raise KeyError('two\\nlines')\n"
        "        if half_life_s <= 0:\n"
        "            raise ConfigError(f'half_life_s={half_life_s} must be positive')\n"
        "class Open(Good):\n"
        "    def __init__(self, **options): self.options = options\n"
        "class Opaque(Good, dict):\n"
        "    __signature__ = 'none'\n"
        "def function(table): return table.last_used_s\n",
        module.__dict__,
    )
    monkeypatch.setitem(sys.modules, "own_policies", module)
    return module


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("admission", "fifo", Fifo),
        ("eviction", "lru", Lru),
        ("predictor", "max_tokens", MaxTokens),
        ("prefetch", "none", NoPrefetch),
    ],
)
def test_short_name_gives_shipped_class(kind, name, expected):
    assert policy_class(kind, name) is expected
    assert type(create_policy(kind, name)) is expected
    assert name in policy_names(kind)


def test_import_path_gives_own_class(own_policies):
    assert policy_class("eviction", "own_policies:Good") is own_policies.Good
    assert isinstance(create_policy("eviction", "own_policies:Good"), own_policies.Good)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        (
            "admission",
            "fif",
            "admission='fif' is no policy; did you mean 'fifo'.; known are chameleon,",
        ),
        ("eviction", "", "eviction='' is no policy; known are chameleon, drop"),
        ("eviction", "own_policies:Lacking", r"lacks the method score\(\)"),
        ("predictor", "own_policies:HalfPredictor", r"lacks the method observe\(\)"),
        ("admission", "own_policies:Good", r"lacks the method admit\(\)"),
        ("prefetch", "own_policies:Good", r"lacks the method candidates\(\)"),
        ("eviction", "own_policies:function", "must be a class, not"),
        ("eviction", "own_policies:Absent", "module 'own_policies' has no 'Absent'"),
        ("eviction", "no_such_module_x:Y", "cannot import 'no_such_module_x'"),
        ("eviction", ":Y", "cannot import ''"),
        ("eviction", "own_policies:", "module 'own_policies' has no ''"),
    ],
)
def test_bad_name_is_a_config_error(own_policies, kind, name, message):
    with pytest.raises(ConfigError, match=message) as caught:
        policy_class(kind, name)
    assert "\n" not in str(caught.value)


def test_every_short_name_is_a_class_of_its_protocol():
    for kind in POLICY_KINDS:
        for name in policy_names(kind):
            found = policy_class(kind, name)
            assert found.__module__.startswith("jchameleon.runtime.policy.")
            assert found is policy_class(kind, name)


def test_short_names_are_those_of_the_documentation():
    assert {kind: policy_names(kind) for kind in POLICY_KINDS} == {
        "admission": ["chameleon", "fifo", "paced", "s-lora", "sjf", "vtc"],
        "eviction": ["chameleon", "drop", "fairshare", "gdsf", "lru"],
        "predictor": ["max_tokens", "noisy-oracle", "oracle", "quantile"],
        "prefetch": ["histogram", "none", "queued"],
    }


def test_options_reach_the_constructor(own_policies):
    one = create_policy("eviction", "own_policies:Tuned", {"half_life_s": 3})
    assert one.options == (3, 1.0)
    two = create_policy(
        "eviction", "own_policies:Tuned", {"weight": 0.5, "half_life_s": 4}
    )
    assert two.options == (4, 0.5)


def test_constructor_that_takes_anything_gets_every_option(own_policies):
    options = {"anything": 1, "half_live_s": 2}
    built = create_policy("eviction", "own_policies:Open", options)
    assert built.options == options


def test_constructor_without_a_signature_is_called_all_the_same(own_policies):
    built = create_policy("eviction", "own_policies:Opaque", {"x": 1})
    assert built == {"x": 1}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "own_policies:Tuned",
            {"half_live_s": 3},
            r"^eviction='own_policies:Tuned' has no option 'half_live_s'; did you mean "
            r"'half_life_s'\?; options are half_life_s, weight$",
        ),
        ("own_policies:Tuned", {"zzz": 3}, "no option 'zzz'; options are half_life_s"),
        ("own_policies:Good", {"x": 3}, "no option 'x'; it has none$"),
        ("lru", {"frequency": 3}, "^eviction='lru' has no option 'frequency'"),
        (
            "own_policies:Tuned",
            {"weight": 2},
            "^eviction='own_policies:Tuned' needs the option 'half_life_s'$",
        ),
        (
            "own_policies:Tuned",
            {"half_life_s": -1},
            "^eviction='own_policies:Tuned': half_life_s=-1 must be positive$",
        ),
        (
            "own_policies:Tuned",
            {"half_life_s": "odd"},
            "^eviction='own_policies:Tuned' cannot be built: 'two",
        ),
        (
            "own_policies:Tuned",
            {"half_life_s": None},
            "^eviction='own_policies:Tuned' cannot be built: '<=' not supported",
        ),
    ],
)
def test_wrong_option_is_a_config_error(own_policies, name, options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        create_policy("eviction", name, options)
    assert "\n" not in str(caught.value)


def test_max_tokens_predicts_the_limit():
    request = Request(request_id="r", prompt_tokens=3, max_tokens=7)
    predictor = MaxTokens()
    predictor.observe(request, 2)
    assert predictor.predict(request) == 7
