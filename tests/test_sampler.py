"""The sampler against sorting in numpy, and its draws against the distribution."""

import functools

import jax
import numpy as np
import pytest
from engine_harness import import_oracle
from hypothesis import given
from hypothesis import strategies as st

from jchameleon.runtime.sampler import (
    INVALID_TOKEN,
    SamplingBatch,
    empty_sampling,
    first_best,
    kept_tokens,
    kth_largest,
    mass_threshold,
    sample,
)

compiled_sample = jax.jit(sample)
compiled_kept_min_p = jax.jit(kept_tokens)
compiled_kth = jax.jit(kth_largest)
compiled_mass = jax.jit(mass_threshold)

ROWS, VOCAB = 16, 24
SMALLEST_NORMAL = np.float32(2.0**-126)


def compiled_kept(scaled, top_k, top_p):
    return compiled_kept_min_p(scaled, top_k, top_p, np.zeros_like(top_p))


def sampling(num_rows, **values):
    fields = empty_sampling(num_rows)
    for name, value in values.items():
        fields[name][...] = value
    return SamplingBatch(**fields)


def draw(logits, **values):
    logits = np.asarray(logits, np.float32)
    return np.asarray(compiled_sample(logits, sampling(logits.shape[1], **values)))


def seeds(num_rows, *, start=0):
    """Return u32[rows, 2], a different seed for each row."""
    return np.stack([np.full(num_rows, 7), np.arange(start, start + num_rows)], axis=1)


def kept_by_sorting(scaled, top_k, top_p):
    """Return (bool[V] kept, closeness) of one row, in float64.

    Closeness is how far, relative to all mass, the nearest cumulative sum is from
    top_p: nearer than float32 sums tell apart, another set is as good.
    """
    order = np.sort(scaled)[::-1]
    limit = order[min(top_k, len(order)) - 1] if top_k else order[-1]
    kept = scaled >= limit
    if top_p >= 1:
        return kept, 1.0
    heaviest = np.sort(np.exp(scaled[kept].astype(np.float64)))[::-1]
    mass = np.cumsum(heaviest) / heaviest.sum()
    last = int(np.argmax(mass >= top_p))
    weight = np.exp(scaled.astype(np.float64))
    return kept & (weight >= heaviest[last]), np.abs(mass - top_p).min()


def random_scaled(rng, *, step=None):
    scaled = rng.standard_normal((VOCAB, ROWS)) * rng.uniform(0.1, 8, ROWS)
    if step is not None:
        scaled = np.round(scaled / step) * step  # ties
    scaled = scaled.astype(np.float32)
    return scaled - scaled.max(axis=0)


@pytest.mark.parametrize("step", [None, 0.5, 2.0])
def test_kept_tokens_match_sorting(step):
    rng = np.random.default_rng(0)
    compared = 0
    for _ in range(60):
        scaled = random_scaled(rng, step=step)
        top_k = rng.choice([0, 1, 2, 5, VOCAB - 1, VOCAB, VOCAB + 9], ROWS)
        top_p = rng.choice([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0, rng.random()], ROWS)
        top_k, top_p = top_k.astype(np.int32), top_p.astype(np.float32)
        found = np.asarray(compiled_kept(scaled, top_k, top_p))
        for row in range(ROWS):
            column = scaled[:, row]
            expected, closeness = kept_by_sorting(column, top_k[row], top_p[row])
            if closeness < 1e-6:
                continue
            compared += 1
            assert (found[:, row] == expected).all(), (column, top_k[row], top_p[row])
    assert compared > 0.98 * 60 * ROWS


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_kept_tokens_are_those_of_the_warpers_of_transformers(temperature):
    with import_oracle() as oracle:
        rng = np.random.default_rng(1)
        logits = (3 * rng.standard_normal((VOCAB, 200))).astype(np.float32)
        top_k = rng.choice([0, 1, 3, 12], 200).astype(np.int32)
        top_p = rng.choice([1.0, 0.5, 0.9], 200).astype(np.float32)
        min_p = rng.choice([0.0, 0.05, 0.3, 1.0], 200).astype(np.float32)
        scaled = (logits - logits.max(axis=0)) / np.float32(temperature)
        found = np.asarray(compiled_kept_min_p(scaled, top_k, top_p, min_p))
        cut = 0
        for row in range(200):
            warpers = [oracle.transformers.TemperatureLogitsWarper(temperature)]
            if top_k[row]:
                warpers.append(oracle.transformers.TopKLogitsWarper(int(top_k[row])))
            warpers.append(oracle.transformers.TopPLogitsWarper(float(top_p[row])))
            warpers.append(oracle.transformers.MinPLogitsWarper(float(min_p[row])))
            scores = oracle.torch.from_numpy(logits[:, row].copy())[None]
            for warper in warpers:
                before = scores
                scores = warper(None, scores)
            cut += bool((scores != before).any())
            expected = np.isfinite(scores[0].numpy())
            assert (found[:, row] == expected).all(), (top_k[row], top_p[row])
    assert cut > 50, "min-p must matter"


def test_kept_tokens_min_p_is_relative_to_the_best_and_after_top_p():
    # Of the likeliest two of three, 0.5 and 0.3, the second is 0.6 of the first.
    scaled = np.log(np.float32([[0.5, 0.3, 0.2]]).T / 0.5)
    args = np.int32([0]), np.float32([0.7])
    for min_p, expected in ((0.0, 2), (0.59, 2), (0.61, 1), (1.0, 1)):
        found = compiled_kept_min_p(scaled, *args, np.float32([min_p]))
        assert np.asarray(found).sum() == expected, min_p


def test_kept_tokens_top_k_keeps_ties_with_the_last():
    scaled = np.float32([[0, -1, -1, -1, -2, 0]]).T
    for top_k, expected in ((1, 2), (2, 2), (3, 5), (5, 5), (6, 6), (0, 6)):
        found = compiled_kept(scaled, np.int32([top_k]), np.float32([1]))
        assert np.asarray(found).sum() == expected, top_k


def test_kept_tokens_top_p_keeps_ties_with_the_last():
    scaled = np.log(np.float32([[4, 2, 2, 2, 1, 1]]).T / 4)  # mass 4 2 2 2 1 1 of 12
    for top_p, expected in ((0.3, 1), (0.34, 4), (0.8, 4), (0.84, 6), (1.0, 6)):
        found = compiled_kept(scaled, np.int32([0]), np.float32([top_p]))
        assert np.asarray(found).sum() == expected, top_p


def test_kept_tokens_top_p_counts_mass_among_top_k():
    scaled = np.log(np.float32([[4, 2, 1, 1, 1, 1]]).T / 4)
    # Of all 10 the best two are 0.6; of the best two themselves 4 / 6 is 0.67.
    kept = functools.partial(compiled_kept, scaled, top_p=np.float32([0.65]))
    assert np.asarray(kept(top_k=np.int32([0]))).sum() == 6
    assert np.asarray(kept(top_k=np.int32([2]))).sum() == 1


def test_kept_tokens_limits_of_one_keep_every_token_of_a_long_tail():
    """Terms too small to change a float32 sum are still tokens that may be drawn."""
    scaled = np.full((4096, 1), -20, np.float32)
    scaled[17] = 0
    everything = compiled_kept(scaled, np.int32([0]), np.float32([1]))
    assert np.asarray(everything).all()
    best = compiled_kept(scaled, np.int32([0]), np.float32([1e-6]))
    assert np.flatnonzero(np.asarray(best)).tolist() == [17]


@st.composite
def float_columns(draw):
    """Return f32[VOCAB, 1] without NaN or infinity, often with duplicates."""
    floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
    pool = draw(st.lists(floats, min_size=1, max_size=VOCAB))
    picks = st.integers(0, len(pool) - 1)
    column = [pool[draw(picks)] for _ in range(VOCAB)]
    return np.array(column, np.float32)[:, None]


def flush(values):
    """Take subnormals as zero, which XLA:CPU does when it compares."""
    return np.where(np.abs(values) < SMALLEST_NORMAL, np.float32(0), values)


@given(float_columns(), st.integers(1, VOCAB))
def test_kth_largest_is_exact(column, k):
    found = np.asarray(compiled_kth(column, np.int32([k])))
    expected = np.sort(flush(column[:, 0]))[::-1][k - 1]
    assert flush(found)[0] == expected


def test_kth_largest_every_k_of_extreme_values():
    top = np.finfo(np.float32).max
    values = [top, -top, 0.0, -0.0, 1, 1, -1, 2.0**-126, -(2.0**-126), 1e-45, -1e-45]
    column = np.float32(values)[:, None]
    expected = np.sort(flush(column[:, 0]))[::-1]
    columns = np.repeat(column, len(values), axis=1)
    found = compiled_kth(columns, np.arange(1, len(values) + 1, dtype=np.int32))
    assert flush(np.asarray(found)).tolist() == expected.tolist()


def test_kth_largest_random_columns_are_exact():
    rng = np.random.default_rng(0)
    columns = rng.standard_normal((1000, 64), dtype=np.float32)
    k = rng.integers(1, 1001, 64).astype(np.int32)
    expected = -np.sort(-columns, axis=0)[k - 1, np.arange(64)]
    assert (np.asarray(compiled_kth(columns, k)) == expected).all()


def test_mass_threshold_is_the_weight_that_completes_the_mass():
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 60, (VOCAB, ROWS)).astype(np.float32)  # exact sums
    needed = np.ceil(weights.sum(axis=0) * rng.random(ROWS)).astype(np.float32)
    found = np.asarray(compiled_mass(weights, needed))
    for row in range(ROWS):
        order = np.sort(weights[:, row])[::-1]
        # The sum over weights >= t counts ties with t as one.
        sums = np.array([order[order >= t].sum() for t in order])
        assert found[row] == order[np.argmax(sums >= needed[row])]


@given(float_columns())
def test_first_best_is_numpys_argmax(column):
    assert jax.jit(first_best)(column)[0] == flush(column).argmax()


def test_greedy_takes_the_first_of_the_best():
    logits = np.random.default_rng(0).standard_normal((VOCAB, ROWS))
    assert (draw(logits) == logits.argmax(axis=0)).all()
    logits[[5, 9]] = 50
    assert (draw(logits) == 5).all()
    # Greedy rows stay so in the company of drawn ones.
    warm = np.where(np.arange(ROWS) % 2, 1.0, 0.0)
    assert (draw(logits, temperature=warm, seed=seeds(ROWS))[::2] == 5).all()


@pytest.mark.parametrize("limits", [{"top_k": 1}, {"top_p": 1e-6}, {"top_p": 1e-30}])
@pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
def test_draw_with_tight_limits_is_the_best(limits, temperature):
    logits = np.random.default_rng(1).standard_normal((VOCAB, ROWS))
    found = draw(logits, temperature=temperature, seed=seeds(ROWS), **limits)
    assert (found == logits.argmax(axis=0)).all()


def test_draw_at_low_temperature_is_the_best():
    logits = np.random.default_rng(2).permuted(
        np.tile(np.arange(VOCAB), (ROWS, 1)).T, axis=0
    )
    for temperature in (0.01, 1e-5):
        found = draw(logits, temperature=temperature, seed=seeds(ROWS))
        assert (found == logits.argmax(axis=0)).all()


@pytest.mark.parametrize("temperature", [1e-5, 0.5, 1.0, 100.0])
def test_draw_from_huge_logits_is_the_best(temperature):
    logits = np.full((VOCAB, ROWS), -3e38)
    best = np.arange(ROWS) % VOCAB
    logits[best, np.arange(ROWS)] = 3e38
    logits[(best + 1) % VOCAB, np.arange(ROWS)] = 1e38
    found = draw(logits, temperature=temperature, seed=seeds(ROWS))
    assert (found == best).all()


DRAWS = 20_000
LOGITS = np.float32([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, 1.5])


def probabilities(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    scaled = (LOGITS - LOGITS.max()) / np.float32(temperature)
    kept, _ = kept_by_sorting(scaled, top_k, top_p)
    kept &= np.exp(scaled) >= min_p
    weights = np.where(kept, np.exp(scaled.astype(np.float64)), 0.0)
    return weights / weights.sum()


def chi_square(counts, expected):
    """Return Pearson's statistic over the cells that can occur, and those cells."""
    possible = expected > 0
    assert not counts[~possible].any()
    error = counts[possible] - expected[possible]
    return (error**2 / expected[possible]).sum(), possible.sum()


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 100.0},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 0.8, "top_k": 6, "top_p": 0.7},
        {"temperature": 1.0, "min_p": 0.2},
    ],
)
@pytest.mark.parametrize("varies", ["seed", "position"])
def test_draws_follow_the_distribution(values, varies):
    logits = np.repeat(LOGITS[:, None], DRAWS, axis=1)
    row = {"seed": seeds(DRAWS)} if varies == "seed" else {"position": np.arange(DRAWS)}
    found = draw(logits, **values, **row)
    expected = DRAWS * probabilities(**values)
    statistic, cells = chi_square(np.bincount(found, minlength=8), expected)
    # 1e-5 of the distribution with `cells - 1` <= 7 degrees of freedom lies beyond.
    assert statistic < 36, (statistic, cells)


def test_draws_of_following_positions_are_independent():
    logits = np.repeat(LOGITS[:, None], DRAWS, axis=1)
    found = draw(logits, temperature=1.0, seed=[3, 4], position=np.arange(DRAWS))
    pairs = np.bincount(found[:-1] * 8 + found[1:], minlength=64)
    expected = (DRAWS - 1) * np.outer(probabilities(), probabilities()).ravel()
    statistic, _ = chi_square(pairs, expected)
    assert statistic < 125  # 1e-5 beyond, 63 degrees of freedom


def test_draws_of_other_seeds_or_positions_differ():
    logits = np.zeros((VOCAB, ROWS))
    base = draw(logits, temperature=1.0, seed=seeds(ROWS))
    again = draw(logits, temperature=1.0, seed=seeds(ROWS))
    assert (base == again).all()
    assert len(set(base.tolist())) > 4
    others = [
        {"seed": seeds(ROWS, start=ROWS)},
        {"seed": seeds(ROWS)[:, ::-1]},
        {"seed": seeds(ROWS), "position": 1},
    ]
    for other in others:
        assert (draw(logits, temperature=1.0, **other) != base).sum() > ROWS // 2


def row_values(num_rows, rng):
    """Return random logits f32[V, rows] and sampling values of every kind."""
    values = {
        "temperature": rng.choice([0.0, 0.7, 1.0, 3.0], num_rows),
        "top_k": rng.choice([0, 1, 5, 20], num_rows),
        "top_p": rng.choice([1.0, 0.5, 0.9], num_rows),
        "min_p": rng.choice([0.0, 0.1, 0.5], num_rows),
        "seed": rng.integers(0, 2**32, (num_rows, 2), dtype=np.uint32),
        "position": rng.integers(0, 9000, num_rows),
    }
    return rng.standard_normal((VOCAB, num_rows)) * 2, values


def test_row_draws_the_same_in_any_company_and_place():
    rng = np.random.default_rng(3)
    logits, values = row_values(40, rng)
    alone = [
        draw(logits[:, [i]], **{name: v[[i]] for name, v in values.items()})[0]
        for i in range(40)
    ]
    for num_rows in (4, ROWS, ROWS, ROWS, ROWS):
        rows = rng.permutation(40)[:num_rows]
        found = draw(logits[:, rows], **{name: v[rows] for name, v in values.items()})
        assert found.tolist() == [alone[i] for i in rows]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("whole_row", [False, True])
def test_logits_not_finite_fail_their_row_alone(bad, whole_row):
    logits, values = row_values(ROWS, np.random.default_rng(4))
    values["temperature"][:4] = [0.0, 0.0, 1.0, 1.0]
    clean = draw(logits, **values)
    poisoned = logits.copy()
    poisoned[slice(None) if whole_row else VOCAB - 1, [0, 3, 7]] = bad
    expected = clean.copy()
    expected[[0, 3, 7]] = INVALID_TOKEN
    assert (clean >= 0).all()
    assert (draw(poisoned, **values) == expected).all()
    assert draw(poisoned).tolist()[:2] == [INVALID_TOKEN, logits[:, 1].argmax()]
