"""Names that stand for contents, and the claims of requests to them."""

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jchameleon.runtime.adapters import AdapterRegistry


@dataclasses.dataclass(slots=True, eq=False)
class Binding:
    """A name for a content, until nobody uses it under that name any more.

    Attributes:
      pinned: this name keeps the content on the device.
      draining: the name is gone or stands for another content; requests that were
        accepted before go on.
      revoked: why they do not, where they were told to end.
      requests: open leases, by lease number.
    """

    name: str
    uid: str
    pinned: bool = False
    draining: bool = False
    revoked: str | None = None
    requests: dict[int, "Use"] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True, eq=False)
class Use:
    """One lease: which request holds it, and whether the engine has that one."""

    number: int
    request_id: str
    binding: Binding
    submitted: bool = False


class AdapterLease:
    """A request's claim to the adapter that its name stood for when it was accepted.

    The engine releases it when the request ends. Whoever holds one that never reaches
    the engine calls `abandon`; one that is dropped is found by the garbage collector.
    """

    def __init__(self, registry: "AdapterRegistry", use: Use) -> None:
        self._registry = registry
        self._use = use

    @property
    def uid(self) -> str:
        """The content that the request runs with."""
        return self._use.binding.uid

    @property
    def revoked(self) -> str | None:
        """Why the request is to end at once, or None."""
        return self._use.binding.revoked

    def another(self, request_id: str) -> "AdapterLease":
        """Return one more claim to the same, which ends with another request."""
        return self._registry.claim(self._use.binding, request_id)

    def submit(self) -> None:
        """Note that the engine has the request from now on and will release this."""
        self._registry.note_submitted(self._use)

    def abandon(self) -> None:
        """Release this unless the engine has the request; any number of times."""
        if not self._use.submitted:
            self.release()

    def release(self) -> None:
        """Give the claim up: the request has ended. Any number of times."""
        self._registry.release(self._use)

    def __del__(self) -> None:
        self._registry.note_dropped(self._use)
