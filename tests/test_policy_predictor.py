"""Length predictors: estimates, classes and their confusion, sliding quantiles."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jchameleon.errors import ConfigError
from jchameleon.runtime.policy.predictor import (
    MaxTokens,
    NoisyOracle,
    Oracle,
    Quantile,
)
from jchameleon.runtime.policy.quantile import SlidingQuantile
from jchameleon.runtime.policy.request import Request

CUTS = (42, 141, 294, 503)
MIDDLES = [21, 92, 218, 399, 1276]  # of 1-42, 43-141, 142-294, 295-503, 504-2048
IDENTITY = [[float(row == column) for column in range(5)] for row in range(5)]


def request(expected=None, *, request_id="r", max_tokens=2048, adapter="a"):
    return Request(
        request_id=request_id,
        prompt_tokens=1,
        max_tokens=max_tokens,
        adapter_uid=adapter,
        expected_tokens=expected,
    )


def always(drawn):
    """A matrix that puts every request into class `drawn`."""
    return [[float(column == drawn) for column in range(5)] for _ in range(5)]


def confusion(predictor, num_ids, *, cuts=CUTS, middles=MIDDLES):
    """Return f64[classes, classes], measured over `num_ids` ids per true class."""
    lengths = [1, *(cut + 1 for cut in cuts)]
    seen = np.zeros((len(lengths), len(lengths)))
    for true_class, expected in enumerate(lengths):
        for number in range(num_ids):
            found = predictor.predict(request(expected, request_id=f"id-{number}"))
            seen[true_class, middles.index(found)] += 1
    return seen / num_ids


def test_max_tokens_ignores_the_estimate():
    assert MaxTokens().predict(request(5, max_tokens=9)) == 9


def test_oracle_repeats_the_estimate_or_the_limit():
    predictor = Oracle()
    predictor.observe(request(5), 900)
    assert predictor.predict(request(5)) == 5
    assert predictor.predict(request(None, max_tokens=300)) == 300


@pytest.mark.parametrize(
    ("expected", "predicted"),
    [(1, 21), (42, 21), (43, 92), (141, 92), (142, 218), (294, 218), (295, 399)]
    + [(503, 399), (504, 1276), (2048, 1276)],
)
def test_certain_classifier_gives_the_middle_of_the_class(expected, predicted):
    for options in ({"accuracy": 1.0, "within_one": 1.0}, {"matrix": IDENTITY}):
        assert NoisyOracle(**options).predict(request(expected)) == predicted


@pytest.mark.parametrize(
    ("drawn", "max_tokens", "predicted"),
    [(0, 16, 8), (0, 42, 21), (1, 60, 51), (2, 60, 60), (4, 60, 60), (3, 1, 1)]
    + [(0, 1, 1), (4, 504, 504), (4, 506, 505)],
)
def test_middle_is_that_of_what_the_limit_leaves(drawn, max_tokens, predicted):
    predictor = NoisyOracle(matrix=always(drawn))
    assert predictor.predict(request(1, max_tokens=max_tokens)) == predicted


def test_noisy_oracle_without_an_estimate_gives_the_limit():
    assert NoisyOracle(matrix=always(0)).predict(request(None, max_tokens=300)) == 300


def test_default_confusion_has_the_published_shares():
    # The first and last class have one neighbour and three classes beyond.
    near, far = 0.33, 0.07
    wanted = [
        [0.6, near, far / 3, far / 3, far / 3],
        [near / 2, 0.6, near / 2, far / 2, far / 2],
        [far / 2, near / 2, 0.6, near / 2, far / 2],
        [far / 2, far / 2, near / 2, 0.6, near / 2],
        [far / 3, far / 3, far / 3, near, 0.6],
    ]
    seen = confusion(NoisyOracle(), 20_000)
    np.testing.assert_allclose(seen, wanted, atol=0.015)  # 4 sigma of 0.6 is 0.014


def test_confusion_of_three_classes_gives_unused_shares_to_neighbours():
    predictor = NoisyOracle(cuts=[141, 503], accuracy=0.807, within_one=0.997)
    seen = confusion(predictor, 20_000, cuts=(141, 503), middles=[71, 322, 1276])
    wanted = [[0.807, 0.19, 0.003], [0.0965, 0.807, 0.0965], [0.003, 0.19, 0.807]]
    np.testing.assert_allclose(seen, wanted, atol=0.012)


def test_given_matrix_replaces_accuracy_and_is_read_by_rows():
    matrix = [
        [0.5, 0.5, 0, 0, 0],
        [0, 0, 0, 0, 1],
        [0.1, 0.2, 0.3, 0.25, 0.15],
        [0, 1, 0, 0, 0],
        [0, 0, 0.25, 0, 0.75],
    ]
    seen = confusion(NoisyOracle(matrix=matrix, accuracy=1.0), 4_000)
    np.testing.assert_allclose(seen, matrix, atol=0.03)
    assert not seen[np.array(matrix) == 0].any()


def test_draw_depends_on_seed_and_id_only():
    requests = [request(200, request_id=f"id-{number}") for number in range(300)]
    first = NoisyOracle(seed=3)
    in_order = {r.request_id: first.predict(r) for r in requests}
    second = NoisyOracle(seed=3)
    random.Random(0).shuffle(requests)
    for r in requests:
        second.observe(r, 7)
        second.predict(r)
        assert second.predict(r) == in_order[r.request_id]
    other = NoisyOracle(seed=4)
    assert any(other.predict(r) != in_order[r.request_id] for r in requests)


def test_draw_is_the_same_on_every_machine():
    # The first 8 bytes of BLAKE2b of "0:r", as a fraction, are 0.233332.
    first_row = [0.2333, 0.0001, 0.7666, 0, 0]
    predictor = NoisyOracle(matrix=[first_row, *IDENTITY[1:]])
    assert predictor.predict(request(1)) == 92


def test_any_string_may_be_a_request_id():
    NoisyOracle().predict(request(5, request_id="\ud800"))


@given(
    cuts=st.lists(st.integers(1, 600), min_size=1, max_size=6, unique=True).map(sorted),
    accuracy=st.floats(0, 1),
    within=st.floats(0, 1),
    max_tokens=st.integers(1, 2000),
    share=st.floats(0, 1),
    request_id=st.text(min_size=1),
)
def test_noisy_prediction_is_within_the_limit(
    cuts, accuracy, within, max_tokens, share, request_id
):
    predictor = NoisyOracle(
        cuts=cuts, accuracy=accuracy, within_one=accuracy + within * (1 - accuracy)
    )
    expected = 1 + int(share * (max_tokens - 1))
    made = request(expected, request_id=request_id, max_tokens=max_tokens)
    assert 1 <= predictor.predict(made) <= max_tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cuts": []}, r"cuts=\[\] must be a list of increasing integers"),
        ({"cuts": [5, 5]}, r"cuts=\[5, 5\] must be"),
        ({"cuts": [0, 5]}, r"cuts=\[0, 5\] must be"),
        ({"cuts": [1.5]}, r"cuts=\[1.5\] must be"),
        ({"cuts": "42"}, "cuts='42' must be"),
        ({"accuracy": 1.5}, "accuracy=1.5 must be 0 to 1"),
        ({"accuracy": -0.1}, "accuracy=-0.1 must be"),
        ({"accuracy": "0.6"}, "accuracy='0.6' must be"),
        ({"accuracy": float("nan")}, "accuracy=nan must be"),
        ({"accuracy": True}, "accuracy=True must be"),
        ({"within_one": 0.5}, "within_one=0.5 must be accuracy=0.6 to 1"),
        ({"accuracy": 0.95}, "within_one=0.93 must be accuracy=0.95 to 1"),
        ({"within_one": 1.01}, "within_one=1.01 must be"),
        ({"seed": 1.0}, "seed=1.0 must be an integer"),
        ({"matrix": IDENTITY[:4]}, "must have 5 rows"),
        ({"matrix": 5}, "matrix=5 must have 5 rows"),
        ({"matrix": [*IDENTITY[:4], [0.5] * 5]}, r"matrix\[4\]=.* whose sum is 1"),
        ({"matrix": [[2, -1, 0, 0, 0], *IDENTITY[1:]]}, r"matrix\[0\]=.* >= 0"),
        ({"matrix": [[1.0], *IDENTITY[1:]]}, r"matrix\[0\]=\[1.0\] must be 5 numbers"),
        ({"matrix": [["1", 0, 0, 0, 0], *IDENTITY[1:]]}, r"matrix\[0\]="),
    ],
)
def test_noisy_oracle_with_bad_options_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        NoisyOracle(**options)


@given(
    values=st.lists(st.integers(0, 30), min_size=1, max_size=60),
    window=st.integers(1, 25),
    twentieths=st.integers(1, 20),
)
def test_sliding_quantile_matches_counting(values, window, twentieths):
    sliding = SlidingQuantile(window)
    for number, value in enumerate(values, start=1):
        sliding.add(value)
        last = values[max(number - window, 0) : number]
        assert len(sliding) == len(last)
        covers = [
            x for x in last if 20 * sum(y <= x for y in last) >= twentieths * len(last)
        ]
        assert sliding.at(twentieths / 20) == min(covers)


def test_sliding_quantile_is_not_fooled_by_rounding():
    sliding = SlidingQuantile(100)
    for value in range(1, 101):
        sliding.add(value)
    assert 0.55 * 100 > 55
    assert sliding.at(0.55) == 55


def observe_all(predictor, adapter, outputs):
    for output in outputs:
        predictor.observe(request(adapter=adapter), output)


def test_quantile_of_ten_outputs_is_the_ninth():
    predictor = Quantile()
    observe_all(predictor, "a", [50, 10, 90, 30, 70, 100, 20, 80, 60, 40])
    assert predictor.predict(request(adapter="a")) == 90
    assert Quantile(quantile=0.5).predict(request(max_tokens=77)) == 77


def test_quantile_forgets_what_left_the_window():
    predictor = Quantile(quantile=1.0, window=4, min_samples=1)
    observe_all(predictor, "a", [500, 3, 4, 5])
    assert predictor.predict(request(adapter="a")) == 500
    observe_all(predictor, "a", [6])
    assert predictor.predict(request(adapter="a")) == 6


def test_quantile_keeps_adapters_and_the_base_model_apart():
    predictor = Quantile(min_samples=2, window=8)
    observe_all(predictor, "a", [10, 10])
    observe_all(predictor, None, [200, 200])
    assert predictor.predict(request(adapter="a")) == 10
    assert predictor.predict(request(adapter=None)) == 200


def test_quantile_with_few_samples_falls_back_on_all_then_on_the_limit():
    predictor = Quantile(quantile=0.5, window=8, min_samples=3)
    observe_all(predictor, "a", [10])
    observe_all(predictor, "b", [30])
    assert predictor.predict(request(adapter="a", max_tokens=99)) == 99
    observe_all(predictor, "c", [20])
    assert predictor.predict(request(adapter="a")) == 20  # of 10, 20, 30
    assert predictor.predict(request(adapter="new")) == 20
    observe_all(predictor, "a", [500, 500])
    assert predictor.predict(request(adapter="a")) == 500
    assert predictor.predict(request(adapter="new")) == 30  # of 10, 20, 30, 500, 500


def test_quantile_over_all_adapters_looks_at_four_windows():
    predictor = Quantile(quantile=1.0, window=2, min_samples=2)
    for number in range(8):  # 4 * window outputs behind the 900
        if number == 0:
            observe_all(predictor, "old", [900])
        assert predictor.predict(request(adapter="new")) in (900, 2048)
        observe_all(predictor, f"a{number}", [7])
    assert predictor.predict(request(adapter="new")) == 7


@pytest.mark.parametrize(
    ("output", "max_tokens", "predicted"), [(0, 9, 1), (50, 9, 9), (5, 9, 5)]
)
def test_quantile_is_clipped_to_what_the_request_may(output, max_tokens, predicted):
    predictor = Quantile(min_samples=1)
    observe_all(predictor, "a", [output])
    made = request(adapter="a", max_tokens=max_tokens)
    assert predictor.predict(made) == predicted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantile": 0}, "quantile=0 must be above 0 and at most 1"),
        ({"quantile": 1.1}, "quantile=1.1 must be"),
        ({"quantile": float("nan")}, "quantile=nan must be"),
        ({"quantile": "0.9"}, "quantile='0.9' must be"),
        ({"window": 0}, "window=0 must be a positive integer"),
        ({"window": 8.0}, "window=8.0 must be"),
        ({"min_samples": 0}, "min_samples=0 must be an integer, 1 to window=64"),
        ({"min_samples": 65}, "min_samples=65 must be"),
        ({"window": 4}, "min_samples=8 must be an integer, 1 to window=4"),
    ],
)
def test_quantile_with_bad_options_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Quantile(**options)
