"""Handlers: a reader that reads is never taken for one that does not."""

import asyncio

import grpc
from server_harness import greedy, joined_ids, running_server

from jchameleon.serving.guard import streaming
from jchameleon.serving.proto.jchameleon.v1 import inference_pb2 as pb

STALL_S = 0.05


def test_long_stream_with_a_short_patience_is_whole():
    with running_server({"server": {"stall_timeout_s": STALL_S}}) as server:
        request = greedy(tokens=450)
        assert len(joined_ids(server.stream(request))) == 450
        # Patience ends with its stream.
        assert len(joined_ids(server.stream(request))) == 450


def test_waiting_for_the_next_message_is_not_a_stalled_reader():
    async def method(request, context):
        for _ in range(3):
            await asyncio.sleep(3 * STALL_S)
            yield pb.GenerateResponse(request_id="x")

    async def call():
        handler = streaming(pb.GenerateRequest, method, stall_timeout_s=STALL_S)
        server = grpc.aio.server()
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("x.X", {"Y": handler}),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                return [reply async for reply in channel.unary_stream("/x.X/Y")(b"")]
        finally:
            await server.stop(None)

    assert len(asyncio.run(call())) == 3
