"""Put a server together: services over one model, and their life from port to stop."""

import asyncio
import dataclasses
import logging
import re
from collections.abc import Callable
from typing import Any

import grpc

from jchameleon.llm import LLM
from jchameleon.sampling import MAX_N
from jchameleon.serving.adapter_paths import AdapterRoot
from jchameleon.serving.adapters import AdapterService
from jchameleon.serving.admission import Admission
from jchameleon.serving.auth import Tokens
from jchameleon.serving.catalog import AdapterCatalog
from jchameleon.serving.compiles import CompileCounter
from jchameleon.serving.engine_reader import EngineReader
from jchameleon.serving.engine_service import EngineService
from jchameleon.serving.front import Front
from jchameleon.serving.guard import streaming, unary
from jchameleon.serving.health import HEALTH_SERVICE, Health
from jchameleon.serving.inference import InferenceService
from jchameleon.serving.observer import RequestObserver, Silence
from jchameleon.serving.proto.jchameleon.v1 import (
    adapter_pb2,
    engine_pb2,
    inference_pb2,
)
from jchameleon.serving.registrar import AdapterRegistrar
from jchameleon.serving.settings import ServerConfig
from jchameleon.serving.state import Phase, ServerState
from jchameleon.serving.status import StatusError
from jchameleon.serving.streams import LoopOutbox
from jchameleon.serving.tls import server_credentials

logger = logging.getLogger(__name__)

INFERENCE_SERVICE = "jchameleon.v1.InferenceService"
ADAPTER_SERVICE = "jchameleon.v1.AdapterService"
ENGINE_SERVICE = "jchameleon.v1.EngineService"


class Server:
    """A gRPC server over one model; event loop only.

    The port is bound first, so that a taken one is found at once and probes get an
    answer while the model loads.

    Attributes:
      health: live from `bind` on, ready once loaded.
      compiles: what jax has compiled, in the whole process.
      reader: of the engine's totals.
    """

    def __init__(
        self,
        config: ServerConfig,
        observer: RequestObserver | None = None,
        *,
        on_front_lost: Callable[[int | None], None] = lambda code: None,
    ) -> None:
        """Nothing is bound or loaded yet; the files of the configuration are read.

        Args:
          on_front_lost: is called when the front process has ended by itself, with its
            exit code if that is known: nothing can be served any more.

        Raises:
          ConfigError: one of them is missing or no good.
        """
        self.config = config
        adapters = config.adapters
        root = None
        if adapters.root is not None:
            root = AdapterRoot(adapters.root, max_bytes=adapters.max_adapter_bytes)
        self._tokens = Tokens.read(config.security)
        # Read again by the front process, which looks for renewed ones; what is wrong
        # with them is found before it starts.
        server_credentials(config.security)
        self.catalog = AdapterCatalog()
        self.health = Health((INFERENCE_SERVICE,))
        self.compiles = CompileCounter()
        self._observer = observer or Silence()
        self.state = ServerState()
        limits, engine = config.limits, config.engine
        self.admission = Admission(
            max_requests=limits.max_waiting_requests + engine.max_running,
            max_waiting_tokens=limits.max_waiting_tokens,
        )
        self.outbox = LoopOutbox(asyncio.get_running_loop())
        self.adapters = AdapterRegistrar(adapters, root, self.catalog)
        self.reader = EngineReader(lambda: self.state.llm)
        self._inference = InferenceService(
            self.state.open_llm,
            self.outbox,
            self.admission,
            self._observer,
            self.catalog,
        )
        self._on_front_lost = on_front_lost
        self._front: Front | None = None
        self._port = 0

    @property
    def port(self) -> int:
        """The port that is bound."""
        return self._port

    @property
    def front_pid(self) -> int:
        """The process that speaks gRPC."""
        assert self._front is not None, "bind first"
        return self._front.pid

    async def bind(self) -> None:
        """Answer on the port: UNAVAILABLE until `load` is done.

        Raises:
          ConfigError: the address cannot be bound.
        """
        front = Front(
            self.config, self._handlers(), tokens=self._tokens, on_lost=self._lose_front
        )
        self._port = await front.start()
        self._front = front

    def _lose_front(self, code: int | None) -> None:
        self.refuse("dead")
        self._on_front_lost(code)

    async def load(self) -> None:
        """Load the model and compile its programs, off the event loop.

        Raises:
          JChameleonError: what is wrong with model, adapters or configuration.
        """
        llm = await asyncio.to_thread(self._open_llm)
        try:
            await self.adapters.start(llm)
        except BaseException:
            await asyncio.to_thread(llm.close)
            raise
        self.state.ready(llm)
        self.compiles.warm()
        self.health.set_ready(ready=self.state.phase == "ready")

    def refuse(self, phase: Phase = "draining") -> None:
        """Take no new requests any more; what runs goes on."""
        if self.state.phase != "dead":
            self.state.phase = phase
        self.health.refuse()

    async def stop(self, grace_s: float | None = None) -> None:
        """Refuse new calls, give those that run `grace_s`, then end everything.

        The engine is stopped last: what still runs is answered by it.
        """
        await self.stop_calls(grace_s)
        await self.close_engine()

    async def stop_calls(
        self, grace_s: float | None, error: StatusError | None = None
    ) -> None:
        """End the port and its calls.

        Args:
          grace_s: for replies that are on their way, or for calls that run on.
          error: ends all requests with this status first.
        """
        self.refuse()
        self.health.end()
        if error is not None:
            self.outbox.fail_all(error)
        if self._front is not None:
            await self._front.stop(grace_s)

    async def close_engine(self) -> None:
        """Stop the engine, where there is one; it is waited for."""
        self.compiles.close()
        self.adapters.close()
        self._inference.close()
        if self.state.llm is not None:
            await asyncio.to_thread(self.state.llm.close)

    def _open_llm(self) -> LLM:
        config = self.config
        engine = dataclasses.replace(
            config.engine,
            # The bound is counted at the edge; completions of one request over it pass.
            max_waiting=config.limits.max_waiting_requests + MAX_N,
        )
        fields = {
            field.name: getattr(engine, field.name)
            for field in dataclasses.fields(engine)
        }
        # Given at the start: they say what projections the programs are compiled for.
        return LLM(
            config.model,
            adapters=self.adapters.configured(),
            adapter_root=config.adapters.root,
            **fields,
        )

    def _handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        """Return the handlers of all methods by their full names."""
        adapters = AdapterService(
            self.adapters,
            self.catalog,
            self.state.open_llm,
            dynamic=self.config.adapters.dynamic,
        )
        engine = EngineService(
            self.config, self.state.open_llm, self.outbox, self.compiles, self.reader
        )
        stall_timeout_s = self.config.server.stall_timeout_s
        services = {
            INFERENCE_SERVICE: {
                "Generate": unary(
                    inference_pb2.GenerateRequest, self._inference.generate
                ),
                "GenerateStream": streaming(
                    inference_pb2.GenerateRequest,
                    self._inference.generate_stream,
                    stall_timeout_s=stall_timeout_s,
                ),
                "Tokenize": unary(
                    inference_pb2.TokenizeRequest, self._inference.tokenize
                ),
            },
            ADAPTER_SERVICE: _unary_handlers(ADAPTER_SERVICE, adapter_pb2, adapters),
            ENGINE_SERVICE: _unary_handlers(ENGINE_SERVICE, engine_pb2, engine),
            HEALTH_SERVICE: self.health.handlers(stall_timeout_s=stall_timeout_s),
        }
        return {
            f"/{service}/{name}": handler
            for service, handlers in services.items()
            for name, handler in handlers.items()
        }


def _unary_handlers(
    name: str, messages: Any, service: Any
) -> dict[str, grpc.RpcMethodHandler]:
    """Return the handlers of a service; each method of the protocol has one."""
    described = messages.DESCRIPTOR.services_by_name[name.rpartition(".")[2]]
    handlers = {}
    for method in described.methods:
        snake = re.sub(r"(?<!^)(?=[A-Z])", "_", method.name).lower()
        request_type = getattr(messages, method.input_type.name)
        handlers[method.name] = unary(request_type, getattr(service, snake))
    return handlers
