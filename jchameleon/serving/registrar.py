"""Changes of a server's adapters: limits, names, pins and what the next start needs.

Event loop only; files are read and the engine is asked on threads. Changes of one id
follow each other, those of different ids do not: a disk that hangs under one adapter
keeps no other from coming or going.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import logging
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import grpc

from jchameleon.errors import (
    AdapterBusyError,
    ConfigError,
    JChameleonError,
    UnknownAdapterError,
)
from jchameleon.llm import LLM, AdapterCard, AdapterDrain
from jchameleon.outputs import AdapterInfo
from jchameleon.serving.adapter_paths import AdapterRoot, check_adapter_id
from jchameleon.serving.catalog import AdapterCatalog, CatalogEntry
from jchameleon.serving.manifest import Manifest, ManifestEntry
from jchameleon.serving.settings import AdapterConfig
from jchameleon.serving.status import StatusError

logger = logging.getLogger(__name__)

DRAIN_POLL_S = 0.02
"""How often an UnregisterAdapter that waits looks."""

_T = TypeVar("_T")


class AdapterRegistrar:
    """Registers, pins and unregisters within a server's limits."""

    def __init__(
        self, config: AdapterConfig, root: AdapterRoot | None, catalog: AdapterCatalog
    ) -> None:
        """Create it; `root` is None where no adapters are served."""
        self._config = config
        self._root = root
        self._catalog = catalog
        self._manifest = None if config.manifest is None else Manifest(config.manifest)
        self._writing = asyncio.Lock()
        # Reading an adapter takes long; tokenising and questions must not wait for it.
        self._readers = concurrent.futures.ThreadPoolExecutor(
            8, thread_name_prefix="jchameleon-adapter-files"
        )
        self._askers = concurrent.futures.ThreadPoolExecutor(
            8, thread_name_prefix="jchameleon-adapters"
        )
        self._of_one_id: weakref.WeakValueDictionary[str, asyncio.Lock] = (
            weakref.WeakValueDictionary()
        )
        self._pinning = asyncio.Lock()  # taken after the lock of an id
        self._arriving: set[str] = set()
        self._tasks: set[asyncio.Task[Any]] = set()

    def close(self) -> None:
        """Start nothing more."""
        for threads in (self._readers, self._askers):
            threads.shutdown(wait=False, cancel_futures=True)

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
        for info in await self.infos(llm):
            self._catalog.note_registered(info, self._config.preload[info.name])
        if self._manifest is None:
            return
        for entry in await self._read(self._manifest.read):
            if entry.adapter_id in self._catalog.entries:
                continue  # configured by now
            try:
                await self._register(
                    llm,
                    entry.adapter_id,
                    entry.source_path,
                    replace=False,
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
                    is_registered=False,
                    pinned=entry.pinned,
                )

    # Changes. Each is done to its end, also where its caller leaves in the middle.

    async def register(
        self,
        llm: LLM,
        adapter_id: str,
        source_path: str,
        *,
        replace: bool,
        pin: bool,
        expected_uid: str | None,
    ) -> AdapterInfo:
        """Read, check and register an adapter, and remember it.

        Raises:
          StatusError, JChameleonError: why not; nothing has changed then.
        """

        async def change() -> AdapterInfo:
            async with self._only_one(adapter_id):
                info = await self._register(
                    llm,
                    adapter_id,
                    source_path,
                    replace=replace,
                    pin=pin,
                    expected_uid=expected_uid,
                )
                await self._remember()
                return info

        return await self._to_the_end(change())

    async def validate(self, llm: LLM, adapter_id: str, path: str) -> AdapterCard:
        """Read and check an adapter; change nothing."""
        assert self._root is not None, "checked with the configuration"
        folder = await self._read(self._root.resolve, path)
        return await self._read(llm.validate_adapter, adapter_id, folder)

    async def begin_unregister(
        self, llm: LLM, adapter_id: str, *, force: bool
    ) -> tuple[AdapterInfo | None, CatalogEntry | None, AdapterDrain | None]:
        """Take no more requests for an id.

        Returns:
          the adapter as it was, and what to wait for; None for what there is not.

        Raises:
          UnknownAdapterError: there is no such adapter.
        """

        async def change() -> Any:
            async with self._only_one(adapter_id):
                last = (await self.by_id(llm)).get(adapter_id)
                entry = self._catalog.entries.get(adapter_id)
                drain = None
                try:
                    drain = await self._ask(
                        llm.begin_unregister, adapter_id, force=force
                    )
                except UnknownAdapterError:
                    if entry is None:  # else it was remembered, and is not served
                        raise
                if self._catalog.entries.pop(adapter_id, None) is not None:
                    await self._remember()
                return last, entry, drain

        return await self._to_the_end(change())

    async def wait(self, drain: AdapterDrain, end_s: float | None) -> None:
        """Wait for what was unregistered until a time of the monotonic clock.

        No thread waits with it, nor goes on when the caller leaves.

        Raises:
          AdapterBusyError: it is not gone by then; EngineDeadError: it never will be.
        """
        while True:
            try:
                return await self._ask(drain.wait, 0.0)
            except AdapterBusyError:
                if end_s is not None and time.monotonic() >= end_s:
                    raise
            await asyncio.sleep(DRAIN_POLL_S)

    async def pin(self, llm: LLM, adapter_id: str) -> None:
        """Keep an adapter on the device."""

        async def change() -> None:
            async with self._only_one(adapter_id), self._pinning:
                self._catalog.check(adapter_id)
                info = (await self.by_id(llm)).get(adapter_id)
                if info is not None:
                    await self._check_budget(llm, adapter_id, info.uid, info.size_bytes)
                await self._ask(llm.pin_adapter, adapter_id)
                await self._note_pin(adapter_id, pinned=True)

        await self._to_the_end(change())

    async def unpin(self, llm: LLM, adapter_id: str) -> None:
        """Let an adapter be evicted again."""

        async def change() -> None:
            async with self._only_one(adapter_id):
                try:
                    await self._ask(llm.unpin_adapter, adapter_id)
                except UnknownAdapterError:
                    entry = self._catalog.entries.get(adapter_id)
                    if entry is None:  # else it was remembered, and is not served
                        raise
                await self._note_pin(adapter_id, pinned=False)

        await self._to_the_end(change())

    # Questions.

    async def infos(self, llm: LLM) -> list[AdapterInfo]:
        """Return what the engine says of all adapters."""
        return await self._ask(llm.list_adapters)

    async def by_id(self, llm: LLM) -> dict[str, AdapterInfo]:
        """Return adapters by id; of one id, what takes requests, else what drains.

        One that the engine has and its registration has not noted yet is still to come.
        """
        # Before the engine is asked: what is unregistered meanwhile is in its answer.
        noted = set(self._catalog.entries)
        return {
            info.name: info
            for info in reversed(await self.infos(llm))
            if info.draining or info.name in noted
        }

    # Steps.

    async def _register(
        self,
        llm: LLM,
        adapter_id: str,
        source_path: str,
        *,
        replace: bool,
        pin: bool,
        expected_uid: str | None,
    ) -> AdapterInfo:
        check_adapter_id(adapter_id)
        entry = self._catalog.entries.get(adapter_id)
        # What has failed stands in nobody's way.
        replace = replace or (entry is not None and entry.failure is not None)
        with self._place_for(adapter_id):
            async with contextlib.AsyncExitStack() as pinning:
                if pin or (replace and entry is not None and entry.pinned):
                    await pinning.enter_async_context(self._pinning)
                    card = await self.validate(llm, adapter_id, source_path)
                    await self._check_budget(
                        llm, adapter_id, card.uid, llm.adapter_bytes(card.rank)
                    )
                assert self._root is not None, "checked with the configuration"
                info = await self._read(
                    llm.register_adapter,
                    adapter_id,
                    await self._read(self._root.resolve, source_path),
                    replace=replace,
                    pin=pin,
                    expected_uid=expected_uid,
                )
                self._catalog.note_registered(info, source_path)
                return info

    @contextlib.contextmanager
    def _place_for(self, adapter_id: str) -> Any:
        """Count an id that arrives among those that are there."""
        there = self._catalog.entries.keys() | self._arriving
        if adapter_id not in there and len(there) >= self._config.max_adapters:
            raise StatusError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "TOO_MANY_ADAPTERS",
                f"{len(there)} adapters are registered; max_adapters="
                f"{self._config.max_adapters} allows no more",
            )
        self._arriving.add(adapter_id)
        try:
            yield
        finally:
            self._arriving.discard(adapter_id)

    async def _check_budget(
        self, llm: LLM, adapter_id: str, uid: str, size_bytes: int
    ) -> None:
        """Refuse a pin that needs more than the budget beside those of other ids."""
        most = self._config.max_pinned_bytes
        if most is None:
            return
        others = {
            info.uid: info.size_bytes
            for info in await self.infos(llm)
            if info.pinned and info.name != adapter_id
        }
        if uid in others:
            return  # names of one content share its place
        if sum(others.values()) + size_bytes > most:
            raise StatusError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "PIN_BUDGET",
                f"adapter {adapter_id!r} takes {size_bytes} bytes, others are pinned "
                f"with {sum(others.values())}; max_pinned_bytes={most}",
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
        async with self._writing:  # what is there now, and never two at once
            entries = [
                ManifestEntry(
                    adapter_id=name,
                    source_path=entry.source_path,
                    uid=entry.uid,
                    pinned=entry.pinned,
                )
                for name, entry in sorted(self._catalog.entries.items())
                if name not in self._config.preload
            ]
            try:
                await self._ask(self._manifest.write, entries)
            except OSError as error:
                logger.error("adapters.manifest was not written: %s", error)

    @contextlib.asynccontextmanager
    async def _only_one(self, adapter_id: str) -> AsyncIterator[None]:
        lock = self._of_one_id.setdefault(adapter_id, asyncio.Lock())
        async with lock:
            yield

    async def _to_the_end(self, change: Coroutine[Any, Any, _T]) -> _T:
        task = asyncio.ensure_future(change)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # its caller may have left

    async def _read(self, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        return await _run(self._readers, call, *args, **kw)

    async def _ask(self, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        return await _run(self._askers, call, *args, **kw)


async def _run(
    threads: concurrent.futures.Executor,
    call: Callable[..., Any],
    *args: Any,
    **kw: Any,
) -> Any:
    return await asyncio.get_running_loop().run_in_executor(
        threads, functools.partial(call, *args, **kw)
    )
