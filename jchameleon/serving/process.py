"""A server's life as a process: start, serve, drain at a signal, end at a fault."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Coroutine, Iterator
from typing import Any, NoReturn

import prometheus_client as prom
import uvloop

from jchameleon.serving.engine_metrics import EngineCollector, MetricsEndpoint
from jchameleon.serving.logs import LineWriter, log_event, start_logs
from jchameleon.serving.metrics import Metrics
from jchameleon.serving.server import Server
from jchameleon.serving.settings import ServerConfig
from jchameleon.serving.status import StatusError, unavailable
from jchameleon.serving.watchdog import Condition, Watchdog

logger = logging.getLogger(__name__)

DRAINED, FAULT, INTERRUPTED = 0, 1, 130

FLUSH_S = 5.0
"""For replies that are made but not read yet, when everything else has ended."""

HURRIED_FLUSH_S = 0.5
"""The same after a fault, whose callers must know within five seconds, and after a
second signal."""

CLOSE_ENGINE_S = 10.0
"""An engine that takes longer to stop hangs."""

SWITCH_INTERVAL_S = 0.0005
"""How long a thread may keep the interpreter from another that waits for it. With
Python's own 5 ms a step that begins in a burst of requests waits for it many times: 32
requests at once had their first tokens after 41 ms instead of 31."""


def run_server(config: ServerConfig) -> NoReturn:
    """Serve until a signal or a fault, and end the process with its exit code.

    Takes over the process: its signals, its logs and its end.

    Raises:
      JChameleonError: nothing was served, and why.
    """
    prom.disable_created_metrics()  # as many series again, which nobody reads
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    logs = start_logs(config.server.log_format, sys.stderr)
    try:
        uvloop.run(_Process(config, logs).run())
    finally:
        logs.close()


class _Process:
    """One server and what may end it; event loop only."""

    def __init__(self, config: ServerConfig, logs: LineWriter) -> None:
        self._config = config
        self._logs = logs
        self._first_signal = asyncio.Event()
        self._second_signal = asyncio.Event()
        self._fault = asyncio.Event()

    async def run(self) -> NoReturn:
        """Serve, and end the process."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._hear, number)
        metrics = Metrics()
        server = Server(self._config, metrics, on_front_lost=self._lose_front)
        await self._bind(server)
        try:
            with self._metrics_endpoint(server, metrics) as metrics_port:
                host = self._config.server.host
                log_event(
                    logger,
                    "listening",
                    host=host,
                    port=server.port,
                    metrics_port=metrics_port,
                )
                await self._load(server)
                await self._serve(server)
        finally:
            await server.stop_calls(None)

    async def _bind(self, server: Server) -> None:
        """Listen; a signal ends the process meanwhile."""
        binding = asyncio.ensure_future(server.bind())
        await _first_of(asyncio.wait({binding}), self._first_signal.wait())
        if not binding.done():
            binding.cancel()
            await asyncio.wait({binding})
            log_event(logger, "stopped", code=DRAINED)
            self._leave(DRAINED)
        await binding

    def _hear(self, number: signal.Signals) -> None:
        if self._first_signal.is_set():
            self._second_signal.set()
        self._first_signal.set()
        log_event(logger, "signal", name=signal.Signals(number).name)

    @contextlib.contextmanager
    def _metrics_endpoint(
        self, server: Server, metrics: Metrics
    ) -> Iterator[int | None]:
        """Answer scrapes meanwhile; yields the port, None where there is none."""
        listen = self._config.server
        if listen.metrics_port is None:
            yield None
            return
        metrics.registry.register(EngineCollector(server))
        endpoint = MetricsEndpoint(
            listen.metrics_host, listen.metrics_port, metrics.registry
        )
        try:
            yield endpoint.port
        finally:
            endpoint.close()

    async def _load(self, server: Server) -> None:
        """Load the model; a signal ends the process meanwhile."""
        start_s = time.monotonic()
        loading = asyncio.ensure_future(server.load())
        await _first_of(
            asyncio.wait({loading}), self._first_signal.wait(), self._fault.wait()
        )
        if not loading.done():
            code = FAULT if self._fault.is_set() else DRAINED
            await server.stop_calls(None)
            log_event(logger, "stopped", code=code)
            self._leave(code)  # the thread that loads cannot be ended
        await loading
        # What is there by now stays. A full collection takes half a second, most of it
        # to look at the modules of jax, and everything waits for it.
        gc.collect()
        gc.freeze()
        log_event(
            logger,
            "ready",
            model=self._config.model,
            seconds=round(time.monotonic() - start_s, 1),
        )

    async def _serve(self, server: Server) -> NoReturn:
        """Serve until a signal or a fault, then end everything in order."""
        assert server.state.llm is not None

        def note(condition: Condition) -> None:
            self._note(server, condition)

        watchdog = Watchdog(
            server.state.llm.engine,
            step_timeout_s=self._config.server.step_timeout_s,
            on_change=note,
        )
        await _first_of(self._first_signal.wait(), self._fault.wait())
        if not self._fault.is_set():
            await self._drain(server)
        code, flush_s, error = self._end()
        await server.stop_calls(flush_s, error)
        watchdog.close()
        closing = asyncio.ensure_future(server.close_engine())
        if watchdog.condition != "stuck":
            await asyncio.wait({closing}, timeout=CLOSE_ENGINE_S)
        if not closing.done():
            code = code or FAULT
        log_event(logger, "stopped", code=code)
        # A thread may wait for an engine or a disk that hangs, and Python for it.
        self._leave(code)

    def _note(self, server: Server, condition: Condition) -> None:
        """Tell the world what the watchdog has found."""
        fine = condition == "fine"
        level = logging.WARNING if fine else logging.ERROR
        log_event(logger, f"engine_{condition}", level=level)
        if condition == "dead":
            server.refuse("dead")
            self._fault.set()
        elif server.state.phase == "ready":
            server.health.set_ready(ready=fine)
        if condition == "stuck" and self._config.server.exit_when_stuck:
            server.refuse("dead")
            self._fault.set()

    async def _drain(self, server: Server) -> None:
        """Take nothing new; wait for what is open, as long as that is allowed."""
        server.refuse()
        timeout_s = self._config.server.shutdown_timeout_s
        open_requests = server.admission.open_requests
        log_event(logger, "draining", open=open_requests, timeout_s=timeout_s)
        await _first_of(
            server.admission.idle(),
            self._second_signal.wait(),
            self._fault.wait(),
            timeout_s=timeout_s,
        )
        log_event(logger, "drained", left=server.admission.open_requests)

    def _lose_front(self, code: int | None) -> None:
        log_event(logger, "front_lost", level=logging.ERROR, code=code)
        self._fault.set()

    def _end(self) -> tuple[int, float, StatusError]:
        """Return exit code, time for the last replies, and what still runs gets."""
        if self._fault.is_set():
            error = unavailable("ENGINE_DEAD", "the engine has failed")
            return FAULT, HURRIED_FLUSH_S, error
        error = unavailable("DRAINING", "the server has shut down")
        if self._second_signal.is_set():
            return INTERRUPTED, HURRIED_FLUSH_S, error
        return DRAINED, FLUSH_S, error

    def _leave(self, code: int) -> NoReturn:
        """End the process without waiting for its threads."""
        self._logs.close()
        os._exit(code)


async def _first_of(
    *ends: Coroutine[Any, Any, Any], timeout_s: float | None = None
) -> None:
    """Run until the first one ends; the others are cancelled then."""
    tasks = [asyncio.ensure_future(end) for end in ends]
    await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
