import math

import pytest
from bench_planner_engine import Settings, SteadyEngine
from tool_runs import run_bench

from jchameleon.runtime.policy.registry import policy_names

POLICIES = ["chameleon", "sjf"]
QUEUED = [5, 10, 20]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Run the whole tool on its tiny case."""
    folder = tmp_path_factory.mktemp("bench")
    return run_bench("bench_planner", "--quick", "--plans", "24", folder=folder)


def sane(times):
    """Whether a summary of times is complete and in order."""
    assert set(times) == {
        "count",
        "median_s",
        "p99_s",
        "max_s",
        "cpu_median_s",
        "cpu_p99_s",
        "cpu_max_s",
        "round_medians_s",
    }
    for clock in ("", "cpu_"):
        found = [times[f"{clock}{key}"] for key in ("median_s", "p99_s", "max_s")]
        assert 0 < found[0] <= found[1] <= found[2] < math.inf
    medians = times["round_medians_s"]
    return min(medians) <= times["median_s"] <= max(medians)


def test_report_quick_run_has_every_part(report):
    _, found = report
    assert set(found) == {
        "settings",
        "machine",
        "load_average",
        "versions",
        "loop_s",
        "plans",
        "growth",
        "evictions",
        "histogram",
        "bars",
        "checks",
    }
    assert found["settings"]["policies"] == POLICIES
    assert found["settings"]["plans"] == 24
    assert found["machine"]["cores_in_use"] == 1
    assert found["versions"]["jchameleon"] and found["versions"]["numpy"]
    assert all(loop_s > 0 for loop_s in found["loop_s"])
    assert found["bars"] == {
        "median_s": 1e-3,
        "p99_s": 3e-3,
        "growth": 2.0,
        "eviction_s": 1e-4,
    }


def test_report_quick_run_times_plans_in_a_steady_state(report):
    _, found = report
    keys = [(row["policy"], row["queued"]) for row in found["plans"]]
    assert keys == [(policy, queued) for policy in POLICIES for queued in QUEUED]
    for row in found["plans"]:
        assert row["plan"]["count"] == 24
        assert len(row["plan"]["round_medians_s"]) == 2
        assert sane(row["plan"])
        state = row["state"]
        # The line is refilled before each plan, which may admit from it.
        assert row["queued"] - 8 <= state["waiting"] <= row["queued"]
        assert 1 <= state["running"] <= 8
        assert state["resident_pages"] > 0
        assert state["decoded_per_plan"] > 0
        if row["policy"] == "chameleon":
            assert row["refresh"]["count"] == 2 and sane(row["refresh"])
        else:
            assert "refresh" not in row
    for row in found["growth"]:
        assert len(row["by_round"]) == 2
        assert min(row["by_round"]) <= row["median"] <= max(row["by_round"])


def test_report_quick_run_times_every_eviction_policy_and_the_histogram(report):
    _, found = report
    names = [row["policy"] for row in found["evictions"]]
    assert names == policy_names("eviction")
    for row in found["evictions"]:
        assert row["evict"]["count"] == 5 and sane(row["evict"])
    assert found["histogram"]["count"] == 5 and sane(found["histogram"])


def test_report_quick_run_compares_every_bar(report):
    text, found = report
    names = [f"plan {p} {key}" for p in POLICIES for key in ("median", "p99")]
    names += [f"growth {policy}" for policy in POLICIES]
    names += [f"evict {name} median" for name in policy_names("eviction")]
    assert [check["name"] for check in found["checks"]] == names
    for check in found["checks"]:
        assert check["ok"] == (check["figure"] <= check["bar"])
        line = next(one for one in text.splitlines() if one.startswith(check["name"]))
        assert line.endswith("ok" if check["ok"] else "MISSED")
    plan = next(r["plan"] for r in found["plans"] if r["queued"] == 10)
    assert found["checks"][0]["figure"] == plan["median_s"]
    assert found["checks"][0]["cpu"] == plan["cpu_median_s"]


def test_steady_engine_keeps_line_and_rows_full_with_every_kind_of_event():
    settings = Settings(adapters=60, resident=20, running=16, warm_up_plans=150, seed=1)
    engine = SteadyEngine("chameleon", 30, settings)
    for _ in range(300):
        engine.step()
        assert engine.state()["running"] >= 12  # quotas are tight in a small pool
    state = engine.state()
    assert state["waiting"] >= 20
    for name in ("arrivals", "admitted", "loads", "evicted", "decoded"):
        assert state[f"{name}_per_plan"] > 0.01, name
    assert state["arrivals_per_plan"] == pytest.approx(
        state["admitted_per_plan"], abs=0.1
    )
