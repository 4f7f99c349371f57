import importlib.util
import math

import numpy as np
import pytest
from safetensors.numpy import load_file
from tool_runs import ROOT, run_bench

from jchameleon.config import ModelConfig
from jchameleon.lora import load_peft_adapter

PEERS_HERE = all(
    importlib.util.find_spec(name) for name in ("torch", "transformers", "peft")
)
OURS = {"plain", "base", "few", "mixed", "low", "high", "cold"}
PEERS = {"peer_base", "peer_few", "peer_mixed"}


@pytest.fixture
def tools(monkeypatch):
    """Return a function that imports a module of tools/ as its scripts do."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Run the whole tool on the tiny model, with peers where they are installed."""
    folder = tmp_path_factory.mktemp("bench")
    return run_bench("bench_offline", "--quick", "--peers", folder=folder)


def test_report_quick_run_has_every_part(report):
    text, found = report
    assert set(found) == {
        "settings",
        "machine",
        "load_average",
        "versions",
        "peers",
        "calibration",
        "rows",
        "ratios",
        "engine",
        "checks",
        "same_outputs",
    }
    assert found["settings"]["model"] == "tiny"
    assert found["machine"]["cores_in_use"] <= found["settings"]["threads"]
    assert found["versions"]["jchameleon"]
    for when in ("start", "end"):
        assert all(rate > 0 for rate in found["calibration"][when].values())
    keys = [row["key"] for row in found["rows"]]
    assert len(keys) == len(set(keys))
    assert set(keys) == (OURS | PEERS if PEERS_HERE else OURS)
    for row in found["rows"]:
        assert row["label"] in text
    assert f"peers: {found['peers']}" in text
    assert found["peers"].startswith("run" if PEERS_HERE else "not run")


def test_report_quick_run_measures_finite_figures(report):
    _, found = report
    for row in found["rows"]:
        for field in ("out_tokens_per_s", "ttft_median_s", "decode_step_ms"):
            values = row[field]
            assert 0 < values["min"] <= values["median"] <= values["max"] < math.inf
        assert row["ttft_median_s"]["median"] <= row["ttft_last_s"]["median"]
        assert row["ttft_last_s"]["median"] < max(row["wall_s"])
        assert row["wall_over_floor"] > 0 and math.isfinite(row["wall_over_floor"])
    assert len(found["ratios"]) == (10 if PEERS_HERE else 6)
    for values in found["ratios"].values():
        assert 0 < values["min"] <= values["median"] <= values["max"] < math.inf


def test_report_quick_run_loads_adapters_in_the_cold_row_only(report):
    _, found = report
    misses = {row["key"]: row["adapter_misses"] for row in found["rows"]}
    assert misses.pop("cold") == found["settings"]["num_requests"]
    assert set(misses.values()) == {0}


def test_report_quick_run_checks_every_bar_that_it_can(report, tools):
    text, found = report
    bars = {*tools("bench_workload").BARS, *tools("bench_engine").BARS}
    if not PEERS_HERE:
        bars -= {name for name in bars if "PEFT" in name}
    assert {row["name"] for row in found["checks"]} == bars
    for row in found["checks"]:
        least, most = sorted((row["figure"], row["bar"]))
        kept = least == row["bar"] if row["least"] else most == row["bar"]
        assert row["ok"] == kept
        assert f"{row['name']:36}" in text
    engine = found["engine"]
    assert engine["compiles"] == 0
    assert 0 < engine["host_s"] <= engine["host_p90_s"] < math.inf
    assert engine["iterations"] > 10 and min(engine["starts_s"]) > 0.1


def test_report_quick_run_computes_what_the_peers_compute(report):
    _, found = report
    same = dict(found["same_outputs"])
    assert same.pop("mixed = base") == 0.0
    assert same.pop("plain = base") == 1.0
    # The tiny model's logits lie far apart, so rounding turns no token.
    assert set(same.values()) == ({1.0} if PEERS_HERE else set())


def test_floor_w1_is_near_the_published_arithmetic(tools):
    workload = tools("bench_workload")
    settings = workload.Settings()
    cases = {case.key: case for case in workload.make_cases(settings)}
    model = ModelConfig.preset("smollm2-135m")
    rates = {"gemm_gflops": 115.0, "read_gbps": 38.0}
    base = workload.floor(model, settings, cases["base"], **rates)
    # 2,048 tokens of 106 M multiply-adds; 2 % of attention, 16 rows of the head.
    assert base["prefill_s"] == pytest.approx(2 * 2048 * 106.2e6 / 115e9, rel=0.03)
    # 16 rows of 134.5 M multiply-adds outlast one read of 538 MB.
    assert base["decode_step_s"] == pytest.approx(2 * 16 * 134.5e6 / 115e9, rel=0.05)
    total = base["prefill_s"] + 31 * base["decode_step_s"]
    assert base["total_s"] == pytest.approx(total)
    # Mean rank 30 on q, k, v, o of 30 layers: 3,840 multiply-adds a rank and layer.
    mixed = workload.floor(model, settings, cases["mixed"], **rates)
    tokens = 16 * (128 + 31)
    extra_s = 2 * tokens * 30 * 30 * 3840 / 115e9
    assert mixed["total_s"] - base["total_s"] == pytest.approx(extra_s, rel=1e-6)


def test_floor_slow_memory_bounds_decode_by_bytes(tools):
    workload = tools("bench_workload")
    settings = workload.Settings()
    cases = {case.key: case for case in workload.make_cases(settings)}
    model = ModelConfig.preset("smollm2-135m")
    rates = {"gemm_gflops": 1e6, "read_gbps": 10.0}
    base = workload.floor(model, settings, cases["base"], **rates)
    kv_bytes = 16 * 144 * 2 * 192 * 30 * 4
    weight_bytes = 134.5e6 * 4
    assert base["decode_step_s"] == pytest.approx(
        (weight_bytes + kv_bytes) / 10e9, rel=0.01
    )
    mixed = workload.floor(model, settings, cases["mixed"], **rates)
    few = workload.floor(model, settings, cases["few"], **rates)
    # An adapter is read once, whoever shares it: rank sums 480 and 120.
    for case, ranks in ((mixed, 480), (few, 120)):
        extra_s = case["decode_step_s"] - base["decode_step_s"]
        assert extra_s == pytest.approx(ranks * 30 * 3840 * 4 / 10e9, rel=1e-6)


def test_ratios_drifting_machine_are_paired_by_repeat(tools):
    workload = tools("bench_workload")

    def sample(wall_s):
        return workload.Sample(
            wall_s=wall_s,
            ttft_s=[],
            decode_step_s=[],
            prefill_s=0.0,
            misses=0,
            tokens=[(1, 2)],
        )

    samples = {
        "mixed": [sample(2.0), sample(4.0), sample(8.0)],
        "base": [sample(1.0), sample(2.0), sample(4.0)],
    }
    ratios = workload.paired_ratios(samples)
    assert ratios == {
        "ranks mixed / base rows": {"median": 0.5, "min": 0.5, "max": 0.5}
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_random_adapter_any_targets_loads_with_what_was_asked(tools, tmp_path, dtype):
    write = tools("random_adapters").write_random_adapter
    model = ModelConfig.preset("tiny")
    targets = ("q", "o", "down")
    folder = write(tmp_path / "a", model, rank=5, targets=targets, seed=3, dtype=dtype)
    adapter = load_peft_adapter(folder, model, max_rank=8)
    assert adapter.rank == 5
    assert adapter.targets == set(targets)
    assert set(adapter.modules) == {(i, t) for i in range(2) for t in targets}
    for pair in adapter.modules.values():
        assert pair.scale == 1.0
        assert pair.a.dtype == pair.b.dtype == dtype
        assert np.all(pair.a != 0) and np.all(pair.b != 0)


def test_random_adapter_seed_decides_the_tensors(tools, tmp_path):
    write = tools("random_adapters").write_random_adapter
    model = ModelConfig.preset("tiny")
    tensors = [
        load_file(
            write(tmp_path / name, model, rank=2, targets=("q",), seed=seed)
            / "adapter_model.safetensors"
        )
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    for name, first in tensors[0].items():
        assert np.array_equal(first, tensors[1][name])
        assert not np.array_equal(first, tensors[2][name])


def test_random_adapter_rank_zero_is_refused(tools, tmp_path):
    write = tools("random_adapters").write_random_adapter
    with pytest.raises(ValueError, match="rank=0 must be at least 1"):
        write(tmp_path, ModelConfig.preset("tiny"), rank=0, targets=("q",), seed=0)
