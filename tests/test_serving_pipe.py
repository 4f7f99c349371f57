"""Frames between a server's processes, however they are cut up on the way."""

import asyncio
import socket

import hypothesis.strategies as st
from hypothesis import given, settings

from jchameleon.serving.pipe import Pipe

FRAMES = st.lists(
    st.tuples(st.integers(0, 255), st.integers(0, 2**64 - 1), st.binary(max_size=300)),
    max_size=20,
)


class Wire:
    """A transport that keeps what is written."""

    def __init__(self):
        self.written = []

    def write(self, data):
        self.written.append(data)


def sent(frames):
    """Return what a pipe writes for frames that are sent in one turn."""

    async def run():
        pipe = Pipe(lambda *_: None, lambda: None)
        pipe._transport = wire = Wire()
        for frame in frames:
            pipe.send(*frame)
        assert not wire.written
        await asyncio.sleep(0)
        return wire.written

    return asyncio.run(run())


@settings(max_examples=200, deadline=None)
@given(frames=FRAMES, cuts=st.lists(st.integers(1, 400), max_size=30))
def test_frames_arrive_whole_and_in_order_however_they_are_cut(frames, cuts):
    written = sent(frames)
    assert len(written) == bool(frames)  # all of a turn in one write
    data, found = b"".join(written), []

    async def run():
        pipe = Pipe(lambda *frame: found.append(frame), lambda: None)
        at = 0
        for cut in [*cuts, len(data)]:
            if at < len(data):
                pipe.data_received(data[at : at + cut])
            at += cut

    asyncio.run(run())
    assert found == frames


def test_end_of_a_pipe_is_heard_once_at_both_ends_and_ends_sending():
    async def run():
        loop, lost, received = asyncio.get_running_loop(), [], []
        ends = []
        for name, one in zip("ab", socket.socketpair(), strict=True):

            def make(name=name):
                return Pipe(
                    lambda *frame: received.append(frame), lambda: lost.append(name)
                )

            ends.append((await loop.create_unix_connection(make, sock=one))[1])
        first, second = ends
        first.send(1, 2, b"last words")
        first.close()
        while len(lost) < 2:
            await asyncio.sleep(0.01)
        first.send(1, 2, b"to nobody")
        second.send(1, 2, b"to nobody")
        await asyncio.sleep(0.05)
        return sorted(lost), received

    assert asyncio.run(run()) == (["a", "b"], [(1, 2, b"last words")])


def test_sender_of_much_waits_for_an_end_that_does_not_read():
    async def run():
        loop = asyncio.get_running_loop()
        own, other = socket.socketpair()
        _, pipe = await loop.create_unix_connection(
            lambda: Pipe(lambda *_: None, lambda: None), sock=own
        )
        await asyncio.wait_for(pipe.room(), 5)
        pipe.send(1, 2, b"x" * (4 << 20))
        await asyncio.sleep(0)  # it goes out at the end of the turn
        waiting = asyncio.ensure_future(pipe.room())
        await asyncio.sleep(0.2)
        assert not waiting.done()
        other.setblocking(False)
        while not waiting.done():
            await loop.sock_recv(other, 1 << 20)
        # And does not wait for one that has ended.
        pipe.send(1, 2, b"x" * (4 << 20))
        await asyncio.sleep(0)
        other.close()
        await asyncio.wait_for(pipe.room(), 5)

    asyncio.run(run())
