"""The clients over loopback: values, fields, errors, ends, against the library."""

import asyncio
import contextlib
import dataclasses
import time

import grpc
import pytest
from server_harness import check_baseline, running_server

from jchameleon import SamplingParams
from jchameleon.client import AsyncClient, CallError, Client, Tls
from jchameleon.client.connection import read_token
from jchameleon.client.messages import Sampling, generate_request
from jchameleon.errors import ConfigError, InvalidRequestError
from jchameleon.llm import LLM
from jchameleon.serving.convert import sampling_params

GREEDY = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server():
    with running_server({}) as server:
        yield server


@pytest.fixture
def client(server):
    with Client(server.target) as client:
        yield client


@pytest.fixture(scope="module")
def library():
    with LLM("tiny", max_running=8, max_batch_tokens=64, max_model_len=512) as llm:
        yield llm


def on_client(server, work):
    """Run `work(client)` with an asyncio client."""

    async def run():
        async with AsyncClient(server.target) as client:
            return await work(client)

    return asyncio.run(run())


def check_is_the_librarys(generation, expected):
    """Assert that an answer is what the library gave, with approximate logprobs."""
    assert generation.prompt_token_ids == expected.prompt_token_ids
    assert len(generation.completions) == len(expected.outputs)
    for mine, theirs in zip(generation.completions, expected.outputs, strict=True):
        assert (mine.index, mine.text) == (theirs.index, theirs.text)
        assert mine.token_ids == theirs.token_ids
        assert mine.finish_reason == theirs.finish_reason
        if theirs.logprobs is None:
            assert mine.logprobs is None
            continue
        for entry, other in zip(mine.logprobs, theirs.logprobs, strict=True):
            assert list(entry) == list(other)
            assert list(entry.values()) == pytest.approx(list(other.values()), rel=1e-4)


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        {"n": 3, "seed": 5, "max_tokens": 9, "logprobs": 2, "prompt_logprobs": 1},
        {"seed": 1, "max_tokens": 40, "stop": "e", "include_stop": True},
        {"seed": 2, "logit_bias": {7: 100.0}, "stop_token_ids": [7]},
    ],
)
def test_generate_gives_the_librarys_answer_from_both_clients(
    server, client, library, sampling
):
    [expected] = library.generate(["hello"], sampling=SamplingParams(**sampling))
    answer = client.generate("hello", **sampling)
    check_is_the_librarys(answer, expected)
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.output_tokens == sum(len(o.token_ids) for o in expected.outputs)
    assert (
        0 < answer.completions[0].timing.ttft_s <= answer.completions[0].timing.total_s
    )
    if "prompt_logprobs" in sampling:
        assert answer.prompt_logprobs[0] == {}
        assert [set(one) for one in answer.prompt_logprobs[1:]] == [
            set(one) for one in expected.prompt_logprobs[1:]
        ]
    again = on_client(server, lambda c: c.generate("hello", **sampling))
    check_is_the_librarys(again, expected)


def test_prompt_as_token_ids_is_read_as_it_is(client):
    answer = client.generate(token_ids=[5, 6, 7], **GREEDY)
    assert answer.prompt_token_ids == (5, 6, 7)


def check_pieces_join_to(pieces, whole):
    assert pieces[0].prompt_token_ids == whole.prompt_token_ids
    assert all(piece.prompt_token_ids is None for piece in pieces[1:])
    assert pieces[-1].usage.output_tokens == whole.usage.output_tokens
    assert all(piece.usage is None for piece in pieces[:-1])
    for expected in whole.completions:
        mine = [piece for piece in pieces if piece.index == expected.index]
        assert "".join(piece.text for piece in mine) == expected.text
        assert sum((piece.token_ids for piece in mine), ()) == expected.token_ids
        assert [piece.finish_reason for piece in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == expected.finish_reason
        assert mine[-1].timing.total_s > 0


@pytest.mark.parametrize("n", [1, 3])
def test_pieces_of_both_clients_join_to_the_answer(server, client, n):
    fields = {"n": n, "seed": 3, "max_tokens": 20}
    whole = client.generate("a stream", **fields)
    pieces = list(client.stream("a stream", **fields))
    assert len(pieces) > 5
    check_pieces_join_to(pieces, whole)

    async def collect(client):
        return [piece async for piece in client.stream("a stream", **fields)]

    check_pieces_join_to(on_client(server, collect), whole)


def test_closed_stream_cancels_its_request(server, client):
    pieces = client.stream("long", max_tokens=400, ignore_eos=True)
    next(pieces)
    pieces.close()
    check_baseline(server)

    async def leave(client):
        stream = client.stream("long", max_tokens=400, ignore_eos=True)
        async with contextlib.aclosing(stream):
            async for _ in stream:
                break

    on_client(server, leave)
    check_baseline(server)


def test_deadline_ends_a_call(client):
    started_s = time.monotonic()
    with pytest.raises(CallError) as caught:
        client.generate("x", max_tokens=480, ignore_eos=True, timeout_s=0.02)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - started_s < 5


def test_tokenize_returns_what_generate_reads(server, client):
    tokens = client.tokenize("héllo")
    assert tokens.token_ids == client.generate("héllo", **GREEDY).prompt_token_ids
    assert tokens.max_model_len == 512
    assert on_client(server, lambda c: c.tokenize("héllo")) == tokens


def test_refusal_says_code_reason_and_field(server, client):
    def check(error):
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert (error.reason, error.field) == ("INVALID_REQUEST", "sampling.top_p")
        assert error.retry_after_s is None
        assert "sampling.top_p=7" in error.message
        assert str(error).startswith("INVALID_ARGUMENT INVALID_REQUEST: ")

    with pytest.raises(CallError) as caught:
        client.generate("x", top_p=7.0)
    check(caught.value)
    with pytest.raises(CallError) as caught:
        on_client(server, lambda c: c.generate("x", top_p=7.0))
    check(caught.value)
    with pytest.raises(CallError) as caught:
        client.generate("x", adapter="nobody")
    assert caught.value.reason == "UNKNOWN_ADAPTER"


def test_every_sampling_field_arrives_at_the_server():
    """Each field with a value that is no default, through the server's own reading."""
    values = {
        "n": 2,
        "max_tokens": 30,
        "min_tokens": 3,
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.25,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {3: 1.5},
        "seed": 9,
        "stop": "end",
        "stop_token_ids": [4, 5],
        "include_stop": True,
        "ignore_eos": True,
        "logprobs": 2,
        "prompt_logprobs": 1,
        "priority": -3,
        "truncate_prompt_tokens": 8,
        "time_limit_s": 2.5,
        "expected_tokens": 6,
    }
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert set(values) == fields == set(Sampling.__annotations__)
    request = generate_request("x", values)
    assert sampling_params(request, deadline_s=None) == SamplingParams(**values)
    defaults = generate_request("x", {name: None for name in values})
    assert sampling_params(defaults, deadline_s=None) == SamplingParams()


@pytest.mark.parametrize(
    "call, problem",
    [
        ({}, "one of prompt, token_ids and messages"),
        ({"prompt": "x", "token_ids": [1]}, "one of prompt, token_ids and messages"),
        ({"token_ids": [-1]}, "token_ids="),
        ({"prompt": "x", "top_k": -1}, "top_k=-1"),
        ({"prompt": "x", "temperature": "hot"}, "temperature='hot'"),
        ({"prompt": "x", "logit_bias": [1]}, "logit_bias="),
        ({"prompt": "x", "heat": 1}, "heat=1 is no field"),
        ({"messages": ["hi"]}, "messages="),
        ({"messages": [{"role": "user", "word": "hi"}]}, "messages="),
        ({"prompt": "\ud800"}, "prompt="),
    ],
)
def test_what_cannot_be_sent_is_refused_by_name(client, call, problem):
    with pytest.raises(InvalidRequestError, match=problem):
        client.generate(**call)
    with pytest.raises(InvalidRequestError, match=problem):
        client.stream(**call)


def test_health_is_the_servers(server, client):
    assert client.health() == "serving"
    assert client.health("") == "serving"
    assert on_client(server, lambda c: c.health()) == "serving"


def test_token_and_tls_files_are_checked(tmp_path):
    with pytest.raises(ConfigError, match="printable ASCII"):
        Client("127.0.0.1:1", token="two words")
    with pytest.raises(ConfigError, match="cannot read"):
        Client("127.0.0.1:1", tls=Tls(root_cert=tmp_path / "none.pem"))
    with pytest.raises(ConfigError, match="go together"):
        Tls(client_cert="cert.pem")
    (tmp_path / "token").write_text("\n  secret \nother\n")
    assert read_token(tmp_path / "token") == "secret"
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigError, match="holds no token"):
        read_token(tmp_path / "empty")
