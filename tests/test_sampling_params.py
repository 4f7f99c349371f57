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
        "max_tokens": 16,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "seed": None,
        "stop": (),
        "stop_token_ids": (),
        "ignore_eos": False,
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
)


@given(field=st.sampled_from(dataclasses.fields(SamplingParams)), value=ANY_VALUE)
def test_any_value_is_kept_within_its_limits_or_refused(field, value):
    try:
        params = SamplingParams(**{field.name: value})
    except InvalidRequestError as error:
        assert re.match(rf"{field.name}[ =]", str(error))
        return
    assert 1 <= params.max_tokens <= 1 << 20
    assert 0 <= params.temperature <= 100
    assert 0 <= params.top_k < 2**31
    assert 0 < params.top_p <= 1
    assert params.seed is None or 0 <= params.seed < 2**32
    assert len(params.stop) <= 16 and all(1 <= len(s) <= 256 for s in params.stop)
    assert all(0 <= token_id < 2**31 for token_id in params.stop_token_ids)
    assert dataclasses.replace(params) == params
