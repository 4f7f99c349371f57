"""AdapterService: adapters that come and go while requests run."""

import asyncio
import concurrent.futures
import functools
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from jchameleon.errors import AdapterBusyError, ConfigError, JChameleonError
from jchameleon.llm import LLM
from jchameleon.outputs import AdapterInfo
from jchameleon.serving.adapter_paths import AdapterRoot, check_adapter_id
from jchameleon.serving.catalog import AdapterCatalog, CatalogEntry
from jchameleon.serving.convert import check_deadline, deadline_exceeded
from jchameleon.serving.manifest import Manifest, ManifestEntry
from jchameleon.serving.proto.jchameleon.v1 import adapter_pb2 as pb
from jchameleon.serving.settings import AdapterConfig
from jchameleon.serving.status import StatusError, invalid

logger = logging.getLogger(__name__)

MAX_PAGE = 1000
DRAIN_POLL_S = 0.5
"""How often an UnregisterAdapter that waits looks whether its caller is still there."""

STATES = {
    "disk": pb.ADAPTER_STATE_REGISTERED,
    "host": pb.ADAPTER_STATE_HOST,
    "loading": pb.ADAPTER_STATE_LOADING,
    "device": pb.ADAPTER_STATE_DEVICE,
}


class AdapterService:
    """Life cycle of adapters; event loop only, work on threads of its own."""

    def __init__(
        self,
        config: AdapterConfig,
        root: AdapterRoot | None,
        catalog: AdapterCatalog,
        llm: Callable[[], LLM],
    ) -> None:
        """Create the service.

        Args:
          root: None where no adapters are served.
          llm: returns the model, or raises the StatusError that says why not now.
        """
        self._config = config
        self._root = root
        self._catalog = catalog
        self._llm = llm
        self._manifest = None if config.manifest is None else Manifest(config.manifest)
        # Reading an adapter takes long; tokenising must not wait for that.
        self._threads = concurrent.futures.ThreadPoolExecutor(
            8, thread_name_prefix="jchameleon-adapters"
        )
        self._changes = asyncio.Lock()  # one at a time: limits are counted before

    def close(self) -> None:
        """Start nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    # What a server starts with.

    def configured(self) -> dict[str, Path]:
        """Return the folders of the adapters that the configuration names, by id.

        Raises:
          ConfigError: an id or path is not allowed; AdapterError: it is no adapter.
        """
        folders = {}
        for adapter_id, path in self._config.preload.items():
            assert self._root is not None, "checked with the configuration"
            try:
                check_adapter_id(adapter_id)
                folders[adapter_id] = self._root.resolve(path)
            except StatusError as error:
                raise ConfigError(f"adapters.preload: {error.message}") from error
        return folders

    async def start(self, llm: LLM) -> None:
        """Take over a model with the configured adapters; register remembered ones.

        A remembered one that is no good any more is listed as FAILED and not served.

        Raises:
          ConfigError: there is no good manifest.
        """
        for info in await self._on_thread(llm.list_adapters):
            self._note(info, self._config.preload[info.name])
        if self._manifest is None:
            return
        for entry in await self._on_thread(self._manifest.read):
            if entry.adapter_id in self._catalog.entries:
                continue  # configured by now
            try:
                await self._register(
                    llm,
                    entry.adapter_id,
                    entry.source_path,
                    pin=entry.pinned,
                    expected_uid=entry.uid,
                )
            except (JChameleonError, StatusError) as error:
                logger.error("adapter %s is not served: %s", entry.adapter_id, error)
                self._catalog.entries[entry.adapter_id] = CatalogEntry(
                    source_path=entry.source_path,
                    uid=entry.uid,
                    registered_s=time.time(),
                    failure=str(error),
                    pinned=entry.pinned,
                )

    # Methods.

    async def register_adapter(
        self, request: pb.RegisterAdapterRequest, context: grpc.aio.ServicerContext
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
        async with self._changes:
            known = self._catalog.entries
            if adapter_id not in known and len(known) >= self._config.max_adapters:
                raise StatusError(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    "TOO_MANY_ADAPTERS",
                    f"{len(known)} adapters are registered; max_adapters="
                    f"{self._config.max_adapters} allows no more",
                )
            info = await self._register(
                llm,
                adapter_id,
                request.source_path,
                replace=request.replace,
                pin=request.pin,
                expected_uid=request.expected_uid or None,
            )
            await self._remember()
        return pb.RegisterAdapterResponse(adapter=self._message(adapter_id, info))

    async def unregister_adapter(
        self, request: pb.UnregisterAdapterRequest, context: grpc.aio.ServicerContext
    ) -> pb.UnregisterAdapterResponse:
        """Forget an adapter once its requests have ended."""
        llm = self._llm()
        self._check_dynamic()
        adapter_id = request.adapter_id
        check_adapter_id(adapter_id)
        left_s = check_deadline(context)
        end_s = None if left_s is None else time.monotonic() + left_s
        last = await self._find(llm, adapter_id)
        entry = self._catalog.entries.pop(adapter_id, None)
        if entry is not None:
            await self._remember()
        if entry is None or entry.failure is None or last is not None:
            await self._drain(llm, adapter_id, force=request.force, end_s=end_s)
        return pb.UnregisterAdapterResponse(
            adapter=self._message(adapter_id, last, entry)
        )

    async def get_adapter(
        self, request: pb.GetAdapterRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetAdapterResponse:
        """Return one adapter."""
        check_adapter_id(request.adapter_id)
        return pb.GetAdapterResponse(
            adapter=await self._current(self._llm(), request.adapter_id)
        )

    async def list_adapters(
        self, request: pb.ListAdaptersRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListAdaptersResponse:
        """Return a page of adapters in order of their ids."""
        if request.page_size > MAX_PAGE:
            raise invalid(
                "page_size", f"page_size={request.page_size} must be at most {MAX_PAGE}"
            )
        found = await self._all(self._llm())
        names = sorted(
            name
            for name in {*found, *self._catalog.entries}
            if name.startswith(request.prefix) and name > request.page_token
        )
        size = request.page_size or MAX_PAGE
        page = names[:size]
        return pb.ListAdaptersResponse(
            adapters=[self._message(name, found.get(name)) for name in page],
            next_page_token=page[-1] if len(names) > size else "",
        )

    async def pin_adapter(
        self, request: pb.PinAdapterRequest, context: grpc.aio.ServicerContext
    ) -> pb.PinAdapterResponse:
        """Load an adapter and keep it on the device."""
        llm, adapter_id = self._llm(), request.adapter_id
        check_adapter_id(adapter_id)
        async with self._changes:
            await self._check_pin_budget(llm, await self._current(llm, adapter_id))
            self._catalog.check(adapter_id)
            await self._on_thread(llm.pin_adapter, adapter_id)
            await self._note_pin(adapter_id, pinned=True)
        return pb.PinAdapterResponse(adapter=await self._current(llm, adapter_id))

    async def unpin_adapter(
        self, request: pb.UnpinAdapterRequest, context: grpc.aio.ServicerContext
    ) -> pb.UnpinAdapterResponse:
        """Let an adapter be evicted again."""
        llm, adapter_id = self._llm(), request.adapter_id
        check_adapter_id(adapter_id)
        async with self._changes:
            await self._on_thread(llm.unpin_adapter, adapter_id)
            await self._note_pin(adapter_id, pinned=False)
        return pb.UnpinAdapterResponse(adapter=await self._current(llm, adapter_id))

    # Steps of them.

    def _check_dynamic(self) -> None:
        if not self._config.dynamic:
            raise StatusError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "ADAPTERS_ARE_FIXED",
                "adapters.dynamic is off: this server's adapters are those it started "
                "with",
            )

    async def _register(
        self,
        llm: LLM,
        adapter_id: str,
        source_path: str,
        *,
        replace: bool = False,
        pin: bool = False,
        expected_uid: str | None = None,
    ) -> AdapterInfo:
        assert self._root is not None, "checked with the configuration"
        folder = await self._on_thread(self._root.resolve, source_path)
        entry = self._catalog.entries.get(adapter_id)
        has_failed = entry is not None and entry.failure is not None
        if pin or (entry is not None and entry.pinned and replace):
            card = await self._on_thread(llm.validate_adapter, adapter_id, folder)
            await self._check_pin_budget(
                llm,
                pb.Adapter(
                    adapter_id=adapter_id, size_bytes=llm.adapter_bytes(card.rank)
                ),
            )
        info = await self._on_thread(
            llm.register_adapter,
            adapter_id,
            folder,
            # What has failed stands in nobody's way.
            replace=replace or has_failed,
            pin=pin,
            expected_uid=expected_uid,
        )
        if entry is None or entry.uid != info.uid or has_failed:
            self._note(info, source_path)
        else:
            entry.pinned = info.pinned
        return info

    def _note(self, info: AdapterInfo, source_path: str) -> None:
        self._catalog.entries[info.name] = CatalogEntry(
            source_path=source_path,
            uid=info.uid,
            registered_s=time.time(),
            pinned=info.pinned,
        )

    async def _validate(
        self, llm: LLM, request: pb.RegisterAdapterRequest
    ) -> pb.Adapter:
        assert self._root is not None, "checked with the configuration"
        folder = await self._on_thread(self._root.resolve, request.source_path)
        card = await self._on_thread(llm.validate_adapter, request.adapter_id, folder)
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
            target_modules=sorted(card.targets),
            size_bytes=llm.adapter_bytes(card.rank),
        )

    async def _drain(
        self, llm: LLM, adapter_id: str, *, force: bool, end_s: float | None
    ) -> None:
        """Unregister, and wait in pieces: a caller that leaves is not waited for."""
        while True:
            wait_s = DRAIN_POLL_S
            if end_s is not None:
                wait_s = min(wait_s, max(0.0, end_s - time.monotonic() - 0.05))
            try:
                await self._on_thread(
                    llm.unregister_adapter, adapter_id, timeout_s=wait_s, force=force
                )
                return
            except AdapterBusyError:
                if end_s is not None and time.monotonic() >= end_s - 0.1:
                    raise deadline_exceeded() from None

    async def _check_pin_budget(self, llm: LLM, adapter: pb.Adapter) -> None:
        most = self._config.max_pinned_bytes
        if most is None or adapter.pinned:
            return
        infos = await self._on_thread(llm.list_adapters)
        others = {
            info.uid: info.size_bytes
            for info in infos
            if info.pinned and info.name != adapter.adapter_id
        }
        if sum(others.values()) + adapter.size_bytes > most:
            raise StatusError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "PIN_BUDGET",
                f"adapter {adapter.adapter_id!r} takes {adapter.size_bytes} bytes, "
                f"others are pinned with {sum(others.values())}; "
                f"max_pinned_bytes={most}",
            )

    async def _note_pin(self, adapter_id: str, *, pinned: bool) -> None:
        entry = self._catalog.entries.get(adapter_id)
        if entry is not None:
            entry.pinned = pinned
        await self._remember()

    async def _remember(self) -> None:
        """Write the manifest; a disk that is full does not undo what was done."""
        if self._manifest is None:
            return
        entries = [
            ManifestEntry(
                adapter_id=name,
                source_path=entry.source_path,
                uid=entry.uid,
                pinned=entry.pinned,
            )
            for name, entry in sorted(self._catalog.entries.items())
        ]
        try:
            await self._on_thread(self._manifest.write, entries)
        except OSError as error:
            logger.error("adapters.manifest was not written: %s", error)

    async def _current(self, llm: LLM, adapter_id: str) -> pb.Adapter:
        info = await self._find(llm, adapter_id)
        if info is None and adapter_id not in self._catalog.entries:
            raise StatusError(
                grpc.StatusCode.NOT_FOUND,
                "UNKNOWN_ADAPTER",
                f"unknown adapter {adapter_id!r}",
            )
        return self._message(adapter_id, info)

    async def _find(self, llm: LLM, adapter_id: str) -> AdapterInfo | None:
        return (await self._all(llm)).get(adapter_id)

    async def _all(self, llm: LLM) -> dict[str, AdapterInfo]:
        """Return adapters by id; of one id, what takes requests, else what drains."""
        infos = await self._on_thread(llm.list_adapters)
        return {info.name: info for info in reversed(infos)}

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

    async def _on_thread(self, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._threads, functools.partial(call, *args, **kw)
        )
