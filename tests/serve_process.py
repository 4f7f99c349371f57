"""`jchameleon serve` as a second process, and calls to it."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
from server_harness import SMALL_ENGINE

from jchameleon.serving.proto.jchameleon.v1 import inference_pb2 as pb

ROOT = Path(__file__).resolve().parent.parent
FAULTY = Path(__file__).parent / "faulty_server.py"
START_S = 120.0
GENERATE = "/jchameleon.v1.InferenceService/Generate"
GENERATE_STREAM = "/jchameleon.v1.InferenceService/GenerateStream"


def toml_of(table: dict[str, Any]) -> str:
    """Return a table of tables of plain values as TOML."""
    plain = {k: v for k, v in table.items() if not isinstance(v, dict)}
    lines = [f"{k} = {json.dumps(v)}" for k, v in plain.items()]
    for name, part in table.items():
        if isinstance(part, dict):
            lines += [f"[{name}]", *(f"{k} = {json.dumps(v)}" for k, v in part.items())]
    return "\n".join(lines) + "\n"


def serve_command(folder: Path, table: dict[str, Any], *, faulty: bool) -> list[str]:
    """Write a configuration of the tiny model and return the command that serves it."""
    table = {
        "model": "tiny",
        **table,
        "server": {"port": 0, "metrics_port": 0, **table.get("server", {})},
        "engine": {**SMALL_ENGINE, **table.get("engine", {})},
    }
    path = folder / "serve.toml"
    path.write_text(toml_of(table), encoding="utf-8")
    program = [str(FAULTY)] if faulty else ["-m", "jchameleon"]
    return [sys.executable, *program, "serve", str(path)]


def environment(**more: str) -> dict[str, str]:
    """Return an environment in which this checkout's package is found first."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}


class ServeProcess:
    """A server that is ready.

    Attributes:
      process: the process.
      lines: what it wrote to standard error so far.
      target: its address.
    """

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            command, env=env, stderr=subprocess.PIPE, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            listening = self.wait_for("listening")
            self.wait_for("ready")
        except AssertionError:
            self.kill()
            raise
        self.metrics_port = listening.get("metrics_port")
        self.target = f"127.0.0.1:{listening['port']}"

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self.lines.append(line)

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the log's events of this name so far."""
        found = [json.loads(line) for line in list(self.lines) if line[0] == "{"]
        return [event for event in found if event["event"] == name]

    def wait_for(self, name: str, count: int = 1) -> dict[str, Any]:
        """Wait until the log has so many events of this name; return the last."""
        wait_until(
            lambda: len(self.events(name)) >= count or self.process.poll() is not None
        )
        events = self.events(name)
        assert len(events) >= count, "".join(self.lines)
        return events[-1]

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """End the process, if it has not ended."""
        self.process.kill()
        self.process.wait()
        self._reader.join(10)

    def end(self) -> int:
        """Wait for the process to end by itself; return its exit code."""
        code = self.process.wait(60)
        self._reader.join(10)
        return code

    def metrics(self) -> dict[str, float]:
        """Return what /metrics says, by name with labels."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=30) as reply:
            lines = reply.read().decode().splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        return {name: float(value) for name, value in pairs}

    def generate(self, request: pb.GenerateRequest, **call: Any) -> pb.GenerateResponse:
        """Call Generate on a channel of its own."""
        with grpc.insecure_channel(self.target) as channel:
            return channel.unary_unary(
                GENERATE,
                request_serializer=pb.GenerateRequest.SerializeToString,
                response_deserializer=pb.GenerateResponse.FromString,
            )(request, **call)


@contextlib.contextmanager
def serving(
    folder: Path,
    table: dict[str, Any] | None = None,
    *,
    faulty: bool = False,
    **env: str,
) -> Iterator[ServeProcess]:
    """Serve the tiny model; what still runs at the end is killed."""
    command = serve_command(folder, table or {}, faulty=faulty)
    server = ServeProcess(command, environment(**env))
    try:
        yield server
    finally:
        server.kill()


def fails_to_serve(
    folder: Path, table: dict[str, Any], *flags: str, **env: str
) -> tuple[int, str]:
    """Return exit code and standard error of a server that ends by itself."""
    command = [*serve_command(folder, table, faulty=False), *flags]
    done = subprocess.run(
        command, env=environment(**env), capture_output=True, text=True, timeout=120
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


def wait_until(holds: Callable[[], bool], timeout_s: float = START_S) -> None:
    """Wait until something is so."""
    end_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end_s, "it never came to be"
        time.sleep(0.02)


class Load:
    """Calls that run at once on a thread, and how each ended.

    Attributes:
      answers: for each call that has ended, in order of its end, its number, its code
        and, if it ended with OK, its replies.
      started: calls that have had a reply.
    """

    def __init__(self, target: str, requests: list[pb.GenerateRequest]) -> None:
        """Call GenerateStream for all requests at once."""
        self.answers: list[tuple[int, grpc.StatusCode, Any]] = []
        self.errors: list[grpc.aio.AioRpcError] = []
        self.started: set[int] = set()
        self._target = target
        self._requests = requests
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()

    def join(self) -> None:
        """Wait until all have ended."""
        self._thread.join(120)
        assert not self._thread.is_alive(), f"only {len(self.answers)} calls have ended"

    async def _run(self) -> None:
        async with grpc.aio.insecure_channel(self._target) as channel:
            method = channel.unary_stream(
                GENERATE_STREAM,
                request_serializer=pb.GenerateRequest.SerializeToString,
                response_deserializer=pb.GenerateResponse.FromString,
            )
            calls = enumerate(self._requests)
            await asyncio.gather(*(self._call(method, i, one) for i, one in calls))

    async def _call(self, method: Any, index: int, request: Any) -> None:
        pieces = []
        try:
            async for piece in method(request):
                self.started.add(index)
                pieces.append(piece)
            self.answers.append((index, grpc.StatusCode.OK, pieces))
        except grpc.aio.AioRpcError as error:
            self.errors.append(error)
            self.answers.append((index, error.code(), None))

    def codes(self) -> list[grpc.StatusCode]:
        """Return the codes of all calls in order, each of which has one answer."""
        found = {index: code for index, code, _ in self.answers}
        assert len(self.answers) == len(found) == len(self._requests)
        return [found[index] for index in range(len(self._requests))]
