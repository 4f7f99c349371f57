"""Edited logits against transformers' processors and loops over the vocabulary."""

import functools

import jax
import numpy as np
import pytest
from engine_harness import import_oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from jchameleon.runtime.edits import RowEdits, edit, edit_lists, edits_width
from jchameleon.sampling import SamplingParams

VOCAB = 40
END = (3, 39)
compiled_edit = jax.jit(edit)
LEAST = np.finfo(np.float32).min


@pytest.fixture(scope="module")
def oracle():
    with import_oracle() as oracle:
        yield oracle


def apply(logits, rows, *, width=None):
    """Edit f32[V, R] by (row, RowEdits)."""
    vocab_size, num_rows = logits.shape
    width = width or edits_width(num_rows)
    for lists in edit_lists(rows, width=width, vocab_size=vocab_size):
        logits = compiled_edit(logits, *lists)
    return np.asarray(logits)


def row_edits(sampling, prompt, output, end_token_ids=END):
    edits = RowEdits(sampling, np.int32(prompt), end_token_ids=end_token_ids)
    for token in output:
        edits.add(token)
    return edits


def by_loop(logits, sampling, prompt, output, end_token_ids=END):
    """Return one column as vLLM's documentation has it, in float64."""
    out = logits.astype(np.float64)
    for token, bias in sampling.biases:
        out[token] += bias
    for token in set(prompt) | set(output):
        factor = sampling.repetition_penalty
        out[token] = out[token] / factor if out[token] > 0 else out[token] * factor
    for token in set(output):
        out[token] -= sampling.frequency_penalty * output.count(token)
        out[token] -= sampling.presence_penalty
    if len(output) < sampling.min_tokens:
        for token in end_token_ids:
            out[token] = LEAST
    return out


def random_logits(seed, num_rows, vocab_size=VOCAB):
    rng = np.random.default_rng(seed)
    return (4 * rng.standard_normal((vocab_size, num_rows))).astype(np.float32)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 7.0])
def test_repetition_penalty_is_that_of_transformers(oracle, penalty):
    prompt, output = [5, 9, 9, 0], [7, 5, 39, 7]
    logits = random_logits(0, 1)
    edits = row_edits(SamplingParams(repetition_penalty=penalty), prompt, output)
    processor = oracle.transformers.RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(
        oracle.torch.tensor([prompt + output]), oracle.torch.from_numpy(logits.T.copy())
    )
    # Theirs multiplies by the rounded reciprocal.
    np.testing.assert_allclose(
        apply(logits, [(0, edits)])[:, 0], expected[0].numpy(), rtol=1e-6
    )


@pytest.mark.parametrize("penalty", [-2.0, 0.7, 2.0])
def test_presence_penalty_counts_output_tokens_once_and_no_prompt(penalty):
    prompt, output = [5, 9, 9, 0], [7, 5, 39, 7]
    logits = random_logits(1, 1)
    edits = row_edits(SamplingParams(presence_penalty=penalty), prompt, output)
    expected = logits[:, 0].copy()
    for token in (7, 5, 39):
        expected[token] -= np.float32(penalty)
    assert (apply(logits, [(0, edits)])[:, 0] == expected).all()


@pytest.mark.parametrize("penalty", [-2.0, 0.7, 2.0])
def test_frequency_penalty_counts_output_tokens_each_time(penalty):
    prompt, output = [5, 9, 9, 0], [7, 5, 39, 7, 7]
    logits = random_logits(2, 1)
    edits = row_edits(SamplingParams(frequency_penalty=penalty), prompt, output)
    expected = logits[:, 0].copy()
    for token, count in ((7, 3), (5, 1), (39, 1)):
        expected[token] -= np.float32(penalty * count)
    assert (apply(logits, [(0, edits)])[:, 0] == expected).all()


def test_logit_bias_is_added():
    logits = random_logits(3, 2)
    biases = {0: 100.0, 39: -100.0, 17: 0.25}
    edits = row_edits(SamplingParams(logit_bias=biases), [1, 2], [17])
    expected = logits.copy()
    for token, bias in biases.items():
        expected[token, 1] += np.float32(bias)
    assert (apply(logits, [(1, edits)]) == expected).all()


def test_end_tokens_are_banned_until_min_tokens_are_there():
    logits = random_logits(4, 1)
    edits = row_edits(SamplingParams(min_tokens=2), [3, 1], [])
    banned = logits[:, 0].copy()
    banned[list(END)] = LEAST
    for token in (8, 9):
        assert (apply(logits, [(0, edits)])[:, 0] == banned).all()
        assert not edits.over
        edits.add(token)
    assert edits.over
    assert (apply(logits, [(0, edits)]) == logits).all()


SAMPLING = st.builds(
    functools.partial(SamplingParams, max_tokens=100),
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.7]),
    presence_penalty=st.sampled_from([0.0, -1.0, 0.3]),
    frequency_penalty=st.sampled_from([0.0, -0.7, 0.9]),
    min_tokens=st.integers(0, 8),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100)),
)
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=60)


@settings(max_examples=100)
@given(
    st.lists(st.tuples(SAMPLING, TOKENS.filter(bool), TOKENS), min_size=1, max_size=4),
    st.sampled_from([7, 64]),
    st.integers(0, 99),
)
def test_any_edits_of_a_step_agree_with_a_loop_over_the_vocabulary(rows, width, seed):
    """All rows but the second are edited, through as many lists as it takes."""
    logits = random_logits(seed, 5)
    # Before min_tokens are there an end token is never drawn.
    rows = [(s, p, [t for t in o if t not in END]) for s, p, o in rows]
    columns = [0, 2, 3, 4]
    edits = [
        (column, row_edits(*row)) for column, row in zip(columns, rows, strict=False)
    ]
    found = apply(logits, edits, width=width)
    expected = logits.astype(np.float64)
    for column, row in zip(columns, rows, strict=False):
        expected[:, column] = by_loop(logits[:, column], *row)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)
    untouched = [c for c in range(5) if c not in columns[: len(rows)]]
    assert (found[:, untouched] == logits[:, untouched]).all()


def test_context_of_4096_distinct_tokens_is_penalised_to_the_last():
    vocab_size = 9000
    tokens = np.random.default_rng(5).permutation(vocab_size)[:4096].tolist()
    sampling = SamplingParams(
        max_tokens=4096,
        repetition_penalty=1.5,
        frequency_penalty=0.5,
        logit_bias={i: 1.0 for i in range(300)},
    )
    logits = random_logits(6, 1, vocab_size)
    row = sampling, tokens[:2000], tokens[2000:] + tokens[:9]
    found = apply(logits, [(0, row_edits(*row, end_token_ids=()))])
    expected = by_loop(logits[:, 0], *row, end_token_ids=())
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_stay_so_where_they_are_edited(bad):
    logits = random_logits(7, 1)
    logits[3] = bad
    for sampling in (
        SamplingParams(min_tokens=2),
        SamplingParams(logit_bias={3: 1.0}),
        SamplingParams(repetition_penalty=2.0),
    ):
        found = apply(logits, [(0, row_edits(sampling, [3], []))])
        assert np.isnan(found[3, 0])
        assert np.isfinite(np.delete(found[:, 0], 3)).all()


def test_largest_logits_stay_finite():
    logits = np.full((VOCAB, 1), 3.4e38, np.float32)
    logits[1] = -3.4e38
    sampling = SamplingParams(
        repetition_penalty=0.01, presence_penalty=-2, logit_bias={0: 100.0}
    )
    found = apply(logits, [(0, row_edits(sampling, [0, 1], [0, 1]))])
    assert np.isfinite(found).all()
    sampling = SamplingParams(repetition_penalty=100.0)
    assert np.isfinite(apply(logits, [(0, row_edits(sampling, [0, 1], []))])).all()
