"""Cost models from plan logs: what was put in comes out, and the least squares too."""

import dataclasses
import importlib
import itertools
import random
import tomllib

import numpy as np
import pytest
from sim_world import LINK, adapters_of, drawn, simulator_of
from tool_runs import ROOT, run_bench, run_tool

from jchameleon.errors import ConfigError
from jchameleon.runtime.policy.events import StepDone
from jchameleon.runtime.policy.log import PlanLogWriter, read_plan_log
from jchameleon.runtime.policy.presets import load_policy
from jchameleon.sim.cost import StepWork
from jchameleon.sim.fitted import (
    fit_cost,
    load_latency_s,
    non_negative_least_squares,
    step_samples,
)
from jchameleon.sim.linear import LinearCost, features
from jchameleon.sim.programs import ProgramCost

TRUTH = ProgramCost(
    work=LinearCost(
        prefill_lora_s=0.001,
        prefill_token_s=2e-5,
        prefill_token_rank_s=3e-7,
        decode_row_s=1e-4,
        decode_kv_token_s=2e-6,
        decode_rank_s=1e-6,
    ),
    prefill_programs_s={32: 0.004, 64: 0.009, 128: 0.01},
    decode_programs_s={1: 0.002, 4: 0.006, 8: 0.007},
)
"""What a planner of `simulator_of` runs; not on a line."""


def logged_run(path, *, link=LINK, count=400, seed=0):
    """Simulate with `TRUTH` and write the plan log of it."""
    writers = []
    simulator, planner = simulator_of(
        adapters_of(a=8, b=16, c=64),
        policy="chameleon",
        cost=TRUTH,
        link=link,
        num_pages=66,
        observe=lambda *iteration: writers[0].append(*iteration),
    )
    writers.append(PlanLogWriter(path, planner.config, load_policy("chameleon")))
    rng = random.Random(seed)
    at_s, requests = 0.0, []
    for _ in range(count):
        at_s += rng.expovariate(20.0)
        who = rng.choice([None, "a", "b", "c"])
        requests.append(drawn(at_s, who, rng.randint(1, 150), rng.randint(1, 30)))
    simulator.run(requests, max_tokens=30)
    writers[0].close()
    return path


def steps_of(path):
    log = read_plan_log(path)
    return step_samples(log, log.planner)


@pytest.mark.parametrize("seed", range(4))
def test_least_squares_are_the_best_of_all_sets_of_columns(seed):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(30, 5)) * (1, 1e3, 1e-3, 1, 1)
    target = matrix @ (2.0, -1e-3, 1e3, 0.0, 0.5) + rng.normal(size=30)
    best = np.inf
    for size in range(6):
        for chosen in itertools.combinations(range(5), size):
            x = np.zeros(5)
            if chosen:
                x[list(chosen)] = np.linalg.lstsq(matrix[:, chosen], target)[0]
            if (x >= 0).all():
                best = min(best, np.linalg.norm(matrix @ x - target))
    found = non_negative_least_squares(matrix, target)
    assert (found >= 0).all()
    assert np.linalg.norm(matrix @ found - target) == pytest.approx(best, rel=1e-9)


def test_a_column_of_zeros_gets_no_weight():
    matrix = np.array([[1.0, 0.0], [1.0, 0.0]])
    found = non_negative_least_squares(matrix, np.array([1.0, 3.0]))
    assert found[0] == pytest.approx(2.0, rel=1e-12)  # the library's rounding
    assert found[1] == 0.0


def test_features_times_coefficients_are_the_cost():
    rng = random.Random(1)
    names = [field.name for field in dataclasses.fields(LinearCost)]
    cost = LinearCost(**{name: rng.random() for name in names})
    for prompts, rows in ((0, 0), (9, 0), (0, 3), (9, 3)):
        work = StepWork(
            prefill_tokens=prompts,
            prefill_lora_tokens=prompts // 2,
            prefill_token_ranks=8 * (prompts // 2),
            prefill_pairs=2 * prompts,
            decode_rows=rows,
            decode_lora_rows=rows // 2,
            decode_kv_tokens=70 * rows,
            decode_ranks=8 * (rows // 2),
        )
        terms = zip(names, features(work), strict=True)
        total_s = sum(getattr(cost, name) * value for name, value in terms)
        assert cost.step_s(work) == pytest.approx(total_s)


def test_fit_to_a_log_finds_the_cost_that_made_it(tmp_path):

    path = logged_run(tmp_path / "plans.gz")
    fit = fit_cost(steps_of(path))
    assert fit.median_error < 1e-6 and fit.p90_error < 1e-6
    for field in dataclasses.fields(LinearCost):
        expected = getattr(TRUTH.work, field.name)
        found = getattr(fit.cost.work, field.name)
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-9), field.name
    for name in ("prefill_programs_s", "decode_programs_s"):
        assert getattr(fit.cost, name) == pytest.approx(getattr(TRUTH, name), rel=1e-3)
    assert fit.load_page_s == pytest.approx(0.0, abs=1e-9)


def test_fit_finds_what_copies_cost_the_engine(tmp_path):

    # 1,000 bytes a page on 1 MB/s; latency, which is not by the page, left out.
    link = dataclasses.replace(LINK, stall=3.0, latency_s=0.0)
    path = logged_run(tmp_path / "plans.gz", link=link)
    fit = fit_cost(steps_of(path))
    assert fit.load_page_s == pytest.approx(3e-3, rel=1e-3)


def test_latency_of_copies_without_idle_waits_is_the_lower_quartile(tmp_path):
    # Steps that hardly ever leave the engine idle: the simulator's own wait counts too.
    path = logged_run(tmp_path / "plans.gz")
    iterations = list(read_plan_log(path))
    busy = [one for one in iterations if any(isinstance(e, StepDone) for e in one[1])]
    late_s = load_latency_s([busy], page_s=1e-3)
    assert 0.01 <= late_s < 0.02
    assert load_latency_s([], page_s=1e-3) == 0.0


def test_noise_moves_no_mean_and_a_compile_counts_little(tmp_path):
    path = logged_run(tmp_path / "plans.gz")
    rng = random.Random(3)
    samples = [
        # A mean of 1 and a long tail, as on a machine that others use.
        dataclasses.replace(
            one, period_s=one.period_s * (0.7 + rng.expovariate(1 / 0.3))
        )
        for one in steps_of(path)
    ]
    samples[5] = dataclasses.replace(samples[5], period_s=60.0)
    fit = fit_cost(samples)
    told_s = sum(fit.cost.step_s(one.work) for one in samples)
    true_s = sum(TRUTH.step_s(one.work) for one in samples)
    assert told_s == pytest.approx(true_s, rel=0.03)


def test_too_few_steps_are_an_error(tmp_path):

    path = logged_run(tmp_path / "plans.gz", count=1)
    with pytest.raises(ConfigError, match="steps are too few to fit, at least 50"):
        fit_cost(steps_of(path))


def test_program_that_ran_once_while_held_up_is_left_out(tmp_path):
    samples = list(steps_of(logged_run(tmp_path / "plans.gz")))
    one = next(one for one in samples if one.programs == (0, 4))
    once = dataclasses.replace(one, programs=(0, 16), period_s=60.0)
    fit = fit_cost([*samples, once])
    assert 16 not in fit.cost.decode_programs_s
    assert fit.cost.decode_programs_s[8] == pytest.approx(0.007, rel=1e-3)


def test_steps_without_decode_rows_are_an_error(tmp_path):
    samples = steps_of(logged_run(tmp_path / "plans.gz"))
    prompts = [one for one in samples if not one.work.decode_rows]
    with pytest.raises(ConfigError, match="no step of .* has decode rows"):
        fit_cost(prompts)


def test_programs_that_never_ran_are_left_to_larger_ones(tmp_path):
    samples = steps_of(logged_run(tmp_path / "plans.gz"))
    fit = fit_cost(one for one in samples if one.programs[1] != 4)
    assert sorted(fit.cost.decode_programs_s) == [1, 8]
    rows = [fit.cost.step_s(StepWork(decode_rows=count)) for count in (1, 2, 8)]
    assert rows[0] == pytest.approx(0.0021, rel=1e-3)
    assert rows[1:] == pytest.approx([0.0072, 0.0078], rel=1e-3)


def test_tool_prints_tables_of_a_profile(tmp_path):

    path = logged_run(tmp_path / "plans.gz")
    arguments = [str(path), "--link-bytes-per-s", "1e6", "--page-bytes", "1000"]
    done = run_tool("fit_cost_model", *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    table = tomllib.loads(done.stdout)
    assert table["cost"]["kind"] == "programs"
    programs_s = table["cost"]["decode_programs_s"]
    assert programs_s == pytest.approx({"1": 0.002, "4": 0.006, "8": 0.007}, rel=1e-3)
    assert table["cost"]["decode_row_s"] == pytest.approx(1e-4, rel=1e-3)
    assert "decode_s" not in table["cost"]
    assert table["link"] == {"stall": pytest.approx(0.0, abs=1e-6)}
    # 10 ms beyond the link; those that are found a step later do not count.
    assert table["engine"]["link_latency_s"] == pytest.approx(0.01, rel=1e-3)
    broken = run_tool("fit_cost_model", str(tmp_path / "none.gz"), folder=tmp_path)
    assert broken.returncode == 1 and "cannot be read" in broken.stderr


def test_validation_compares_engine_and_twin(tmp_path):
    """Figures of so few requests on a busy machine say nothing; that they are there."""
    text, report = run_bench("validate_twin", "--quick", folder=tmp_path)
    assert "twin/engine" in text
    assert [run["traffic"] for run in report["runs"]] == [
        "poisson power:1 0.4",
        "poisson power:1 0.7",
        "gamma:2 uniform 0.5",
    ]
    for run in report["runs"]:
        assert set(run["engine"]) == set(run["twin"])
        engine, twin = run["engine_books"], run["twin_books"]
        for books in (engine, twin):
            assert books["hits"] + books["misses"] == 40 + books["squashes"]
        assert twin["loads"] >= 5 and engine["loads"] >= 5  # one for each adapter
    assert report["checked_steps"]["count"] > 50
    figures = ("throughput_rps", "ttft_s_p50", "ttft_s_p99", "hit_rate")
    assert [one["figure"] for one in report["checks"]] == list(figures) * 3


def test_validation_of_a_tiny_case_takes_no_other_model(tmp_path):
    arguments = ["--quick", "--model", "smollm2-135m"]
    done = run_tool("validate_twin", *arguments, folder=tmp_path)
    assert done.returncode == 2 and "--model smollm2-135m" in done.stderr


def test_validation_takes_the_bar_or_what_the_engine_does_by_itself(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    judge = importlib.import_module("twin_bars").judge

    def run(engine, twin, hits):
        figures = ("throughput_rps", "ttft_s_p50", "ttft_s_p99")
        return {
            "preset": "p",
            "traffic": "t",
            "engine": dict(zip(figures, engine, strict=True)),
            "twin": dict(zip(figures, twin, strict=True)),
            "engine_books": {"hits": 90, "misses": 10},
            "twin_books": {"hits": hits, "misses": 100 - hits},
        }

    runs = [
        run((10.0, 1.0, 2.0), (10.6, 1.09, 2.5), 93),
        run((10.1, 1.0, 2.6), (10.6, 1.09, 2.5), 93),
        run((9.9, 1.0, 2.0), (10.6, 1.09, 2.5), 93),
    ]
    checks = {one["figure"]: one for one in judge(runs)}
    assert {name: one["ok"] for name, one in checks.items()} == {
        "throughput_rps": False,  # 6 % off, and the engine's runs are 2 % apart
        "ttft_s_p50": True,
        "ttft_s_p99": True,  # 25 % off, and the engine's own are 30 % apart
        "hit_rate": False,
    }
    assert checks["hit_rate"]["off"] == pytest.approx(0.03)
