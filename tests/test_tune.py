"""The tuner without a GPU: what it tries, what it picks, and the file it writes."""

import dataclasses
import json
import sys

import pytest
import tune
from gpu_backends import has_nvidia_gpu
from kernel_cases import all_cases
from kernel_timing import Timing
from kernel_world import Load, make_world

from jchameleon.config import EngineConfig, ModelConfig
from jchameleon.errors import ConfigError
from jchameleon.pallas.gpu_attention import DecodeConfig, decode_config
from jchameleon.pallas.gpu_tunables import TUNABLES
from jchameleon.pallas.tuned import make_key, read_table, write_entry

TINY_CONFIG = EngineConfig(dtype="float32", max_model_len=64)
DECODE = Load(phase="decode", tokens=2, context_tokens=32, ranks=(8, 17))
DEVICE = "NVIDIA Test 9000"


def cases_of(model, load, config=TINY_CONFIG):
    world = make_world(
        ModelConfig.preset(model), config, load, arch=None, interpret=True, max_turns=2
    )
    return world, {case.key.op: case for case in all_cases(world)}


def changed(config, other):
    pairs = zip(dataclasses.astuple(config), dataclasses.astuple(other), strict=True)
    return sum(a != b for a, b in pairs)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("model", ["llama-7b", "llama-3-8b", "smollm2-135m"])
def test_candidates_are_valid_distinct_and_nearest_first(model, phase):
    load = Load(phase=phase, tokens=64, context_tokens=64, ranks=(8, 128))
    _, cases = cases_of(model, load, EngineConfig(dtype="bfloat16"))
    assert len(cases) == 4
    for op, case in cases.items():
        found = tune.candidates(case.key, case.chosen, most=10_000)
        assert found[0] == case.chosen and len(set(found)) == len(found) > 8
        for config in found:
            TUNABLES[op].check(config, dict(case.key.shape))
        distances = [changed(case.chosen, config) for config in found]
        assert distances == sorted(distances)
        assert tune.candidates(case.key, case.chosen, most=5) == found[:5]


def test_candidates_leave_out_what_the_operation_refuses():
    """Of the tiny model d_in is 64: no block or splits beyond it."""
    _, cases = cases_of("tiny", DECODE)
    case = cases["lora_shrink"]
    found = tune.candidates(case.key, case.chosen, most=10_000)
    assert {(c.block_k, c.splits) for c in found} == {(32, 1), (32, 2), (64, 1)}
    prefill = Load(phase="prefill", tokens=128, context_tokens=64, ranks=(8,))
    _, cases = cases_of("llama-7b", prefill, EngineConfig(dtype="bfloat16"))
    case = cases["attention_prefill"]
    # Blocks of 128 tokens, of one head each: programs of fewer rows hold none.
    rows = {c.bm for c in tune.candidates(case.key, case.chosen, most=10_000)}
    assert rows == {128, 256}


@pytest.mark.parametrize(
    ("seconds", "place"),
    [
        ({}, None),
        ({0: [2.0], 1: [1.0], 2: [3.0]}, 1),
        ({0: [1.0], 1: [0.98]}, 0),  # within the noise
        ({0: [1.0], 1: [0.96]}, 1),
        ({1: [5.0], 2: [4.0, 4.0]}, 2),  # the default did not run
        ({0: [2.0], 1: [0.1, 3.0, 3.0], 2: [1.0]}, 2),  # medians, not best cases
        ({0: [2.0], 1: [1.0], 2: [1.0]}, 1),
    ],
)
def test_selection_takes_the_fastest_median_that_is_worth_it(seconds, place):
    assert tune.select(seconds) == place


def entry(rows, us=1.0, **config):
    key = make_key(
        "attention_decode",
        phase="decode",
        dtype="bfloat16",
        rows=rows,
        heads=4,
        kv_heads=2,
        head_dim=16,
        block_tokens=16,
        max_context_tokens=160,
    )
    chosen = decode_config(rows, 2, 16, 160, arch=None)
    config = dataclasses.replace(chosen, **config)
    return key, write_entry(key, config, jax="0.10.2", us=us, default_us=None)


def test_table_takes_new_entries_and_keeps_the_others(tmp_path):
    path = tmp_path / "tuned" / "x.json"
    tune.update_table(path, DEVICE, [entry(1)[1], entry(2)[1]])
    tune.update_table(path, DEVICE, [entry(2, 0.5, bn=64)[1], entry(3)[1]])
    table = read_table(path, DEVICE, TUNABLES)
    assert len(table.entries) == 3
    assert [table.find(entry(rows)[0]).bn for rows in (1, 2, 3)] == [32, 64, 32]
    content = json.loads(path.read_text())
    assert [e["us"] for e in content["entries"]] == [1.0, 0.5, 1.0]
    before = path.read_text()
    tune.update_table(path, DEVICE, content["entries"][::-1])
    assert path.read_text() == before  # the order is no matter of history
    assert list(path.parent.iterdir()) == [path]


def test_wrong_tables_are_not_written_over(tmp_path):
    path = tmp_path / "x.json"
    wrong = entry(1)[1] | {"op": "softmax"}
    with pytest.raises(ConfigError, match="softmax"):
        tune.update_table(path, DEVICE, [wrong])
    assert not path.exists()
    path.write_text("{}")
    with pytest.raises(ConfigError, match="lacks"):
        tune.update_table(path, DEVICE, [entry(1)[1]])
    tune.update_table(tmp_path / "y.json", DEVICE, [entry(1)[1]])
    with pytest.raises(ConfigError, match="must be 'NVIDIA A40'"):
        tune.update_table(tmp_path / "y.json", "NVIDIA A40", [entry(2)[1]])
    assert path.read_text() == "{}"


def test_configs_that_fail_or_are_wrong_are_dropped():
    world, cases = cases_of("tiny", DECODE)
    case = cases["attention_decode"]

    def values(config):
        form = case.values(config)
        if config.splits == 2:
            return lambda *inputs: form(*inputs) * 1.5
        if config.splits == 4:
            raise RuntimeError("Shared memory size limit exceeded")
        return form

    configs = [
        DecodeConfig(bn=16, splits=splits, num_warps=4, num_stages=2)
        for splits in (1, 2, 4, 3)
    ]
    result = tune.tune_case(
        dataclasses.replace(case, values=values),
        world,
        configs,
        Timing(rounds=3, queue_s=1e-5),
    )
    assert set(result.seconds) == {0, 3}
    assert all(len(v) == 3 and min(v) > 0 for v in result.seconds.values())
    assert result.failed[1].startswith("values off by 0.5")
    assert result.failed[2] == "RuntimeError: Shared memory size limit exceeded"
    found = tune.result_entry(result)
    assert found["config"]["splits"] in (1, 3) and found["default_us"] > 0
    assert tune.result_entry(dataclasses.replace(result, seconds={})) is None


SMALL_RUN = "--model tiny --decode 2 --context 32 --ranks 8 17 --max-model-len 64"


def test_tuner_writes_a_table_that_engines_read(tmp_path, monkeypatch, capsys):
    path = tmp_path / "table.json"
    options = "--prefill --interpret --rounds 1 --turns 2 --most 2 --dtype float32"
    ops = ["--ops", "attention_decode", "--out", str(path)]
    arguments = [*SMALL_RUN.split(), *options.split(), *ops]
    monkeypatch.setattr(sys, "argv", ["tune.py", *arguments])
    assert tune.main() == 0
    assert "decode[2] attention_decode: 2 candidates" in capsys.readouterr().out
    table = read_table(path, "interpreted", TUNABLES)
    _, cases = cases_of("tiny", DECODE)
    case = cases["attention_decode"]
    tried = tune.candidates(case.key, case.chosen, most=2)
    assert table.find(case.key) in tried
    assert len(table.entries) == 1


@pytest.mark.skipif(has_nvidia_gpu(), reason="there is a GPU")
def test_tuner_without_a_gpu_says_so_and_lists_candidates(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune.py", "--model", "llama-7b"])
    assert tune.main() == 2
    line = "tune: no GPU was seen; --dry-run lists candidates\n"
    assert capsys.readouterr().err == line
    options = "--prefill 32 --dry-run --most 3".split()
    monkeypatch.setattr(sys, "argv", ["tune.py", *SMALL_RUN.split(), *options])
    assert tune.main() == 0
    lines = capsys.readouterr().out.splitlines()
    # Attention, rotation, shrink and expand of two groups, in each of two steps.
    assert len(lines) == 12 * 4
    assert lines[0] == "decode[2] lora_shrink qkv: 3 candidates"
    assert lines[1].startswith("  ShrinkConfig(block_k=")
