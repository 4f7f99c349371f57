"""The engine under test: one model and its programs, fresh policies for each run."""

import dataclasses
import functools
import gc
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jchameleon.config import RESERVED_PAGES, EngineConfig
from jchameleon.lora.peft import load_peft_adapter
from jchameleon.models.loader import load_model
from jchameleon.outputs import RequestTiming
from jchameleon.runtime.engine import Engine
from jchameleon.runtime.outbox import Delta, Outbox
from jchameleon.runtime.policy.build import build_planner
from jchameleon.runtime.policy.log import PlanLogWriter
from jchameleon.runtime.policy.plan import Books
from jchameleon.runtime.policy.planner import Planner
from jchameleon.runtime.policy.presets import load_policy
from jchameleon.runtime.setup import build_executor, start_engine
from jchameleon.runtime.staging import HostStaging, Packer
from jchameleon.sampling import SamplingParams

SILENCE_S = 300.0
"""An engine that puts out nothing for so long while requests are open has failed."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A request, ready to run, and when it arrives, in seconds from the start."""

    request_id: str
    prompt: Sequence[int]
    sampling: SamplingParams
    adapter: str | None
    at_s: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a job.

    Attributes:
      token_s: when each token came out, in seconds from when the job was to arrive.
      late_s: how much later than that it was submitted.
    """

    tokens: tuple[int, ...]
    token_s: tuple[float, ...]
    late_s: float
    finish_reason: str
    error: str | None
    timing: RequestTiming

    @property
    def failed(self) -> bool:
        """Whether it ended otherwise than by its stop token or its length."""
        return self.finish_reason not in ("stop", "length")

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token; None without any."""
        return self.token_s[0] if self.token_s else None

    @property
    def gaps_s(self) -> list[float]:
        """Times between two tokens."""
        return np.diff(self.token_s).tolist()


class Recorder(Outbox):
    """Stamps every delta on the engine's own thread.

    A reader on a thread of its own would wake up for each token, and take the
    interpreter from the engine each time.
    """

    def __init__(self, num_requests: int):
        """Record until `num_requests` have ended."""
        super().__init__()
        self._open = num_requests
        self._all_ended = threading.Event()
        self._stamped: list[tuple[float, str, Delta]] = []

    def put(self, request_id: str, delta: Delta) -> None:
        """Note what comes out, and when (engine thread)."""
        self._stamped.append((time.monotonic(), request_id, delta))
        if delta.finish_reason is not None:
            self._open -= 1
            if not self._open:
                self._all_ended.set()

    def wait(self) -> list[tuple[float, str, Delta]]:
        """Return (time, request id, delta) of everything once all have ended.

        Raises:
          RuntimeError: nothing came out for `SILENCE_S`.
        """
        before = -1
        while not self._all_ended.wait(SILENCE_S):
            if len(self._stamped) == before:
                raise RuntimeError(
                    f"{self._open} requests are open, and nothing came out for "
                    f"{SILENCE_S:g} s"
                )
            before = len(self._stamped)
        return self._stamped


class Session:
    """A running engine; `Rig.session` makes it."""

    def __init__(self, engine: Engine, planner: Planner, uids: Mapping[str, str]):
        self._engine = engine
        self._planner = planner
        self._uids = uids

    def play(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Submit each job when it arrives, whatever the others do, until all ended."""
        recorder = Recorder(len(jobs))
        submissions = [
            self._engine.prepare(
                job.request_id,
                job.prompt,
                job.sampling,
                adapter_uid=None if job.adapter is None else self._uids[job.adapter],
                outbox=recorder,
            )
            for job in jobs
        ]
        late_s = []
        start_s = time.monotonic()
        for job, submission in zip(jobs, submissions, strict=True):
            wait_s = start_s + job.at_s - time.monotonic()
            if wait_s > 0:
                time.sleep(wait_s)
            late_s.append(time.monotonic() - start_s - job.at_s)
            self._engine.submit(submission)
        stamped = recorder.wait()
        pieces: dict[str, list[tuple[float, Delta]]] = {j.request_id: [] for j in jobs}
        for now_s, request_id, delta in stamped:
            pieces[request_id].append((now_s, delta))
        return [
            outcome(pieces[job.request_id], start_s + job.at_s, late)
            for job, late in zip(jobs, late_s, strict=True)
        ]

    def books(self) -> Books:
        """Return the planner's totals since the session began."""
        return self._engine.on_engine_thread(self._planner.books)


def outcome(
    pieces: Sequence[tuple[float, Delta]], due_s: float, late_s: float
) -> Outcome:
    """Return what a job's stamped deltas amount to; it was to arrive at `due_s`."""
    last = pieces[-1][1]
    assert last.finish_reason is not None and last.timing is not None
    return Outcome(
        tokens=tuple(token for _, delta in pieces for token in delta.token_ids),
        token_s=tuple(now_s - due_s for now_s, d in pieces for _ in d.token_ids),
        late_s=late_s,
        finish_reason=last.finish_reason,
        error=last.error,
        timing=last.timing,
    )


class Rig:
    """Weights, compiled programs, pool and adapters in host memory, set up once.

    Every session has an engine thread, planner, policies and adapter cache of its own,
    and starts with an empty pool: only what no policy can change is shared.
    """

    def __init__(
        self, model: str, adapters: Mapping[str, Path], options: Mapping[str, Any]
    ):
        """Load everything and compile.

        Args:
          adapters: name -> PEFT directory; read once, so that no run waits for a disk.
          options: fields of `EngineConfig` of all sessions.
        """
        self._options = dict(options)
        config = EngineConfig.from_dict(self._options)
        self._loaded = load_model(model, dtype=config.dtype)
        read = functools.partial(
            load_peft_adapter, model=self._loaded.config, max_rank=config.max_lora_rank
        )
        found = {name: read(path) for name, path in adapters.items()}
        self._uids = {name: adapter.uid for name, adapter in found.items()}
        self._adapters = {adapter.uid: adapter for adapter in found.values()}
        self._cards = [adapter.card for adapter in self._adapters.values()]
        self._executor, *_ = build_executor(self._loaded, config, self._cards)
        # What jax and all imports leave takes 0.1 s to go through, in the middle of
        # some run or other.
        gc.collect()
        gc.freeze()

    @property
    def vocab_size(self) -> int:
        """Token ids of the model are below this."""
        return self._loaded.config.vocab_size

    @property
    def pool_pages(self) -> int:
        """Pages that KV blocks and adapters share."""
        return self._executor.num_pages - RESERVED_PAGES

    def device_bytes(self, adapter: str) -> int:
        """Return the bytes that an adapter takes in the pool."""
        executor = self._executor
        pages = executor.layout.num_pages(self._adapters[self._uids[adapter]].rank)
        return pages * (executor.pool_bytes // executor.num_pages)

    @contextmanager
    def session(
        self,
        policy: str | Mapping[str, Any],
        link_bytes_per_s: float | None,
        plan_log: Path | None = None,
    ) -> Iterator[Session]:
        """Run an engine with new policies over an empty pool.

        Args:
          policy: as in `EngineConfig`.
          link_bytes_per_s: of the emulated link; None for none.
          plan_log: file that records events and plans.
        """
        config = EngineConfig.from_dict(
            {**self._options, "policy": policy, "link_bytes_per_s": link_bytes_per_s}
        )
        gc.collect()
        planner = build_planner(config, self._executor.num_pages)
        log = None
        if plan_log is not None:
            log = PlanLogWriter(plan_log, planner.config, load_policy(policy))
        engine = start_engine(
            self._loaded,
            config,
            self._executor,
            planner,
            log=log,
            staging=HostStaging(
                Packer(self._executor.layout, self._executor.dtype),
                self._executor.device,
                self._adapters.__getitem__,
            ),
        )
        try:
            for card in self._cards:
                engine.adapters.register(card)
            yield Session(engine, planner, self._uids)
        finally:
            engine.close()
            for uid in self._adapters:
                if planner.adapter_stats(uid).state == "resident":
                    self._executor.evict(uid)
            assert self._executor.num_resident == 0, "a session left adapters behind"
