"""tools/bench_peers.py on the tiny model, whole, and its parts."""

import importlib.util
import math
import os
import resource
import sys
import time
from pathlib import Path

import bench_peers
import peer_vllm
import peers_bars
import peers_batch
import peers_memory
import peers_trace
import pytest
from bench_workload import Case, Sample, Settings, floor, random_prompts
from tool_runs import run_bench

from jchameleon.config import ModelConfig

PEFT_HERE = all(
    importlib.util.find_spec(name) for name in ("torch", "transformers", "peft")
)
OURS = {"base", "few", "mixed", "prefill"}
PEFT = {"peer_base", "peer_few", "peer_mixed"}

GOOD = {
    peers_bars.PEFT_RATIO: 2.3,
    peers_bars.VLLM_RATIO: 1.2,
    peers_bars.OWN_SHARE: 0.88,
    peers_bars.TRACE_SHARE: 0.8,
    peers_bars.PREFILL_SHARE: 0.7,
    peers_bars.DECODE_SHARE: 0.6,
    peers_bars.START_S: 8.0,
    peers_bars.MEMORY_RATIO: 1.3,
}
AT_MOST = {peers_bars.START_S, peers_bars.MEMORY_RATIO}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    return run_bench("bench_peers", "--quick", folder=folder)


def test_report_quick_run_has_every_part(report):
    text, found = report
    assert {"batch", "trace", "start_s", "memory", "checks"} <= set(found)
    assert {"settings", "trace_settings", "machine", "versions", "peers"} <= set(found)
    keys = {row["key"] for row in found["batch"]["rows"]}
    assert keys == (OURS | PEFT if PEFT_HERE else OURS)
    assert [row["key"] for row in found["trace"]["rows"]] == ["base", "few", "many"]
    for row in (*found["batch"]["rows"], *found["trace"]["rows"]):
        assert row["label"] in text
        values = row["out_tokens_per_s"]
        assert 0 < values["min"] <= values["median"] <= values["max"] < math.inf
    assert set(found["calibration"]) == {"start", "middle", "end"}
    # A process with Python and jax in it, and more than the pool.
    assert found["memory"]["peak_bytes"] > 100e6 > found["memory"]["pool_bytes"]
    assert found["start_s"]["median"] > 0.1


def test_report_quick_run_rows_did_the_same_work(report):
    _, found = report
    settings, served = found["settings"], found["trace_settings"]
    for row in found["batch"]["rows"]:
        each = 1 if row["key"] == "prefill" else settings["output_tokens"]
        assert row["output_tokens"] == settings["num_requests"] * each
        assert row["adapter_misses"] == 0
    for field in ("requests", "prompt_tokens", "output_tokens"):
        assert len({row[field] for row in found["trace"]["rows"]}) == 1
    rows = {row["key"]: row for row in found["trace"]["rows"]}
    assert rows["base"]["requests"] == served["num_requests"]
    assert rows["base"]["misses"] == 0 < rows["few"]["misses"]
    # The tiny model's logits lie far apart, so rounding turns no token.
    same = found["batch"]["same_outputs"]
    assert set(same.values()) == ({1.0} if PEFT_HERE else set())


def test_report_quick_run_checks_every_bar_or_says_why_not(report):
    text, found = report
    verdicts = {row["name"]: row["verdict"] for row in found["checks"]}
    assert set(verdicts) == set(GOOD)
    assert verdicts[peers_bars.VLLM_RATIO] == "not run"
    assert "vLLM: not installed" in text
    absent = {peers_bars.VLLM_RATIO} | (set() if PEFT_HERE else {peers_bars.PEFT_RATIO})
    assert {name for name, v in verdicts.items() if v == "not run"} == absent
    assert found["checks"] == peers_bars.judge(bench_peers.figures(found))
    for row in found["checks"]:
        assert row["name"] in text


@pytest.mark.parametrize("name", GOOD)
def test_judge_figure_beyond_its_bar_has_missed(name):
    rows = {row["name"]: row["verdict"] for row in peers_bars.judge(GOOD)}
    assert rows == dict.fromkeys(GOOD, "ok")
    worse = GOOD[name] * (1.01 if name in AT_MOST else 0.99)
    for bad, verdict in ((worse, "MISSED"), (math.nan, "MISSED"), (None, "not run")):
        rows = {r["name"]: r["verdict"] for r in peers_bars.judge({**GOOD, name: bad})}
        assert rows.pop(name) == verdict
        assert set(rows.values()) == {"ok"}


def sample(wall_s, *, tokens=((1, 2), (3, 4)), decode_step_s=()):
    return Sample(
        wall_s=wall_s,
        ttft_s=[],
        decode_step_s=list(decode_step_s),
        prefill_s=math.nan,
        misses=0,
        tokens=list(tokens),
    )


@pytest.fixture
def small():
    """A model and workload whose floor can be computed by hand."""
    model = ModelConfig(
        name="small",
        vocab_size=10,
        hidden_size=4,
        intermediate_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=4,
        tie_embeddings=True,
    )
    settings = Settings(num_requests=2, prompt_tokens=3, output_tokens=2, repeats=1)
    return model, settings


# A thousand multiply-adds and additions a second, a thousand bytes a second.
RATES = {"gemm_gflops": 1e-6, "read_gbps": 1e-6}


def test_floor_small_model_is_what_a_hand_computes(small):
    model, settings = small
    base = Case(key="base", label="", system="ours", adapters={})
    found = floor(model, settings, base, **RATES)
    # Four projections of 4 x 4 and three of 4 x 8: 160; the head 40. Each prompt: 3 x
    # 160 + 40, and 8 a pair of tokens of which there are 6.
    assert found["prefill_s"] == pytest.approx(2 * 2 * (3 * 160 + 40 + 8 * 6) / 1000)
    # A step: 2 x (160 + 40 + 8 x 4 tokens) multiply-adds take 0.928 s, and 200 weights
    # and 2 x 4 tokens of 8 KV elements, four bytes each, 1.056 s.
    assert found["decode_step_s"] == pytest.approx(4 * (200 + 2 * 4 * 8) / 1000)
    faster = floor(model, settings, base, gemm_gflops=1e-6, read_gbps=1.0)
    assert faster["decode_step_s"] == pytest.approx(2 * 2 * (200 + 8 * 4) / 1000)


def test_batch_figures_are_shares_of_the_floor_and_ratios_of_rates(small):
    model, settings = small
    samples = {
        "base": [sample(1.0, decode_step_s=[1.056 / 0.4])],
        "few": [sample(1.0, decode_step_s=[1.0])],
        "mixed": [sample(2.0, decode_step_s=[1.0])],
        "prefill": [sample(2.272 / 0.8, tokens=[(1,), (2,)])],
        "peer_mixed": [sample(5.0)],
        "vllm_base": [sample(3.0)],
    }
    batch = peers_batch.batch_report(settings, model, samples, {}, RATES, vllm=True)
    served = {"ratios": {"few / base": {"median": 0.7}}}
    found = bench_peers.figures(
        {
            "batch": batch,
            "trace": served,
            "start_s": {"median": 9.0},
            "memory": {"ratio": 1.5},
        }
    )
    assert found == pytest.approx(
        {
            peers_bars.PEFT_RATIO: 2.5,
            peers_bars.VLLM_RATIO: 1.5,
            peers_bars.OWN_SHARE: 0.5,
            peers_bars.TRACE_SHARE: 0.7,
            peers_bars.PREFILL_SHARE: 0.8,
            peers_bars.DECODE_SHARE: 0.4,
            peers_bars.START_S: 9.0,
            peers_bars.MEMORY_RATIO: 1.5,
        }
    )


def test_trace_requests_have_the_same_lengths_for_any_number_of_adapters():
    settings = peers_trace.TraceSettings(num_requests=500)
    model = ModelConfig.preset("smollm2-135m")
    workload = peers_trace.TraceWorkload(settings, model)
    few, many = workload.requests(100), workload.requests(1_000)
    assert [r.prompt(99) for r in few] == [r.prompt(99) for r in many]
    assert [r.output_tokens for r in few] == [r.output_tokens for r in many]
    assert len({r.adapter for r in few}) <= 100 < len({r.adapter for r in many})
    assert workload.adapters(100).items() <= workload.adapters(1_000).items()
    longest = max(r.prompt_tokens + r.output_tokens for r in few)
    assert longest <= settings.max_model_len < 2 * longest
    assert workload.lengths.context_tokens(workload.scale) <= settings.max_model_len


@pytest.mark.parametrize(("count", "share"), [(100, 0.25), (1_000, 0.1)])
def test_trace_pool_holds_its_share_of_adapters_beside_running_requests(count, share):
    settings = peers_trace.TraceSettings()
    model = ModelConfig.preset("smollm2-135m")
    workload = peers_trace.TraceWorkload(settings, model)
    options = workload.options(count, share)
    # A rank's f32 rows of A and B on q, k, v and o of 30 layers; ranks 8 to 128.
    rank_bytes = 4 * 30 * sum((1152, 768, 768, 1152))
    adapter_bytes = rank_bytes * (8 + 16 + 32 + 64 + 128) / 5
    requests = workload.requests(count)
    mean = sum(r.prompt_tokens + r.output_tokens for r in requests) / len(requests)
    kv_bytes = settings.max_running * mean * 4 * 30 * 2 * 192
    # Both are whole pages.
    least = share * count * adapter_bytes + kv_bytes
    assert least <= options["pool_bytes"] <= 1.15 * least


def test_trace_fewer_requests_than_parts_is_refused():
    settings = peers_trace.TraceSettings(num_requests=2, repeats=3)
    with pytest.raises(ValueError, match="num_requests=2 must be at least repeats=3"):
        peers_trace.TraceWorkload(settings, ModelConfig.preset("tiny"))


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux")
def test_peak_memory_is_between_what_is_used_now_and_what_the_kernel_says():
    now_pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    peak = peers_memory.peak_resident_bytes()
    # The kernel adds up what each thread has done in batches.
    assert 0.98 * now_pages * os.sysconf("SC_PAGESIZE") <= peak <= 1.02 * most


STAND_IN = """
import time

__version__ = "stand-in"

class LLM:
    def __init__(self, **options):
        if options["model"] == "broken":
            raise SystemExit("no such model")
        self.options = options
        print("noise on standard output")

    def generate(self, prompts, sampling, use_tqdm, lora_request=None):
        if lora_request:
            assert [r.path for r in lora_request] == ["/a", "/b"]
            time.sleep(600)
        return [Out(p["prompt_token_ids"], sampling) for p in prompts]

class SamplingParams:
    def __init__(self, **options):
        self.max_tokens = options["max_tokens"]

class Out:
    def __init__(self, prompt, sampling):
        self.outputs = [self]
        self.token_ids = prompt[: sampling.max_tokens]
"""
REQUEST = """
class LoRARequest:
    def __init__(self, name, number, path):
        self.path = path
"""


@pytest.fixture
def vllm_python(tmp_path):
    """A Python that finds a package with the part of vLLM's interface that is used."""
    package = tmp_path / "packages" / "vllm"
    (package / "lora").mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN, encoding="utf-8")
    (package / "lora" / "__init__.py").write_text("", encoding="utf-8")
    (package / "lora" / "request.py").write_text(REQUEST, encoding="utf-8")
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\nPYTHONPATH={package.parent} exec {sys.executable} "$@"\n',
        encoding="utf-8",
    )
    python.chmod(0o755)
    return python


def start(python, folder, ranks, model="model"):
    settings = Settings(num_requests=2, prompt_tokens=3, output_tokens=2)
    paths = {name: Path(f"/{name}") for name in ranks}
    log = folder / "log"
    return peer_vllm.Vllm(python, settings, Path(model), paths, ranks, log=log)


def is_stopped(engine):
    """Return whether its process stops, which a signal takes a moment to do."""
    stat = Path(f"/proc/{engine._process.pid}/stat")
    for _ in range(500):
        if stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "T":
            return True
        time.sleep(0.01)
    return False


def test_vllm_process_answers_and_is_stopped_in_between(vllm_python, tmp_path):
    assert peer_vllm.is_installed(vllm_python)
    case = Case(key="vllm_base", label="", system="vllm", adapters={})
    prompts = random_prompts(Settings(num_requests=2, prompt_tokens=3), 50, 0)
    engine = start(vllm_python, tmp_path, {})
    try:
        for _ in range(2):
            found = engine.run(case, prompts, output_tokens=2)
            assert found.tokens == [tuple(prompt[:2]) for prompt in prompts]
            assert found.wall_s > 0
            assert is_stopped(engine)
    finally:
        engine.close()
    assert engine.run(case, prompts, output_tokens=2) is None


def test_vllm_batch_that_does_not_end_is_ended(vllm_python, tmp_path):
    ranks = {"a": 8, "b": 16}
    case = Case(key="vllm_few", label="", system="vllm_lora", adapters=ranks)
    engine = start(vllm_python, tmp_path, ranks)
    with pytest.raises(peer_vllm.VllmError, match=r"did not finish in 0\.5 s"):
        engine.try_batch(case, [[1], [2]], 1, 0.5)
    assert engine._process.returncode is not None


def test_vllm_that_fails_says_why(vllm_python, tmp_path):
    with pytest.raises(peer_vllm.VllmError, match="ended: no such model"):
        start(vllm_python, tmp_path, {}, model="broken")


@pytest.mark.parametrize("python", [Path(sys.executable), Path("/no/such/python")])
def test_vllm_absent_is_not_installed(python):
    assert not peer_vllm.is_installed(python)
