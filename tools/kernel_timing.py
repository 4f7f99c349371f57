"""Device times of programs: queues of calls, in turn, medians of rounds.

A program runs a kernel once for every turn of a world, and takes and returns a state
whose memory it may reuse. A sample is a queue of calls between two waits, long enough
that neither dispatch nor the waits matter, divided by all its kernels. Contestants run
in turn within a round, forwards and backwards, so that a GPU whose clock drifts drifts
for all of them.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

Program = Callable[[Any, Any], tuple[Any, Any]]
"""(state, inputs) -> (state, whatever else was computed)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """How long to measure.

    Attributes:
      rounds: samples of each contestant.
      queue_s: least length of a sample.
    """

    rounds: int = 9
    queue_s: float = 0.02

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds} must be at least 1")
        if self.queue_s <= 0:
            raise ValueError(f"queue_s={self.queue_s} must be more than 0")


def compile_program(program: Program, state: Any, inputs: Any) -> Program:
    """Return the compiled program; its state is donated."""
    return jax.jit(program, donate_argnums=0).lower(state, inputs).compile()


def measure(
    programs: Mapping[str, Program],
    state: Any,
    inputs: Any,
    *,
    kernels: int,
    timing: Timing,
) -> dict[str, list[float]]:
    """Return seconds of one kernel, a sample a round, of each compiled program.

    Args:
      state: of the first call; lost. All programs hand it on to each other.
      kernels: that a call of any program runs, one after the other.
    """
    calls = {}
    for name, program in programs.items():
        _, state = _queue_s(program, state, inputs, 1)  # the first call warms up
        count = 1
        while True:
            took_s, state = _queue_s(program, state, inputs, count)
            if took_s >= timing.queue_s:
                break
            # A little more than enough; never a leap from one noisy short sample.
            count = max(count + 1, int(min(10, 1.2 * timing.queue_s / took_s) * count))
        calls[name] = count
    samples: dict[str, list[float]] = {name: [] for name in programs}
    for round_index in range(timing.rounds):
        order = list(programs)[:: -1 if round_index % 2 else 1]
        for name in order:
            took_s, state = _queue_s(programs[name], state, inputs, calls[name])
            samples[name].append(took_s / calls[name] / kernels)
    return samples


def _queue_s(
    program: Program, state: Any, inputs: Any, calls: int
) -> tuple[float, Any]:
    jax.block_until_ready(state)
    more = None
    start_s = time.perf_counter()
    for _ in range(calls):
        state, more = program(state, inputs)
    jax.block_until_ready((state, more))
    return time.perf_counter() - start_s, state
