"""PEFT directories: their factors, scales and identity, and what is refused."""

import math
import os
import pickle
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
from peft_files import (
    MODEL,
    PREFIX,
    Q0,
    load,
    make_config,
    make_tensors,
    write_adapter,
)

from jchameleon.config import PROJECTIONS, ModelConfig
from jchameleon.errors import AdapterError
from jchameleon.lora import load_peft_adapter
from jchameleon.lora.targets import linear_modules


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


def test_rslora_scale_is_alpha_over_root_of_the_modules_own_rank(tmp_path):
    tensors = make_tensors(("q",), rank=4)
    tensors |= make_tensors(("v",), rank=9)
    config = make_config(use_rslora=True, rank_pattern={"v_proj": 9})
    adapter = load(write_adapter(tmp_path, config=config, tensors=tensors))
    assert adapter.modules[0, "q"].scale == 16 / 2
    assert adapter.modules[0, "v"].scale == 16 / 3
    assert math.isclose(adapter.modules[2, "v"].scale, 16 / math.sqrt(9))


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


# Refusals: files.


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


def test_import_brings_in_no_heavy_package():
    code = (
        "import sys, jchameleon.lora; "
        "print(sorted({'jax', 'torch', 'peft', 'transformers'} & set(sys.modules)))"
    )
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert PROJECTIONS == ("q", "k", "v", "o", "gate", "up", "down")
