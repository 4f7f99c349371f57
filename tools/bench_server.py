"""Measure what the gRPC server costs beside what it serves.

Streams: many requests stream at once from the tiny model. Three processes run the same
requests in turn: the server, an engine without gRPC, and a bare grpc.aio server that
sends the server's own messages at the server's own rate. What the server adds to the
engine, per message and to the first token, is compared with the bare one.

Throughput: requests for many adapters of a real model, all at once, through the server
and through the engine alone.

    python tools/bench_server.py --json out.json
    python tools/bench_server.py --quick              # its figures mean nothing
"""

import argparse
import asyncio
import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_machine import calibrate, describe_machine, hold_to_cores, versions
from bench_server_streams import (
    Process,
    generate_request,
    measure_streams,
    processes,
    stream_all,
)
from bench_workload import spread
from random_adapters import write_random_adapter

from jchameleon import __version__
from jchameleon.client.calls import GENERATE_STREAM
from jchameleon.config import ATTENTION_PROJECTIONS
from jchameleon.models.loader import load_model_config
from jchameleon.serving.proto.jchameleon.v1 import inference_pb2 as pb

BAR_MESSAGE = 1.5
"""The server's CPU per message may be so many times that of the bare one, which runs on
asyncio's own loop."""
BAR_TTFT = 1.5
"""What the server adds to the engine's time to first token may be so many times that of
the bare server."""
BAR_THROUGHPUT = 0.9
"""The server's tokens per second may be so many times the engine's, at least."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """One run of the bench.

    Attributes:
      streams: how many at once, in turn.
      stream_tokens: output of each.
      repeats: timed rounds; one more warms up.
      model: of the throughput part.
      ranks: of its adapters, in turn.
      max_running, max_model_len: of its engines.
    """

    streams: tuple[int, ...] = (32, 64)
    stream_tokens: int = 256
    repeats: int = 15
    model: str = "smollm2-135m"
    num_adapters: int = 16
    ranks: tuple[int, ...] = (8, 16, 32, 64)
    num_requests: int = 32
    prompt_tokens: int = 32
    output_tokens: int = 32
    throughput_repeats: int = 3
    max_running: int = 16
    max_model_len: int = 512
    seed: int = 0
    threads: int = 2


QUICK: dict[str, Any] = {
    "streams": (2, 4),
    "stream_tokens": 8,
    "repeats": 1,
    "model": "tiny",
    "num_adapters": 2,
    "ranks": (8,),
    "num_requests": 4,
    "prompt_tokens": 8,
    "output_tokens": 4,
    "throughput_repeats": 1,
    "max_running": 4,
    "max_model_len": 64,
}


def measure_throughput(settings: Settings) -> dict[str, Any]:
    """Return tokens per second of server and engine on the same requests."""
    model = load_model_config(settings.model)
    rng = np.random.default_rng(settings.seed)
    rates: dict[str, list[float]] = {"server": [], "engine": []}
    with tempfile.TemporaryDirectory() as folder:
        adapters = {
            f"a{index}": str(
                write_random_adapter(
                    Path(folder, f"a{index}"),
                    model,
                    rank=settings.ranks[index % len(settings.ranks)],
                    targets=ATTENTION_PROJECTIONS,
                    seed=index,
                )
            )
            for index in range(settings.num_adapters)
        }
        names = list(adapters)
        who = [names[i % len(names)] for i in range(settings.num_requests)]
        engine = {
            "max_running": settings.max_running,
            "max_model_len": settings.max_model_len,
            "pool_bytes": 512 << 20,
        }
        config = {"model": settings.model, "adapters": adapters, "engine": engine}
        with processes(("server", "engine"), config) as found:
            for repeat in range(settings.throughput_repeats + 1):
                prompts = rng.integers(
                    0,
                    model.vocab_size,
                    (settings.num_requests, settings.prompt_tokens),
                ).tolist()
                for role in list(found)[:: -1 if repeat % 2 else 1]:
                    rate = throughput(found[role], role, prompts, who, settings)
                    if repeat:  # the first loads the adapters
                        rates[role].append(rate)
    pairs = zip(rates["server"], rates["engine"], strict=True)
    return {
        "server_tokens_per_s": spread(rates["server"]),
        "engine_tokens_per_s": spread(rates["engine"]),
        "ratio": spread([server / engine for server, engine in pairs]),
    }


def throughput(
    process: Process,
    role: str,
    prompts: Sequence[Sequence[int]],
    adapters: Sequence[str],
    settings: Settings,
) -> float:
    """Return the output tokens per second of one run."""
    total = len(prompts) * settings.output_tokens
    if role == "engine":
        sample = process.ask(
            do="run",
            prompts=prompts,
            adapters=list(adapters),
            output_tokens=settings.output_tokens,
        )
        assert sample["output_tokens"] == total, sample
        return total / sample["wall_s"]
    requests = [
        generate_request(prompt, adapter, settings.output_tokens)
        for prompt, adapter in zip(prompts, adapters, strict=True)
    ]
    wall_s, _, messages = asyncio.run(
        stream_all(process.port, GENERATE_STREAM, requests)
    )
    tokens = sum(
        len(output.token_ids)
        for stream in messages
        for message in stream
        for output in pb.GenerateResponse.FromString(message).outputs
    )
    assert tokens == total, tokens
    return total / wall_s


def run_bench(settings: Settings, *, quick: bool) -> dict[str, Any]:
    """Measure everything and return the report that is printed and kept as JSON."""
    load = os.getloadavg()[0]
    width, amount = (256, 8 << 20) if quick else (2048, 512 << 20)
    calibration = calibrate(
        threads=settings.threads, gemm_width=width, read_bytes=amount
    )
    streams = measure_streams(settings)
    rate = measure_throughput(settings)
    return {
        "settings": dataclasses.asdict(settings),
        "machine": describe_machine(),
        "load_average": load,
        "calibration": calibration,
        "versions": {
            "jchameleon": __version__,
            **versions(("numpy", "jax", "grpcio", "protobuf", "uvloop")),
        },
        "streams": streams,
        "throughput": rate,
        "checks": {
            **{
                f"{row['streams']} streams: CPU per message <= {BAR_MESSAGE} x bare": (
                    row["serving_ratio"]["median"] <= BAR_MESSAGE
                )
                for row in streams
            },
            **{
                f"{row['streams']} streams: TTFT added <= {BAR_TTFT} x bare": (
                    row["ttft_ratio"]["median"] <= BAR_TTFT
                )
                for row in streams
            },
            f"throughput >= {BAR_THROUGHPUT} x engine": (
                rate["ratio"]["median"] >= BAR_THROUGHPUT
            ),
        },
    }


def print_report(report: Mapping[str, Any]) -> None:
    """Print the report for people."""
    settings, machine = report["settings"], report["machine"]
    load = report["load_average"]
    print(
        f"medians of {settings['repeats']} rounds [spread]; machine: {machine['cpu']}, "
        f"{machine['cores_in_use']} of {machine['cores']} cores, load {load:.1f} at "
        f"the start{'' if load < 0.5 else ': it was NOT QUIET'}; "
        f"{report['calibration']['gemm_gflops']:.0f} GFLOP/s, "
        f"{report['calibration']['read_gbps']:.1f} GB/s; versions: "
        + ", ".join(f"{k} {v}" for k, v in report["versions"].items() if v)
    )

    def shown(values: Mapping[str, float], digits: int = 0) -> str:
        return (
            f"{values['median']:.{digits}f} "
            f"[{values['min']:.{digits}f}-{values['max']:.{digits}f}]"
        )

    for row in report["streams"]:
        print(f"\n{row['streams']} streams of the tiny model")
        for label, key, digits in (
            ("messages/s, server", "messages_per_s", 0),
            ("messages/s, bare", "echo_messages_per_s", 0),
            ("tokens/s, engine alone", "engine_tokens_per_s", 0),
            ("CPU us a message, serving", "serving_us_per_message", 1),
            ("CPU us a message, over the engine", "added_us_per_message", 1),
            ("CPU us a message, bare", "echo_us_per_message", 1),
            ("serving / bare", "serving_ratio", 2),
            ("over the engine / bare", "added_ratio", 2),
            ("TTFT ms, server", "server_ttft_ms", 1),
            ("TTFT ms, engine alone", "engine_ttft_ms", 1),
            ("TTFT ms, over the engine", "added_ttft_ms", 1),
            ("TTFT ms, bare", "echo_ttft_ms", 1),
            ("over the engine / bare", "ttft_ratio", 2),
        ):
            print(f"  {label:34} {shown(row[key], digits)}")
    rate = report["throughput"]
    print(
        f"\n{settings['model']}, {settings['num_adapters']} adapters, "
        f"{settings['num_requests']} requests: tokens/s server "
        f"{shown(rate['server_tokens_per_s'], 1)}, engine "
        f"{shown(rate['engine_tokens_per_s'], 1)}, ratio {shown(rate['ratio'], 3)}\n"
    )
    for check, holds in report["checks"].items():
        print(f"{'ok  ' if holds else 'MISS'} {check}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report")
    parser.add_argument("--quick", action="store_true", help="everything, in seconds")
    parser.add_argument("--repeats", type=int, help="timed rounds of the streams")
    args = parser.parse_args()
    values = dict(QUICK) if args.quick else {}
    if args.repeats is not None:
        if args.repeats < 1:
            parser.error(f"--repeats={args.repeats} must be at least 1")
        values["repeats"] = args.repeats
    settings = Settings(**values)
    hold_to_cores(settings.threads)
    report = run_bench(settings, quick=args.quick)
    print_report(report)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
