"""What both clients know: token, deadline, retries."""

from jchameleon.client.connection import metadata
from jchameleon.client.retry import Attempts, RetryPolicy

DEFAULT_TIMEOUT_S = 600.0


class ClientBase:
    """Settings that every call starts from."""

    def __init__(
        self, token: str | None, timeout_s: float | None, retry: RetryPolicy | None
    ) -> None:
        """Of the clients."""
        self._metadata = metadata(token)
        self._timeout_s = timeout_s
        self._retry = retry or RetryPolicy()

    def _attempts(self, timeout_s: float | None, *, repeatable: bool) -> Attempts:
        if timeout_s is None:
            timeout_s = self._timeout_s
        return Attempts(self._retry, timeout_s, repeatable=repeatable)

    def _only_attempt(self) -> Attempts:
        return Attempts(RetryPolicy(attempts=1), self._timeout_s, repeatable=True)
