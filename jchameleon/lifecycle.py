"""Adapters that come and go while requests run: register, replace, pin, unregister.

What a name stands for changes in one moment: requests accepted before it finish on what
they were accepted for, later ones get what is there now. An old content drains and is
then forgotten everywhere: device, host memory, policies, paths.
"""

import threading
from pathlib import Path

from jchameleon.config import PROJECTIONS, is_number
from jchameleon.errors import AdapterContentError, InvalidRequestError
from jchameleon.lora.adapter import AdapterCard
from jchameleon.outputs import AdapterInfo, AdapterTier
from jchameleon.runtime.adapters import AdapterRegistry
from jchameleon.runtime.engine import Engine
from jchameleon.runtime.executor import Executor
from jchameleon.runtime.host_store import HostStore
from jchameleon.runtime.leases import Binding
from jchameleon.runtime.policy.residency import AdapterStats


class AdapterLifecycle:
    """Registry, host store and engine as one; safe to use from several threads."""

    def __init__(
        self,
        registry: AdapterRegistry,
        host: HostStore,
        engine: Engine,
        executor: Executor,
    ):
        """Take over a registry whose adapters the engine does not know yet.

        Raises:
          AdapterError, CapacityError: as `register`.
        """
        self._registry = registry
        self._host = host
        self._engine = engine
        self._layout = executor.layout
        self._page_bytes = executor.pool_bytes // executor.num_pages
        # One change of names at a time; files are read and drains awaited outside.
        self._changes = threading.Lock()
        registry.connect(engine.adapters.unregister, engine.adapters.post)
        for uid in dict.fromkeys(registry.names().values()):
            engine.adapters.register(registry.card(uid))

    def validate(self, name: str, path: str | Path) -> AdapterCard:
        """See `LLM.validate_adapter`."""
        card = self._registry.load(name, path).card
        self._engine.adapters.check(card)
        return card

    def register(
        self,
        name: str,
        path: str | Path,
        *,
        replace: bool,
        pin: bool,
        expected_uid: str | None,
    ) -> AdapterInfo:
        """See `LLM.register_adapter`."""
        _check_switch("replace", replace)
        _check_switch("pin", pin)
        adapter = self._registry.load(name, path)
        if expected_uid not in (None, adapter.uid):
            raise AdapterContentError(
                f"adapter {name!r}: {str(path)!r} has content {adapter.uid}, not the "
                f"expected {expected_uid!r:.80}"
            )
        with self._changes:
            if not replace:
                self._registry.check(name, adapter)
            self._engine.adapters.check(adapter.card)
            with self._registry.holding(adapter):
                # The engine first: a name must never lead to what it does not know.
                self._engine.adapters.register(adapter.card)
                old = self._registry.find(name)
                if old is None or old.uid != adapter.uid:
                    pin = pin or (old is not None and old.pinned)
                    self._move_pin(old, adapter.uid if pin else None)
                    self._registry.bind(name, adapter.uid, pinned=pin)
                elif pin:
                    self._pin(old)
            [info] = self._ask([(self._registry.binding(name), adapter.card)])
            return info

    def unregister(self, name: str, *, timeout_s: float | None, force: bool) -> None:
        """See `LLM.unregister_adapter`."""
        _check_switch("force", force)
        if timeout_s is not None and not (is_number(timeout_s) and timeout_s >= 0):
            raise InvalidRequestError(
                f"timeout_s={timeout_s!r} must be None or a number of seconds, at "
                "least 0"
            )
        registry = self._registry
        self._engine.check_alive()
        with self._changes:
            drains = registry.draining(name)
            live = registry.find(name)
            if live is not None:
                self._move_pin(live, None)
                registry.unbind(name)
                drains.append(live)
            elif not drains:
                registry.binding(name)  # says that there is none
        if force:
            reason = f"adapter {name!r} was unregistered"
            for request_id in registry.revoke(drains, reason):
                self._engine.cancel(request_id)
        registry.wait_until_gone(name, drains, timeout_s)

    def pin(self, name: str) -> None:
        """See `LLM.pin_adapter`."""
        with self._changes:
            self._pin(self._registry.binding(name))

    def unpin(self, name: str) -> None:
        """See `LLM.unpin_adapter`."""
        with self._changes:
            binding = self._registry.binding(name)
            self._move_pin(binding, None)
            binding.pinned = False

    def infos(self) -> list[AdapterInfo]:
        """See `LLM.list_adapters`."""
        return sorted(
            self._ask(self._registry.bindings()),
            key=lambda info: (info.name, info.draining),
        )

    # With `_changes` held.

    def _pin(self, binding: Binding) -> None:
        if not binding.pinned:
            if not self._registry.is_pinned(binding.uid):
                self._engine.adapters.pin(binding.uid, pinned=True)
            binding.pinned = True

    def _move_pin(self, binding: Binding | None, uid: str | None) -> None:
        """Pin `uid`, if any, and end what `binding` pins unless others pin it too.

        Raises:
          CapacityError: it cannot be pinned; nothing has changed then.
        """
        registry, adapters = self._registry, self._engine.adapters
        ends = None
        if binding is not None and binding.pinned:
            if not registry.is_pinned(binding.uid, without=binding.name):
                ends = binding.uid
        if uid is not None and not registry.is_pinned(uid):
            adapters.pin(uid, pinned=True, instead_of=ends)
        elif ends is not None:
            adapters.pin(ends, pinned=False)

    # No lock held.

    def _ask(self, rows: list[tuple[Binding, AdapterCard]]) -> list[AdapterInfo]:
        """Return what the engine says of bindings; those forgotten by now are left out.

        One question to the engine for all of them.
        """
        found = self._engine.adapters.stats([binding.uid for binding, _ in rows])
        return [
            self._info(binding, card, stats)
            for (binding, card), stats in zip(rows, found, strict=True)
            if stats is not None
        ]

    def _info(
        self, binding: Binding, card: AdapterCard, stats: AdapterStats
    ) -> AdapterInfo:
        size_bytes = self._layout.num_pages(card.rank) * self._page_bytes
        host_bytes = self._host.held_bytes(card.uid)
        tier: AdapterTier = "host" if host_bytes else "disk"
        if stats.state == "resident":
            tier = "device"
        elif stats.state != "absent":
            tier = "loading"
        return AdapterInfo(
            name=binding.name,
            uid=card.uid,
            rank=card.rank,
            targets=tuple(p for p in PROJECTIONS if p in card.targets),
            source=card.source,
            tier=tier,
            draining=binding.draining,
            pinned=binding.pinned,
            requests=len(binding.requests),
            size_bytes=size_bytes,
            device_bytes=size_bytes if stats.state != "absent" else 0,
            host_bytes=host_bytes,
            hits=stats.hits,
            misses=stats.misses,
            loads=stats.loads,
            evictions=stats.evictions,
            load_failures=stats.failures,
            running=stats.running,
            waiting=stats.queued,
        )


def _check_switch(name: str, value: bool) -> None:
    if type(value) is not bool:
        raise InvalidRequestError(f"{name}={value!r} must be True or False")
