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
    create_policy,
    policy_class,
    policy_names,
)
from jchameleon.runtime.policy.request import Request


@pytest.fixture
def own_policies(monkeypatch):
    """A module on the import path, as a user would have one."""
    module = types.ModuleType("own_policies")
    exec(
        "class Good:\n"
        "    def score(self, table): return table.last_used_s\n"
        "class Lacking:\n"
        "    score = None\n"
        "class HalfPredictor:\n"
        "    def predict(self, request): return 1\n"
        "class Demanding(Good):\n"
        "    def __init__(self, weight): self.weight = weight\n"
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
        ("admission", "fif", "admission='fif' is no policy; known are fifo"),
        ("eviction", "", "eviction='' is no policy; known are lru"),
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


def test_constructor_that_refuses_is_a_config_error(own_policies):
    with pytest.raises(ConfigError, match="'own_policies:Demanding' cannot be built"):
        create_policy("eviction", "own_policies:Demanding")


def test_max_tokens_predicts_the_limit():
    request = Request(request_id="r", prompt_tokens=3, max_tokens=7)
    predictor = MaxTokens()
    predictor.observe(request, 2)
    assert predictor.predict(request) == 7
