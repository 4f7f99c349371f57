"""What an engine costs beside its arithmetic: host time, compiles, start of a process.

`bench_offline.py` prints these with its table; alone, this takes a minute:

    python tools/bench_engine.py
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
from bench_machine import interpreter_loop

from jchameleon import LLM, SamplingParams

RUNNING, QUEUED = 64, 1_000

BARS = {"host_s": 1e-3, "compiles": 0, "start_s": 8.0}
"""Most that an iteration's host part, compiles after warm-up and a warm start of
`jchameleon generate` may take."""


def measure_host(
    model: str,
    *,
    running: int = RUNNING,
    queued: int = QUEUED,
    prompt_tokens: int = 16,
    output_tokens: int = 64,
) -> Any:
    """Serve many short requests at once and watch the engine.

    Returns:
      host_s: the host's part of iterations that decode `running` rows while requests
        wait, a list in seconds; compiles: programs compiled after the start.
    """
    compiles = 0
    started = False

    def listen(name: str, seconds: float, **_: Any) -> None:
        nonlocal compiles
        del seconds
        compiles += started and "backend_compile" in name

    jax.monitoring.register_event_duration_secs_listener(listen)
    options = {
        "max_running": running,
        "max_model_len": 2 * (prompt_tokens + output_tokens),
    }
    rng = np.random.default_rng(0)
    with LLM(model, **options) as llm:
        started = True
        shape = (running + queued, prompt_tokens)
        prompts = rng.integers(0, llm.model_config.vocab_size, shape).tolist()
        sampling = SamplingParams(
            max_tokens=output_tokens, temperature=0.0, ignore_eos=True
        )
        stream = llm.stream(prompts, sampling=sampling)
        ended = 0
        for delta in stream:
            ended += delta.finish_reason is not None
            if ended > 2 * running:  # most still wait
                break
        records = llm.step_records
        stream.close()
    full = [r.host_s for r in records if len(r.decode) == running and not r.prefill]
    return {"host_s": full, "compiles": int(compiles)}


def measure_start(model: str) -> float:
    """Return the seconds of a `jchameleon generate` of one token in a new process."""
    command = [sys.executable, "-m", "jchameleon", "generate", "--model", model]
    command += ["--prompt", "Hi", "--max-tokens", "1"]
    start_s = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    return time.monotonic() - start_s


def measure_engine(
    model: str, *, repeats: int, running: int = RUNNING, queued: int = QUEUED
) -> dict[str, Any]:
    """Return host time (median, P90), compiles, and starts with filled caches."""
    if repeats > 1:  # else nobody means the figure
        measure_start(model)
    loops_s = [interpreter_loop()]
    starts_s = [measure_start(model) for _ in range(repeats)]
    loops_s.append(interpreter_loop())
    found = measure_host(model, running=running, queued=queued)
    loops_s.append(interpreter_loop())
    host_s = found["host_s"]
    return {
        "running": running,
        "queued": queued,
        "iterations": len(host_s),
        "host_s": statistics.median(host_s),
        "host_p90_s": float(np.percentile(host_s, 90)),
        "compiles": found["compiles"],
        "start_s": statistics.median(starts_s),
        "starts_s": starts_s,
        "loops_s": loops_s,
    }


def print_engine(found: dict[str, Any]) -> None:
    """Print the figures for people, and beside the bars what they are in loops.

    The loop is timed before and after each of the two.
    """
    before_s, between_s, after_s = found["loops_s"]
    in_loops = [
        f"{name.removesuffix('_s')} {found[name] / loop_s:.4g} "
        f"(bar {BARS[name] / loop_s:.4g})"
        for name, loop_s in (
            ("host_s", (between_s + after_s) / 2),
            ("start_s", (before_s + between_s) / 2),
        )
    ]
    loops_ms = ", ".join(f"{1e3 * loop_s:.1f}" for loop_s in found["loops_s"])
    print(
        f"host time of an iteration, {found['running']} running, {found['queued']} "
        f"queued at first: median {1e3 * found['host_s']:.2f} ms, "
        f"P90 {1e3 * found['host_p90_s']:.2f} ms of {found['iterations']}\n"
        f"compiles after warm-up: {found['compiles']}\n"
        f"`jchameleon generate`, warm caches, 1 token: {found['start_s']:.1f} s\n"
        f"a fixed loop of Python: {loops_ms} ms; in its units {', '.join(in_loops)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    args = parser.parse_args()
    found = measure_engine(args.model, repeats=args.repeats)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        print_engine(found)


if __name__ == "__main__":
    main()
