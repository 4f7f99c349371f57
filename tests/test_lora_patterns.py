"""Regular expressions of adapter files: none runs for ever, the rest mean PEFT's."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft_files import LISTED_NAMES, MODEL, Q0

from jchameleon.errors import AdapterError
from jchameleon.lora.patterns import MatchBudget, PatternTable, compile_pattern
from jchameleon.lora.targets import TargetRules, linear_modules, select_modules

pytest_plugins = ["peft_fixtures"]


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+",
        "(a*)*b",
        "(?:.*)*x",
        "(.+.+)+x",
        "(x|x)*y",
        "((a?)b){2,}",
        "(?P<n>.*)+",
        "(a{1,9}){1,9}z",
        ".*" * 9 + "x",
        ".?" * 40 + "x",
        "(.|.)" * 40 + "x",
        "( a+ )(?x) +",
        "(?x:(a+) +)",
        "(?#[)(a+)+",
        "[(](a+)+",
        r"\((a+)+",
        "(" * 2000 + ")" * 2000,
    ],
)
def test_compile_pattern_that_could_run_for_ever_is_refused(pattern):
    start_s = time.thread_time()
    with pytest.raises(AdapterError, match="field: regular expression"):
        compile_pattern("field", pattern)
    assert time.thread_time() - start_s < 0.5


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        (r".*\.(q_proj|k_proj|v_proj|o_proj)", Q0),
        (r"model\.layers\.(?:[0-9]|1[0-9]|2[0-9])\.self_attn\.(q|k|v|o)_proj", Q0),
        (r"^(?!.*vision)(?=.*self_attn).*?(?:q|v)_proj$", Q0),
        (r"(?:.*?(?:language|text).*?(?:attn|mlp).*?(?:q|k|v)_proj.*?)|(.*q_proj)", Q0),
        (r"model\.layers\.\d{1,3}\.[a-z_]+\.[^(]+_proj", Q0),
        ("|".join(rf".*\.{i}\..*\.q_proj" for i in range(80)), Q0),
    ],
)
def test_compile_pattern_in_common_use_is_accepted(pattern, name):
    assert compile_pattern("field", pattern).fullmatch(name)


def test_match_budget_stops_slow_patterns():
    budget = MatchBudget(0.0)
    with pytest.raises(AdapterError, match="r: matching patterns took more than 0.0 s"):
        while True:
            budget.check("r")
    rules = TargetRules(target_modules=".*q_proj")
    with pytest.raises(AdapterError, match="target_modules: matching patterns"):
        select_modules(rules, MODEL, budget=budget)
    with pytest.raises(AdapterError, match="rank_pattern: matching patterns"):
        PatternTable("rank_pattern", {"a": 1}, budget=budget)


@given(
    st.lists(
        st.sampled_from(LISTED_NAMES)
        | st.sampled_from([r"layers\.\d", "q.proj", "_proj", ".*", "(q|v)_proj|mlp"]),
        max_size=4,
        unique=True,
    ),
    st.sampled_from(sorted(linear_modules(MODEL))),
)
def test_pattern_table_any_keys_agree_with_peft(oracle, keys, name):
    table = {key: float(index) for index, key in enumerate(keys)}
    expected = table.get(oracle.peft.utils.other.get_pattern_key(keys, name), -1.0)
    found = PatternTable("rank_pattern", table, budget=MatchBudget())
    assert found.get(name, -1.0) == expected
