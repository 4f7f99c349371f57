"""When the clients try again: starting, draining, full and lost servers."""

import asyncio
import random
import threading
import time

import grpc
import pytest
from flaky_proxy import flaky_proxy
from server_harness import check_baseline, running_server

from jchameleon.client import AsyncClient, CallError, Client, RetryPolicy
from jchameleon.client.retry import Attempts
from jchameleon.errors import ConfigError

FAST = RetryPolicy(attempts=8, first_s=0.05, most_s=0.4)
GREEDY = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server():
    with running_server({}) as server:
        yield server


def generate_and_stream(target, **options):
    """Return the text of one prompt, asked for in all four ways."""
    with Client(target, **options) as client:
        texts = [
            client.generate("again", **GREEDY).text,
            "".join(piece.text for piece in client.stream("again", **GREEDY)),
        ]

    async def ask():
        async with AsyncClient(target, **options) as client:
            texts.append((await client.generate("again", **GREEDY)).text)
            pieces = [piece.text async for piece in client.stream("again", **GREEDY)]
            texts.append("".join(pieces))

    asyncio.run(ask())
    return texts


def refused(call):
    with pytest.raises(CallError) as caught:
        call()
    return caught.value


def test_starting_server_is_waited_for():
    with running_server({}, loads=False) as server:
        with Client(server.target, retry=RetryPolicy(attempts=1)) as client:
            error = refused(lambda: client.generate("x"))
            assert (error.code, error.reason) == (
                grpc.StatusCode.UNAVAILABLE,
                "STARTING",
            )
            assert error.retry_after_s == 1.0
            assert client.health() == "not_serving"
        loading = threading.Thread(target=lambda: server.on_loop(server.server.load()))
        loading.start()
        with Client(server.target, retry=RetryPolicy(attempts=60)) as client:
            assert len(client.generate("x", **GREEDY).token_ids) == 8
        loading.join()


def test_draining_server_refuses_after_all_attempts_or_at_the_deadline():
    with running_server({}) as server:
        with Client(server.target, retry=RetryPolicy(attempts=2)) as client:
            pieces = client.stream("runs on", max_tokens=200, ignore_eos=True)
            first = next(pieces)

            async def refuse():
                server.server.refuse()

            server.on_loop(refuse())
            started_s = time.monotonic()
            error = refused(lambda: client.generate("x"))
            assert error.reason == "DRAINING"
            assert time.monotonic() - started_s >= 1.0  # what the server asked for
            started_s = time.monotonic()
            error = refused(lambda: client.generate("x", timeout_s=0.5))
            # A wait beyond the deadline is not begun.
            assert error.reason == "DRAINING" and time.monotonic() - started_s < 0.5
            ids = first.token_ids + sum((piece.token_ids for piece in pieces), ())
            assert len(ids) == 200


def test_full_server_is_tried_again_until_there_is_room():
    table = {"limits": {"max_waiting_requests": 1}, "engine": {"max_running": 1}}
    with running_server(table) as server, Client(server.target) as client:
        running = [client.stream("a", max_tokens=300, ignore_eos=True) for _ in "ab"]
        threads = [
            threading.Thread(target=lambda one=one: list(one)) for one in running
        ]
        for thread in threads:
            thread.start()
        while server.server.admission.open_requests < 2:
            time.sleep(0.005)
        with Client(server.target, retry=RetryPolicy(attempts=1)) as once:
            error = refused(lambda: once.generate("b"))
            assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert error.reason == "QUEUE_FULL" and error.retry_after_s > 0
        with Client(server.target, retry=RetryPolicy(attempts=100)) as patient:
            assert len(patient.generate("c", **GREEDY).token_ids) == 8
        assert server.server.admission.refused > 0
        for thread in threads:
            thread.join()
        check_baseline(server)


def test_what_never_fits_is_not_tried_again(server):
    with Client(server.target) as client:
        started_s = time.monotonic()
        error = refused(lambda: client.generate("x", max_tokens=100_000))
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert time.monotonic() - started_s < 0.1


def test_connections_lost_before_the_answer_are_made_again(server):
    expected = generate_and_stream(server.target)
    assert len(set(expected)) == 1
    with flaky_proxy(server.target) as proxy:
        proxy.refuse(2)
        assert generate_and_stream(proxy.target, retry=FAST) == expected
        assert proxy.accepted >= 4
        proxy.swallow(2)
        assert generate_and_stream(proxy.target, retry=FAST) == expected
    check_baseline(server)


def test_attempts_are_counted(server):
    with flaky_proxy(server.target) as proxy:
        proxy.swallow(1000)
        policy = RetryPolicy(attempts=3, first_s=0.05, most_s=0.4)
        with Client(proxy.target, retry=policy) as client:
            error = refused(lambda: client.generate("x", **GREEDY))
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "")
        assert proxy.accepted == 3


def test_stream_that_is_lost_after_its_first_piece_is_not_repeated(server):
    with flaky_proxy(server.target) as proxy:
        with Client(proxy.target, retry=FAST) as client:
            pieces = client.stream("x", max_tokens=450, ignore_eos=True)
            got = [next(pieces)]
            proxy.cut()
            error = refused(lambda: got.extend(pieces))
            assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "")
            assert proxy.accepted == 1

        async def ask():
            async with AsyncClient(proxy.target, retry=FAST) as client:
                pieces = client.stream("x", max_tokens=450, ignore_eos=True)
                await anext(pieces)
                proxy.cut()
                with pytest.raises(CallError) as caught:
                    async for _ in pieces:
                        pass
                return caught.value

        error = asyncio.run(ask())
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "")
        assert proxy.accepted == 2
    check_baseline(server)


def unavailable(retry_after_s=None):
    return CallError(
        grpc.StatusCode.UNAVAILABLE, "X", "gone", retry_after_s=retry_after_s
    )


def test_waits_double_within_bounds_and_never_undercut_the_server():
    random.seed(1)
    policy = RetryPolicy(attempts=100, first_s=1.0, most_s=8.0)
    waits = [[] for _ in range(6)]
    for _ in range(200):
        attempts = Attempts(policy, None, repeatable=True)
        for seen in waits:
            seen.append(attempts.wait_s(unavailable()))
    for seen, whole_s in zip(waits, [1, 2, 4, 8, 8, 8], strict=True):
        assert whole_s / 2 <= min(seen) < 0.6 * whole_s
        assert 0.9 * whole_s < max(seen) <= whole_s
    asked = Attempts(policy, None, repeatable=True)
    assert 30 <= asked.wait_s(unavailable(30.0)) <= 31


def test_call_that_may_have_been_run_is_not_repeated_where_that_harms():
    attempts = Attempts(RetryPolicy(), None, repeatable=False)
    with pytest.raises(CallError, match="gone"):
        attempts.wait_s(unavailable())
    # The server's word that nothing was run.
    assert Attempts(RetryPolicy(), None, repeatable=False).wait_s(unavailable(1.0)) >= 1


@pytest.mark.parametrize(
    "fields", [{"attempts": 0}, {"first_s": 0.0}, {"first_s": 2.0, "most_s": 1.0}]
)
def test_policy_refuses_nonsense(fields):
    with pytest.raises(ConfigError):
        RetryPolicy(**fields)
