"""AdapterService: adapters that come and go while requests run."""

import time
from collections.abc import Callable

import grpc

from jchameleon.config import PROJECTIONS
from jchameleon.errors import AdapterBusyError
from jchameleon.llm import LLM
from jchameleon.outputs import AdapterInfo
from jchameleon.serving.adapter_paths import check_adapter_id
from jchameleon.serving.catalog import AdapterCatalog, CatalogEntry
from jchameleon.serving.convert import check_deadline, deadline_exceeded
from jchameleon.serving.front import Call
from jchameleon.serving.proto.jchameleon.v1 import adapter_pb2 as pb
from jchameleon.serving.registrar import AdapterRegistrar
from jchameleon.serving.status import StatusError, invalid

MAX_PAGE = 1000
ANSWER_S = 0.1
"""What is left of a deadline when waiting ends: enough to answer in time."""

STATES = {
    "disk": pb.ADAPTER_STATE_REGISTERED,
    "host": pb.ADAPTER_STATE_HOST,
    "loading": pb.ADAPTER_STATE_LOADING,
    "device": pb.ADAPTER_STATE_DEVICE,
}


class AdapterService:
    """Answers about adapters and has them changed; event loop only."""

    def __init__(
        self,
        registrar: AdapterRegistrar,
        catalog: AdapterCatalog,
        llm: Callable[[], LLM],
        *,
        dynamic: bool,
    ) -> None:
        """Create the service.

        Args:
          llm: returns the model, or raises the StatusError that says why not now.
          dynamic: adapters may be registered and unregistered.
        """
        self._registrar = registrar
        self._catalog = catalog
        self._llm = llm
        self._dynamic = dynamic

    async def register_adapter(
        self, request: pb.RegisterAdapterRequest, context: Call
    ) -> pb.RegisterAdapterResponse:
        """Read, check and register an adapter."""
        llm = self._llm()
        self._check_dynamic()
        adapter_id = request.adapter_id
        check_adapter_id(adapter_id)
        if request.validate_only:
            return pb.RegisterAdapterResponse(
                adapter=await self._validate(llm, request)
            )
        info = await self._registrar.register(
            llm,
            adapter_id,
            request.source_path,
            replace=request.replace,
            pin=request.pin,
            expected_uid=request.expected_uid or None,
        )
        return pb.RegisterAdapterResponse(adapter=self._message(adapter_id, info))

    async def unregister_adapter(
        self, request: pb.UnregisterAdapterRequest, context: Call
    ) -> pb.UnregisterAdapterResponse:
        """Forget an adapter once its requests have ended."""
        llm = self._llm()
        self._check_dynamic()
        check_adapter_id(request.adapter_id)
        left_s = check_deadline(context)
        end_s = None if left_s is None else time.monotonic() + left_s - ANSWER_S
        last, entry, drain = await self._registrar.begin_unregister(
            llm, request.adapter_id, force=request.force
        )
        if drain is not None:
            try:
                await self._registrar.wait(drain, end_s)
            except AdapterBusyError:
                raise deadline_exceeded() from None
        return pb.UnregisterAdapterResponse(
            adapter=self._message(request.adapter_id, last, entry)
        )

    async def get_adapter(
        self, request: pb.GetAdapterRequest, context: Call
    ) -> pb.GetAdapterResponse:
        """Return one adapter."""
        check_adapter_id(request.adapter_id)
        return pb.GetAdapterResponse(
            adapter=await self._current(self._llm(), request.adapter_id)
        )

    async def list_adapters(
        self, request: pb.ListAdaptersRequest, context: Call
    ) -> pb.ListAdaptersResponse:
        """Return a page of adapters in order of their ids."""
        if request.page_size > MAX_PAGE:
            raise invalid(
                "page_size", f"page_size={request.page_size} must be at most {MAX_PAGE}"
            )
        found = await self._registrar.by_id(self._llm())
        names = sorted(
            name
            for name in {*found, *self._catalog.failed()}
            if name.startswith(request.prefix) and name > request.page_token
        )
        size = request.page_size or MAX_PAGE
        page = names[:size]
        return pb.ListAdaptersResponse(
            adapters=[self._message(name, found.get(name)) for name in page],
            next_page_token=page[-1] if len(names) > size else "",
        )

    async def pin_adapter(
        self, request: pb.PinAdapterRequest, context: Call
    ) -> pb.PinAdapterResponse:
        """Load an adapter and keep it on the device."""
        llm, adapter_id = self._llm(), request.adapter_id
        check_adapter_id(adapter_id)
        await self._registrar.pin(llm, adapter_id)
        return pb.PinAdapterResponse(adapter=await self._current(llm, adapter_id))

    async def unpin_adapter(
        self, request: pb.UnpinAdapterRequest, context: Call
    ) -> pb.UnpinAdapterResponse:
        """Let an adapter be evicted again."""
        llm, adapter_id = self._llm(), request.adapter_id
        check_adapter_id(adapter_id)
        await self._registrar.unpin(llm, adapter_id)
        return pb.UnpinAdapterResponse(adapter=await self._current(llm, adapter_id))

    def _check_dynamic(self) -> None:
        if not self._dynamic:
            raise StatusError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "ADAPTERS_ARE_FIXED",
                "adapters.dynamic is off: this server's adapters are those it started "
                "with",
            )

    async def _validate(
        self, llm: LLM, request: pb.RegisterAdapterRequest
    ) -> pb.Adapter:
        card = await self._registrar.validate(
            llm, request.adapter_id, request.source_path
        )
        if request.expected_uid not in ("", card.uid):
            raise StatusError(
                grpc.StatusCode.DATA_LOSS,
                "OTHER_CONTENT",
                f"{request.source_path!r} has content {card.uid}, not "
                f"{request.expected_uid[:80]!r}",
            )
        return pb.Adapter(
            adapter_id=request.adapter_id,
            uid=card.uid,
            source_path=request.source_path,
            rank=card.rank,
            target_modules=[p for p in PROJECTIONS if p in card.targets],
            size_bytes=llm.adapter_bytes(card.rank),
        )

    async def _current(self, llm: LLM, adapter_id: str) -> pb.Adapter:
        info = (await self._registrar.by_id(llm)).get(adapter_id)
        if info is None and adapter_id not in self._catalog.failed():
            raise StatusError(
                grpc.StatusCode.NOT_FOUND,
                "UNKNOWN_ADAPTER",
                f"unknown adapter {adapter_id!r}",
            )
        return self._message(adapter_id, info)

    def _message(
        self,
        adapter_id: str,
        info: AdapterInfo | None,
        entry: CatalogEntry | None = None,
    ) -> pb.Adapter:
        entry = entry or self._catalog.entries.get(adapter_id)
        message = pb.Adapter(adapter_id=adapter_id)
        if info is not None:
            message.uid, message.rank = info.uid, info.rank
            message.target_modules.extend(info.targets)
            message.size_bytes, message.pinned = info.size_bytes, info.pinned
            message.running, message.waiting = info.running, info.waiting
            message.hits, message.misses = info.hits, info.misses
            message.evictions = info.evictions
            message.state = STATES[info.tier]
            if info.draining:
                message.state = pb.ADAPTER_STATE_DRAINING
        if entry is not None:
            message.source_path = entry.source_path
            message.registered_at.FromMilliseconds(int(entry.registered_s * 1e3))
            if entry.last_used_s is not None:
                message.last_used_at.FromMilliseconds(int(entry.last_used_s * 1e3))
            if entry.failure is not None:
                message.state = pb.ADAPTER_STATE_FAILED
                message.reason, message.uid = entry.failure, entry.uid
        return message
