"""Policies that keep something per adapter hear when one was unregistered."""

from collections.abc import Callable
from typing import Any

from jchameleon.runtime.policy.blame import blaming
from jchameleon.runtime.policy.candidates import Adapter


class Forgetting:
    """The `forget` methods of an engine's policies, of those that have one."""

    def __init__(self, policies: dict[str, object]) -> None:
        """Take policies by kind."""
        self._listeners: list[tuple[str, object, Callable[[Any], None]]] = []
        for kind, policy in policies.items():
            forget = getattr(policy, "forget", None)
            if forget is not None:
                self._listeners.append((kind, policy, forget))

    def forget(self, adapter: Adapter) -> None:
        """Tell everyone; eviction policies know adapters by their order."""
        for kind, policy, forget in self._listeners:
            with blaming(kind, policy):
                forget(adapter.order if kind == "eviction" else adapter.uid)
