"""Handlers: a reader that reads is never taken for one that does not."""

import asyncio

import grpc

from jchameleon.serving.guard import streaming
from jchameleon.serving.proto.jchameleon.v1 import inference_pb2 as pb

STALL_S = 1.0
"""Far more than a write takes on a machine that is busy with other things."""


def test_waiting_for_the_next_message_is_not_a_stalled_reader():
    async def method(request, context, send):
        for _ in range(3):
            await asyncio.sleep(1.5 * STALL_S)
            await send(pb.GenerateResponse(request_id="x"))

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
