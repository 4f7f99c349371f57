"""PEFT directories: what is refused, and that the rest means what PEFT reads."""

import contextlib
import json
import math
import os
import pickle
import subprocess
import sys
import time
import types
import warnings

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jchameleon.config import PROJECTIONS, ModelConfig
from jchameleon.errors import AdapterError
from jchameleon.lora import load_peft_adapter
from jchameleon.lora.patterns import MatchBudget, PatternTable, compile_pattern
from jchameleon.lora.settings import (
    HONOURED,
    INFORMATIONAL,
    PEFT_DEFAULTS,
    TASK_TYPES,
    parse_config,
)
from jchameleon.lora.targets import (
    DEFAULT_TARGETS,
    TargetRules,
    linear_modules,
    module_names,
    select_modules,
)

MODEL = ModelConfig(
    name="small",
    vocab_size=64,
    hidden_size=48,
    intermediate_size=80,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
)
PREFIX = "base_model.model."
Q0 = "model.layers.0.self_attn.q_proj"


# Files made by hand.


def write_safetensors(path, tensors):
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
    header, at = {}, 0
    for name, value in tensors.items():
        header[name] = {
            "dtype": names[value.dtype.name],
            "shape": list(value.shape),
            "data_offsets": [at, at + value.nbytes],
        }
        at += value.nbytes
    text = json.dumps(header).encode()
    data = b"".join(value.tobytes() for value in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def make_tensors(projections=("q", "v"), *, rank=4, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, (_, projection) in linear_modules(MODEL).items():
        if projection in projections:
            d_in, d_out = MODEL.projection_shape(projection)
            a = rng.standard_normal((rank, d_in)).astype(dtype)
            b = rng.standard_normal((d_out, rank)).astype(dtype)
            tensors[f"{PREFIX}{name}.lora_A.weight"] = a
            tensors[f"{PREFIX}{name}.lora_B.weight"] = b
    return tensors


def make_config(**changes):
    return {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
        **changes,
    }


def write_adapter(folder, *, config=None, tensors=None):
    folder.mkdir(exist_ok=True)
    text = json.dumps(make_config() if config is None else config)
    (folder / "adapter_config.json").write_text(text)
    write_safetensors(
        folder / "adapter_model.safetensors",
        make_tensors() if tensors is None else tensors,
    )
    return folder


def load(folder, *, max_rank=64):
    return load_peft_adapter(folder, MODEL, max_rank=max_rank)


def test_load_plain_adapter_returns_its_factors_and_scale(tmp_path):
    tensors = make_tensors()
    adapter = load(write_adapter(tmp_path, tensors=tensors))
    assert adapter.rank == 4
    assert adapter.targets == {"q", "v"}
    assert list(adapter.modules) == [(i, p) for i in range(3) for p in ("q", "v")]
    assert adapter.num_bytes == sum(value.nbytes for value in tensors.values())
    assert adapter.source == str(tmp_path)
    for name, key in linear_modules(MODEL).items():
        if key in adapter.modules:
            pair = adapter.modules[key]
            assert pair.scale == 4.0
            a = tensors[f"{PREFIX}{name}.lora_A.weight"]
            np.testing.assert_array_equal(pair.a, a)
            b = tensors[f"{PREFIX}{name}.lora_B.weight"]
            np.testing.assert_array_equal(pair.b, b)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_load_keeps_the_dtype_of_the_file(tmp_path, dtype):
    adapter = load(write_adapter(tmp_path, tensors=make_tensors(dtype=dtype)))
    for pair in adapter.modules.values():
        assert pair.a.dtype == pair.b.dtype == dtype


def test_load_absent_r_and_alpha_take_the_defaults(tmp_path):
    config = make_config()
    del config["r"], config["lora_alpha"]
    adapter = load(write_adapter(tmp_path, config=config, tensors=make_tensors(rank=8)))
    assert adapter.rank == 8
    assert {pair.scale for pair in adapter.modules.values()} == {1.0}


def test_load_real_sized_adapter_takes_well_under_100_ms(tmp_path):
    model = ModelConfig.preset("smollm2-135m")
    rng = np.random.default_rng(0)
    tensors = {}
    for name, (_, projection) in linear_modules(model).items():
        if projection in "qkvo":
            d_in, d_out = model.projection_shape(projection)
            for factor, shape in (("A", (8, d_in)), ("B", (d_out, 8))):
                value = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
                tensors[f"{PREFIX}{name}.lora_{factor}.weight"] = value
    config = make_config(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    # As some tools write them: one entry per module.
    config["alpha_pattern"] = {
        name: 32 for name, (_, p) in linear_modules(model).items() if p in "qkvo"
    }
    write_adapter(tmp_path, config=config, tensors=tensors)
    took_s = []
    for _ in range(3):
        start_s = time.thread_time()
        load_peft_adapter(tmp_path, model, max_rank=8)
        took_s.append(time.thread_time() - start_s)
    assert sum(value.nbytes for value in tensors.values()) == 1_843_200
    assert min(took_s) < 0.1


def test_uid_is_that_of_the_content(tmp_path):
    tensors = make_tensors()
    uid = load(write_adapter(tmp_path / "first", tensors=tensors)).uid
    assert len(uid) == 64
    again = write_adapter(
        tmp_path / "second",
        # Other words for the same thing, in another order.
        config=make_config(
            target_modules=r".*\.self_attn\.(v|q)_proj",
            rank_pattern={"q_proj": 4},
            r=4,
            lora_alpha=16.0,
            base_model_name_or_path="elsewhere",
        ),
        tensors=dict(reversed(tensors.items())),
    )
    assert load(again).uid == uid
    uids = {uid}
    for index, name in enumerate(tensors):
        changed = {key: value.copy() for key, value in tensors.items()}
        changed[name].view(np.uint8)[0, index] ^= 1
        uids.add(load(write_adapter(tmp_path / f"{index}", tensors=changed)).uid)
    other = make_config(lora_alpha=17)
    uids.add(load(write_adapter(tmp_path / "alpha", config=other)).uid)
    half = make_tensors(dtype=np.float16)
    uids.add(load(write_adapter(tmp_path / "half", tensors=half)).uid)
    assert len(uids) == 1 + len(tensors) + 2


# Refusals: configs.


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


def test_load_absent_files_are_refused_by_name(tmp_path):
    with pytest.raises(AdapterError, match="nowhere'.*no such directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match="no such directory|null"):
        load(tmp_path / "nul\0")
    with pytest.raises(AdapterError, match="no such directory|too long"):
        load(tmp_path / ("x" * 5000))
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="no such directory"):
        load(tmp_path / "file")
    write_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="read adapter_model.safetensors: No such"):
        load(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match="read adapter_config.json: No such file"):
        load(tmp_path)
    os.mkfifo(tmp_path / "adapter_config.json")
    with pytest.raises(AdapterError, match="adapter_config.json must be a regular"):
        load(tmp_path)


class Payload:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (open, (str(self.canary), "w"))


def test_load_pickle_only_is_refused_without_running_it(tmp_path):
    canary = tmp_path / "canary"
    write_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Payload(canary)))
    with pytest.raises(AdapterError, match="adapter_model.bin is a pickle"):
        load(tmp_path)
    assert not canary.exists()
    pickle.loads((tmp_path / "adapter_model.bin").read_bytes()).close()
    assert canary.exists(), "the payload would have run"


# Refusals: tensors.


def drop(name):
    return lambda tensors: tensors.pop(f"{PREFIX}{name}")


def put(name, shape, dtype=np.float32):
    return lambda tensors: tensors.update({name: np.ones(shape, dtype)})


def poke(name, value):
    def change(tensors):
        tensors[f"{PREFIX}{name}"][1, 2] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.clear(), "12 tensors of targeted modules are missing"),
        (drop(f"{Q0}.lora_A.weight"), f"1 tensors .* missing, .*{Q0}.lora_A.weight"),
        (drop(f"{Q0}.lora_B.weight"), f"1 tensors .* missing, .*{Q0}.lora_B.weight"),
        (
            put(f"{PREFIX}model.layers.1.self_attn.k_proj.lora_A.weight", (4, 48)),
            "not targeted .* 'model.layers.1.self_attn.k_proj'",
        ),
        (
            put(f"{PREFIX}model.layers.3.self_attn.q_proj.lora_A.weight", (4, 48)),
            "no projection of a model with 3 layers, .*layers.3.self_attn.q_proj",
        ),
        (
            put(f"{PREFIX}lm_head.lora_A.weight", (4, 48)),
            "no projection of a model with 3 layers, such as 'lm_head'",
        ),
        (
            put(f"{PREFIX}layers.0.self_attn.q_proj.lora_A.weight", (4, 48)),
            "no projection .* such as 'layers.0.self_attn.q_proj'",
        ),
        (put(f"{Q0}.lora_A.weight", (4, 48)), "tensor .*must be base_model.model"),
        (put(f"{PREFIX}{Q0}.weight", (48, 48)), "tensor .*must be base_model.model"),
        (put("x", (1,)), "tensor 'x' must be base_model.model"),
        (
            put(f"{PREFIX}{Q0}.lora_A.other.weight", (4, 48)),
            "lora_A.other.weight' must be base_model.model",
        ),
        (
            put(f"{PREFIX}{Q0}.lora_A.default.weight", (4, 48)),
            f"gives lora_A of '{Q0}' a second time",
        ),
        (
            put(f"{PREFIX}model.embed_tokens.lora_embedding_A", (4, 64)),
            "lora_embedding_A' adapts an embedding",
        ),
        (
            put(f"{PREFIX}{Q0}.lora_magnitude_vector", (48,)),
            "lora_magnitude_vector' belongs to DoRA",
        ),
        (put(f"{PREFIX}{Q0}.lora_B.bias", (48,)), "lora_B.bias' is a bias"),
        (
            put(f"{PREFIX}{Q0}.lora_A.weight", (5, 48)),
            rf"{Q0}.lora_A.weight has shape \(5, 48\), must be \(4, 48\)",
        ),
        (
            put(f"{PREFIX}{Q0}.lora_A.weight", (4, 47)),
            r"has shape \(4, 47\), must be \(4, 48\) \(rank=4, d_in=48\)",
        ),
        (
            put(f"{PREFIX}{Q0}.lora_B.weight", (4, 48)),
            r"lora_B.weight has shape \(4, 48\), must be \(48, 4\) \(d_out=48, rank=4",
        ),
        (put(f"{PREFIX}{Q0}.lora_A.weight", (4 * 48,)), r"has shape \(192,\)"),
        (put(f"{PREFIX}{Q0}.lora_A.weight", (0, 48)), r"has shape \(0, 48\)"),
        (
            put(f"{PREFIX}{Q0}.lora_A.weight", (4, 48), np.float64),
            "has dtype 'F64', must be one of F32, F16, BF16",
        ),
        (
            poke(f"{Q0}.lora_A.weight", np.nan),
            f"{Q0}.lora_A.weight has 1 NaN or Inf among 192 values",
        ),
        (
            poke(f"{Q0}.lora_B.weight", -np.inf),
            f"{Q0}.lora_B.weight has 1 NaN or Inf among 192 values",
        ),
        # The scale is 4.
        (
            poke(f"{Q0}.lora_B.weight", 1e38),
            f"{Q0}: .* B up to 1e.38 at scale=4 exceed",
        ),
        (poke(f"{Q0}.lora_A.weight", 3.4e38), f"{Q0}: A up to 3.4e.38"),
    ],
)
def test_load_tensors_that_do_not_fit_are_refused(tmp_path, change, message):
    tensors = make_tensors()
    change(tensors)
    write_adapter(tmp_path, tensors=tensors)
    with pytest.raises(AdapterError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_load_narrow_tensor_that_is_not_finite_is_refused(tmp_path, dtype, value):
    tensors = make_tensors(dtype=dtype)
    tensors[f"{PREFIX}{Q0}.lora_A.weight"][3, 47] = value
    write_adapter(tmp_path, tensors=tensors)
    with pytest.raises(AdapterError, match="has 1 NaN or Inf among 192 values"):
        load(tmp_path)


def test_load_largest_finite_values_are_accepted(tmp_path):
    tensors = make_tensors(dtype=np.float16)
    for value in tensors.values():
        value[0, 0], value[0, 1] = 65504, -65504
    load(write_adapter(tmp_path, tensors=tensors))


@pytest.mark.parametrize("length", [0, 7, 8, 100, 3000, -4, -1])
def test_load_half_written_file_is_refused_then_read_when_whole(tmp_path, length):
    write_adapter(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:length])
    with pytest.raises(AdapterError):
        load(tmp_path)
    path.write_bytes(whole)
    assert load(tmp_path).rank == 4


def test_load_file_larger_than_any_adapter_is_refused_unread(tmp_path):
    write_adapter(tmp_path)
    with (tmp_path / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(AdapterError, match=f"has {2**40} bytes, limit is"):
        load(tmp_path)


# Patterns.


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


def test_long_target_list_with_layers_is_refused_where_peft_is_ambiguous():
    names = [name for name in linear_modules(MODEL)]
    assert len(names) == 21
    budget = MatchBudget()
    rules = TargetRules(target_modules=tuple(names), layers_to_transform=(0, 1))
    with pytest.raises(AdapterError, match="layers.2.*among 21 entries"):
        select_modules(rules, MODEL, budget=budget)
    rules = TargetRules(target_modules=tuple(names[:19]), layers_to_transform=(0,))
    assert select_modules(rules, MODEL, budget=budget) == names[:19]


# PEFT itself as the oracle.


@contextlib.contextmanager
def quiet():
    """Let the oracle warn as it likes; what we raise is asserted on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def oracle():
    """torch, PEFT and a maker of small Llama models with fixed random weights."""
    reason = "oracle: Python 3.11 only"
    with quiet():
        torch = pytest.importorskip("torch", reason=reason)
        transformers = pytest.importorskip("transformers", reason=reason)
        peft = pytest.importorskip("peft", reason=reason)
        safetensors = pytest.importorskip("safetensors.torch", reason=reason)

    def base():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=MODEL.vocab_size,
            hidden_size=MODEL.hidden_size,
            intermediate_size=MODEL.intermediate_size,
            num_hidden_layers=MODEL.num_layers,
            num_attention_heads=MODEL.num_heads,
            num_key_value_heads=MODEL.num_kv_heads,
            head_dim=MODEL.head_dim,
        )
        return transformers.LlamaForCausalLM(config)

    return types.SimpleNamespace(
        torch=torch, peft=peft, safetensors=safetensors, base=base
    )


def save_random_adapter(oracle, folder, **config):
    """Train nothing: give every factor random values and save as PEFT saves."""
    with quiet():
        model = oracle.peft.get_peft_model(
            oracle.base(), oracle.peft.LoraConfig(**config)
        )
        generator = oracle.torch.Generator().manual_seed(1)
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.data.normal_(generator=generator)
        model.save_pretrained(folder)


def peft_deltas(oracle, folder):
    """Return {(layer, projection): delta weight} after loading `folder` with PEFT."""
    with quiet():
        model = oracle.peft.PeftModel.from_pretrained(oracle.base(), folder)
    linear = linear_modules(MODEL)
    return {
        linear[name.removeprefix(PREFIX)]: module.get_delta_weight("default")
        .detach()
        .numpy()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def assert_same_deltas(oracle, folder, *, max_rank=64):
    adapter = load(folder, max_rank=max_rank)
    expected = peft_deltas(oracle, folder)
    assert set(adapter.modules) == set(expected)
    for key, pair in adapter.modules.items():
        a, b = pair.a.astype(np.float32), pair.b.astype(np.float32)
        found = np.float32(pair.scale) * (b @ a)
        largest = np.abs(expected[key]).max()
        assert largest > 0.01
        np.testing.assert_allclose(found, expected[key], rtol=0, atol=1e-6 * largest)
    return adapter


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["o_proj"], "r": 1, "lora_alpha": 3},
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "r": 17},
        {"target_modules": "all-linear", "r": 64, "lora_alpha": 128},
        {"target_modules": r".*\.(gate|up)_proj", "lora_alpha": 0.5},
        {"target_modules": r"model\.layers\.[02]\.(mlp|self_attn)\..*_proj"},
        {"target_modules": ["self_attn.k_proj", "2.mlp.down_proj"]},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj", "1.mlp"]},
        {"target_modules": "all-linear", "exclude_modules": ["0.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*\.1\..*"},
        {"target_modules": ["q_proj"], "r": 17, "lora_alpha": 5, "use_rslora": True},
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "r": 8,
            "rank_pattern": {"down_proj": 2, r"layers\.1\..*": 17, "v_proj": 3},
            "alpha_pattern": {r"layers\.[01]\.mlp\.down_proj": 40, "proj": 99},
        },
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "lora_alpha": 12,
            "rank_pattern": {"model.layers.0.self_attn.q_proj": 1, "up_proj": 5},
            "alpha_pattern": {"q_proj": 2, ".*2.*": 7},
        },
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1},
        {
            "target_modules": ["up_proj"],
            "layers_to_transform": [1],
            "layers_pattern": ["blocks", "layers"],
        },
        {
            "target_modules": ["model.layers.2.mlp.up_proj", "q_proj"],
            "layers_to_transform": [0],
        },
        {"target_modules": ["q_proj"], "fan_in_fan_out": True},
        {"target_modules": ["k_proj"], "init_lora_weights": "gaussian"},
        {"target_modules": ["k_proj"], "init_lora_weights": "orthogonal"},
        {"target_modules": ["k_proj"], "init_lora_weights": False, "lora_dropout": 0.5},
        {"target_modules": ["k_proj"], "task_type": "CAUSAL_LM"},
        {"target_modules": None},
    ],
)
def test_load_computes_the_delta_weights_of_peft(oracle, tmp_path, config):
    save_random_adapter(oracle, tmp_path, **config)
    assert_same_deltas(oracle, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"fan_in_fan_out": True},
        {"target_modules": "all-linear"},
        {"target_modules": "ALL-Linear"},
        {"target_modules": r".*\.[a-z]+_proj"},
        {"layers_to_transform": [], "layers_pattern": ""},
        {"use_rslora": True},
        {"lora_alpha": -2.5},
        # Both match: the order in the file decides, and PEFT itself sorts on saving.
        {"alpha_pattern": {"self_attn.q_proj": 3, "q_proj": 4, "k.proj": 5}},
        {"alpha_pattern": {"q_proj": 4, "self_attn.q_proj": 3, "k|q_proj": 6}},
        {"alpha_pattern": {r"layers\.1": 4, r".*\.1\..*": 3, r"a)|(model.*": 6}},
        {"loftq_config": None, "modules_to_save": [], "runtime_config": {}},
        {"future_key": None, "exclude_modules": ["lm_head"]},
    ],
)
def test_load_edited_config_means_what_peft_reads(oracle, tmp_path, changes):
    save_random_adapter(oracle, tmp_path, r=6, target_modules="all-linear")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert_same_deltas(oracle, tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_load_narrow_file_computes_the_delta_weights_of_peft(oracle, tmp_path, dtype):
    save_random_adapter(oracle, tmp_path, r=5, target_modules="all-linear")
    path = tmp_path / "adapter_model.safetensors"
    tensors = oracle.safetensors.load_file(path)
    narrow = {k: v.to(getattr(oracle.torch, dtype)) for k, v in tensors.items()}
    oracle.safetensors.save_file(narrow, path)
    adapter = assert_same_deltas(oracle, tmp_path)
    assert {pair.a.dtype.name for pair in adapter.modules.values()} == {dtype}


def test_load_keys_with_the_adapter_name_load_as_in_peft(oracle, tmp_path):
    save_random_adapter(oracle, tmp_path, target_modules=["q_proj", "up_proj"])
    plain = load(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = oracle.safetensors.load_file(path)
    named = {k.replace(".weight", ".default.weight"): v for k, v in tensors.items()}
    oracle.safetensors.save_file(named, path)
    assert assert_same_deltas(oracle, tmp_path).uid == plain.uid


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


NAMES = st.sampled_from(
    [
        "q_proj",
        "down_proj",
        "self_attn.v_proj",
        "0.mlp.up_proj",
        "layers.1.self_attn.o_proj",
        "model.layers.2.mlp.gate_proj",
        "model.layers.0.self_attn.q_proj",
        "mlp",
        "lm_head",
        "proj",
    ]
)
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


@given(
    st.lists(
        NAMES
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


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["norm"]},
        {"target_modules": ".*self_attn"},
        {"target_modules": "nothing"},
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "r": 0},
        {"target_modules": "all-linear", "layers_to_transform": [0]},
        {"target_modules": ["q_proj"], "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal", "r": 3},
        {"target_modules": ["q_proj"], "init_lora_weights": "Orthogonal"},
        {"target_modules": ["q_proj"], "rank_pattern": {"(?i)q": 2}},
    ],
)
def test_what_peft_itself_refuses_is_refused(oracle, tmp_path, config):
    with quiet(), pytest.raises(Exception):  # noqa: B017 - of many types
        oracle.peft.get_peft_model(oracle.base(), oracle.peft.LoraConfig(**config))
    write_adapter(tmp_path, config=make_config(**config))
    with pytest.raises(AdapterError):
        load(tmp_path)


def test_rslora_scale_is_alpha_over_root_of_the_modules_own_rank(tmp_path):
    tensors = make_tensors(("q",), rank=4)
    tensors |= make_tensors(("v",), rank=9)
    config = make_config(use_rslora=True, rank_pattern={"v_proj": 9})
    adapter = load(write_adapter(tmp_path, config=config, tensors=tensors))
    assert adapter.modules[0, "q"].scale == 16 / 2
    assert adapter.modules[0, "v"].scale == 16 / 3
    assert math.isclose(adapter.modules[2, "v"].scale, 16 / math.sqrt(9))


def test_import_brings_in_no_heavy_package():
    code = (
        "import sys, jchameleon.lora; "
        "print(sorted({'jax', 'torch', 'peft', 'transformers'} & set(sys.modules)))"
    )
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert PROJECTIONS == ("q", "k", "v", "o", "gate", "up", "down")
