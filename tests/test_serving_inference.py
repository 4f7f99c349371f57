"""Generate, GenerateStream and Tokenize over loopback, against the library."""

import grpc
import pytest
from server_harness import error_details, greedy, running_server

from jchameleon.llm import LLM
from jchameleon.sampling import SamplingParams
from jchameleon.serving.proto.jchameleon.v1 import inference_pb2 as pb


@pytest.fixture(scope="module")
def server():
    with running_server({}) as server:
        yield server


@pytest.fixture(scope="module")
def library(server):
    """Return what the library answers, on an engine of its own."""
    with LLM("tiny", max_running=8, max_batch_tokens=64, max_model_len=512) as llm:
        yield llm


def test_generate_gives_the_librarys_tokens_and_text(server, library):
    reply = server.generate(greedy())
    [expected] = library.generate(
        ["hello"],
        sampling=SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
    )
    [output] = reply.outputs
    assert tuple(output.token_ids) == expected.token_ids
    assert output.text == expected.text
    assert output.finish.reason == pb.FINISH_REASON_LENGTH
    assert tuple(reply.prompt_info.token_ids) == expected.prompt_token_ids
    assert reply.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert reply.usage.output_tokens == 12


@pytest.mark.parametrize("n", [1, 3])
def test_pieces_of_a_stream_joined_are_the_unary_reply(server, n):
    request = pb.GenerateRequest(
        text="a stream",
        sampling=pb.SamplingParams(temperature=1, seed=7, n=n),
        stopping=pb.StoppingCriteria(max_new_tokens=20),
        response=pb.ResponseOptions(token_ids=True, logprobs=2, prompt_logprobs=1),
    )
    whole = server.generate(request)
    pieces = list(server.stream(request))
    assert len(pieces) > 5
    assert [p.HasField("prompt_info") for p in pieces] == [True] + [False] * (
        len(pieces) - 1
    )
    assert [p.HasField("usage") for p in pieces] == [False] * (len(pieces) - 1) + [True]
    for index in range(n):
        mine = [o for p in pieces for o in p.outputs if o.index == index]
        [expected] = [o for o in whole.outputs if o.index == index]
        assert "".join(o.text for o in mine) == expected.text
        assert [i for o in mine for i in o.token_ids] == list(expected.token_ids)
        assert [e for o in mine for e in o.logprobs] == list(expected.logprobs)
        finishes = [o.HasField("finish") for o in mine]
        assert finishes == [False] * (len(mine) - 1) + [True]
        assert mine[-1].finish.reason == expected.finish.reason
    assert pieces[0].prompt_info.logprobs == whole.prompt_info.logprobs
    assert pieces[-1].usage.output_tokens == whole.usage.output_tokens


def test_tokenize_returns_what_generate_reads(server):
    reply = server.unary(
        "InferenceService",
        "Tokenize",
        pb.TokenizeRequest(text="héllo"),
        pb.TokenizeResponse,
    )
    read = server.generate(greedy("héllo")).prompt_info.token_ids
    assert list(reply.token_ids) == list(read)
    assert reply.max_model_len == 512


def test_request_id_is_echoed_or_made(server):
    assert server.generate(greedy(request_id="mine")).request_id == "mine"
    made = {server.generate(greedy()).request_id for _ in range(2)}
    assert len(made) == 2 and all(made)


def test_status_names_field_and_reason(server):
    with pytest.raises(grpc.RpcError) as caught:
        server.generate(
            pb.GenerateRequest(
                text="x", sampling=pb.SamplingParams(temperature=float("nan"))
            )
        )
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "sampling.temperature=nan" in caught.value.details()
    details = error_details(caught.value)
    assert details["ErrorInfo"].reason == "INVALID_REQUEST"
    [violation] = details["BadRequest"].field_violations
    assert violation.field == "sampling.temperature"


def test_bytes_that_are_no_message_are_an_invalid_argument(server):
    call = server.channel.unary_unary("/jchameleon.v1.InferenceService/Generate")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"\xff\xff\xff")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error_details(caught.value)["ErrorInfo"].reason == "MALFORMED_MESSAGE"


def test_starting_server_is_unavailable():
    with running_server({}, loads=False) as server:
        with pytest.raises(grpc.RpcError) as caught:
            server.generate(greedy())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert error_details(caught.value)["ErrorInfo"].reason == "STARTING"
