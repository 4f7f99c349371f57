"""vLLM on our exported weights, in its own virtual environment and process."""

import json
import math
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench_workload import Case, Sample, Settings

START_LIMIT_S = 600.0
"""vLLM compiles the model when it starts first: 120 to 270 s on two cores (0.32)."""

TRY_LIMIT_S = 120.0
"""With LoRA one batch must end within this before it is measured at all."""

RUN_LIMIT_S = 600.0
"""A batch that takes longer ends the process; its row stays empty."""

KV_CACHE_GIB = 1
"""Holds the 16 requests of the workload many times over."""


class VllmError(RuntimeError):
    """vLLM did not start, ended, or took too long; says which."""


class Vllm:
    """One vLLM engine: of the base model alone, or with LoRA for a few adapters.

    While it is not asked anything its processes are stopped by a signal, so that
    threads of it that spin take no core from whoever is measured.
    """

    def __init__(
        self,
        python: Path,
        settings: Settings,
        model: Path,
        adapters: Mapping[str, Path],
        ranks: Mapping[str, int],
        *,
        log: Path,
        start_limit_s: float = START_LIMIT_S,
    ):
        """Start it and wait until it is ready.

        Args:
          python: of the environment that vLLM is installed in.
          model: a Hugging Face directory.
          adapters, ranks: directory and rank by name; without any, LoRA is off.
          log: takes what it prints.

        Raises:
          VllmError: it does not start within `start_limit_s`.
        """
        self._log = log
        self._rest = b""
        env = {
            **os.environ,
            # Its "auto" keeps one core free, which is half of two.
            "VLLM_CPU_OMP_THREADS_BIND": core_list(settings.threads),
            "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        env.pop("PYTHONPATH", None)  # our packages are not its
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [str(python), str(Path(__file__).with_name("peer_vllm_role.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=env,
                start_new_session=True,
            )
        order = {
            "model": str(model),
            "dtype": settings.dtype,
            "adapters": {n: [str(p), ranks[n]] for n, p in adapters.items()},
            "max_model_len": settings.prompt_tokens + settings.output_tokens,
            "num_requests": settings.num_requests,
        }
        facts = self._ask(order, limit_s=start_limit_s)
        self.version: str = facts["version"]
        self.start_s: float = facts["start_s"]

    def run(
        self, case: Case, prompts: list[list[int]], *, output_tokens: int
    ) -> Sample | None:
        """Time one batch; None if vLLM has failed, in this batch or before."""
        if self._process.poll() is not None:
            return None
        order = self._order(case, prompts, output_tokens)
        try:
            found = self._ask(order, limit_s=RUN_LIMIT_S)
        except VllmError:
            return None
        if any(len(output) != output_tokens for output in found["tokens"]):
            raise RuntimeError(f"{case.label}: {[*map(len, found['tokens'])]}")
        return Sample(
            wall_s=found["wall_s"],
            ttft_s=[],
            decode_step_s=[],
            prefill_s=math.nan,
            misses=0,
            tokens=[tuple(output) for output in found["tokens"]],
        )

    def try_batch(
        self, case: Case, prompts: list[list[int]], output_tokens: int, limit_s: float
    ) -> None:
        """Run one batch, or end the engine.

        Raises:
          VllmError: the batch did not end within `limit_s`.
        """
        order = self._order(case, prompts, output_tokens)
        self._ask(order, limit_s=limit_s)

    def close(self) -> None:
        """End its processes; they share a group of their own."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _order(
        self, case: Case, prompts: list[list[int]], output_tokens: int
    ) -> dict[str, Any]:
        return {
            "prompts": prompts,
            "adapters": case.names(len(prompts)),
            "output_tokens": output_tokens,
        }

    def _ask(self, order: Mapping[str, Any], *, limit_s: float) -> dict[str, Any]:
        """Give an order and wait for its answer; the processes run only meanwhile."""
        assert self._process.stdin is not None
        try:
            os.killpg(self._process.pid, signal.SIGCONT)
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
            answer = json.loads(self._read_line(time.monotonic() + limit_s, limit_s))
            os.killpg(self._process.pid, signal.SIGSTOP)
        except (VllmError, OSError, ValueError) as error:
            self.close()
            reason = str(error) if isinstance(error, VllmError) else self._ended()
            raise VllmError(reason) from error
        return answer

    def _read_line(self, deadline_s: float, limit_s: float) -> bytes:
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._rest:
            left_s = max(0.0, deadline_s - time.monotonic())
            if not select.select([pipe], [], [], left_s)[0]:
                raise VllmError(f"did not finish in {limit_s:g} s")
            data = os.read(pipe, 1 << 16)
            if not data:
                raise VllmError(self._ended())
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _ended(self) -> str:
        """Return that it ended, with the last that it printed."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no message")
        return f"ended: {last.strip()[:200]}"


def core_list(threads: int) -> str:
    """Return the cores of this process, at most `threads`: "0,1"."""
    if not hasattr(os, "sched_getaffinity"):
        return f"0-{threads - 1}"
    return ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))


def is_installed(python: Path) -> bool:
    """Return whether `python` is an interpreter that finds vLLM."""
    code = "import importlib.util as u; raise SystemExit(u.find_spec('vllm') is None)"
    try:
        return not subprocess.run([str(python), "-c", code], check=False).returncode
    except OSError:
        return False
