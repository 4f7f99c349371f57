"""What a GPU holds: memory, capacity and what saturates, against plain arithmetic."""

import dataclasses
import statistics

import numpy as np
import pytest
from test_sim_profile import TINY

from jchameleon.config import EngineConfig, ModelConfig
from jchameleon.errors import ConfigError
from jchameleon.sim import Load, capacity, load_profile, simulate
from jchameleon.sim.capacity import Question, plan_capacity
from jchameleon.sim.profile import AdapterMix
from jchameleon.sim.roofline import SHARES, gpu_names, load_gpu, roofline_cost
from jchameleon.sim.saturation import find_saturated, metered
from jchameleon.workload.arrivals import Trace
from jchameleon.workload.generator import Length, Workload

QKVO = ("q", "k", "v", "o")


def question_of(gpu="a40", count=200, ranks=(32,), **fields):
    """Return a question that is answered in a few seconds."""
    model = fields.pop("model", "llama-7b")
    workload = {
        "input_len": Length(low=100, high=300),
        "output_len": Length(low=10, high=50),
        "max_model_len": 512,
        **fields.pop("workload", {}),
    }
    engine = {"max_running": 64, "max_batch_tokens": 1024, **fields.pop("engine", {})}
    return Question(
        gpu=gpu,
        model=ModelConfig.preset(model),
        adapters=AdapterMix(count=count, ranks=ranks),
        engine=EngineConfig(dtype="bfloat16", **engine),
        workload=Workload(**workload),
        **{"slo_ttft_s": 1.0, "num_seeds": 3, "duration_s": 8.0, **fields},
    )


@pytest.fixture(scope="module")
def answers():
    """Plans for two GPUs, and for one adapter."""
    return {
        "a40": plan_capacity(question_of()),
        "a100": plan_capacity(question_of("a100")),
        "one": plan_capacity(question_of(count=1)),
    }


def at_least(answer, other):
    """Return whether a capacity is no smaller than another, to within intervals."""
    slack = answer["half_width_95_rps"] + other["half_width_95_rps"]
    return answer["capacity_rps"] >= other["capacity_rps"] - slack


def test_memory_is_split_as_plain_arithmetic_says(answers):
    memory = answers["a40"]["memory"]
    # 6,738,415,616 parameters (Touvron et al., 2023) of two bytes.
    assert memory["weights_bytes"] == 2 * 6_738_415_616
    # 2 x 32 layers x 4,096 values of two bytes are 0.5 MiB a token, 16 tokens a page.
    assert memory["page_bytes"] == 16 * 2 * 32 * 4096 * 2
    assert memory["adapter_bytes_by_rank"] == {"32": 64 << 20}  # Chameleon, section 3
    terms = [name for name in memory if name.endswith("_bytes")]
    parts = set(terms) - {"device_bytes", "page_bytes"}
    parts -= {"adapters_bytes", "adapters_fit_bytes"}
    assert sum(memory[name] for name in parts) == memory["device_bytes"]
    assert memory["context_bytes"] == pytest.approx(0.08 * 47.7e9, abs=1)
    # Four adapters of rank 32 on their way.
    assert memory["staging_bytes"] == 4 * (64 << 20)
    # 64 rows of 512 tokens, twice, are all that a pool is of use for.
    assert (
        memory["pool_pages"]
        == min(
            2 * 64 * 512 // 16,
            (memory["pool_bytes"] + memory["unused_bytes"]) // memory["page_bytes"],
        )
        // 64
        * 64
    )
    usable = memory["pool_pages"] - 2
    assert memory["kv_tokens"] == 16 * usable
    fit = min(200, (usable - 32 - 8) // 8)  # eight pages each, beside a request's 40
    assert memory["adapters_fit"] == fit
    assert memory["kv_tokens_beside"] == 16 * (usable - 8 * fit)


def test_more_gpu_and_fewer_adapters_hold_no_less(answers):
    assert at_least(answers["a100"], answers["a40"])
    assert at_least(answers["one"], answers["a40"])
    # Twice the operations and three times the bandwidth are more than chance.
    assert answers["a100"]["capacity_rps"] > 1.2 * answers["a40"]["capacity_rps"]
    for answer in answers.values():
        low, high = answer["range_rps"]
        assert 0 < low < answer["capacity_rps"] < high


def test_more_memory_holds_no_less_and_memory_is_named(monkeypatch):
    """Room for a few requests at once, and then for many."""
    found = {}
    for gigabytes in (16.7, 20.0):
        gpu = dataclasses.replace(load_gpu("a40"), memory_bytes=int(gigabytes * 1e9))
        monkeypatch.setattr(capacity, "load_gpu", lambda name, gpu=gpu: gpu)
        found[gigabytes] = plan_capacity(
            question_of(count=4, ranks=(8,), num_seeds=2, max_tokens=200)
        )
    small, large = found.values()
    assert small["memory"]["pool_pages"] < large["memory"]["pool_pages"] / 2
    assert large["capacity_rps"] > 1.1 * small["capacity_rps"]
    assert small["cases"]["nominal"]["saturated"]["resource"] == "memory"


def test_capacity_is_the_last_rate_that_keeps_the_slo(answers):
    case = answers["a40"]["cases"]["nominal"]
    held = [row["held_rps"] for row in case["seeds"]]
    assert case["capacity_rps"] == pytest.approx(np.mean(held))
    # 4.303 is Student's t of 2 degrees of freedom at 97.5 %, from any table of it.
    half = 4.303 * statistics.stdev(held) / 3**0.5
    assert case["half_width_95_rps"] == pytest.approx(half, rel=1e-3, abs=1e-9)
    for row in case["seeds"]:
        *before, last = row["runs"]
        assert all(run["ttft_p99_s"] <= 1.0 for run in before)
        assert last["ttft_p99_s"] > 1.0 and before[-1]["rate_rps"] == row["held_rps"]
        step = row["over_slo_rps"] - row["held_rps"]
        assert step == pytest.approx(case["step_rps"])


def test_runs_are_those_of_simulate(answers, monkeypatch):
    """The same profile through the front door: rates, times, hit rate."""
    question = question_of()
    profiles, _ = capacity._profiles(question, load_gpu("a40"))
    case = answers["a40"]["cases"]["nominal"]
    profile = dataclasses.replace(
        profiles["nominal"],
        workload=dataclasses.replace(profiles["nominal"].workload, duration_s=8.0),
        skip_s=case["skip_s"],
    )
    row = case["seeds"][1]
    for run in row["runs"][-2:]:
        report = simulate(profile, Load(rate_rps=run["rate_rps"], seed=row["seed"]))
        assert report["ttft_s"]["p99"] == run["ttft_p99_s"]
    at_load = case["at_load"]
    assert at_load["rate_rps"] == pytest.approx(0.8 * case["capacity_rps"])
    reports = [
        simulate(profile, Load(rate_rps=at_load["rate_rps"], seed=seed))
        for seed in range(3)
    ]
    for kind in ("ttft_s", "tbt_s"):
        mean_s = np.mean([report[kind]["p99"] for report in reports])
        assert at_load[kind]["p99"] == pytest.approx(mean_s)
    hit_rates = [report["cache"]["hit_rate"] for report in reports]
    assert at_load["cache"]["hit_rate"] == pytest.approx(np.mean(hit_rates))
    usage = at_load["usage"]
    pool = usage["pool_kv"] + usage["pool_adapters"] + usage["pool_free"]
    assert pool == pytest.approx(1.0)
    busy = usage["prefill_busy"] + usage["decode_busy"]
    assert 0.1 < busy <= 1.0 + 1e-9


def test_request_alone_takes_what_a_run_of_such_takes():
    """Prompts of several chunks, one a minute, their adapter there."""
    question = question_of(
        count=2,
        ranks=(8, 128),
        workload={"input_len": Length(low=100, high=2000), "max_model_len": 2048},
        engine={"policy": "lru"},
    )
    profiles, _ = capacity._profiles(question, load_gpu("a40"))
    profile = profiles["nominal"]
    alone_s = capacity._alone_s(profile, Load(rate_rps=1.0))[:300]
    apart = dataclasses.replace(profile.workload, process="fixed", duration_s=18_000.0)
    report = simulate(
        dataclasses.replace(profile, workload=apart), Load(rate_rps=1 / 60)
    )
    assert report["requests"]["counted"] == 300 and report["cache"]["misses"] == 0
    for percent in (50, 90, 99):
        expected = np.percentile(alone_s, percent, method="inverted_cdf")
        assert report["ttft_s"][f"p{percent}"] == pytest.approx(expected)


# Name of what saturates, and what of the small profile is changed to that end.
SATURATED = {
    "compute": ("prefill_token_s = 1e-4", "prefill_token_s = 2e-3", 12.0),
    "rows": ("max_running = 8", "max_running = 2", 16.0),
    "memory": ("pool_bytes = 1_000_000", "pool_bytes = 180_224", 20.0),
    "link": ("link_bytes_per_s = 1e7", "link_bytes_per_s = 2e5", 12.0),
}


@pytest.mark.parametrize("resource", SATURATED)
def test_what_saturates_is_what_there_is_too_little_of(resource, tmp_path):
    old, new, rate_rps = SATURATED[resource]
    path = tmp_path / "tiny.toml"
    text = TINY.replace(old, new)
    if resource == "link":  # nothing is kept, so every request waits for a copy
        text = text.replace("fifo-lru", "drop")
    path.write_text(text)
    found = find_saturated(load_profile(path), Load(rate_rps=rate_rps), 99)
    assert found["resource"] == resource, found
    late = found["ttft_p99_s"]
    assert late["as_it_is"] > 0.5 and found["rate_rps"] >= rate_rps
    others = {"memory", "rows", "link"} - {resource}
    assert all(late[name] > late["as_it_is"] / 2 for name in others)


def test_meter_sees_all_of_the_time_of_a_full_engine(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    profile = load_profile(path)
    report = metered(profile, Load(rate_rps=200.0), 99)
    usage = report["usage"]
    assert usage["prefill_busy"] + usage["decode_busy"] == pytest.approx(1, abs=0.05)
    assert usage["rows_full"] > 0.9 and usage["running_mean"] > 7.5
    # 20 ms a step of decode, and 10 to 20 for prompts of 16 to 64 tokens in some.
    assert usage["decode_busy"] > usage["prefill_busy"] > 0.1
    assert report["late_s"] == report["ttft_s"]["p99"]
    assert report["ttft_s"] == simulate(profile, Load(rate_rps=200.0))["ttft_s"]


@pytest.mark.parametrize("name", gpu_names())
def test_larger_shares_of_a_peak_are_never_slower(name):
    model, gpu = ModelConfig.preset("llama-7b"), load_gpu(name)
    costs = [
        dataclasses.asdict(roofline_cost(model, gpu, QKVO, SHARES[case]))
        for case in ("pessimistic", "nominal", "optimistic")
    ]
    for slower, faster in zip(costs, costs[1:], strict=False):
        assert all(slower[key] > faster[key] > 0 for key in slower)
    # Two operations for each weight but those of the embedding's rows.
    token_s = (
        2 * (6_738_415_616 - 32000 * 4096 - 65 * 4096) / (0.5 * gpu.bf16_flops_per_s)
    )
    assert costs[1]["prefill_token_s"] == pytest.approx(token_s, rel=1e-6)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"gpu": "a41"}, "gpu='a41' is unknown; did you mean 'a40'"),
        ({"model": "llama-30b"}, "model='llama-30b' has .* must fit into gpu='a40'"),
        ({"ranks": (32768,)}, "ranks has 32768: an adapter of that rank takes"),
        ({"ranks": (8192,)}, "the model leaves 0 pages"),
        ({"slo_ttft_s": 0.02}, "slo_ttft=0.02 must be at least 0.0"),
        ({"slo_ttft_s": 0.0}, "slo_ttft_s=0.0 must be a finite number above 0"),
        ({"slo_ttft_s": float("nan")}, "slo_ttft_s=nan must be"),
        ({"percent": 100.0}, "percentile=100.0 must be above 0 and below 100"),
        ({"num_seeds": 0}, "seeds=0 must be at least 1"),
        ({"duration_s": -1.0}, "duration_s=-1.0 must be a finite number above 0"),
        ({"duration_s": 0.9}, "duration=0.9 must be above slo_ttft=1"),
        ({"count": 3, "ranks": (8, 16)}, "adapters.count=3 must be a multiple of"),
        ({"max_tokens": 512}, "workload.max_tokens=512 must be from 1 to below"),
        ({"workload": {"max_model_len": 4096}}, "max_model_len=4096 must be at most"),
        ({"engine": {"policy": "chamelon"}}, "did you mean 'chameleon'"),
        ({"workload": {"process": "trace"}}, "need a trace"),
    ],
)
def test_what_is_impossible_is_an_error_that_names_field_value_and_rule(
    fields, message
):
    with pytest.raises((ConfigError, LookupError), match=message):
        plan_capacity(question_of(**fields))


def test_a_case_that_keeps_no_slo_holds_nothing():
    """Between what requests take alone under one cost model and under the next."""
    profiles, _ = capacity._profiles(question_of(), load_gpu("a40"))
    alone_s = capacity._alone_s(profiles["pessimistic"], Load(rate_rps=1.0))
    slo_s = 0.98 * np.percentile(alone_s, 99)
    answer = plan_capacity(question_of(slo_ttft_s=slo_s, num_seeds=1, duration_s=3.0))
    none = answer["cases"]["pessimistic"]
    assert none["ttft_alone_s"]["p99"] == pytest.approx(slo_s / 0.98, rel=0.01)
    assert none["capacity_rps"] == 0.0 and none["at_load"] is None
    assert "exceeds the SLO at any load" in none["limit"]
    assert answer["range_rps"][0] == 0.0 < answer["capacity_rps"]
    assert answer["half_width_95_rps"] is None  # of a single seed


def test_longest_output_follows_lengths_and_trace():
    trace = Trace(at_s=(0.0, 1.0), lengths=((10, 40), (10, 100)))
    workload = Workload(output_len=Length.parse("lognormal:10:1:300"), length_scale=0.5)
    assert capacity._longest_output(workload, None) == 150
    assert capacity._longest_output(workload, trace) == 50
    even = dataclasses.replace(workload, output_len=Length(low=1, high=77))
    assert capacity._longest_output(even, None) == 77
    short = dataclasses.replace(even, max_model_len=50)
    assert capacity._longest_output(short, None) == 49
