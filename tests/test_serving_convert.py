"""Requests of the protocol as sampling parameters; equal ones are read once."""

import dataclasses

import numpy as np
import pytest

from jchameleon.errors import InvalidRequestError
from jchameleon.runtime.submission import prompt_array
from jchameleon.sampling import SamplingParams
from jchameleon.serving import convert
from jchameleon.serving.proto.jchameleon.v1 import inference_pb2 as pb


def request(**fields):
    return pb.GenerateRequest(
        sampling=pb.SamplingParams(temperature=0.5, seed=3),
        stopping=pb.StoppingCriteria(max_new_tokens=9, stop=["end"]),
        response=pb.ResponseOptions(logprobs=2),
        **fields,
    )


def params(message):
    return convert.sampling_params(message, deadline_s=None)


PLAIN = SamplingParams(temperature=0.5, seed=3, max_tokens=9, stop=("end",), logprobs=2)


def test_equal_requests_share_their_parameters():
    assert params(request()) == PLAIN
    assert params(request(text="another prompt")) is params(request())


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        (lambda m: m.sampling.ClearField("seed"), {"seed": None}),
        (lambda m: m.sampling.logit_bias.update({7: 1.5}), {"logit_bias": {7: 1.5}}),
        (lambda m: m.stopping.stop_token_ids.append(4), {"stop_token_ids": (4,)}),
        (lambda m: setattr(m.stopping, "ignore_eos", True), {"ignore_eos": True}),
        (lambda m: setattr(m.response, "prompt_logprobs", 1), {"prompt_logprobs": 1}),
        (lambda m: setattr(m.response, "logprobs", 0), {"logprobs": 0}),
        (lambda m: setattr(m, "priority", -2), {"priority": -2}),
        (
            lambda m: setattr(m, "truncate_prompt_tokens", 5),
            {"truncate_prompt_tokens": 5},
        ),
        (
            lambda m: setattr(m, "predicted_output_tokens", 6),
            {"expected_tokens": 6},
        ),
    ],
)
def test_whatever_differs_is_seen(change, fields):
    params(request())
    message = request()
    change(message)
    assert params(message) == dataclasses.replace(PLAIN, **fields)
    assert params(request()) == PLAIN


def test_bad_value_is_refused_every_time():
    message = request(predicted_output_tokens=10)
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match="expected_tokens=10"):
            params(message)


def test_deadline_is_of_one_request_only():
    late = convert.sampling_params(request(), deadline_s=2.5)
    assert late == dataclasses.replace(PLAIN, time_limit_s=2.5)
    assert params(request()) == PLAIN


def test_message_padded_with_unknown_fields_is_not_kept():
    message = request()
    # Field 1000 of bytes, which this protocol does not have.
    size = 100_000
    padding = b"\xc2\x3e" + bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14])
    message.stopping.MergeFromString(padding + bytes(size))
    assert message.stopping.ByteSize() > size
    before = convert._params.cache_info().currsize
    assert params(message) == PLAIN
    assert convert._params.cache_info().currsize == before


@pytest.mark.parametrize("bad", [True, 1.0, -1, 10, "1", None, np.int32(10)])
@pytest.mark.parametrize("place", [0, 2])
def test_prompt_with_one_bad_token_is_refused(bad, place):
    tokens = [1, 2, 3]
    tokens[place] = bad
    with pytest.raises(InvalidRequestError, match="outside the vocabulary of 10"):
        prompt_array(tokens, 10)


@pytest.mark.parametrize(
    "good", [[0, 9], (0, 9), np.array([0, 9]), [np.int64(0), 9], np.array([0, 9], "u1")]
)
def test_prompt_is_taken_from_any_sequence_of_integers(good):
    found = prompt_array(good, 10)
    assert found.dtype == np.int32
    assert found.tolist() == [0, 9]
