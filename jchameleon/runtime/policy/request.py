"""What a policy knows of a request: its lengths and its adapter, never its tokens."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One request as policies see it.

    Attributes:
      request_id: unique among the requests that wait or run.
      prompt_tokens: prompt length, at least 1.
      max_tokens: most tokens it may produce, at least 1.
      adapter_uid: content hash of its adapter; None is the bare base model.
      arrival_s: when the edge accepted it, on the engine's clock.
      expected_tokens: the caller's own estimate of its output, 1 .. max_tokens, or
        None; only predictors that say so read it.
      priority: lower numbers are admitted first.
      block_keys: one for each full KV block of its prompt, equal to another request's
        exactly where adapter, salt and all tokens up to the block's end are; empty
        where it neither uses nor fills the prefix cache, or its prompt has no full
        block.
    """

    request_id: str
    prompt_tokens: int
    max_tokens: int
    adapter_uid: str | None = None
    arrival_s: float = 0.0
    expected_tokens: int | None = None
    priority: int = 0
    block_keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1:
            raise ValueError(f"prompt_tokens={self.prompt_tokens} must be at least 1")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1")
        expected = self.expected_tokens
        if expected is not None and not 1 <= expected <= self.max_tokens:
            raise ValueError(
                f"expected_tokens={expected} must be 1 to max_tokens={self.max_tokens}"
            )
