"""Which operations a backend stands for, and that all of them give the same tokens."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_adapters import write_random_adapter

from jchameleon import LLM, SamplingParams
from jchameleon.config import ModelConfig
from jchameleon.errors import ConfigError
from jchameleon.pallas import cpu_ffi, cpu_softmax
from jchameleon.pallas.operations import (
    CPU,
    XLA,
    choose_operations,
    pallas_operations,
)

F32, BF16 = np.dtype(np.float32), np.dtype("bfloat16")
TINY = ModelConfig.preset("tiny")
RANKS = {"a": 8, "b": 40, "c": 3}


@pytest.mark.parametrize(
    ("backend", "platform", "dtype", "capability", "expected"),
    [
        ("auto", "cpu", F32, None, CPU),
        ("auto", "cpu", BF16, None, XLA),
        ("auto", "gpu", BF16, "8.6", pallas_operations("sm_86")),
        ("auto", "gpu", F32, "9.0", pallas_operations("sm_90")),
        ("auto", "gpu", BF16, "7.5", XLA),
        ("auto", "tpu", BF16, None, XLA),
        ("cpu", "cpu", F32, None, CPU),
        ("pallas", "cpu", F32, None, pallas_operations(None, interpret=True)),
        ("pallas", "gpu", BF16, "8.0", pallas_operations("sm_80")),
        ("xla", "cpu", F32, None, XLA),
        ("xla", "gpu", BF16, "8.0", XLA),
    ],
)
def test_backend_stands_for_what_serves_device_and_dtype(
    backend, platform, dtype, capability, expected
):
    found = choose_operations(
        backend, platform=platform, dtype=dtype, model=TINY, capability=capability
    )
    assert found is expected


@pytest.mark.parametrize(("platform", "dtype"), [("cpu", BF16), ("gpu", F32)])
def test_cpu_backend_elsewhere_is_refused(platform, dtype):
    with pytest.raises(ConfigError, match="backend='cpu' needs .* use backend='xla'"):
        choose_operations("cpu", platform=platform, dtype=dtype, model=TINY)


@pytest.mark.parametrize(
    ("platform", "capability", "head_dim", "rule"),
    [
        ("gpu", "7.5", 16, "needs compute capability 8.0, not 7.5"),
        ("tpu", None, 16, "needs an NVIDIA GPU or a CPU, got 'tpu'"),
        ("gpu", None, 16, "needs an NVIDIA GPU or a CPU"),
        ("gpu", "9.0", 12, "multiple of 8 from 16 to 256, tiny has 12"),
        ("cpu", None, 264, "multiple of 8 from 16 to 256, tiny has 264"),
    ],
)
def test_pallas_backend_that_serves_not_is_refused_or_left(
    platform, capability, head_dim, rule
):
    where = {"platform": platform, "dtype": BF16, "capability": capability}
    where["model"] = dataclasses.replace(TINY, head_dim=head_dim)
    with pytest.raises(ConfigError, match=f"{rule}.*; use backend='xla'"):
        choose_operations("pallas", **where)
    assert choose_operations("auto", **where) is XLA


def test_engine_refuses_a_backend_that_does_not_serve_its_dtype():
    with pytest.raises(ConfigError, match="backend='cpu' needs dtype='float32'"):
        LLM(model="tiny", backend="cpu", dtype="bfloat16")
    with pytest.raises(ConfigError, match="backend='cuda' must be"):
        LLM(model="tiny", backend="cuda")


@given(st.integers(1, 2000))
def test_parts_cover_all_units_once_and_are_few(units):
    parts = list(cpu_ffi.parts(units))
    assert [u for first, n in parts for u in range(first, first + n)] == [*range(units)]
    assert len(parts) == min(units, cpu_ffi.PARTS)
    sizes = [n for _, n in parts]
    assert max(sizes) - min(sizes) <= 1


def test_exponential_is_that_of_numpy_and_keeps_nan():
    x = -np.concatenate([np.linspace(0, 90, 20_001), np.geomspace(1e-30, 1, 500)])
    x = x.astype(np.float32)
    found = np.array([cpu_softmax.exp(value) for value in x])
    expected = np.where(x < -87, 0, np.exp(x.astype(np.float64)))
    np.testing.assert_allclose(found, expected, rtol=3e-7)
    assert np.isnan(cpu_softmax.exp(np.float32(np.nan)))


def test_backends_give_the_same_tokens(tmp_path):
    model = ModelConfig.preset("tiny")
    paths = {
        name: write_random_adapter(
            tmp_path / name, model, rank=rank, targets=("q", "v", "o", "down"), seed=i
        )
        for i, (name, rank) in enumerate(RANKS.items())
    }
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 200, n).tolist() for n in (1, 17, 40, 133, 64, 5)]
    names = [None, "a", "b", "c", "a", None]
    options = {"max_running": 8, "max_model_len": 256, "max_batch_tokens": 96}
    tokens = {}
    for backend in ("xla", "cpu"):
        with LLM("tiny", adapters=paths, backend=backend, **options) as llm:
            outputs = llm.generate(
                prompts,
                names,
                SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True),
            )
        tokens[backend] = [output.token_ids for output in outputs]
    assert tokens["cpu"] == tokens["xla"]
    assert len({tokens["xla"][i] for i in range(6)}) == 6
