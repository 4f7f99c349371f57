"""The adapters that an engine knows: cards for any thread, events for the planner."""

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from jchameleon.errors import CapacityError, UnknownAdapterError
from jchameleon.lora.adapter import AdapterCard
from jchameleon.lora.layout import ChunkLayout
from jchameleon.runtime.adapters import check_fits
from jchameleon.runtime.policy.events import (
    AdapterPinned,
    AdapterRegistered,
    AdapterUnregistered,
)
from jchameleon.runtime.policy.planner import Planner
from jchameleon.runtime.policy.residency import AdapterStats
from jchameleon.runtime.question import Question


class AdapterListener(Protocol):
    """Who hears from an engine what became of its adapters; on the engine thread."""

    def forgotten(self, uid: str) -> None:
        """An adapter that was unregistered has left planner, device and loads."""

    def ended(self, reason: str) -> None:
        """The engine has ended; it will not say anything else."""


class EngineAdapters:
    """Registers, pins and unregisters; the engine thread does what it must itself."""

    def __init__(
        self,
        layout: ChunkLayout,
        planner: Planner,
        *,
        send: Callable[[AdapterRegistered | AdapterUnregistered | Question], None],
        ask: Callable[[Callable[[], Any]], Any],
        check_alive: Callable[[], None],
        listener: AdapterListener | None,
    ):
        """Start without adapters.

        Args:
          send: puts a message into the engine's inbox.
          ask: runs an action on the engine thread after its next plan.
          check_alive: raises EngineDeadError when the engine has ended.
          listener: hears when nothing is left of an adapter, and of the engine's end.
        """
        self._layout = layout
        self._planner = planner
        self._send = send
        self._ask = ask
        self._check_alive = check_alive
        self._listener = listener
        self._lock = threading.Lock()
        self._cards: dict[str, AdapterCard] = {}
        # Engine thread only: uids by the events received so far, and pins decided.
        self._received: set[str] = set()
        self._pins: list[AdapterPinned] = []

    # Any thread.

    def __len__(self) -> int:
        return len(self._cards)

    def check(self, adapter: AdapterCard) -> int:
        """Return the pages that an adapter takes.

        Raises:
          AdapterError: it touches projections outside the engine's lora_targets.
          CapacityError: it can never fit in the pool.
          EngineDeadError: the engine has stopped.
        """
        self._check_alive()
        return check_fits(adapter, self._layout, self._planner)

    def register(self, adapter: AdapterCard) -> None:
        """Make an adapter known; requests may name its uid from now on.

        Raises: as `check`.
        """
        pages = self.check(adapter)
        with self._lock:
            self._send(AdapterRegistered(adapter.uid, adapter.rank, pages))
            self._cards.setdefault(adapter.uid, adapter)

    def unregister(self, uid: str) -> None:
        """Give up an adapter; the listener hears when nothing of it is left.

        Requests that still name it end as "aborted".
        """
        with self._lock:
            if self._cards.pop(uid, None) is not None:
                self._send(AdapterUnregistered(uid))
            else:
                self.post(lambda: self.note_forgotten([uid]))

    def pages(self, uid: str) -> int:
        """Return the pages of a registered adapter.

        Raises:
          UnknownAdapterError: no such adapter is registered.
        """
        card = self._cards.get(uid)
        if card is None:
            raise _unknown(uid)
        return self._layout.num_pages(card.rank)

    def pin(self, uid: str, *, pinned: bool, instead_of: str | None = None) -> None:
        """Keep a registered adapter on the device from now on, or no longer.

        Args:
          instead_of: an adapter whose pin ends in the same moment.

        Raises:
          UnknownAdapterError: no such adapter is registered.
          CapacityError: an accepted request could not run beside it any more.
        """
        self.pages(uid)

        def decide() -> None:
            for one in (uid, instead_of):
                if one is not None and one not in self._received:
                    raise _unknown(one)
            # Others may have been decided since the last plan.
            pins = {e.uid: e.pinned for e in self._pins}
            if instead_of is not None:
                pins[instead_of] = False
            reason = self._planner.why_not_pin(uid, pins) if pinned else None
            if reason is not None:
                raise CapacityError(f"adapter {uid[:12]} cannot be pinned: {reason}")
            if instead_of is not None:
                self._pins.append(AdapterPinned(instead_of, False))
            self._pins.append(AdapterPinned(uid, pinned))

        self._ask(decide)

    def stats(self, uids: Sequence[str]) -> list[AdapterStats | None]:
        """Return the counters of adapters; None for those that are not known."""

        def look() -> list[AdapterStats | None]:
            planner = self._planner
            return [
                planner.adapter_stats(u) if planner.knows(u) else None for u in uids
            ]

        return self._ask(look)

    def post(self, action: Callable[[], Any]) -> None:
        """Run an action on the engine thread, soon; finalizers may call this."""
        self._send(Question(action))

    # Engine thread.

    def note_forgotten(self, uids: Sequence[str]) -> None:
        """Tell the listener of adapters that are forgotten."""
        if self._listener is not None:
            for uid in uids:
                self._listener.forgotten(uid)

    def end(self, reason: str) -> None:
        """Tell the listener that the engine has ended."""
        if self._listener is not None:
            self._listener.ended(reason)

    def receive(self, event: AdapterRegistered | AdapterUnregistered) -> bool:
        """Note an event for the planner; return whether the adapter is registered."""
        if isinstance(event, AdapterRegistered):
            self._received.add(event.uid)
            return True
        self._received.discard(event.uid)
        return False

    def has_received(self, uid: str) -> bool:
        """Return whether the planner knows an adapter, or will when it plans next."""
        return uid in self._received

    def take_pins(self) -> list[AdapterPinned]:
        """Return what was decided since the last call."""
        pins, self._pins = self._pins, []
        return pins


def _unknown(uid: str) -> UnknownAdapterError:
    return UnknownAdapterError(f"no adapter with uid {uid!r:.80} is registered")
