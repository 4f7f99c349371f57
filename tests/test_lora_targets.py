"""The modules that an adapter's rules select, against PEFT's own choice."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft_files import LISTED_NAMES, MODEL

from jchameleon.errors import AdapterError
from jchameleon.lora.patterns import MatchBudget
from jchameleon.lora.targets import (
    TargetRules,
    linear_modules,
    module_names,
    select_modules,
)

pytest_plugins = ["peft_fixtures"]

NAMES = st.sampled_from(LISTED_NAMES)
PATTERNS = st.sampled_from(
    [
        r".*_proj",
        r".*\.(q|k|up)_proj",
        r"model\.layers\.[01]\..*proj",
        r"q_proj",
        r".*\.1\.(mlp|self_attn)\.[a-p].*_proj",
        r"(?!.*mlp).*\.\d\..*_proj",
        r".*",
    ]
)
LAYERS = st.none() | st.integers(0, 2) | st.lists(st.integers(0, 2), max_size=3)
LAYERS_PATTERNS = st.lists(
    st.sampled_from(["layers", "model.layers", "layer", "x|layers", "mod.*"]),
    max_size=2,
)


def test_module_names_are_those_of_the_real_model(oracle):
    model = oracle.base()
    found = {name for name, _ in model.named_modules() if name}
    assert sorted(module_names(MODEL)) == sorted(found)
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, oracle.torch.nn.Linear)
    }
    assert set(linear_modules(MODEL)) == linear - {"lm_head"}
    shapes = dict(model.named_parameters())
    for name, (_, projection) in linear_modules(MODEL).items():
        d_in, d_out = MODEL.projection_shape(projection)
        assert shapes[f"{name}.weight"].shape == (d_out, d_in)


def test_long_target_list_with_layers_is_refused_where_peft_is_ambiguous():
    names = [name for name in linear_modules(MODEL)]
    assert len(names) == 21
    budget = MatchBudget()
    rules = TargetRules(target_modules=tuple(names), layers_to_transform=(0, 1))
    with pytest.raises(AdapterError, match="layers.2.*among 21 entries"):
        select_modules(rules, MODEL, budget=budget)
    rules = TargetRules(target_modules=tuple(names[:19]), layers_to_transform=(0,))
    assert select_modules(rules, MODEL, budget=budget) == names[:19]


@settings(max_examples=400)
@given(
    targets=st.lists(NAMES, min_size=1, max_size=4) | PATTERNS,
    exclude=st.lists(NAMES, max_size=2) | PATTERNS | st.none(),
    layers=LAYERS,
    layers_pattern=LAYERS_PATTERNS,
)
@example(targets=["mlp.up_proj"], exclude=None, layers=0, layers_pattern=["x|layers"])
def test_select_modules_any_rules_agree_with_peft(
    oracle, targets, exclude, layers, layers_pattern
):
    if isinstance(targets, str):
        layers, layers_pattern = None, []
    if layers is None:
        layers_pattern = []
    config = oracle.peft.LoraConfig(
        target_modules=targets,
        exclude_modules=exclude,
        layers_to_transform=layers,
        layers_pattern=layers_pattern or None,
    )
    check = oracle.peft.tuners.tuners_utils.check_target_module_exists
    expected = {name for name in module_names(MODEL) if check(config, name)}
    rules = TargetRules(
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        exclude_modules=exclude if isinstance(exclude, str) else tuple(exclude or ()),
        layers_to_transform=tuple(layers) if isinstance(layers, list) else layers,
        layers_pattern=tuple(layers_pattern),
    )
    try:
        found = select_modules(rules, MODEL, budget=MatchBudget())
    except AdapterError as error:
        foreign = expected - set(linear_modules(MODEL))
        absent = isinstance(targets, list) and "proj" in targets
        assert not expected or foreign or absent, error
        return
    assert set(found) == expected
    assert len(found) == len(expected)
