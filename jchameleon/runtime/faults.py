"""Kinds of causes for which requests end without an answer, for programs to act on."""

from typing import Literal

from jchameleon.errors import AdapterError, AdapterReadError

Fault = Literal[
    "cancelled",
    "unregistered",
    "adapter",
    "adapter_io",
    "capacity",
    "rejected",
    "not_finite",
    "internal",
    "closed",
    "engine",
]
"""What kind of cause ended a request as "aborted" or "error"; messages are for people.

- "cancelled": the caller ended it.
- "unregistered": its adapter was unregistered with force.
- "adapter": its adapter's files are gone, have changed or are refused; trying again
  does not help before they are put right.
- "adapter_io": its adapter could not be read now; trying again may help.
- "capacity": it cannot fit in the pool any more, beside what was pinned since.
- "rejected": the admission policy turned it away; trying again later may help.
- "not_finite": the model, or its adapter, computed logits that are not finite.
- "internal": something failed while it ran, and it was found to be the reason.
- "closed": the engine was closed.
- "engine": the engine has died; no request can be answered any more.
"""


def load_fault(error: BaseException) -> Fault:
    """Return what kind of cause made the load of an adapter fail."""
    if isinstance(error, AdapterReadError):
        return "adapter_io"
    return "adapter" if isinstance(error, AdapterError) else "internal"
