"""Run-time estimates against machines with known coefficients."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jchameleon.runtime.policy.estimator import LOAD_PRIOR, STEP_PRIOR, Estimator

POINTS = ((0, 1), (0, 8), (0, 64), (64, 0), (512, 32), (2048, 8))

MACHINES = {
    "two cores, small model": (0.03, 2e-3, 1e-3),
    "as the prior": STEP_PRIOR,
    "fast GPU, small model": (2e-3, 1e-6, 1e-5),
    "prefill costs nothing": (0.05, 0.0, 2e-3),
}


def true_s(machine, tokens, rows):
    base_s, token_s, row_s = machine
    return base_s + token_s * tokens + row_s * rows


def feed_steps(estimator, machine, count, *, seed=0, noise=0.1):
    """Run `count` mixed steps of `machine`, durations off by up to `noise`."""
    rng = random.Random(seed)
    for _ in range(count):
        rows = rng.randrange(1, 65)
        tokens = rng.choice([0, 0, 0, 64, 512, 2048])
        duration_s = true_s(machine, tokens, rows) * (1 + rng.uniform(-noise, noise))
        estimator.observe_step(duration_s, prefill_tokens=tokens, decode_rows=rows)
    return estimator


def worst_error(estimator, machine):
    """Return the largest relative error over `POINTS`."""
    return max(
        abs(
            estimator.step_s(prefill_tokens=t, decode_rows=r) / true_s(machine, t, r)
            - 1
        )
        for t, r in POINTS
    )


def test_prior_before_any_step_is_what_the_module_says():
    estimator = Estimator()
    base_s, token_s, row_s = STEP_PRIOR
    found_s = estimator.step_s(prefill_tokens=100, decode_rows=10)
    assert found_s == base_s + token_s * 100 + row_s * 10
    assert estimator.load_line() == LOAD_PRIOR
    assert estimator.load_s(5) == LOAD_PRIOR[0] + 5 * LOAD_PRIOR[1]


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_step_noisy_samples_recover_planted_coefficients(machine):
    for seed in range(3):
        estimator = feed_steps(Estimator(), machine, 500, seed=seed)
        assert worst_error(estimator, machine) < 0.05
        base_s = estimator.step_s(prefill_tokens=0, decode_rows=0)
        token_s = estimator.step_s(prefill_tokens=1000, decode_rows=0) - base_s
        row_s = estimator.step_s(prefill_tokens=0, decode_rows=1000) - base_s
        assert base_s == pytest.approx(machine[0], rel=0.1)
        assert token_s / 1000 == pytest.approx(machine[1], rel=0.05, abs=1e-5)
        assert row_s / 1000 == pytest.approx(machine[2], rel=0.1)


def test_step_without_noise_agrees_with_least_squares():
    # The first three points fix the line; relative weights do not matter then.
    machine = (0.04, 3e-4, 2e-4)
    points = [(0, 1), (512, 3), (0, 60), (128, 9), (2048, 0)]
    estimator = Estimator()
    for tokens, rows in points * 4:
        duration_s = true_s(machine, tokens, rows)
        estimator.observe_step(duration_s, prefill_tokens=tokens, decode_rows=rows)
    table = np.array([(1, t, r) for t, r in points], np.float64)
    durations_s = np.array([true_s(machine, t, r) for t, r in points])
    solved = np.linalg.lstsq(table, durations_s)[0]
    for tokens, rows in POINTS:
        expected_s = true_s(solved, tokens, rows)
        found_s = estimator.step_s(prefill_tokens=tokens, decode_rows=rows)
        assert found_s == pytest.approx(expected_s, rel=1e-3)


def test_load_noisy_samples_recover_planted_line():
    rng = random.Random(3)
    estimator = Estimator()
    for _ in range(400):
        pages = rng.choice([5, 10, 20, 40, 80])
        duration_s = (0.02 + 5e-3 * pages) * (1 + rng.uniform(-0.1, 0.1))
        estimator.observe_load(duration_s, num_pages=pages)
    base_s, s_per_page = estimator.load_line()
    assert base_s == pytest.approx(0.02, rel=0.15)
    assert s_per_page == pytest.approx(5e-3, rel=0.05)
    assert estimator.load_s(30) == base_s + 30 * s_per_page
    assert estimator.load_s(0) == 0.0


def test_first_step_that_compiled_is_soon_forgotten():
    machine = MACHINES["two cores, small model"]
    estimator = Estimator()
    estimator.observe_step(60.0, prefill_tokens=512, decode_rows=0)
    # Counted as twice what was expected, whatever it was.
    found_s = estimator.step_s(prefill_tokens=512, decode_rows=0)
    assert found_s == pytest.approx(2 * true_s(STEP_PRIOR, 512, 0), rel=1e-3)
    feed_steps(estimator, machine, 30)
    assert worst_error(estimator, machine) < 0.2


def test_single_stall_after_many_steps_moves_the_estimate_little():
    machine = MACHINES["two cores, small model"]
    estimator = feed_steps(Estimator(), machine, 1000)
    before_s = estimator.step_s(prefill_tokens=0, decode_rows=8)
    estimator.observe_step(30.0, prefill_tokens=0, decode_rows=8)
    after_s = estimator.step_s(prefill_tokens=0, decode_rows=8)
    assert before_s < after_s < 1.05 * before_s


def test_stalls_among_many_steps_leave_the_estimate_usable():
    machine = MACHINES["two cores, small model"]
    estimator = Estimator()
    rng = random.Random(4)
    for _ in range(1000):
        tokens, rows = rng.choice(POINTS)
        factor = rng.choice([10, 30, 0.1]) if rng.random() < 0.05 else 1.0
        duration_s = factor * true_s(machine, tokens, rows)
        estimator.observe_step(duration_s, prefill_tokens=tokens, decode_rows=rows)
    assert worst_error(estimator, machine) < 0.3


@pytest.mark.parametrize("factor", [0.1, 0.6, 1.5, 10.0, 100.0])
def test_change_of_speed_is_learnt(factor):
    machine = MACHINES["two cores, small model"]
    estimator = feed_steps(Estimator(), machine, 2000)
    changed = tuple(factor * k for k in machine)
    feed_steps(estimator, changed, 400, seed=1)
    assert worst_error(estimator, changed) < 0.15


def test_change_of_one_coefficient_is_learnt_and_the_others_kept():
    estimator = feed_steps(Estimator(), (0.03, 2e-3, 1e-3), 2000)
    changed = (0.03, 8e-3, 1e-3)
    feed_steps(estimator, changed, 400, seed=1)
    assert worst_error(estimator, changed) < 0.15


def test_decode_only_stretch_does_not_erase_what_prompts_cost():
    machine = MACHINES["two cores, small model"]
    estimator = feed_steps(Estimator(), machine, 500)
    rng = random.Random(5)
    for _ in range(20_000):
        duration_s = true_s(machine, 0, 8) * (1 + rng.uniform(-0.1, 0.1))
        estimator.observe_step(duration_s, prefill_tokens=0, decode_rows=8)
    true = true_s(machine, 2048, 0)
    assert estimator.step_s(prefill_tokens=2048, decode_rows=0) == pytest.approx(
        true, rel=0.1
    )
    # Nor does it erase how sure that was.
    estimator.observe_step(1.9 * true, prefill_tokens=2048, decode_rows=0)
    assert estimator.step_s(prefill_tokens=2048, decode_rows=0) < 1.2 * true


@pytest.mark.parametrize(("tokens", "rows"), [(0, 1), (0, 8), (64, 0), (512, 32)])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_always_the_same_step_is_predicted_well_there(tokens, rows, scale):
    rng = random.Random(6)
    estimator = Estimator()
    true = 0.05 * scale
    for count in range(5000):
        duration_s = true * (1 + rng.uniform(-0.1, 0.1))
        estimator.observe_step(duration_s, prefill_tokens=tokens, decode_rows=rows)
        if count >= 30:
            found_s = estimator.step_s(prefill_tokens=tokens, decode_rows=rows)
            assert found_s == pytest.approx(true, rel=0.05)


def test_data_that_call_for_a_negative_base_get_none_and_fit():
    # Through (1, 0.001) and (64, 0.2): the line would start at -0.002.
    estimator = Estimator()
    for _ in range(200):
        estimator.observe_step(0.001, prefill_tokens=0, decode_rows=1)
        estimator.observe_step(0.2, prefill_tokens=0, decode_rows=64)
    assert 0.0 <= estimator.step_s(prefill_tokens=0, decode_rows=0) < 1e-6
    row_s = estimator.step_s(prefill_tokens=0, decode_rows=1)
    # Best through the origin by relative errors lies between 1 and 3.125 ms a row.
    assert 0.001 <= row_s <= 0.2 / 64


def test_two_negative_coefficients_at_once_are_both_zero():
    estimator = Estimator()
    # Prompts and rows seem to save time: the more of them, the shorter the step.
    for _ in range(300):
        estimator.observe_step(1.0, prefill_tokens=1, decode_rows=1)
        estimator.observe_step(0.8, prefill_tokens=500, decode_rows=1)
        estimator.observe_step(0.8, prefill_tokens=1, decode_rows=60)
    for tokens, rows in POINTS:
        found_s = estimator.step_s(prefill_tokens=tokens, decode_rows=rows)
        assert found_s == pytest.approx(0.87, abs=0.08)


def test_step_that_ran_nothing_teaches_nothing():
    estimator = Estimator()
    estimator.observe_step(5.0, prefill_tokens=0, decode_rows=0)
    estimator.observe_load(5.0, num_pages=0)
    assert estimator.step_s(prefill_tokens=0, decode_rows=0) == STEP_PRIOR[0]
    assert estimator.load_line() == LOAD_PRIOR


@pytest.mark.parametrize("duration_s", [-1.0, math.nan, math.inf])
def test_duration_that_cannot_be_is_refused(duration_s):
    estimator = Estimator()
    with pytest.raises(ValueError, match=f"duration_s={duration_s} must be finite"):
        estimator.observe_step(duration_s, prefill_tokens=1, decode_rows=0)
    with pytest.raises(ValueError, match=f"duration_s={duration_s} must be finite"):
        estimator.observe_load(duration_s, num_pages=1)
    assert estimator.load_line() == LOAD_PRIOR


def test_covariance_lost_to_rounding_is_replaced():
    estimator = feed_steps(Estimator(), STEP_PRIOR, 100)
    estimator._step._p = (-1.0, 0.0, 0.0, -1.0, 0.0, -1.0)
    changed = (0.05, 1e-3, 1e-3)
    feed_steps(estimator, changed, 100, seed=1)
    assert worst_error(estimator, changed) < 0.15


def test_negative_counts_are_refused():
    estimator = Estimator()
    with pytest.raises(ValueError, match="prefill_tokens=-1 must not be negative"):
        estimator.observe_step(1.0, prefill_tokens=-1, decode_rows=0)
    with pytest.raises(ValueError, match="decode_rows=-1 must not be negative"):
        estimator.observe_step(1.0, prefill_tokens=0, decode_rows=-1)
    with pytest.raises(ValueError, match="num_pages=-1 must not be negative"):
        estimator.observe_load(1.0, num_pages=-1)


def test_run_adds_load_prefill_and_decode_steps():
    estimator = Estimator()  # 0.02 + 1e-4 * tokens + 1e-4 * rows; 1e-3 + 4e-4 * pages
    found_s = estimator.run_s(
        prefill_tokens=300, output_tokens=11, load_pages=10, decode_rows=5
    )
    load_s = 1e-3 + 4e-4 * 10
    prefill_s = 0.02 + 1e-4 * 300 + 1e-4 * 4
    decode_s = 0.02 + 1e-4 * 5
    assert found_s == pytest.approx(load_s + prefill_s + 10 * decode_s, rel=1e-12)


def test_run_of_one_token_without_load_is_its_prefill_alone():
    estimator = Estimator()
    found_s = estimator.run_s(prefill_tokens=300, output_tokens=1)
    assert found_s == estimator.step_s(prefill_tokens=300, decode_rows=0)


def test_run_after_the_prompt_is_one_decode_step_per_token():
    estimator = Estimator()
    found_s = estimator.run_s(prefill_tokens=0, output_tokens=7, decode_rows=3)
    assert found_s == 7 * estimator.step_s(prefill_tokens=0, decode_rows=3)


OBSERVATIONS = st.lists(
    st.tuples(
        st.sampled_from(["step", "load"]),
        st.floats(0.0, 1e6) | st.sampled_from([0.0, 1e-9, 1e-3, 0.03, 60.0]),
        st.integers(0, 10**6) | st.sampled_from([0, 1, 64, 2048]),
        st.integers(0, 10**5) | st.sampled_from([0, 1, 8, 256]),
    ),
    max_size=60,
)


@given(observations=OBSERVATIONS, repeats=st.integers(1, 8))
def test_any_observations_leave_sane_estimates(observations, repeats):
    estimator, again = Estimator(), Estimator()
    for kind, duration_s, tokens, rows in observations * repeats:
        for one in (estimator, again):
            if kind == "step":
                one.observe_step(duration_s, prefill_tokens=tokens, decode_rows=rows)
            else:
                one.observe_load(duration_s, num_pages=rows)
        base_s, s_per_page = estimator.load_line()
        line = [base_s, s_per_page]
        # More work never takes less time, so no coefficient is negative.
        base_s = estimator.step_s(prefill_tokens=0, decode_rows=0)
        line += [
            base_s,
            estimator.step_s(prefill_tokens=10**6, decode_rows=0) - base_s,
            estimator.step_s(prefill_tokens=0, decode_rows=10**6) - base_s,
        ]
        assert all(0.0 <= value < math.inf for value in line), line
    assert vars(estimator._step) == vars(again._step)  # bit for bit
    assert vars(estimator._load) == vars(again._load)
