"""How calls end before their time: cancels, deadlines, stalls, full queues, doubles."""

import random
import threading
import time

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

LONG = 400  # tokens, of a context of 512


@pytest.fixture(scope="module")
def server():
    with running_server({"server": {"stall_timeout_s": 1.5}}) as server:
        yield server


@pytest.fixture(scope="module")
def full_server():
    """Return a server of two rows and two places to wait."""
    with running_server(
        {
            "engine": {"max_running": 2, "max_batch_tokens": 64},
            "limits": {"max_waiting_requests": 2, "max_waiting_tokens": 100},
        }
    ) as server:
        yield server


def test_cancel_in_mid_decode_frees_everything(server):
    with neighbours(server):
        stream = server.stream(greedy(tokens=LONG, request_id="cut-1"))
        for _ in range(5):
            next(stream)
        stream.cancel()
        assert refusal(lambda: list(stream)).code() is grpc.StatusCode.CANCELLED
    check_cut_short(server, "cut-1")


def test_cancel_of_a_unary_call_frees_everything(server):
    with neighbours(server):
        call = server.channel.unary_unary(
            "/jchameleon.v1.InferenceService/Generate"
        ).future(greedy(tokens=LONG, request_id="cut-2").SerializeToString())
        while "cut-2" not in server.server.outbox.open_ids:
            time.sleep(0.001)
        call.cancel()
    check_cut_short(server, "cut-2")


def test_cancel_while_queued_frees_its_place(full_server):
    running = [full_server.stream(greedy(tokens=LONG)) for _ in range(2)]
    firsts = [next(stream) for stream in running]
    queued = full_server.stream(greedy("queued", 20))
    check_open(full_server, 3)
    queued.cancel()
    check_open(full_server, 2)
    for stream, first in zip(running, firsts, strict=True):
        assert len(joined_ids([first, *stream])) == LONG
    check_baseline(full_server)


def test_cancel_during_prefill_frees_everything(server):
    with neighbours(server):
        prompt = pb.TokenIds(ids=[7] * 450)
        request = greedy(tokens=60, request_id="cut-3")
        request.token_ids.CopyFrom(prompt)
        stream = server.stream(request)
        while "cut-3" not in server.server.outbox.open_ids:
            time.sleep(0.001)
        stream.cancel()
    check_cut_short(server, "cut-3", tokens=60)


def test_cancel_after_the_last_token_changes_nothing(server):
    stream = server.stream(greedy())
    assert len(joined_ids(stream)) == 12
    stream.cancel()
    check_baseline(server)


def test_deadline_in_mid_decode_ends_the_call_and_frees_everything(server):
    with neighbours(server):
        request = greedy(tokens=LONG, request_id="cut-4")
        error = refusal(lambda: server.generate(request, timeout=0.1))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    check_cut_short(server, "cut-4")


def test_deadline_that_passes_in_the_queue_spends_no_prefill(full_server):
    llm = full_server.server.state.llm
    running = [full_server.stream(greedy(tokens=LONG)) for _ in range(2)]
    firsts = [next(stream) for stream in running]
    late = greedy("queued", request_id="late")
    error = refusal(lambda: full_server.generate(late, timeout=0.05))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    check_open(full_server, 2)
    for stream, first in zip(running, firsts, strict=True):
        assert len(joined_ids([first, *stream])) == LONG
    ran = [name for record in llm.step_records for name, _ in record.prefill]
    assert "late" not in ran and len(ran) >= 2
    check_baseline(full_server)


def test_deadline_in_the_past_is_refused(server):
    with neighbours(server, 40):
        error = refusal(lambda: server.generate(greedy(), timeout=-1))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_time_limit_of_the_request_answers_with_what_there_is(server):
    request = greedy(tokens=LONG)
    request.stopping.time_limit_seconds = 0.1
    reply = server.generate(request, timeout=30)
    assert reply.outputs[0].finish.reason == pb.FINISH_REASON_TIME_LIMIT
    assert 0 < len(reply.outputs[0].token_ids) < LONG
    check_baseline(server)


def test_reader_that_stalls_is_given_up_and_holds_up_nobody(server):
    request = pb.GenerateRequest(
        text="much",
        sampling=pb.SamplingParams(temperature=1, n=32, seed=1),
        stopping=pb.StoppingCriteria(max_new_tokens=LONG, ignore_eos=True),
        response=pb.ResponseOptions(token_ids=True, logprobs=20),
    )
    expected = joined_ids(server.stream(greedy("beside a stall", 100)))
    channel = grpc.insecure_channel(
        server.target,
        options=[
            ("grpc.http2.bdp_probe", 0),
            ("grpc.use_local_subchannel_pool", 1),
        ],
    )
    stalled = channel.unary_stream(
        "/jchameleon.v1.InferenceService/GenerateStream",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=pb.GenerateResponse.FromString,
    )(request)
    next(stalled)
    beside = greedy("beside a stall", 100)
    assert joined_ids(server.stream(beside)) == expected
    check_baseline(server, timeout_s=60)
    error = refusal(lambda: list(stalled))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error_details(error)["ErrorInfo"].reason == "STALLED_READER"
    channel.close()


def test_full_queue_refuses_at_once_and_says_when_to_try_again(full_server):
    streams = [full_server.stream(greedy(tokens=LONG)) for _ in range(4)]
    firsts = [next(stream) for stream in streams[:2]]
    check_open(full_server, 4)
    start_s = time.monotonic()
    error = refusal(lambda: full_server.generate(greedy()))
    assert time.monotonic() - start_s < 5  # it did not wait for a place
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    details = error_details(error)
    assert details["ErrorInfo"].reason == "QUEUE_FULL"
    assert 0.1 <= details["RetryInfo"].retry_delay.ToTimedelta().total_seconds() <= 10
    for stream, first in zip(streams[:2], firsts, strict=True):
        assert len(joined_ids([first, *stream])) == LONG
    for stream in streams[2:]:
        assert len(joined_ids(stream)) == LONG
    check_baseline(full_server)


def test_waiting_tokens_are_bounded(full_server):
    streams = [full_server.stream(greedy(tokens=LONG)) for _ in range(2)]
    firsts = [next(stream) for stream in streams]
    prompt = pb.TokenIds(ids=[7] * 90)
    queued = full_server.stream(
        pb.GenerateRequest(
            token_ids=prompt, stopping=pb.StoppingCriteria(max_new_tokens=2)
        )
    )
    check_open(full_server, 3)
    error = refusal(lambda: full_server.generate(pb.GenerateRequest(token_ids=prompt)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "90 tokens wait" in error.details()
    for stream in streams:
        stream.cancel()
    assert firsts and list(queued)
    check_baseline(full_server)


def test_request_id_in_flight_is_refused_and_may_be_used_again_later(server):
    stream = server.stream(greedy(tokens=LONG, request_id="same"))
    first = next(stream)
    error = refusal(lambda: server.generate(greedy(request_id="same")))
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    assert error_details(error)["ErrorInfo"].reason == "DUPLICATE_REQUEST_ID"
    assert len(joined_ids([first, *stream])) == LONG
    assert server.generate(greedy(request_id="same")).usage.output_tokens == 12


@pytest.mark.parametrize("rounds", [60])
def test_random_cancels_deadlines_and_reads_leave_nothing_behind(server, rounds):
    """A short form of the soak: every call ends, tokens are right, books balance."""
    expected = {
        text: joined_ids(server.stream(greedy(text, 40))) for text in "abcdefgh"
    }
    problems: list[str] = []

    def client(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(rounds):
            text = rng.choice("abcdefgh")
            kind = rng.choice(["whole", "cancel", "deadline", "unary", "drop"])
            try:
                if kind == "unary":
                    ids = list(server.generate(greedy(text, 40)).outputs[0].token_ids)
                    if ids != expected[text]:
                        problems.append(f"{text}: {ids}")
                    continue
                timeout = rng.uniform(0.001, 0.1) if kind == "deadline" else 60
                stream = server.stream(greedy(text, 40), timeout=timeout)
                seen: list[int] = []
                most = rng.randint(0, 40) if kind in ("cancel", "drop") else 100
                for piece in stream:
                    seen += joined_ids([piece])
                    if len(seen) >= most:
                        break
                if kind == "cancel":
                    stream.cancel()
                if seen != expected[text][: len(seen)]:
                    problems.append(f"{text}: {seen}")
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                    problems.append(f"{kind}: {error.code()} {error.details()}")

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    check_baseline(server)


def check_open(server, count):
    """Assert that soon `count` requests are open, in the edge and in the engine."""
    llm = server.server.state.llm
    end_s = time.monotonic() + 10
    while True:
        stats = llm.stats()
        found = server.server.admission.open_requests, stats.running + stats.waiting
        if found == (count, count):
            return
        assert time.monotonic() < end_s, f"{found} are open, not {count}"
        time.sleep(0.002)


def check_cut_short(server, request_id, tokens=LONG):
    """Assert that nothing is held, and that a request did not run to its end."""
    check_baseline(server)
    records = server.server.state.llm.step_records
    assert sum(request_id in record.decode for record in records) < tokens - 1
