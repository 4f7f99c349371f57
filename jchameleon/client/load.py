"""An open-loop load generator: send times never wait for answers."""

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence

from jchameleon.client.asynchronous import AsyncClient
from jchameleon.client.errors import CallError
from jchameleon.client.values import Timing
from jchameleon.workload.generator import Planned


@dataclasses.dataclass(slots=True)
class Sample:
    """What became of one request. Times are in seconds from the start of the run.

    Attributes:
      sent_s: when it was sent; later than planned where this program was late.
      pieces: when each piece with tokens came, and how many.
      ended_s: when its stream ended, well or not.
      error: why it failed; None is a whole answer.
    """

    planned: Planned
    sent_s: float = 0.0
    ended_s: float = 0.0
    pieces: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    text: str = ""
    timing: Timing | None = None
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """Time from sending to the first token."""
        return self.pieces[0][0] - self.sent_s

    @property
    def latency_s(self) -> float:
        """Time from sending to the last token."""
        return self.pieces[-1][0] - self.sent_s

    @property
    def output_tokens(self) -> int:
        """Tokens that came."""
        return sum(count for _, count in self.pieces)

    @property
    def itls_s(self) -> list[float]:
        """Times between one piece and the next."""
        times = [at_s for at_s, _ in self.pieces]
        return [b - a for a, b in zip(times, times[1:], strict=False)]

    @property
    def tpot_s(self) -> float | None:
        """Time per token after the first; None for an output of one token."""
        more = self.output_tokens - 1
        return (self.latency_s - self.ttft_s) / more if more else None


@dataclasses.dataclass(slots=True)
class Progress:
    """How far a run is.

    Attributes:
      most_open: requests under way at once, so far.
    """

    planned: int
    sent: int = 0
    completed: int = 0
    failed: int = 0
    output_tokens: int = 0
    most_open: int = 0

    @property
    def open(self) -> int:
        """Requests under way."""
        return self.sent - self.completed - self.failed


async def run_load(
    client: AsyncClient,
    plan: Sequence[Planned],
    *,
    timeout_s: float,
    seed: int = 0,
    tick: Callable[[Progress, float], None] | None = None,
    tick_s: float = 1.0,
) -> tuple[list[Sample], Progress]:
    """Send every request at its time and collect what comes.

    Args:
      client: should not retry, or what is refused counts as slow.
      timeout_s: deadline of each request.
      seed: of the sampling.
      tick: is called every `tick_s` with the progress and the seconds since the start.
    """
    progress = Progress(planned=len(plan))
    samples = [Sample(planned=planned) for planned in plan]
    start_s = time.perf_counter()

    async def send(index: int, sample: Sample) -> None:
        planned = sample.planned
        sample.sent_s = time.perf_counter() - start_s
        progress.sent += 1
        progress.most_open = max(progress.most_open, progress.open)
        texts = []
        try:
            async for piece in client.stream(
                token_ids=planned.prompt,
                adapter=planned.adapter,
                timeout_s=timeout_s,
                max_tokens=planned.output_tokens,
                ignore_eos=True,
                seed=(seed + index) % 2**32,
            ):
                if piece.token_ids:
                    now_s = time.perf_counter() - start_s
                    sample.pieces.append((now_s, len(piece.token_ids)))
                    progress.output_tokens += len(piece.token_ids)
                texts.append(piece.text)
                sample.timing = piece.timing
        except CallError as error:
            sample.error = str(error)
        else:
            if not sample.pieces:
                sample.error = "the answer has no tokens"
        sample.ended_s = time.perf_counter() - start_s
        sample.text = "".join(texts)
        progress.failed += sample.error is not None
        progress.completed += sample.error is None

    async def report() -> None:
        while tick is not None:
            await asyncio.sleep(tick_s)
            tick(progress, time.perf_counter() - start_s)

    reporting = asyncio.create_task(report())
    try:
        async with asyncio.TaskGroup() as group:
            for index, sample in enumerate(samples):
                wait_s = sample.planned.at_s - (time.perf_counter() - start_s)
                # Also where it is late: else nothing is read while it catches up.
                await asyncio.sleep(max(0.0, wait_s))
                group.create_task(send(index, sample))
    finally:
        reporting.cancel()
    return samples, progress
