"""What the paper report keeps of a run: against the planner's own books."""

import dataclasses

import numpy as np
import pytest
from paper_cells import CUTS_TOKENS, POPULARITIES, changed, policy_of, slo_s
from paper_records import Records, isolated_s

from jchameleon.resources import configs_dir
from jchameleon.runtime.policy.build import build_planner
from jchameleon.sim import Load, load_profile
from jchameleon.sim.run import requests, run_once, settle
from jchameleon.sim.simulator import Simulator
from jchameleon.workload.generator import Drawn

PROFILE = configs_dir() / "paper" / "a40-llama-7b.toml"


def watched(variant, policy, rate_rps, duration_s=75.0):
    """Run and return the records, the result and the profile."""
    load = Load(policy=policy, rate_rps=rate_rps, seed=3, duration_s=duration_s)
    profile, engine = settle(load_profile(PROFILE, variant), load)
    records = Records(profile)
    return records, run_once(profile, engine, load, records), profile


@pytest.mark.parametrize("policy", ["s-lora", "chameleon"])
def test_times_are_those_of_the_simulators_samples(policy):
    records, result, profile = watched("m4w", policy, 9.0)
    ended = [
        one
        for one in records.requests.values()
        if one.arrival_s >= result.start_s + profile.skip_s
    ]
    assert len(ended) == result.samples.ended
    ttft = sorted(one.first_s - one.arrival_s for one in ended)
    e2e = sorted(one.end_s - one.arrival_s for one in ended)
    assert ttft == pytest.approx(sorted(result.samples.ttft_s))
    assert e2e == pytest.approx(sorted(result.samples.e2e_s))
    hits = sum(one.hit for one in records.requests.values())
    if not result.books.squashes:  # else an admission is counted again
        assert hits == result.books.hits
    for one in ended:
        # The engine looks for copies between two steps, so it is later than the link.
        assert one.load_wait_s >= one.link_wait_s - 1e-9
        assert one.arrival_s <= one.admitted_s <= one.first_s <= one.end_s


@pytest.mark.parametrize("variant, policy", [("m4w", "s-lora"), ("m4w", "chameleon")])
def test_pages_are_those_of_the_planners_books(variant, policy):
    load = Load(policy=policy, rate_rps=10.0, seed=1, duration_s=70.0)
    profile, engine = settle(load_profile(PROFILE, variant), load)
    planner = build_planner(engine, profile.num_pages)
    records = Records(profile)
    most_queued = 0

    def observe(now_s, events, plan):
        nonlocal most_queued
        records(now_s, events, plan)
        books = planner.books()
        _, kv_pages, adapter_pages = records.moments[-1]
        assert kv_pages == books.kv_pages
        # Copies that wait for the link have pages already, and no load yet.
        held = books.resident_pages + books.loading_pages
        most_queued = max(most_queued, held - adapter_pages)
        assert books.resident_pages <= adapter_pages <= held

    simulator = Simulator(
        planner,
        profile.cost,
        profile.link,
        profile.sim_adapters(),
        page_bytes=profile.page_bytes,
        observe=observe,
    )
    simulator.warm_up(profile.num_pages - profile.largest_request_pages)
    simulator.run(requests(profile, None), max_tokens=profile.max_tokens)
    figures = records.figures(0.0)
    timeline = np.array(figures["memory"]["timeline"])
    assert (timeline[:, 1:].sum(axis=1) <= 1).all() and (timeline >= 0).all()
    assert 0 <= figures["memory"]["idle_least"] <= figures["memory"]["idle_median"]


@pytest.mark.parametrize("variant", [None, "m2"])
@pytest.mark.parametrize("rank, tokens", [(8, (100, 1)), (128, (300, 40)), (0, (9, 2))])
def test_isolated_time_is_that_of_a_request_alone(variant, rank, tokens):
    profile = load_profile(PROFILE, variant)
    engine = dataclasses.replace(profile.engine, policy="fifo-lru")
    simulator = Simulator(
        build_planner(engine, profile.num_pages),
        profile.cost,
        profile.link,
        profile.sim_adapters(),
        page_bytes=profile.page_bytes,
    )
    adapter = f"r{rank}-0" if rank else None
    result = simulator.run([Drawn(0.0, adapter, rank, *tokens)], max_tokens=None)
    expected = isolated_s(
        profile, prompt_tokens=tokens[0], output_tokens=tokens[1], rank=rank
    )
    assert expected == pytest.approx(result.samples.e2e_s[0], rel=1e-9)


def test_power_ranks_give_ranks_and_adapters_a_power_law():
    shares = POPULARITIES["P-P"].weights([8, 16, 8, 16, 8, 16])
    # Ranks as 1 : 1/2, adapters of a rank as 1 : 1/2 : 1/3.
    within = np.array([1, 1 / 2, 1 / 3]) / (11 / 6)
    assert shares[::2] == pytest.approx(2 / 3 * within)
    assert shares[1::2] == pytest.approx(1 / 3 * within)


def test_changes_replace_what_they_name_and_nothing_else():
    profile = load_profile(PROFILE)
    few = changed(profile, [("ranks", (32,)), ("adapters", 7)])
    assert (few.adapters.count, few.adapters.ranks) == (7, (32,))
    assert dataclasses.replace(few, adapters=profile.adapters) == profile
    half = changed(profile, [("length_scale", 0.5)])
    assert half.workload.length_scale == pytest.approx(0.08)


def test_a_device_keeps_free_what_the_paper_profile_keeps_free():
    profile = load_profile(PROFILE)
    same = changed(profile, [("device", ("a40", "llama-7b", 48e9))])
    assert same.engine.pool_bytes == pytest.approx(profile.engine.pool_bytes, abs=1)
    more = changed(profile, [("device", ("a40", "llama-7b", 58e9))])
    assert more.engine.pool_bytes - same.engine.pool_bytes == pytest.approx(1e10)
    # 13 billion weights of 2 bytes instead of 6.74.
    large = changed(profile, [("device", ("a40", "llama-13b", 58e9))])
    less = more.engine.pool_bytes - large.engine.pool_bytes
    assert less == pytest.approx(2 * (13.02e9 - 6.74e9), rel=0.01)


def test_slo_is_five_times_the_mean_isolated_request():
    profile = load_profile(PROFILE)
    load = Load(rate_rps=0.02, seed=7, policy="s-lora", duration_s=20_000.0)
    settled, engine = settle(profile, load)
    result = run_once(settled, engine, load)
    assert slo_s(profile, None) == pytest.approx(
        5 * float(np.mean(result.samples.e2e_s)), rel=0.1
    )


def test_classes_of_the_noisy_predictor_are_scaled_with_the_lengths():
    profile = load_profile(PROFILE)
    policy = policy_of("accuracy 80%", profile, slo=None)
    cuts = policy["predictor"]["cuts"]
    assert cuts == [round(0.16 * cut) for cut in CUTS_TOKENS]
    policy = policy_of("chameleon", profile, slo=2.5)
    assert policy["admission"]["slo_s"] == 2.5
