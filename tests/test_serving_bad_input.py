"""Bad input over loopback: its status, unchanged neighbours, nothing left behind."""

import contextlib
import resource
import socket
import zlib

import grpc
import pytest
from server_harness import (
    check_baseline,
    error_details,
    greedy,
    joined_ids,
    neighbours,
    refusal,
    running_server,
)

from jchameleon.serving.proto.jchameleon.v1 import inference_pb2 as pb

VOCAB = 259  # of the tiny model
TOO_LARGE = [VOCAB, 2**31 - 1, 2**32 - 1]
INVALID = grpc.StatusCode.INVALID_ARGUMENT
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture(scope="module")
def server():
    # A pool of 16 blocks beside the two reserved pages: not all that the context
    # allows can ever fit.
    with running_server({"engine": {"prefix_cache": False}}) as server:
        yield server


def sampled(**fields):
    return pb.GenerateRequest(text="x", sampling=pb.SamplingParams(**fields))


def stopped(**fields):
    return pb.GenerateRequest(text="x", stopping=pb.StoppingCriteria(**fields))


def ids(*token_ids):
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=token_ids))


def assert_refused(server, request, code, field=None):
    """Both ways of asking are refused, naming the field."""
    for call in (server.generate, lambda one: list(server.stream(one))):
        error = refusal(lambda call=call: call(request))
        assert error.code() is code, error.details()
        if field is not None:
            assert field in error.details()
            [violation] = error_details(error)["BadRequest"].field_violations
            assert violation.field == field


def test_empty_prompts_are_invalid(server):
    with neighbours(server):
        for request in (
            pb.GenerateRequest(),
            pb.GenerateRequest(text=""),
            ids(),
            pb.GenerateRequest(chat=pb.ChatMessages()),
        ):
            assert_refused(server, request, INVALID)


@pytest.mark.parametrize("token_id", TOO_LARGE)
def test_token_ids_outside_the_vocabulary_are_invalid(server, token_id):
    with neighbours(server, 60):
        assert_refused(server, ids(1, token_id), INVALID, "prompt")
        assert_refused(
            server,
            stopped(stop_token_ids=[token_id]),
            INVALID,
            "stopping.stop_token_ids",
        )
        assert_refused(
            server, sampled(logit_bias={token_id: 1.0}), INVALID, "sampling.logit_bias"
        )


@pytest.mark.parametrize(
    "field",
    [
        "temperature",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    ],
)
def test_numbers_that_are_none_or_out_of_range_are_invalid(server, field):
    values = [float("nan"), float("inf"), float("-inf"), -1e9, 1e9]
    with neighbours(server, 40):
        for value in values:
            assert_refused(
                server, sampled(**{field: value}), INVALID, f"sampling.{field}"
            )


def test_tiny_temperature_is_greedy(server):
    request = greedy()
    expected = joined_ids(server.stream(request))
    request.sampling.temperature = 1e-30
    assert joined_ids(server.stream(request)) == expected


def test_excessive_counts_are_invalid_and_allocate_nothing(server):
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with neighbours(server):
        assert_refused(server, sampled(n=10**6), INVALID, "sampling.n")
        assert_refused(
            server,
            stopped(max_new_tokens=2**32 - 1),
            INVALID,
            "stopping.max_new_tokens",
        )
        assert_refused(server, stopped(stop=["a"] * 10**5), INVALID)
        assert_refused(
            server,
            pb.GenerateRequest(text="x", response=pb.ResponseOptions(logprobs=10**6)),
            INVALID,
            "response.logprobs",
        )
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    assert grown_kib < 64 << 10


def test_prompt_beyond_the_context_is_invalid(server):
    with neighbours(server):
        assert_refused(server, ids(*[5] * 512), INVALID)
        assert_refused(server, stopped(max_new_tokens=512), INVALID)


def test_request_that_can_never_fit_is_refused_at_once():
    page_bytes = 2 * 2 * 16 * 16 * 4  # of the tiny model, in one layer
    table = {"engine": {"pool_bytes": 12 * page_bytes * 2}}
    with running_server(table) as server:
        pages = server.server.state.llm.stats().total_pages
        assert pages < 32, "else everything fits"
        error = refusal(lambda: server.generate(ids(*[5] * 400)))
        assert error.code() is EXHAUSTED
        details = error_details(error)
        assert details["ErrorInfo"].reason == "NEVER_FITS"
        assert "RetryInfo" not in details
        check_baseline(server)


def test_text_over_the_message_limit_is_refused_by_the_wire(server):
    with neighbours(server):
        error = refusal(
            lambda: server.generate(pb.GenerateRequest(text="x" * 50_000_000))
        )
        assert error.code() is EXHAUSTED


def test_text_that_is_no_utf8_is_invalid(server):
    call = server.channel.unary_unary("/jchameleon.v1.InferenceService/Generate")
    good = pb.GenerateRequest(text="abc").SerializeToString()
    assert b"abc" in good
    with neighbours(server):
        error = refusal(lambda: call(good.replace(b"abc", b"a\xff\xfe")))
        assert error.code() is INVALID
        assert error_details(error)["ErrorInfo"].reason == "MALFORMED_MESSAGE"


def test_odd_but_valid_text_is_answered(server):
    for text in ("\0", "a\0b", "\u202e", "<|endoftext|>", "😀" * 10):
        reply = server.generate(greedy(text, 3))
        assert reply.usage.output_tokens == 3
        assert reply.usage.prompt_tokens >= len(text)


def test_long_text_is_tokenised_off_the_loop_and_refused_by_length(server):
    with neighbours(server):
        error = refusal(lambda: server.generate(pb.GenerateRequest(text="x" * 100_000)))
        assert error.code() is INVALID


def test_compressed_bomb_is_refused_by_its_size(server):
    bomb = pb.GenerateRequest(text="\0" * 64_000_000)
    assert len(zlib.compress(bomb.SerializeToString())) < 100_000
    with neighbours(server):
        error = refusal(
            lambda: server.generate(bomb, compression=grpc.Compression.Gzip)
        )
        assert error.code() is EXHAUSTED


def test_garbage_on_the_port_ends_that_connection_only(server):
    host, _, port = server.target.partition(":")
    with neighbours(server):
        for garbage in (b"\0" * 1000, b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 65536):
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                with contextlib.suppress(OSError):  # it may close first
                    connection.sendall(garbage)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(65536):
                        pass


def test_unknown_fields_are_passed_over(server):
    call = server.channel.unary_unary("/jchameleon.v1.InferenceService/Generate")
    known = greedy().SerializeToString()
    reply = pb.GenerateResponse.FromString(call(known + b"\xf2\x7f\x03abc"))
    assert reply.usage.output_tokens == 12


@pytest.mark.parametrize("method", ["Generate", "GenerateStream", "Nothing"])
def test_unknown_methods_and_services_are_unimplemented(server, method):
    call = server.channel.unary_unary(f"/jchameleon.v2.InferenceService/{method}")
    assert refusal(lambda: call(b"")).code() is grpc.StatusCode.UNIMPLEMENTED


def test_other_model_is_not_found(server):
    error = refusal(lambda: server.generate(greedy(model="gpt-9")))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert error_details(error)["ErrorInfo"].reason == "UNKNOWN_MODEL"
    assert server.generate(greedy(model="tiny")).usage.output_tokens == 12


@pytest.mark.parametrize("request_id", ["a b", "x" * 129, "é", "a\nb"])
def test_malformed_request_id_is_invalid(server, request_id):
    assert_refused(server, greedy(request_id=request_id), INVALID, "request_id")
