"""The bounds of the report on absent GPUs, against sums written out by hand."""

import types

import aot_bars
import aot_floor
import aot_programs
import aot_target
import jax
import pytest

from jchameleon.config import EngineConfig, ModelConfig

TRAFFIC = aot_floor.Traffic(context_tokens=1024, ranks=(8, 16, 32, 64, 128))


@pytest.fixture(scope="module")
def shapes():
    """Return the 7B model's engine on an A40, from shapes: nothing is allocated."""
    return aot_programs.describe_engine(
        ModelConfig.preset("llama-7b"),
        aot_target.read_target("a40"),
        jax.devices()[0],
        EngineConfig(dtype="bfloat16", max_running=16, max_model_len=2048),
        aot_programs.choose_backend("xla", aot_target.read_target("a40")),
    )


def test_decode_floor_reads_weights_caches_and_adapters_once(shapes):
    floor = aot_floor.decode_floor(shapes, 16, TRAFFIC)
    layer = 12288 * 4096 + 4096 * 4096 + 22016 * 4096 + 4096 * 11008 + 2 * 4096
    assert floor.weights_bytes == 2 * (32 * layer + 4096 + 32000 * 4096)
    # Keys and values of 1024 tokens: all but one are read, that one is written.
    assert floor.kv_bytes == 16 * 1024 * 32 * 2 * 4096 * 2
    ranks = 3 * (8 + 16 + 32 + 64 + 128) + 8
    assert floor.adapters_bytes == ranks * 32 * 4 * (4096 + 4096) * 2
    a40 = aot_target.read_target("a40")
    assert floor.seconds(a40) == floor.fewest_bytes / 696e9


def test_prefill_floor_is_set_by_operations(shapes):
    floor = aot_floor.prefill_floor(shapes, 1024, TRAFFIC)
    layer = 12288 * 4096 + 4096 * 4096 + 22016 * 4096 + 4096 * 11008 + 2 * 4096
    products = 2 * 1024 * (32 * layer + 4096) + 2 * 32000 * 4096
    # Each token attends to itself and all before it: keys and values, 32 heads of 128.
    attention = 32 * sum(4 * 4096 * (i + 1) for i in range(1024))
    adapter = 2 * 1024 * 8 * 32 * 4 * (4096 + 4096)
    assert floor.flops == products + attention + adapter
    assert floor.seconds(aot_target.read_target("a40")) == floor.flops / 150e12


def test_traffic_is_laid_out_as_the_engine_would(shapes):
    batch = aot_floor.traffic_batch(shapes, 16, TRAFFIC, prefill=False)
    assert batch.context_tokens.tolist() == [1024] * 16
    # 94 chunks of 8 ranks, 16 an item.
    assert int(batch.lora.count) == 6
    batch = aot_floor.traffic_batch(shapes, 2048, TRAFFIC, prefill=True)
    assert batch.context_tokens.max() == 1024
    assert (batch.lora.token_adapter == [0] * 1024 + [1] * 1024).all()


def test_model_without_room_for_a_pool_is_refused():
    with pytest.raises(ValueError, match="leaves no room for a pool on a40"):
        aot_programs.describe_engine(
            ModelConfig.preset("llama-30b"),
            aot_target.read_target("a40"),
            jax.devices()[0],
            EngineConfig(dtype="bfloat16"),
            aot_programs.choose_backend("xla", aot_target.read_target("a40")),
        )


def test_backend_that_is_none_is_refused():
    with pytest.raises(ValueError, match="backend='cpu' must be one of"):
        aot_programs.choose_backend("cpu", aot_target.read_target("a40"))


def test_traffic_bar_holds_for_what_memory_bounds():
    target = types.SimpleNamespace(bandwidth_bytes_per_s=1.0, bf16_flops_per_s=10.0)
    decode = aot_floor.Floor(weights_bytes=100, flops=500)
    prefill = aot_floor.Floor(weights_bytes=100, flops=2000)
    assert decode.is_memory_bound(target) and not prefill.is_memory_bound(target)
    assert aot_bars.traffic_faults("decode[1]", decode, 115, target) == []
    [fault] = aot_bars.traffic_faults("decode[1]", decode, 117, target)
    assert "moves 117 bytes, at most 115" in fault
    assert aot_bars.traffic_faults("decode[9]", prefill, 1000, target) == []
    assert aot_bars.traffic_faults("prefill[9]", decode, 1000, target) == []
