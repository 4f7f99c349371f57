"""The experiment's tools: how runs are played, counted, kept and compared."""

import gc
import json
import math
import xml.etree.ElementTree

import exp_report
import pytest
from exp_calibration import Calibration, Reference
from exp_policies import PRESETS, plan_runs
from exp_results import Results, Settings, figures
from exp_rig import Job, Outcome, Recorder, Rig, outcome
from exp_workload import Lengths, Shape, make_trace
from random_adapters import write_random_adapter
from tool_runs import run_tool

from jchameleon.client.chart import line_chart
from jchameleon.config import ATTENTION_PROJECTIONS, ModelConfig
from jchameleon.runtime.outbox import Delta, RequestTiming
from jchameleon.runtime.policy.presets import load_policy, policy_preset_names
from jchameleon.sampling import SamplingParams

SETTINGS = Settings(model="tiny", trace=None, scale=0.1, num_requests=20)

TIMING = RequestTiming(
    queue_s=0.25, adapter_load_s=0.5, ttft_s=1.0, total_s=2.0, adapter_cache_hit=False
)


def done(*token_s, tokens=None, reason="stop", error=None, late_s=0.0):
    """Return the outcome of a request whose tokens came out at these times."""
    return Outcome(
        tokens=tuple(range(len(token_s))) if tokens is None else tokens,
        token_s=token_s,
        late_s=late_s,
        finish_reason=reason,
        error=error,
        timing=TIMING,
    )


def run(preset, seed, ttft_s, *, load=0.5, **values):
    """Return a run's record with one counted request of this TTFT."""
    counters = dict.fromkeys(
        ("hits", "misses", "loads", "evictions", "bypasses", "squashes")
        + ("growth_squashes", "grown_pages", "stalls", "mismatches", "failed"),
        0,
    )
    return {
        "preset": preset,
        "load": load,
        "seed": seed,
        "rate_rps": 10.0 * load,
        "ttft_s": [ttft_s],
        "e2e_s": [2 * ttft_s],
        "queue_s": [0.0],
        "load_s": [0.0],
        "tbt_p50_s": 0.01,
        "tbt_p99_s": 0.02,
        "late_max_s": 0.0,
        "lanes": [],
        "machine": {"gemm_gflops": 100.0, "read_gbps": 20.0},
        "first_differences": [],
        "first_error": None,
        **counters,
        **values,
    }


def policies(*names):
    return {name: load_policy(name).to_dict() for name in names}


# How a run is played.


def test_outcome_stamped_deltas_count_from_when_the_job_was_due():
    pieces = [
        (101.5, Delta(token_ids=(7,))),
        (103.0, Delta(token_ids=(8, 9))),
        (104.0, Delta(token_ids=(5,), finish_reason="stop", timing=TIMING)),
    ]
    found = outcome(pieces, due_s=100.0, late_s=0.5)
    assert found.tokens == (7, 8, 9, 5)
    assert found.token_s == (1.5, 3.0, 3.0, 4.0)
    assert found.gaps_s == [1.5, 0.0, 1.0]
    assert found.ttft_s == 1.5  # a late submission is no excuse
    assert found.finish_reason == "stop" and found.late_s == 0.5


def test_recorder_all_ended_returns_everything_in_order():
    recorder = Recorder(2)
    recorder.put("a", Delta(token_ids=(1,)))
    recorder.put("b", Delta(token_ids=(2,), finish_reason="stop"))
    recorder.put("a", Delta(token_ids=(3,), finish_reason="length"))
    stamped = recorder.wait()
    assert [(name, delta.token_ids) for _, name, delta in stamped] == [
        ("a", (1,)),
        ("b", (2,)),
        ("a", (3,)),
    ]
    times = [now_s for now_s, _, _ in stamped]
    assert times == sorted(times)


def test_sessions_of_one_rig_share_no_policy_state(tmp_path):
    model = ModelConfig.preset("tiny")
    paths = {
        name: write_random_adapter(
            tmp_path / name, model, rank=8, targets=ATTENTION_PROJECTIONS, seed=seed
        )
        for seed, name in enumerate(("a", "b"))
    }
    rig = Rig(
        "tiny",
        paths,
        {
            "max_model_len": 64,
            "max_running": 4,
            "max_batch_tokens": 36,
            "max_lora_rank": 8,
            "pool_bytes": 64 * 8192,
        },
    )
    jobs = [
        Job(
            request_id=str(index),
            prompt=[index + 1] * 5,
            sampling=SamplingParams(max_tokens=6, seed=index, ignore_eos=True),
            adapter=name,
            at_s=0.05 * index,
        )
        for index, name in enumerate(("a", "a", "b", None))
    ]
    tokens, totals = [], []
    for policy in ("fifo-lru", "fifo-lru", "chameleon"):
        with rig.session(policy, None) as session:
            outcomes = session.play(jobs)
            totals.append(session.books())
        tokens.append([found.tokens for found in outcomes])
        for job, found in zip(jobs, outcomes, strict=True):
            assert found.finish_reason == "length"
            # From when it was due; seen a moment after the engine has it, however long
            # that moment is on this machine.
            assert found.ttft_s >= found.late_s + found.timing.ttft_s >= 0
            assert found.ttft_s < 60, job
    assert tokens[0] == tokens[1] == tokens[2]
    # Each began with an empty pool and counters at zero.
    assert [(books.hits, books.misses) for books in totals[:2]] == [(1, 2), (1, 2)]
    assert totals[2].hits + totals[2].misses == 3
    gc.unfreeze()  # the rig keeps its start-up out of collections; other tests need not


# What is counted.


def test_figures_warm_up_is_left_out_of_times_only():
    outcomes = [
        done(9.0, 19.0, tokens=(1, 1)),
        *(done(1.0, 1.5, 3.5) for _ in range(9)),
    ]
    found = figures(outcomes, [Reference(tokens=(0, 1, 2))] * 10, warm_share=0.05)
    assert found["counted"] == 9
    assert found["ttft_s"] == [1.0] * 9
    assert found["e2e_s"] == [3.5] * 9
    assert found["queue_s"] == [0.25] * 9 and found["load_s"] == [0.5] * 9
    # Gaps are 0.5 and 2.0, nine of each.
    assert found["tbt_p50_s"] == pytest.approx(1.25)
    assert found["tbt_p99_s"] == pytest.approx(2.0)
    assert found["mismatches"] == 1 and found["first_differences"] == [[0, 0]]


def test_figures_failed_requests_are_counted_and_not_timed():
    outcomes = [
        done(1.0, late_s=0.5),
        done(2.0, reason="error", error="no pages", late_s=0.25),
        done(reason="error", error="dead"),
    ]
    found = figures(outcomes, [Reference(tokens=(0,))] * 3, warm_share=0.0)
    assert found["failed"] == 2 and found["first_error"] == "no pages"
    assert found["ttft_s"] == [1.0] and found["counted"] == 3
    assert found["mismatches"] == 0
    assert found["late_max_s"] == 0.5


@pytest.mark.parametrize(
    ("tokens", "position"),
    [((4, 5, 6), None), ((4, 5, 7), 2), ((9, 5, 6), 0), ((4, 5), 2), ((4, 5, 6, 6), 3)],
)
def test_reference_first_difference_is_found(tokens, position):
    assert Reference(tokens=(4, 5, 6)).first_difference(tokens) == position


def test_policy_only_chameleons_scheduler_gets_time_constants():
    found = Calibration(
        prompt_tokens=100,
        own_load_share=0.1,
        load_share=0.175,
        median_load_share=0.2,
        ttft_resident_s=0.1,
        ttft_cold_s=0.12,
        link_bytes_per_s=1e8,
        load_bytes=1 << 20,
        isolated_s=0.2,
        saturation_rps=5.0,
    )
    times = {"slo_s": 1.0, "refresh_s": 60.0, "first_refresh_s": 0.0}
    with_lanes = set()
    for preset in policy_preset_names():
        policy = load_policy(found.policy(preset, warm_requests=30))
        plain = load_policy(preset)
        assert policy.eviction == plain.eviction and policy.prefetch == plain.prefetch
        if policy.admission == plain.admission:
            continue
        with_lanes.add(preset)
        assert policy.admission.name == plain.admission.name == "chameleon"
        assert policy.admission.options == {
            **plain.admission.options,
            **{name: pytest.approx(value) for name, value in times.items()},
            "min_samples": 30,
        }
    assert found.policy("lru", warm_requests=9)["admission"]["min_samples"] == 16
    assert {"chameleon", "lru", "gdsf"} <= with_lanes
    assert not {"adaptive", "s-lora", "sjf", "chameleon-nosched"} & with_lanes


def test_plan_runs_every_preset_is_first_in_turn():
    runs = plan_runs(("a", "b", "c"), (0.5, 0.9), (0, 1))
    assert len(runs) == len(set(runs)) == 12
    cells = [runs[start : start + 3] for start in range(0, 12, 3)]
    for cell in cells:  # presets of one seed and load run side by side
        assert len({(seed, load) for seed, load, _ in cell}) == 1
        assert {preset for *_, preset in cell} == {"a", "b", "c"}
    assert [cell[0][2] for cell in cells] == ["a", "b", "c", "a"]


# What is kept.


def test_results_same_settings_go_on_where_they_stopped(tmp_path):
    path = tmp_path / "out.json"
    results = Results(path, SETTINGS)
    results.state["runs"].append(run("lru", 3, 1.0, load=0.7))
    results.save()
    again = Results(path, SETTINGS)
    assert again.done("lru", 0.7, 3)
    assert not again.done("lru", 0.7, 4)
    assert not again.done("lru", 0.5, 3)
    assert not again.done("gdsf", 0.7, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_results_other_settings_are_refused(tmp_path):
    path = tmp_path / "out.json"
    Results(path, SETTINGS).save()
    other = Settings(model="tiny", trace=None, scale=0.2, num_requests=20)
    with pytest.raises(ValueError, match=r"scale=0.1, not 0.2"):
        Results(path, other)


# What is made of it.


def test_spread_shows_median_and_range():
    assert exp_report.spread([3.0, 1.0, 2.0]) == "2 [1-3]"
    assert exp_report.spread([0.12345, 0.12349]) == "0.123"
    assert exp_report.spread([1234.5, 12.345]) == "623 [12.3-1234]"
    assert exp_report.spread([]) == "-"


def test_ratios_are_paired_by_seed_and_count_wins():
    runs = [
        run("s-lora", 0, 1.0),
        run("s-lora", 1, 10.0),
        run("s-lora", 2, 100.0),
        run("lru", 2, 50.0),
        run("lru", 0, 2.0),
        run("lru", 7, 1.0),  # no baseline in this seed
        run("lru", 1, 1.0, load=0.9),  # nor at this load
    ]
    ratios = exp_report.paired_ratios(runs, "lru", "s-lora", 0.5, exp_report.P99_TTFT)
    assert ratios == [2.0, 0.5]
    assert exp_report.shown_ratios(ratios) == "1.25 [0.5-2], 1/2"


def test_exercised_mechanism_without_an_event_is_named():
    runs = [
        run("chameleon", 0, 1.0, bypasses=3, squashes=5, growth_squashes=5, stalls=1),
        run("chameleon", 1, 1.0, bypasses=1),
        run("s-lora", 0, 1.0, evictions=7),
    ]
    found = exp_report.exercised(policies("chameleon", "s-lora", "fifo-lru"), runs)
    assert found == {
        "chameleon": [
            "eviction: not exercised",
            "bypass: 4 in 2 of 2 runs",
            "squash after a bypass: not exercised",
            "growth: not exercised",
            "squash by growth: 5 in 1 of 2 runs",
            "stall: 1 in 1 of 2 runs",
            "several lanes: not exercised",
        ],
        "s-lora": [
            "eviction: 7 in 1 of 1 runs",
            "growth: not exercised",
            "squash by growth: not exercised",
            "stall: not exercised",
        ],
    }
    # A preset that reserves for everything has nothing that could outgrow it.
    only = exp_report.exercised(policies("fifo-lru"), [run("fifo-lru", 0, 1.0)])
    assert only == {"fifo-lru": ["eviction: not exercised"]}


def test_twins_same_policies_under_two_names_are_found():
    found = exp_report.twins(policies(*PRESETS))
    assert found == [("chameleon-nocache", "drop")]


def test_figure_points_stand_where_their_values_say():
    drawing = line_chart(
        "title",
        {"a": [(0.5, 10.0), (1.0, 1000.0)], "b": [(0.5, 100.0)]},
        across="load",
        limit=100.0,
    )
    root = xml.etree.ElementTree.fromstring(drawing)
    space = "{http://www.w3.org/2000/svg}"
    first, last, other = [
        (float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{space}circle")
    ]
    assert first[0] == other[0] < last[0]
    # The axis is logarithmic: 100 is half-way between 10 and 1000.
    assert other[1] == pytest.approx((first[1] + last[1]) / 2, abs=0.2)
    assert last[1] < first[1]
    texts = [element.text for element in root.iter(f"{space}text")]
    assert {"title", "a", "b", "0.5", "1", "10", "100", "1000", "SLO 100 ms"} <= set(
        texts
    )


# The whole tool.


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Run the command on the tiny model twice; return both outputs and the file."""
    folder = tmp_path_factory.mktemp("experiment")
    arguments = ["--quick", "--presets", "chameleon", "s-lora", "--seeds", "0"]
    arguments += ["--loads", "0.7", "--work", folder, "--json", folder / "out.json"]
    arguments += ["--svg", folder / "out.svg"]
    outputs = []
    for _ in range(2):
        ended = run_tool("exp_policies", *arguments, folder=folder)
        assert ended.returncode == 0, ended.stderr
        outputs.append((ended.stdout, ended.stderr))
    return outputs, folder


def test_tool_quick_run_keeps_every_figure(smoke):
    _, folder = smoke
    state = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    assert [one["preset"] for one in state["runs"]] == ["chameleon", "s-lora"]
    assert set(state["policies"]) == {"chameleon", "s-lora"}
    assert len(state["references"]["0"]) == 20
    lengths = {len(tokens) for tokens in state["references"]["0"]}
    assert 1 <= min(lengths) and max(lengths) <= state["workload"]["max_tokens"] == 50
    for one in state["runs"]:
        assert one["failed"] == 0 and one["mismatches"] == 0
        assert one["hits"] + one["misses"] >= 20
        assert one["counted"] == len(one["ttft_s"]) == 17
        for first_s, last_s in zip(one["ttft_s"], one["e2e_s"], strict=True):
            assert 0 < first_s <= last_s < math.inf
        assert one["rate_rps"] == pytest.approx(
            0.7 * state["calibration"]["saturation_rps"]
        )
    # The last request came when it was due, and not before.
    shape = Shape(num_requests=20, scale=0.05, max_model_len=288, num_adapters=40)
    last = make_trace(shape, Lengths(), 0)[-1]
    for one in state["runs"]:
        assert one["wall_s"] > last.arrival_s(one["rate_rps"]) + one["e2e_s"][-1]
    found = state["calibration"]
    assert found["ttft_cold_s"] > found["ttft_resident_s"] > 0
    assert state["slo_s"] == pytest.approx(5 * found["isolated_s"])
    assert len(state["commands"]) == 1 and "--quick" in state["commands"][0]
    xml.etree.ElementTree.parse(folder / "out.svg")


def test_tool_again_runs_nothing_and_reports_the_same(smoke):
    (first, second), folder = smoke
    assert "[2/2]" in first[1] and "calibrating" in first[1]
    assert second[1] == ""
    assert second[0] == first[0]
    for part in ("bypass", "Emulated link", "Saturation", "| s-lora |", "TTFT P99"):
        assert part in first[0]
    assert "Outputs that differ from the undisturbed run's: 0 of 40" in first[0]
