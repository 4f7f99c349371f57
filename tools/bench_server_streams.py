"""Streams of the server, of its engine alone and of a bare server, side by side."""

import asyncio
import contextlib
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from bench_server_roles import ECHO_METHOD
from bench_workload import spread

from jchameleon.client.calls import GENERATE_STREAM
from jchameleon.serving.proto.jchameleon.v1 import inference_pb2 as pb


class Process:
    """One of the roles of bench_server_roles.py."""

    def __init__(self, role: str, config: Mapping[str, Any]) -> None:
        script = Path(__file__).with_name("bench_server_roles.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script), role, json.dumps(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.port = self._read()["port"]

    def ask(self, **order: Any) -> dict[str, Any]:
        """Give an order and wait for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process ended: {self._process.args}")
        return json.loads(line)


@contextlib.contextmanager
def processes(roles: Sequence[str], config: Mapping[str, Any]) -> Iterator[dict]:
    """Run roles, by name."""
    found: dict[str, Process] = {}
    try:
        for role in roles:
            found[role] = Process(role, config)
        yield found
    finally:
        for process in found.values():
            process.close()


async def stream_all(
    port: int, method: str, requests: Sequence[bytes]
) -> tuple[float, list[float], list[list[bytes]]]:
    """Send requests at once; return wall seconds, times to first message, messages."""
    gc.collect()  # not while it is measured: it takes longer than a first token
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await channel.channel_ready()
        call = channel.unary_stream(method)
        start_s = time.perf_counter()

        async def read(request: bytes) -> tuple[float, list[bytes]]:
            messages, first_s = [], 0.0
            async for message in call(request):
                if not messages:
                    first_s = time.perf_counter() - start_s
                messages.append(message)
            return first_s, messages

        answers = await asyncio.gather(*map(read, requests))
        wall_s = time.perf_counter() - start_s
    return wall_s, [first_s for first_s, _ in answers], [m for _, m in answers]


def generate_request(
    prompt: Sequence[int], adapter: str | None, output_tokens: int
) -> bytes:
    """Return a greedy request of a fixed length."""
    return pb.GenerateRequest(
        adapter_id=adapter or "",
        token_ids=pb.TokenIds(ids=prompt),
        sampling=pb.SamplingParams(temperature=0.0),
        stopping=pb.StoppingCriteria(max_new_tokens=output_tokens, ignore_eos=True),
        response=pb.ResponseOptions(token_ids=True),
    ).SerializeToString()


def spent(process: Process, before: Mapping[str, float]) -> dict[str, float]:
    """Return the CPU seconds since `before`."""
    after = process.ask(do="cpu")
    return {name: after[name] - before[name] for name in after}


def run_streams(
    found: Mapping[str, Process],
    role: str,
    prompts: Sequence[Sequence[int]],
    settings: Any,
    served: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return one sample of a role; the bare server sends what `served` received."""
    process = found[role]
    if role == "echo":
        assert served is not None, "the server runs first"
        process.ask(
            do="rehearse",
            interval_s=served["interval_s"],
            messages=[
                [one.hex() for one in messages] for messages in served["messages"]
            ],
        )
    before = process.ask(do="cpu")
    if role == "engine":
        sample = process.ask(
            do="run",
            prompts=prompts,
            adapters=[None] * len(prompts),
            output_tokens=settings.stream_tokens,
        )
        return {**sample, "cpu": spent(process, before)}
    # The same requests for both: what the bare server says, it knows already.
    requests = [
        generate_request(prompt, None, settings.stream_tokens) for prompt in prompts
    ]
    method = GENERATE_STREAM if role == "server" else ECHO_METHOD
    wall_s, ttfts_s, messages = asyncio.run(stream_all(process.port, method, requests))
    most = max(len(one) for one in messages)
    return {
        "wall_s": wall_s,
        "ttfts_s": ttfts_s,
        "num_messages": sum(map(len, messages)),
        "interval_s": (wall_s - min(ttfts_s)) / max(1, most - 1),
        "messages": messages,
        "cpu": spent(process, before),
    }


def measure_streams(settings: Any) -> list[dict[str, Any]]:
    """Return one row per number of streams."""
    engine = {
        "max_running": max(settings.streams),
        "max_model_len": settings.stream_tokens + 64,
        "pool_bytes": 256 << 20,
    }
    rng = np.random.default_rng(settings.seed)
    samples: dict[int, dict[str, list]] = {}
    roles = ("server", "engine", "echo")
    config = {"model": "tiny", "adapters": {}, "engine": engine}
    with processes(roles, config) as found:
        served: dict[int, dict[str, Any]] = {}
        for repeat in range(settings.repeats + 1):
            for streams in settings.streams:
                prompts = rng.integers(0, 256, (streams, 16)).tolist()
                # A machine that drifts drifts for all: forwards, then backwards.
                for role in roles[:: -1 if repeat % 2 and repeat > 1 else 1]:
                    sample = run_streams(
                        found, role, prompts, settings, served.get(streams)
                    )
                    if role == "server":
                        served[streams] = sample
                    if repeat:  # the first warms up
                        samples.setdefault(streams, {}).setdefault(role, []).append(
                            {k: v for k, v in sample.items() if k != "messages"}
                        )
    return [stream_row(streams, runs) for streams, runs in samples.items()]


def stream_row(streams: int, runs: Mapping[str, Sequence[dict]]) -> dict[str, Any]:
    """Return what a number of streams cost, ratios paired by round."""
    server, engine, echo = runs["server"], runs["engine"], runs["echo"]

    def us_per_message(sample: dict, cpu_s: float) -> float:
        return 1e6 * cpu_s / sample["num_messages"]

    ours = [us_per_message(one, one["cpu"]["serving_s"]) for one in server]
    bare = [us_per_message(one, one["cpu"]["serving_s"]) for one in echo]
    added = [
        us_per_message(one, one["cpu"]["process_s"] - alone["cpu"]["process_s"])
        for one, alone in zip(server, engine, strict=True)
    ]

    def median_ms(sample: dict) -> float:
        return 1e3 * statistics.median(sample["ttfts_s"])

    added_ms = [
        median_ms(one) - median_ms(alone)
        for one, alone in zip(server, engine, strict=True)
    ]
    bare_ms = [median_ms(one) for one in echo]

    def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
        return spread([a / b for a, b in zip(above, below, strict=True)])

    return {
        "streams": streams,
        "messages_per_s": spread(
            [one["num_messages"] / one["wall_s"] for one in server]
        ),
        "echo_messages_per_s": spread(
            [one["num_messages"] / one["wall_s"] for one in echo]
        ),
        "engine_tokens_per_s": spread(
            [one["output_tokens"] / one["wall_s"] for one in engine]
        ),
        "serving_us_per_message": spread(ours),
        "added_us_per_message": spread(added),
        "echo_us_per_message": spread(bare),
        "serving_ratio": ratio(ours, bare),
        "added_ratio": ratio(added, bare),
        "server_ttft_ms": spread([median_ms(one) for one in server]),
        "engine_ttft_ms": spread([median_ms(one) for one in engine]),
        "added_ttft_ms": spread(added_ms),
        "echo_ttft_ms": spread(bare_ms),
        "ttft_ratio": ratio(added_ms, bare_ms),
        "runs": dict(runs),
    }
