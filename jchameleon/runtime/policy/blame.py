"""Whose fault an exception was: every call into a policy is wrapped."""

from types import TracebackType
from typing import NoReturn

from jchameleon.errors import PolicyError


class blaming:  # noqa: N801, reads as a statement: `with blaming(...)`
    """Turn what a policy raises into a PolicyError that names its kind and class."""

    __slots__ = ("_kind", "_policy")

    def __init__(self, kind: str, policy: object) -> None:
        self._kind = kind
        self._policy = policy

    def __enter__(self) -> "blaming":
        return self

    def __call__(self, what: str) -> NoReturn:
        """Raise PolicyError: the policy did `what`."""
        found = type(self._policy)
        raise PolicyError(
            f"{self._kind} policy {found.__module__}:{found.__qualname__} {what}"
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # One policy may call another (admission evicts): the inner one is to blame.
        if not isinstance(error, Exception | SystemExit):
            return
        if isinstance(error, PolicyError):
            return
        found, text = type(self._policy), " ".join(str(error).split())
        raise PolicyError(
            f"{self._kind} policy {found.__module__}:{found.__qualname__} raised "
            f"{type(error).__name__}: {text}"
        ) from error
