"""Names of adapters, what is behind them, and who still uses it.

A name is an alias for an immutable uid (content hash). Cache, KV pages and logs use the
uid, so a name can never lead to the wrong weights. Weights live in the host store.

Each time a name is given to a content is a binding of its own. A request claims the
binding that its name has when it is accepted, by a lease that it holds until it has
ended; so it finishes on that content whatever becomes of the name. A content is given
up when no name and no request claims it any more.
"""

import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jchameleon.errors import (
    AdapterBusyError,
    AdapterConflictError,
    AdapterDrainingError,
    AdapterError,
    CapacityError,
    EngineDeadError,
    UnknownAdapterError,
)
from jchameleon.lora.adapter import AdapterCard, HostAdapter
from jchameleon.lora.layout import ChunkLayout
from jchameleon.runtime.host_store import HostStore
from jchameleon.runtime.leases import AdapterLease, Binding, Use
from jchameleon.runtime.policy.planner import Planner

MAX_NAME_CHARS = 128

_NAMES_SHOWN = 20
"""Registered names that a message lists at most."""


@dataclasses.dataclass(slots=True, eq=False)
class _Content:
    """What a uid stands for.

    Attributes:
      claims: bindings that use it, and registrations under way.
      leaving: bindings that were the last to use it, until the engine has given it up.
    """

    card: AdapterCard
    claims: int = 0
    leaving: list[Binding] = dataclasses.field(default_factory=list)


class AdapterRegistry:
    """Registered adapters, without weights; safe to use from several threads."""

    def __init__(self, host: HostStore):
        """Create an empty registry; weights go to `host`."""
        self._host = host
        # Taken before the store's lock, and never while waiting for an engine.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._live: dict[str, Binding] = {}
        self._draining: dict[str, list[Binding]] = {}
        self._contents: dict[str, _Content] = {}
        self._last_use = 0
        self._ended: str | None = None
        self._retire: Callable[[str], None] = self.forgotten
        self._post: Callable[[Callable[[], None]], None] = lambda action: action()

    def connect(
        self,
        retire: Callable[[str], None],
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        """Put an engine behind the registry.

        Args:
          retire: makes the engine give up a uid; it answers with `forgotten`. Called
            with the registry's lock held.
          post: runs an action soon, on another thread; may be called from finalizers.
        """
        self._retire = retire
        self._post = post

    def load(self, name: str, path: str | Path) -> HostAdapter:
        """Read and check a PEFT directory without registering it.

        Raises:
          AdapterError: the name or the directory is not acceptable.
        """
        check_name(name)
        if not isinstance(path, str | Path):
            raise AdapterError(f"adapter {name!r}: path {path!r:.80} must be a path")
        return self._host.read(str(path))

    def check(self, name: str, adapter: HostAdapter) -> None:
        """Raise AdapterConflictError if `name` stands for other content."""
        with self._lock:
            known = self._live.get(name)
        if known is not None and known.uid != adapter.uid:
            raise AdapterConflictError(
                f"adapter name {name!r} is taken by content {known.uid[:12]}, and "
                f"{adapter.source} has content {adapter.uid[:12]}; use another name "
                "or replace=True"
            )

    def add(self, name: str, adapter: HostAdapter) -> None:
        """Register `adapter` under `name` and hand its weights to the host store.

        The same content under the same name again is no change.

        Raises:
          AdapterConflictError: the name stands for other content.
        """
        check_name(name)
        with self._lock:
            self.check(name, adapter)
            with self.holding(adapter):
                if name not in self._live:
                    self.bind(name, adapter.uid)

    @contextlib.contextmanager
    def holding(self, adapter: HostAdapter) -> Iterator[None]:
        """Make a content known, and keep it so until it is bound or this ends."""
        with self._lock:
            content = self._contents.get(adapter.uid)
            if content is None:
                content = _Content(adapter.card)
                self._contents[adapter.uid] = content
            content.claims += 1
            self._remove_left(content)
            self._host.put(adapter, adapter.source)
        try:
            yield
        finally:
            with self._lock:
                self._drop_claim(content, None)

    def bind(self, name: str, uid: str, *, pinned: bool = False) -> None:
        """Let a name stand for a known content; what it stood for before drains."""
        with self._lock:
            old = self._live.get(name)
            self._contents[uid].claims += 1
            self._live[name] = Binding(name, uid, pinned)
            if old is not None:
                self._let_drain(old)

    def unbind(self, name: str) -> None:
        """Take no more requests under a name; who was accepted goes on.

        Raises:
          UnknownAdapterError: no adapter has this name.
        """
        with self._lock:
            binding = self.binding(name)
            del self._live[name]
            self._let_drain(binding)

    def find(self, name: str) -> Binding | None:
        """Return what `name` stands for, or None."""
        with self._lock:
            return self._live.get(name)

    def binding(self, name: str) -> Binding:
        """Return what `name` stands for.

        Raises:
          UnknownAdapterError: no adapter has this name; never the base model instead.
          AdapterDrainingError: it has been unregistered, and is still in use.
        """
        with self._lock:
            binding = self._live.get(name)
            if binding is not None:
                return binding
            left = sum(len(b.requests) for b in self._draining.get(name, ()))
            if name in self._draining:
                raise AdapterDrainingError(
                    f"adapter {name!r} was unregistered and takes no new requests; "
                    f"{left} of its requests are still open"
                )
            names = sorted(self._live)
            known = ", ".join(names[:_NAMES_SHOWN]) or "none"
            if len(names) > _NAMES_SHOWN:
                known += f" and {len(names) - _NAMES_SHOWN} more"
            raise UnknownAdapterError(
                f"unknown adapter {name!r}; registered are: {known}"
            )

    def resolve(self, name: str) -> str:
        """Return the uid behind `name`; errors as `binding`."""
        return self.binding(name).uid

    def lease(self, name: str, request_id: str) -> AdapterLease:
        """Return a request's claim to what `name` stands for now; errors as `binding`.

        The claim holds until it is released.
        """
        with self._lock:
            return self.claim(self.binding(name), request_id)

    def claim(self, binding: Binding, request_id: str) -> AdapterLease:
        """Return a claim to a binding that a name or another claim keeps."""
        with self._lock:
            assert binding.requests or not binding.draining, "nobody claims it any more"
            self._last_use += 1
            use = Use(self._last_use, request_id, binding)
            binding.requests[use.number] = use
        return AdapterLease(self, use)

    def note_submitted(self, use: Use) -> None:
        """See `AdapterLease.submit`."""
        with self._lock:
            use.submitted = True

    def note_dropped(self, use: Use) -> None:
        """See to a lease that the garbage collector found."""
        # That may be on this very thread, in the middle of a change to these tables.
        if use.number in use.binding.requests:
            self._post(lambda: self.release(use))

    def release(self, use: Use) -> None:
        """See `AdapterLease.release`."""
        with self._lock:
            if use.binding.requests.pop(use.number, None) is not None:
                self._settle(use.binding)

    def revoke(self, bindings: Sequence[Binding], reason: str) -> list[str]:
        """Tell the requests of draining bindings to end.

        Those that the engine does not have are released, and end when it gets them.

        Returns:
          ids of the others, which the engine is to cancel.
        """
        submitted = []
        with self._lock:
            for binding in bindings:
                assert binding.draining, f"{binding.name} takes requests"
                binding.revoked = reason
                for use in list(binding.requests.values()):
                    if use.submitted:
                        submitted.append(use.request_id)
                    else:
                        self.release(use)
        return submitted

    def draining(self, name: str) -> list[Binding]:
        """Return what the name stood for before and is still in use, oldest first."""
        with self._lock:
            return list(self._draining.get(name, ()))

    def wait_until_gone(
        self, name: str, bindings: Sequence[Binding], timeout_s: float | None
    ) -> None:
        """Wait until no request uses these bindings and what only they claimed is gone.

        Raises:
          AdapterBusyError: that is not so after `timeout_s`.
          EngineDeadError: the engine has ended; nothing will change any more.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._ended is not None or not self._pending(bindings),
                None if timeout_s is None else min(timeout_s, threading.TIMEOUT_MAX),
            )
            if not self._pending(bindings):
                return
            if self._ended is not None:
                raise EngineDeadError(self._ended)
            left = sum(len(binding.requests) for binding in bindings)
            what = f"{left} open request{'s' * (left > 1)}"
            if not left:
                what = "a copy under way to the device"
            raise AdapterBusyError(
                f"adapter {name!r} still has {what} after timeout_s={timeout_s}; it "
                "takes no new ones: unregister it again to go on waiting, or with "
                "force=True to abort them"
            )

    def get(self, uid: str) -> HostAdapter:
        """Return the adapter with this uid, read from disk where memory lacks it.

        Raises:
          AdapterError: its files are gone or have changed.
        """
        return self._host.get(uid)

    def card(self, uid: str) -> AdapterCard:
        """Return the card of the adapter with this uid."""
        return self._contents[uid].card

    def names(self) -> dict[str, str]:
        """Return name -> uid of all registered adapters."""
        with self._lock:
            return {name: binding.uid for name, binding in self._live.items()}

    def bindings(self) -> list[tuple[Binding, AdapterCard]]:
        """Return copies of all bindings, those that drain too, with their cards."""
        with self._lock:
            drains = itertools.chain.from_iterable(self._draining.values())
            return [
                (
                    dataclasses.replace(binding, requests=dict(binding.requests)),
                    self._contents[binding.uid].card,
                )
                for binding in (*self._live.values(), *drains)
            ]

    def is_pinned(self, uid: str, *, without: str | None = None) -> bool:
        """Return whether a name, other than `without`, pins a content."""
        with self._lock:
            return any(
                binding.pinned and binding.uid == uid and name != without
                for name, binding in self._live.items()
            )

    # Called by the engine.

    def forgotten(self, uid: str) -> None:
        """Give up a content that the engine does not know any more.

        One that was registered again meanwhile is kept.
        """
        with self._changed:
            content = self._contents.get(uid)
            if content is not None and not content.claims:
                self._remove_left(content)
                del self._contents[uid]
                self._host.forget(uid)

    def ended(self, reason: str) -> None:
        """Let nobody wait for an engine that has ended."""
        with self._changed:
            self._ended = reason
            self._retire = self.forgotten
            for uid in list(self._contents):
                self.forgotten(uid)
            self._changed.notify_all()

    # With the lock held.

    def _let_drain(self, binding: Binding) -> None:
        binding.draining, binding.pinned = True, False
        self._draining.setdefault(binding.name, []).append(binding)
        self._settle(binding)

    def _settle(self, binding: Binding) -> None:
        """Give up a binding that neither name nor request needs any more."""
        if binding.draining and not binding.requests:
            self._drop_claim(self._contents[binding.uid], binding)

    def _drop_claim(self, content: _Content, binding: Binding | None) -> None:
        """End a claim, of a binding if it was one."""
        content.claims -= 1
        if binding is not None:
            content.leaving.append(binding)
        if content.claims:
            self._remove_left(content)
        else:
            self._retire(content.card.uid)

    def _remove_left(self, content: _Content) -> None:
        """Remove bindings whose content is gone, or stays for others."""
        for binding in content.leaving:
            left = self._draining[binding.name]
            left.remove(binding)
            if not left:
                del self._draining[binding.name]
        content.leaving.clear()
        self._changed.notify_all()

    def _pending(self, bindings: Sequence[Binding]) -> bool:
        return any(b in self._draining.get(b.name, ()) for b in bindings)


def check_fits(adapter: AdapterCard, layout: ChunkLayout, planner: Planner) -> int:
    """Return the pages that an adapter takes on the device.

    Raises:
      AdapterError: it touches projections outside the engine's lora_targets.
      CapacityError: the pool can never hold it beside a request.
    """
    layout.check_targets(adapter)
    pages = layout.num_pages(adapter.rank)
    usable = planner.config.usable_pages
    if pages + 1 > usable:
        raise CapacityError(
            f"adapter {adapter.source!r} of rank {adapter.rank} takes {pages} pages, "
            f"a request one more at least, the pool has {usable}: enlarge pool_bytes"
        )
    return pages


def check_name(name: str) -> None:
    """Raise AdapterError unless `name` is a short printable string."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS:
        raise AdapterError(
            f"adapter name {name!r:.80} must be a string of 1 to {MAX_NAME_CHARS} "
            "characters"
        )
    if not name.isprintable():
        raise AdapterError(f"adapter name {name!r} must be printable")
