"""Deltas on their way to readers: each reaches the call that it is of, or nobody."""

import asyncio
import threading

import grpc
from serve_process import wait_until
from server_harness import check_baseline, greedy, joined_ids, refusal, running_server

from jchameleon.runtime.outbox import Delta
from jchameleon.serving.inference import TOKENISING_THREADS
from jchameleon.serving.proto.jchameleon.v1 import engine_pb2
from jchameleon.serving.proto.jchameleon.v1 import inference_pb2 as pb
from jchameleon.serving.streams import LoopOutbox


def test_id_of_a_call_that_left_is_taken_until_its_last_words_are_heard():
    async def run():
        outbox = LoopOutbox(asyncio.get_running_loop())
        first = outbox.open(("x", "x#1"))
        first.submitted("x")  # the other was never handed over
        first.close()
        assert outbox.is_open("x") and not outbox.is_open("x#1")
        outbox.put("x", Delta(text="secret"))
        await asyncio.sleep(0)
        assert outbox.is_open("x")
        outbox.put("x", Delta(text="of another", finish_reason="aborted"))
        assert outbox.is_open("x")  # it is still on its way
        await asyncio.sleep(0)
        second = outbox.open(("x",))
        outbox.put("x", Delta(text="own"))
        assert await second.get() == [(0, Delta(text="own"))]

    asyncio.run(run())


def test_same_id_again_and_again_gives_every_call_its_own_tokens():
    with running_server({}) as server:
        texts = ("one prompt", "and another")
        expected = [joined_ids(server.stream(greedy(text, 40))) for text in texts]
        for turn in range(60):
            stream = server.stream(greedy(texts[turn % 2], 40, request_id="same"))
            ids = []
            try:
                for piece in stream:
                    ids += joined_ids([piece])
                    if len(ids) > turn % 7:
                        break
            except grpc.RpcError as error:  # the one before is still leaving
                assert error.code() is grpc.StatusCode.ALREADY_EXISTS
            assert ids == expected[turn % 2][: len(ids)]
            stream.cancel()
        check_baseline(server)


def test_thousands_of_empty_turns_do_not_hold_up_others():
    with running_server({}) as server:
        turns = [pb.ChatMessage(role="user")] * 20_000
        request = pb.GenerateRequest(chat=pb.ChatMessages(messages=turns))
        assert request.ByteSize() < 1 << 20
        slow = server.channel.unary_unary("/jchameleon.v1.InferenceService/Generate")
        pending = slow.future(request.SerializeToString())
        assert server.generate(greedy()).usage.output_tokens == 12
        assert refusal(pending.result).code() is grpc.StatusCode.INVALID_ARGUMENT


def test_unknown_adapter_does_not_tell_which_there_are(tmp_path):
    with running_server({}) as server:
        error = refusal(lambda: server.generate(greedy(adapter_id="nobody")))
        assert error.details() == "unknown adapter 'nobody'"


def test_ipv6_loopback_serves():
    table = {"server": {"host": "::1"}}
    try:
        running = running_server(table, loads=False)
        server = running.__enter__()
    except Exception as error:  # a machine without IPv6
        assert "cannot listen on [::1]" in str(error)
        return
    try:
        with grpc.insecure_channel(f"[::1]:{server.server.port}") as channel:
            call = channel.unary_unary("/jchameleon.v1.EngineService/GetServerInfo")
            data = engine_pb2.GetServerInfoRequest().SerializeToString()
            error = refusal(lambda: call(data))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert "starting" in error.details()
    finally:
        running.__exit__(None, None, None)


def test_long_prompts_of_callers_that_leave_are_not_tokenised():
    """Their jobs must not pile up in front of other people's."""
    with running_server({}) as server:
        server.generate(greedy())
        inference = server.server._inference
        busy = threading.Event()
        for _ in range(TOKENISING_THREADS):
            inference._threads.submit(busy.wait, 30)
        text = greedy("a" * 400 + " " * 3000).SerializeToString()
        generate = server.channel.unary_unary(
            "/jchameleon.v1.InferenceService/Generate"
        )
        tokenize = server.channel.unary_unary(
            "/jchameleon.v1.InferenceService/Tokenize"
        )
        request = pb.TokenizeRequest(text="b" * 3000).SerializeToString()
        calls = [generate.future(text) for _ in range(4)]
        calls += [tokenize.future(request) for _ in range(4)]
        waiting = inference._threads._work_queue.qsize
        wait_until(lambda: waiting() == 8)
        for call in calls:
            call.cancel()
        check_baseline(server)
        busy.set()
        reply = pb.TokenizeResponse.FromString(tokenize(request, timeout=30))
        assert len(reply.token_ids) >= 3000
