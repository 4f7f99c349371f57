"""What a request may ask for, and what is refused by name, value and rule."""

import dataclasses
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jchameleon.errors import InvalidRequestError, JChameleonError
from jchameleon.sampling import SamplingParams

NAN = math.nan
INF = math.inf
HUGE = 10**5000  # Python refuses to print an int this long.


def test_defaults_are_as_documented():
    params = SamplingParams()
    assert dataclasses.asdict(params) == {
        "n": 1,
        "max_tokens": 16,
        "min_tokens": 0,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": (),
        "seed": None,
        "stop": (),
        "stop_token_ids": (),
        "include_stop": False,
        "ignore_eos": False,
        "logprobs": None,
        "prompt_logprobs": None,
        "priority": 0,
        "truncate_prompt_tokens": None,
        "time_limit_s": None,
        "expected_tokens": None,
    }
    assert not params.greedy


@pytest.mark.parametrize("value", [0, 17, True, 1.5, "4"])
def test_expected_tokens_outside_1_to_max_tokens_is_refused(value):
    with pytest.raises(InvalidRequestError, match="expected_tokens="):
        SamplingParams(max_tokens=16, expected_tokens=value)
    assert SamplingParams(max_tokens=16, expected_tokens=16).expected_tokens == 16


def test_params_are_frozen_and_hashable():
    params = SamplingParams(stop=["a"], stop_token_ids=[1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.seed = 1
    assert hash(params) == hash(SamplingParams(stop=("a",), stop_token_ids=(1,)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 1),
        ("max_tokens", 1 << 20),
        ("temperature", 0.0),
        ("temperature", 100.0),
        ("top_k", 0),
        ("top_k", 2**31 - 1),
        ("top_p", 1e-9),
        ("top_p", 1.0),
        ("seed", 0),
        ("seed", 2**32 - 1),
        ("stop", ("x" * 256,) * 16),
        ("stop_token_ids", tuple(range(64))),
        ("ignore_eos", True),
        ("n", 64),
        ("min_tokens", 16),
        ("min_p", 0.0),
        ("min_p", 1.0),
        ("repetition_penalty", 0.01),
        ("repetition_penalty", 100.0),
        *[
            (f"{kind}_penalty", v)
            for kind in ("presence", "frequency")
            for v in (-2, 2)
        ],
        ("logit_bias", tuple((i, 100.0) for i in range(300))),
        ("include_stop", True),
        *[(field, v) for field in ("logprobs", "prompt_logprobs") for v in (0, 20)],
        ("priority", -(2**31 - 1)),
        ("priority", 2**31 - 1),
        ("truncate_prompt_tokens", 1),
        ("time_limit_s", 1e-9),
        ("time_limit_s", 604800.0),
    ],
)
def test_value_at_the_limit_is_kept(field, value):
    assert getattr(SamplingParams(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("max_tokens", v) for v in (0, -1, (1 << 20) + 1, 2**32 - 1, 1.0, NAN)],
        *[("max_tokens", v) for v in (True, "8", None, [8])],
        *[("temperature", v) for v in (NAN, INF, -INF, -0.1, -1e-30, 100.1)],
        *[("temperature", v) for v in (True, "1", None, 1j)],
        *[("top_k", v) for v in (-1, 2**31, 1.5, NAN, False, None)],
        *[("top_p", v) for v in (0.0, 0, -0.1, 1.0001, NAN, INF, True, None)],
        *[("seed", v) for v in (-1, 2**32, 1.0, NAN, True, "1")],
        *[("stop", v) for v in ([""], "", ["x" * 257], ["x"] * 17, ["x"] * 100_000)],
        *[("stop", v) for v in (b"x", [b"x"], [1], 1, None, {"x"}, ["a", None])],
        *[("stop_token_ids", v) for v in ([-1], [2**31], [2**32 - 1], [1.0], [True])],
        *[
            ("stop_token_ids", v)
            for v in (list(range(65)), "12", b"12", 5, None, [2**40])
        ],
        *[("ignore_eos", v) for v in (1, 0, None, "no")],
        *[("include_stop", v) for v in (1, 0, None, "no")],
        *[("n", v) for v in (0, -1, 65, 10**6, 1.0, NAN, True, None, "2")],
        *[("min_tokens", v) for v in (-1, 17, 1.0, NAN, True, None)],
        *[("min_p", v) for v in (-0.1, 1.0001, NAN, INF, True, None, "0")],
        *[
            ("repetition_penalty", v)
            for v in (0, 0.0, 1e-30, -1.0, 100.1, NAN, INF, -INF, True, None)
        ],
        *[
            (f"{kind}_penalty", v)
            for kind in ("presence", "frequency")
            for v in (-2.1, 2.1, NAN, INF, -INF, True, None, "0")
        ],
        *[("logit_bias", {5: v}) for v in (NAN, INF, -INF, 100.1, -101, None, "1")],
        *[("logit_bias", {v: 1.0}) for v in (-1, 2**31, 1.0, "1", True, None)],
        ("logit_bias", {i: 0.0 for i in range(301)}),
        *[("logit_bias", v) for v in (None, [(1, 1.0)], ((1, 1.0), (1, 2.0)), 5, "1")],
        *[
            ("logit_bias", v)
            for v in ((1,), ((1, 2.0, 3),), {i: 0.0 for i in range(10**5)})
        ],
        *[
            (field, v)
            for field in ("logprobs", "prompt_logprobs")
            for v in (-1, 21, 10**6, 1.0, NAN, True, "1")
        ],
        *[("priority", v) for v in (2**31, -(2**31), 0.0, NAN, True, None, "1")],
        *[("truncate_prompt_tokens", v) for v in (0, -1, 2**21, 1.0, NAN, True, "1")],
        *[("time_limit_s", v) for v in (0, -1, NAN, INF, 604801, True, "1")],
    ],
)
def test_wrong_value_is_refused_in_one_line_that_names_the_field(field, value):
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{field: value})
    message = str(caught.value)
    assert message.startswith(field)
    assert "\n" not in message
    assert len(message) < 200
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, JChameleonError)


@pytest.mark.parametrize(
    "field", ["max_tokens", "temperature", "top_k", "top_p", "seed", "stop_token_ids"]
)
def test_integer_too_long_to_print_is_refused_all_the_same(field):
    value = [HUGE] if field == "stop_token_ids" else HUGE
    with pytest.raises(InvalidRequestError, match=f"^{field}=<int: ValueError> must"):
        SamplingParams(**{field: value})


def test_message_gives_value_and_rule():
    with pytest.raises(InvalidRequestError, match=r"temperature=nan .* 0 to 100"):
        SamplingParams(temperature=NAN)
    with pytest.raises(InvalidRequestError, match=r"max_tokens=0 .* 1 to 1048576"):
        SamplingParams(max_tokens=0)
    with pytest.raises(InvalidRequestError, match=r"17 strings; at most 16"):
        SamplingParams(stop=["x"] * 17)
    with pytest.raises(InvalidRequestError, match=r"257 characters.* 1 to 256"):
        SamplingParams(stop=["x" * 257])


@pytest.mark.parametrize(
    ("temperature", "greedy"),
    [(0.0, True), (1e-30, True), (9.9e-6, True), (1e-5, False), (0.7, False)],
)
def test_greedy_is_a_temperature_below_1e_5(temperature, greedy):
    assert SamplingParams(temperature=temperature).greedy is greedy


def test_one_stop_string_stands_for_a_list_of_one():
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_numpy_scalars_become_python_numbers():
    params = SamplingParams(
        max_tokens=np.int64(3), temperature=np.float32(0.5), seed=np.uint32(7)
    )
    assert [type(v) for v in (params.max_tokens, params.temperature, params.seed)] == [
        int,
        float,
        int,
    ]
    assert type(SamplingParams(temperature=1).temperature) is float


def test_several_completions_of_a_greedy_request_are_refused():
    with pytest.raises(InvalidRequestError, match=r"n=2 must be 1 at temperature=0"):
        SamplingParams(n=2, temperature=0.0)
    assert SamplingParams(n=2, temperature=0.1).n == 2


def test_logit_bias_is_kept_as_pairs_in_the_order_of_ids():
    params = SamplingParams(logit_bias={np.int32(7): 1, 3: -2.5})
    assert params.biases == ((3, -2.5), (7, 1.0))
    assert dataclasses.replace(params, n=3).biases == params.biases
    assert hash(params) == hash(SamplingParams(logit_bias={3: -2.5, 7: 1.0}))


def test_validate_for_refuses_a_biased_id_outside_the_vocabulary():
    params = SamplingParams(logit_bias={5: 1.0, 258: 1.0})
    params.validate_for(259)
    with pytest.raises(InvalidRequestError, match=r"logit_bias has 258, .* 258"):
        params.validate_for(258)


def test_validate_for_refuses_a_stop_id_outside_the_vocabulary():
    params = SamplingParams(stop_token_ids=[5, 258])
    params.validate_for(259)
    with pytest.raises(InvalidRequestError, match=r"258, outside .* 258"):
        params.validate_for(258)


ANY_VALUE = st.one_of(
    st.integers(),
    st.floats(),
    st.none(),
    st.booleans(),
    st.text(max_size=300),
    st.lists(st.one_of(st.text(max_size=3), st.integers()), max_size=20),
    st.dictionaries(st.integers(), st.floats(), max_size=3),
)


@given(field=st.sampled_from(dataclasses.fields(SamplingParams)), value=ANY_VALUE)
def test_any_value_is_kept_within_its_limits_or_refused(field, value):
    try:
        params = SamplingParams(**{field.name: value})
    except InvalidRequestError as error:
        assert re.match(rf"{field.name}[ =\[]", str(error))
        return
    assert 1 <= params.max_tokens <= 1 << 20
    assert 0 <= params.temperature <= 100
    assert 0 <= params.top_k < 2**31
    assert 0 < params.top_p <= 1
    assert params.seed is None or 0 <= params.seed < 2**32
    assert len(params.stop) <= 16 and all(1 <= len(s) <= 256 for s in params.stop)
    assert all(0 <= token_id < 2**31 for token_id in params.stop_token_ids)
    assert 1 <= params.n <= 64
    assert 0 <= params.min_tokens <= params.max_tokens
    assert 0 <= params.min_p <= 1
    assert 0.01 <= params.repetition_penalty <= 100
    assert abs(params.presence_penalty) <= 2 and abs(params.frequency_penalty) <= 2
    assert all(0 <= i < 2**31 and abs(bias) <= 100 for i, bias in params.biases)
    for top in (params.logprobs, params.prompt_logprobs):
        assert top is None or 0 <= top <= 20
    assert abs(params.priority) < 2**31
    keep = params.truncate_prompt_tokens
    assert keep is None or 1 <= keep <= 1 << 20
    assert params.time_limit_s is None or 0 < params.time_limit_s <= 604800
    assert dataclasses.replace(params) == params
