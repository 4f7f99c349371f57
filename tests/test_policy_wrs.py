"""Weighted request sizes in worked numbers."""

import numpy as np
import pytest

from jchameleon.runtime.policy.wrs import LargestSeen, rank_chunks


@pytest.mark.parametrize(
    ("rank", "chunks"), [(0, 1), (1, 1), (8, 1), (9, 2), (16, 2), (100, 13), (128, 16)]
)
def test_adapter_size_counts_chunks_of_rank_8_and_the_base_model_as_one(rank, chunks):
    assert rank_chunks(rank) == chunks


def test_wrs_matches_worked_numbers():
    largest = LargestSeen(prompt_tokens=200, predicted_tokens=100, chunks=16)
    # (0.4 * 100/200 + 0.6 * 50/100) * 8/16
    assert largest.wrs(100, 50, 8) == pytest.approx(0.25)
    # Output weighs more than the prompt.
    assert largest.wrs(200, 50, 16) == pytest.approx(0.7)
    assert largest.wrs(100, 100, 16) == pytest.approx(0.8)
    # The bare base model is as small as the smallest adapter, not 0.
    assert largest.wrs(200, 100, rank_chunks(0)) == pytest.approx(1 / 16)
    assert largest.wrs(200, 100, 16) == 1.0


def test_maxima_only_grow():
    largest = LargestSeen()
    largest.see(prompt_tokens=30, predicted_tokens=7)
    largest.see(prompt_tokens=20, predicted_tokens=9, chunks=4)
    largest.see(chunks=2)
    assert largest == LargestSeen(prompt_tokens=30, predicted_tokens=9, chunks=4)


def test_wrs_of_arrays_equals_that_of_each_request_to_the_last_bit():
    rng = np.random.default_rng(0)
    largest = LargestSeen(prompt_tokens=777, predicted_tokens=1023, chunks=13)
    columns = rng.integers(1, [[778], [1024], [14]], (3, 1000))
    together = largest.wrs(*columns.astype(np.float64))
    one_by_one = [largest.wrs(*row) for row in columns.T.tolist()]
    assert together.tolist() == one_by_one
