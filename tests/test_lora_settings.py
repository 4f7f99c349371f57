"""Adapter configs: what is refused by name, and what changes nothing."""

import pytest
from peft_files import Q0, load, make_config, write_adapter

from jchameleon.errors import AdapterError
from jchameleon.lora.settings import (
    HONOURED,
    INFORMATIONAL,
    PEFT_DEFAULTS,
    TASK_TYPES,
    parse_config,
)
from jchameleon.lora.targets import DEFAULT_TARGETS

pytest_plugins = ["peft_fixtures"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
        ({"peft_type": None}, "peft_type=None"),
        ({"task_type": "PAINTING"}, "task_type='PAINTING'"),
        ({"r": 0}, "r=0 must be a positive integer"),
        ({"r": -8}, "r=-8 must be a positive integer"),
        ({"r": 8.0}, "r=8.0 must be a positive integer"),
        ({"r": True}, "r=True must be a positive integer"),
        ({"r": "8"}, "r='8' must be a positive integer"),
        ({"r": None}, "r=None must be a positive integer"),
        ({"r": 65}, f"r=65 of {Q0} exceeds max_rank=64"),
        ({"rank_pattern": {"v_proj": 0}}, r"rank_pattern\['v_proj'\]=0 must be"),
        ({"rank_pattern": {"v_proj": 99}}, r"r=99 of .*v_proj exceeds max_rank=64"),
        ({"rank_pattern": []}, r"rank_pattern=\[\] must be an object"),
        ({"rank_pattern": {"(": 4}}, "key of rank_pattern: regular expression"),
        ({"lora_alpha": "16"}, "lora_alpha='16' must be a finite number"),
        ({"lora_alpha": None}, "lora_alpha=None must be a finite number"),
        ({"lora_alpha": False}, "lora_alpha=False must be a finite number"),
        ({"lora_alpha": 10**400}, "lora_alpha=1000.* must be a finite number"),
        ({"lora_alpha": 1e40}, f"lora_alpha=1e.40 of {Q0} is too large at r=4"),
        ({"alpha_pattern": {"q_proj": "x"}}, r"alpha_pattern\['q_proj'\]='x' must"),
        ({"alpha_pattern": {"(a+)+": 1}}, "key of alpha_pattern: regular expression"),
        ({"use_rslora": 1}, "use_rslora=1 must be true or false"),
        ({"fan_in_fan_out": "no"}, "fan_in_fan_out='no' must be true or false"),
        ({"lora_dropout": 2.0}, "lora_dropout=2.0 must be from 0 to 1"),
        ({"lora_dropout": "x"}, "lora_dropout='x' must be a finite number"),
        *(
            ({"init_lora_weights": name}, f"init_lora_weights='{name}' must be")
            for name in ("pissa", "pissa_niter_4", "olora", "loftq", "corda", "eva")
        ),
        ({"init_lora_weights": "mica"}, "init_lora_weights='mica' must be"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights='lora_ga' must be"),
        ({"init_lora_weights": 1}, "init_lora_weights=1 must be"),
        (
            {"init_lora_weights": "orthogonal", "rank_pattern": {"v_proj": 3}},
            r"r=3 of model.layers.0.self_attn.v_proj must be even",
        ),
        ({"target_modules": []}, r"target_modules=\(\) selects no module"),
        ({"target_modules": 5}, "target_modules=5 must be"),
        ({"target_modules": ["q_proj", 5]}, r"target_modules=\['q_proj', 5\] must be"),
        ({"target_modules": ["q_proj", "w_proj"]}, "'w_proj', which matches no module"),
        ({"target_modules": ["roj"]}, "'roj', which matches no module"),
        ({"target_modules": ["q_proj", ""]}, "'', which matches no module"),
        (
            {"target_modules": ["model.layers.3.self_attn.q_proj"]},
            "q_proj', which matches no module of a model with 3 layers",
        ),
        ({"target_modules": "nothing"}, "target_modules='nothing' selects no module"),
        ({"target_modules": "q_proj"}, "target_modules='q_proj' selects no module"),
        ({"target_modules": "(q_proj"}, "target_modules: regular expression"),
        ({"target_modules": "(.*)*q_proj"}, r"target_modules: .* repeated group"),
        ({"target_modules": ["lm_head"]}, "selects 'lm_head', which is none of"),
        ({"target_modules": ["embed_tokens"]}, "selects 'model.embed_tokens'"),
        ({"target_modules": ["norm", "q_proj"]}, "selects 'model.norm'"),
        ({"target_modules": ".*self_attn.*"}, "selects 'model.layers.0.self_attn'"),
        ({"exclude_modules": ["q_proj", "v_proj"]}, "selects no module"),
        ({"exclude_modules": ".*"}, "selects no module"),
        ({"exclude_modules": {}}, "exclude_modules={} must be"),
        ({"exclude_modules": "["}, "exclude_modules: regular expression '"),
        ({"layers_to_transform": [0, 3]}, "layers_to_transform has 3, .* 0 to 2"),
        ({"layers_to_transform": -1}, "layers_to_transform has -1"),
        ({"layers_to_transform": "0"}, "layers_to_transform='0' must be"),
        ({"layers_to_transform": [0.0]}, r"layers_to_transform=\[0.0\] must be"),
        ({"layers_to_transform": True}, "layers_to_transform=True must be"),
        ({"layers_pattern": "layers"}, "layers_pattern='layers' needs"),
        (
            {"layers_pattern": "blocks", "layers_to_transform": 0},
            "selects no module",
        ),
        (
            {"layers_pattern": "(", "layers_to_transform": 0},
            "layers_pattern: regular expression",
        ),
        ({"layers_pattern": [1], "layers_to_transform": 0}, r"layers_pattern=\[1\]"),
        (
            {"target_modules": "all-linear", "layers_to_transform": [0]},
            "layers_to_transform cannot go with target_modules='all-linear'",
        ),
        (
            {"target_modules": ".*q_proj", "layers_pattern": "layers"},
            "layers_pattern cannot go with target_modules='.*q_proj'",
        ),
        ({"bias": "all"}, "bias='all' is not supported, must be 'none'"),
        ({"bias": "lora_only"}, "bias='lora_only' is not supported"),
        ({"bias": None}, "bias=None is not supported"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices=\[1\] is not"),
        ({"trainable_token_indices": {"e": [1]}}, "trainable_token_indices={'e'"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication=\[\[0, 2\]\] is not"),
        ({"target_parameters": ["x"]}, r"target_parameters=\['x'\] is not"),
        ({"alora_invocation_tokens": [5]}, r"alora_invocation_tokens=\[5\] is not"),
        ({"use_qalora": True}, "use_qalora=True is not supported"),
        ({"qalora_group_size": 32}, "qalora_group_size=32 .* must be 16 or absent"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying=True is not supported"),
        ({"megatron_config": {"a": 1}}, "megatron_config={'a': 1} is not supported"),
        ({"megatron_core": "mine"}, "megatron_core='mine' is not supported"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config={'loftq_bits': 4} is"),
        *(
            # An empty object switches each of these on.
            ({key: {}}, f"{key}={{}} is not supported")
            for key in (
                "arrow_config",
                "corda_config",
                "eva_config",
                "kasa_config",
                "lora_ga_config",
                "monteclora_config",
                "use_bdlora",
                "velora_config",
            )
        ),
        ({"future_key": 1}, "unknown key 'future_key'=1 is set"),
        ({"future_key": 0}, "unknown key 'future_key'=0 is set"),
        ({"future_key": [None]}, r"unknown key 'future_key'=\[None\] is set"),
        ({"bad\nkey": "x" * 1000}, r"unknown key 'bad\\nkey'='xxx.*\.\.\. is set"),
    ],
)
def test_load_unsupported_config_is_refused_by_name(tmp_path, changes, message):
    write_adapter(tmp_path, config=make_config(**changes))
    with pytest.raises(AdapterError, match=message) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"future_key": None},
        {"future_key": False},
        {"future_key": ""},
        {"future_key": []},
        {"future_key": {}},
        {"task_type": "CAUSAL_LM", "inference_mode": True, "revision": "main"},
        {"auto_mapping": {"base_model_class": "X"}, "peft_version": "9.9"},
        {"base_model_name_or_path": "some/model", "lora_dropout": 0.1},
        {"runtime_config": {"ephemeral_gpu_offload": False}},
        {"bias": "none", "modules_to_save": [], "target_parameters": []},
        {"use_dora": None, "loftq_config": None, "rank_pattern": None},
        {"megatron_core": "megatron.core", "megatron_config": None},
        {"init_lora_weights": False},
        {"init_lora_weights": "Gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"fan_in_fan_out": True},
        {"target_modules": None},
        {"layers_to_transform": []},
        {"layers_to_transform": [0, 1, 2], "layers_pattern": "layers"},
        {"exclude_modules": []},
        {"exclude_modules": ""},
        {"rank_pattern": {"nothing": 3}, "alpha_pattern": {"nothing": 3}},
    ],
)
def test_load_config_without_effect_gives_the_plain_adapter(tmp_path, changes):
    plain = load(write_adapter(tmp_path / "plain"))
    folder = write_adapter(tmp_path / "changed", config=make_config(**changes))
    assert load(folder).uid == plain.uid


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "adapter_config.json is not valid JSON"),
        (b"[1]", "adapter_config.json must hold a JSON object"),
        (b"\xff{}", "adapter_config.json is not valid JSON"),
        (b'{"r": 4, "r": 8}', "duplicate key 'r'"),
        (b'{"rank_pattern": {"q": 4, "q": 8}}', "duplicate key 'q'"),
        (b'{"lora_alpha": NaN}', "NaN is not a JSON number"),
        (b'{"lora_alpha": Infinity}', "Infinity is not a JSON number"),
        (b'{"peft_type": "LORA", "lora_alpha": 1e999}', "lora_alpha=inf must be"),
        (b'{"a":' + b"[" * 200_000, "nested too deeply"),
        (b'{"a": "' + b"x" * 1_000_000, "has 1000007 bytes, limit is 1000000"),
    ],
)
def test_load_malformed_config_file_is_refused(tmp_path, text, message):
    write_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(text)
    with pytest.raises(AdapterError, match=message):
        load(tmp_path)


def test_defaults_are_those_of_the_installed_peft(oracle):
    found = oracle.peft.LoraConfig().to_dict()
    found["peft_version"] = None
    found["peft_type"] = found["peft_type"].value
    assert found == PEFT_DEFAULTS
    for key, value in found.items():
        assert type(value) is type(PEFT_DEFAULTS[key])
    assert HONOURED <= set(PEFT_DEFAULTS)
    assert INFORMATIONAL - {"runtime_config"} <= set(PEFT_DEFAULTS)
    parse_config(found)
    assert set(TASK_TYPES) == {task.value for task in oracle.peft.TaskType}
    constants = oracle.peft.utils.constants
    mapping = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert tuple(mapping["llama"]) == DEFAULT_TARGETS
