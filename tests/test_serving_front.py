"""The front process: calls to handlers in this one, over loopback."""

import asyncio
import contextlib
import os
import signal
import socket
import time

import grpc
import pytest

from jchameleon.errors import ConfigError
from jchameleon.serving import pipe as wire
from jchameleon.serving.front import Front, _spawn
from jchameleon.serving.front_process import Status, end_call
from jchameleon.serving.pipe import WINDOW_BYTES
from jchameleon.serving.settings import ServerConfig

Code = grpc.StatusCode
HTTP2_BYTES = 24 << 20
"""Far more than gRPC and sockets keep of what nobody reads."""


@contextlib.asynccontextmanager
async def front(many=None, single=None, *, on_lost=lambda code: None, **listen):
    """Run a front process before a handler of streams and one of single replies."""
    handlers = {}
    if many is not None:
        handlers["/x.X/Many"] = grpc.unary_stream_rpc_method_handler(many)
    if single is not None:
        handlers["/x.X/Single"] = grpc.unary_unary_rpc_method_handler(single)
    config = ServerConfig.from_dict({"server": {"port": 0, **listen}})
    one = Front(config, handlers, on_lost=on_lost)
    port = await one.start()
    try:
        options = [("grpc.max_receive_message_length", -1)]
        target = f"127.0.0.1:{port}"
        async with grpc.aio.insecure_channel(target, options=options) as channel:
            yield one, channel
    finally:
        await one.stop(None)
    assert not is_running(one.pid)


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class Waiting:
    """A handler that sends one message and waits until it is cancelled."""

    def __init__(self):
        self.cancelled = asyncio.Event()

    async def __call__(self, message, context):
        await context.write(b"first")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


async def status_of(call):
    """Return the error that a call must end with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rest_of(call)
    return caught.value


async def rest_of(call):
    """Return the messages that are left."""
    messages = []
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    return messages


def test_bytes_go_through_unchanged_whatever_they_are():
    blobs = [b"", b"\0", b"x" * 100_000, bytes(range(256)) * 3]

    async def many(message, context):
        for number in range(3):
            await context.write(message + bytes([number]))

    async def single(message, context):
        return message[::-1]

    async def run():
        async with front(many, single) as (_, channel):
            for blob in blobs:
                pieces = [p async for p in channel.unary_stream("/x.X/Many")(blob)]
                assert pieces == [blob + bytes([number]) for number in range(3)]
                assert await channel.unary_unary("/x.X/Single")(blob) == blob[::-1]
            unknown = channel.unary_stream("/x.X/Nothing")(b"")
            assert (await status_of(unknown)).code() is Code.UNIMPLEMENTED

    asyncio.run(run())


def test_many_calls_at_once_are_kept_apart():
    async def many(message, context):
        for number in range(20):
            await context.write(message + b"-%d" % number)
            await asyncio.sleep(0)

    async def run():
        async with front(many) as (_, channel):

            async def call(index):
                name = b"%d" % index
                got = [p async for p in channel.unary_stream("/x.X/Many")(name)]
                assert got == [name + b"-%d" % number for number in range(20)]

            await asyncio.gather(*map(call, range(200)))

    asyncio.run(run())


def test_statuses_carry_code_details_and_metadata():
    async def many(message, context):
        await context.write(b"first")
        await context.abort(Code.DATA_LOSS, "gone", (("key-bin", b"\0\xff"),))

    async def single(message, context):
        raise ValueError("a secret of the server's")

    async def run():
        async with front(many, single) as (_, channel):
            error = await status_of(channel.unary_stream("/x.X/Many")(b""))
            assert (error.code(), error.details()) == (Code.DATA_LOSS, "gone")
            assert ("key-bin", b"\0\xff") in tuple(error.trailing_metadata())
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/x.X/Single")(b"")
            assert caught.value.code() is Code.INTERNAL
            assert "secret" not in caught.value.details()

    asyncio.run(run())


@pytest.mark.parametrize("ends", ["cancel", "deadline", "channel"])
def test_caller_who_leaves_cancels_the_handler(ends):
    async def run():
        left_s, waiting = [], Waiting()

        async def many(message, context):
            left_s.append(context.time_remaining())
            await waiting(message, context)

        async with front(many) as (_, channel):
            timeout = 1.0 if ends == "deadline" else None
            call = channel.unary_stream("/x.X/Many")(b"", timeout=timeout)
            assert await call.read() == b"first"
            if ends == "cancel":
                call.cancel()
            if ends == "channel":
                await channel.close()
            await asyncio.wait_for(waiting.cancelled.wait(), 10)
        [left] = left_s
        assert left is None if timeout is None else 0 < left <= 1.0

    asyncio.run(run())


def test_sender_waits_for_a_reader_who_does_not_read():
    message = b"x" * 10_000
    total = 2 * HTTP2_BYTES // len(message)

    async def run():
        written = 0

        async def many(_, context):
            nonlocal written
            for _ in range(total):
                await context.write(message)
                written += 1

        async with front(many) as (_, channel):
            call = channel.unary_stream("/x.X/Many")(b"")
            assert await call.read() == message
            before = -1
            while written != before:  # until no more goes out
                before = written
                await asyncio.sleep(0.5)
            assert written * len(message) < HTTP2_BYTES
            assert len(await rest_of(call)) + 1 == total == written

    asyncio.run(run())


def test_message_larger_than_the_window_goes_out():
    async def many(message, context):
        await context.write(b"x" * (3 * WINDOW_BYTES))
        await context.write(b"y")

    async def run():
        async with front(many) as (_, channel):
            sizes = [len(p) async for p in channel.unary_stream("/x.X/Many")(b"")]
        assert sizes == [3 * WINDOW_BYTES, 1]

    asyncio.run(run())


def test_reply_over_the_limit_ends_its_call_alone():
    async def run():
        cancelled = asyncio.Event()

        async def many(message, context):
            try:
                for _ in range(int(message)):
                    await context.write(b"x" * 2000)
                    await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                cancelled.set()
                raise

        async def single(message, context):
            return b"x" * int(message)

        async with front(many, single, max_reply_bytes=1000) as (_, channel):
            error = await status_of(channel.unary_stream("/x.X/Many")(b"1000"))
            assert error.code() in (Code.INTERNAL, Code.RESOURCE_EXHAUSTED)
            await asyncio.wait_for(cancelled.wait(), 10)
            call = channel.unary_unary("/x.X/Single")
            with pytest.raises(grpc.aio.AioRpcError):
                await call(b"2000")
            assert await call(b"5") == b"xxxxx"

    asyncio.run(run())


def test_stop_gives_running_calls_their_time_and_takes_no_new_ones():
    async def run():
        go_on = asyncio.Event()

        async def many(message, context):
            await context.write(b"first")
            await go_on.wait()
            await context.write(b"last")

        async with front(many) as (one, channel):
            call = channel.unary_stream("/x.X/Many")(b"")
            assert await call.read() == b"first"
            stopping = asyncio.ensure_future(one.stop(10.0))
            await asyncio.sleep(0.2)
            late = channel.unary_stream("/x.X/Many")(b"")
            assert (await status_of(late)).code() is Code.UNAVAILABLE
            go_on.set()
            assert await rest_of(call) == [b"last"]
            await stopping
            assert not is_running(one.pid)

    asyncio.run(run())


def test_address_that_is_taken_is_an_error_and_leaves_no_process():
    async def single(message, context):
        return b""

    async def run(port):
        config = ServerConfig.from_dict({"server": {"port": port}})
        handler = grpc.unary_unary_rpc_method_handler(single)
        lost = []
        one = Front(config, {"/x.X/Single": handler}, on_lost=lost.append)
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            await one.start()
        assert not is_running(one.pid) and not lost

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        asyncio.run(run(taken.getsockname()[1]))


def test_front_process_that_is_killed_cancels_its_calls_and_is_missed():
    async def run():
        codes, lost, waiting = [], asyncio.Event(), Waiting()

        def on_lost(code):
            codes.append(code)
            lost.set()

        async with front(waiting, on_lost=on_lost) as (one, channel):
            call = channel.unary_stream("/x.X/Many")(b"")
            assert await call.read() == b"first"
            os.kill(one.pid, signal.SIGKILL)
            await asyncio.wait_for(lost.wait(), 10)
            await asyncio.wait_for(waiting.cancelled.wait(), 10)
            assert (await status_of(call)).code() is Code.UNAVAILABLE
        assert codes in ([-signal.SIGKILL], [None])  # not known at once

    start_s = time.monotonic()
    asyncio.run(run())
    assert time.monotonic() - start_s < 10


def test_call_that_ended_before_its_status_is_cancelled_and_no_fault():
    class Gone:
        async def abort(self, code, details, metadata):
            raise grpc.aio.InternalError("the call is over")

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(end_call(Status(Code.DEADLINE_EXCEEDED, "too late"), Gone()))


def test_fault_of_the_front_process_at_its_start_is_an_error_and_leaves_none():
    async def single(message, context):
        return b""

    async def run():
        handlers = {"no-slash": grpc.unary_unary_rpc_method_handler(single)}
        config = ServerConfig.from_dict({"server": {"port": 0}})
        lost = []
        one = Front(config, handlers, on_lost=lost.append)
        with pytest.raises(ConfigError, match="index out of range"):
            await asyncio.wait_for(one.start(), 30)
        assert not is_running(one.pid) and not lost

    asyncio.run(run())


@pytest.mark.parametrize("signals", [(), (signal.SIGTERM, signal.SIGINT)])
def test_front_process_ends_with_its_parent_and_not_by_signals(signals):
    """From its very first moment: before it ignores them they are blocked."""
    own, other = socket.socketpair()
    with other:
        process = _spawn(other.fileno())
    for number in signals:
        process.send_signal(number)
    own.close()
    assert process.wait(20) == 0
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGTERM}


def test_signals_to_a_front_process_that_serves_do_nothing():
    async def single(message, context):
        return message

    async def run():
        async with front(single=single) as (one, channel):
            os.kill(one.pid, signal.SIGTERM)
            os.kill(one.pid, signal.SIGINT)
            assert await channel.unary_unary("/x.X/Single")(b"here") == b"here"

    asyncio.run(run())


def test_front_process_that_hangs_is_killed_at_the_end_and_its_calls_with_it():
    async def run():
        waiting = Waiting()
        async with front(waiting) as (one, channel):
            call = channel.unary_stream("/x.X/Many")(b"")
            assert await call.read() == b"first"
            os.kill(one.pid, signal.SIGSTOP)
            await asyncio.wait_for(one.stop(None), 15)
            assert waiting.cancelled.is_set() and not is_running(one.pid)

    asyncio.run(run())


def test_call_whose_caller_left_before_it_began_leaves_nothing():
    began = []

    async def many(message, context):
        began.append(message)

    async def run():
        handler = grpc.unary_stream_rpc_method_handler(many)
        config = ServerConfig.from_dict({"server": {"port": 0}})
        one = Front(config, {"/x.X/Many": handler}, on_lost=lambda code: None)
        one._pipe = wire.Pipe(one._receive, one._lost)
        head = wire.CALL_HEAD.pack(0, float("inf"))
        for number in range(3):
            one._receive(wire.CALL, number, head + b"x")
        one._receive(wire.GONE, 1, b"")
        while one._calls:
            await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(run(), 10))
    assert len(began) == 2
