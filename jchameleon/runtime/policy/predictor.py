"""How many tokens a request will produce."""

from typing import Protocol

from jchameleon.runtime.policy.request import Request


class LengthPredictor(Protocol):
    """Estimates output lengths and learns from requests that finished."""

    def predict(self, request: Request) -> int:
        """Return the expected output, in tokens, 1 .. request.max_tokens."""

    def observe(self, request: Request, produced_tokens: int) -> None:
        """Learn that `request` ended by itself after `produced_tokens`."""


class MaxTokens:
    """Expect every request to use all it may."""

    def predict(self, request: Request) -> int:
        """Return the request's limit."""
        return request.max_tokens

    def observe(self, request: Request, produced_tokens: int) -> None:
        """Learn nothing."""
        del request, produced_tokens
