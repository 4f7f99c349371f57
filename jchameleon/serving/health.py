"""grpc.health.v1: whether the process lives, and whether it takes requests.

Not grpcio-health-checking's own servicer: there a watcher that reads nothing holds up
every change of state, and its open calls hold up a drain until they are cut.
"""

import asyncio

import grpc
from grpc_health.v1 import health_pb2 as pb

from jchameleon.serving.front import Call
from jchameleon.serving.guard import Send, streaming, unary
from jchameleon.serving.status import StatusError

HEALTH_SERVICE = pb.DESCRIPTOR.services_by_name["Health"].full_name
LIVE = ""
"""The name that stands for the process itself."""


class Health:
    """States by service, and those who watch them; event loop only."""

    def __init__(self, ready_services: tuple[str, ...]) -> None:
        """Be live, with all `ready_services` not serving yet."""
        self._serving = {LIVE: True, **dict.fromkeys(ready_services, False)}
        self._changed = asyncio.Event()
        self._has_ended = False
        self._is_refusing = False

    def is_serving(self, service: str) -> bool:
        """Return what a check of a known service says."""
        return self._serving[service]

    def set_ready(self, *, ready: bool) -> None:
        """Say whether requests are taken; being live is another matter."""
        if not self._is_refusing:
            self._set(ready, [name for name in self._serving if name != LIVE])

    def refuse(self) -> None:
        """Say that no requests are taken any more; the process lives on for a while."""
        self.set_ready(ready=False)
        self._is_refusing = True

    def end(self) -> None:
        """Say NOT_SERVING everywhere, once and for all; watchers hear it and end."""
        self._set(False, list(self._serving))
        self._has_ended = True

    def _set(self, serving: bool, services: list[str]) -> None:
        if not self._has_ended:
            self._serving |= dict.fromkeys(services, serving)
            self._changed.set()
            self._changed = asyncio.Event()

    async def check(
        self, request: pb.HealthCheckRequest, context: Call
    ) -> pb.HealthCheckResponse:
        """Answer Check."""
        if request.service not in self._serving:
            raise StatusError(
                grpc.StatusCode.NOT_FOUND,
                "UNKNOWN_SERVICE",
                f"service={request.service[:80]!r} is not one of {list(self._serving)}",
            )
        return pb.HealthCheckResponse(status=self._status(request.service))

    async def watch(
        self,
        request: pb.HealthCheckRequest,
        context: Call,
        send: Send,
    ) -> None:
        """Answer Watch: what is, then every change."""
        told = None
        while True:
            changed, status = self._changed, self._status(request.service)
            if status != told:
                await send(pb.HealthCheckResponse(status=status))
                told = status
            if self._has_ended:
                return
            if changed is self._changed:
                await changed.wait()

    def handlers(self, *, stall_timeout_s: float) -> dict[str, grpc.RpcMethodHandler]:
        """Return what answers the service's methods, by name."""
        request_type = pb.HealthCheckRequest
        return {
            "Check": unary(request_type, self.check),
            "Watch": streaming(
                request_type, self.watch, stall_timeout_s=stall_timeout_s
            ),
        }

    def _status(self, service: str) -> "pb.HealthCheckResponse.ServingStatus":
        serving = self._serving.get(service)
        if serving is None:
            # What the protocol asks of Watch: the service may come.
            return pb.HealthCheckResponse.SERVICE_UNKNOWN
        return (
            pb.HealthCheckResponse.SERVING
            if serving
            else pb.HealthCheckResponse.NOT_SERVING
        )
