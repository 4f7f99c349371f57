"""The processes that tools/bench_server.py compares; it starts them by itself.

Each reads one JSON object a line and answers with one: {"do": "cpu"} with its CPU
seconds so far, "engine" also {"do": "run", ...} with what a run of requests took. They
end when their input does.
"""

import asyncio
import functools
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import uvloop

from jchameleon import LLM, SamplingParams
from jchameleon.serving.process import SWITCH_INTERVAL_S
from jchameleon.serving.server import Server
from jchameleon.serving.settings import ServerConfig

ECHO_METHOD = "/bench.Echo/Stream"
ENGINE_THREAD = "jchameleon-engine"


def main() -> None:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    sys.setswitchinterval(SWITCH_INTERVAL_S)  # for all roles alike
    role, config = sys.argv[1], json.loads(sys.argv[2])
    if role == "engine":
        run_engine(config)
    elif role == "server":
        uvloop.run(run_server(config))  # as `jchameleon serve`
    else:
        asyncio.run(run_echo(config))


def settle() -> None:
    """Look at nothing again that is there by now, as `jchameleon serve` does."""
    gc.collect()
    gc.freeze()


def tell(**facts: Any) -> None:
    """Answer the parent."""
    print(json.dumps(facts), flush=True)


def obey(**actions: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Do what the parent says until it says nothing more."""
    for line in sys.stdin:
        order = json.loads(line)
        tell(**actions[order["do"]](order))


def cpu(order: dict[str, Any], front_pid: int | None = None) -> dict[str, float]:
    """Return CPU seconds: of everything, and of threads of Python but the engine's.

    Those are the event loop and gRPC's poller; what is neither runs the model. All of a
    front process counts to both.
    """
    serving_s = sum(
        time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        for thread in threading.enumerate()
        if thread.name != ENGINE_THREAD and thread.ident is not None
    )
    front_s = 0.0 if front_pid is None else process_cpu_s(front_pid)
    return {
        "process_s": time.process_time() + front_s,
        "serving_s": serving_s + front_s,
    }


def process_cpu_s(pid: int) -> float:
    """Return the CPU seconds of another process, threads that have ended included."""
    return time.clock_gettime((~pid << 3) | 2)  # Linux' clock of that process


async def run_server(config: dict[str, Any]) -> None:
    """Serve a model with adapters."""
    server = Server(
        ServerConfig.from_dict(
            {
                "model": config["model"],
                "server": {"port": 0, "metrics_port": None},
                "engine": config["engine"],
            }
        )
    )
    await server.bind()
    await server.load()
    llm = server.state.open_llm()
    for name, path in config["adapters"].items():
        await asyncio.to_thread(llm.register_adapter, name, path)
    settle()
    tell(port=server.port)
    count = functools.partial(cpu, front_pid=server.front_pid)
    await asyncio.to_thread(obey, cpu=count)
    await server.stop()


class Beat:
    """Lets many streams go on at once, as the steps of an engine do."""

    def __init__(self) -> None:
        self._next: asyncio.Future[None] | None = None
        self._struck_s = 0.0

    async def wait(self, interval_s: float) -> None:
        """Wait for the next beat; all who wait share it."""
        loop = asyncio.get_running_loop()
        if self._next is None:
            self._next = loop.create_future()
            # From beat to beat, however long the streams took in between.
            at_s = max(loop.time(), self._struck_s + interval_s)
            loop.call_at(at_s, self._strike, self._next)
        await self._next

    def _strike(self, waited_for: "asyncio.Future[None]") -> None:
        self._struck_s = asyncio.get_running_loop().time()
        self._next = None
        waited_for.set_result(None)


async def run_echo(config: dict[str, Any]) -> None:
    """Answer requests with messages that the parent has handed over, one a beat.

    Not with what a request brings: to unpack it would take longer than to answer.
    """
    server = grpc.aio.server()
    beat = Beat()
    scripts: list[tuple[float, list[bytes]]] = []

    def rehearse(order: dict[str, Any]) -> dict[str, Any]:
        scripts[:] = [
            (order["interval_s"], [bytes.fromhex(text) for text in messages])
            for messages in order["messages"]
        ]
        return {}

    async def handle(data: bytes, context: Any) -> None:
        interval_s, messages = scripts.pop()
        for index, message in enumerate(messages):
            if index:
                await beat.wait(interval_s)
            await context.write(message)

    service, _, method = ECHO_METHOD.strip("/").partition("/")
    handler = grpc.unary_stream_rpc_method_handler(handle)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {method: handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    settle()
    tell(port=port)
    await asyncio.to_thread(obey, cpu=cpu, rehearse=rehearse)
    await server.stop(None)


def run_engine(config: dict[str, Any]) -> None:
    """Run requests on an engine in this process."""
    llm = LLM(config["model"], adapters=config["adapters"], **config["engine"])

    def run(order: dict[str, Any]) -> dict[str, Any]:
        sampling = SamplingParams(
            max_tokens=order["output_tokens"], temperature=0.0, ignore_eos=True
        )
        first_s: dict[int, float] = {}
        num_tokens = 0
        start_s = time.perf_counter()
        for delta in llm.stream(order["prompts"], order["adapters"], sampling):
            first_s.setdefault(delta.index, time.perf_counter() - start_s)
            num_tokens += len(delta.token_ids)
        return {
            "wall_s": time.perf_counter() - start_s,
            "ttfts_s": list(first_s.values()),
            "output_tokens": num_tokens,
        }

    with llm:
        settle()
        tell(port=0)
        obey(cpu=cpu, run=run)


if __name__ == "__main__":
    main()
