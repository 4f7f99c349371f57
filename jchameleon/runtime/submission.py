"""A request at the edge: checked on the caller's thread before the engine sees it."""

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from jchameleon.errors import InvalidRequestError
from jchameleon.runtime.block_keys import BlockKeys, check_cache_salt
from jchameleon.runtime.leases import AdapterLease
from jchameleon.runtime.outbox import Outbox
from jchameleon.runtime.policy.request import Request
from jchameleon.sampling import SamplingParams, shown


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """A validated request on its way to the engine thread.

    Attributes:
      prompt: i32[n] token ids.
      adapter_uid: content hash, or None for the base model.
      lease: the claim to it that ends with the request; None where the caller sees to
        it that the adapter stays registered.
      outbox: where its deltas go.
      completion: which of its prompt's completions this is; with a seed each draws
        tokens of its own.
      block_keys: keys of its prompt's blocks; None keeps it out of the prefix cache:
        every token of its prompt runs, and nothing that it computes is kept.
    """

    request_id: str
    prompt: np.ndarray
    sampling: SamplingParams
    adapter_uid: str | None
    arrival_s: float
    outbox: Outbox
    block_keys: BlockKeys | None
    completion: int = 0
    lease: AdapterLease | None = None

    def seed(self, random: np.random.Generator) -> tuple[int, int]:
        """Return the key of its draws: the caller's seed, or one from `random`."""
        if self.sampling.seed is not None:
            return self.completion, self.sampling.seed
        # A half of the key space that no caller's seed reaches.
        high, low = random.integers(0, 2**31, 2).tolist()
        return 2**31 + high, low

    @property
    def revoked(self) -> str | None:
        """Why its adapter is not to be used any more, or None."""
        return None if self.lease is None else self.lease.revoked

    def abandon(self) -> None:
        """Give up its claims unless the engine has it; any number of times."""
        if self.lease is not None:
            self.lease.abandon()

    def release(self) -> None:
        """Give up its claims: it has ended."""
        if self.lease is not None:
            self.lease.release()

    def request(self) -> Request:
        """Return what policies see of it."""
        return Request(
            request_id=self.request_id,
            prompt_tokens=len(self.prompt),
            max_tokens=self.sampling.max_tokens,
            adapter_uid=self.adapter_uid,
            arrival_s=self.arrival_s,
            expected_tokens=self.sampling.expected_tokens,
            priority=self.sampling.priority,
            block_keys=() if self.block_keys is None else self.block_keys.keys,
        )


def check_request_id(request_id: str) -> None:
    """Raise InvalidRequestError unless `request_id` is a non-empty string."""
    if not isinstance(request_id, str) or not request_id:
        raise InvalidRequestError(
            f"request_id={shown(request_id)} must be a non-empty string"
        )


def prompt_array(prompt: Sequence[int], vocab_size: int) -> np.ndarray:
    """Return token ids as i32[n].

    Raises:
      InvalidRequestError: there are none, or one is no id of the vocabulary.
    """
    if len(prompt) == 0:
        raise InvalidRequestError("prompt is empty; it must have at least 1 token")
    if set(map(type, prompt)) == {int} and 0 <= min(prompt) <= max(prompt) < vocab_size:
        return np.asarray(prompt, np.int32)  # the usual case, several times as fast
    for token in prompt:
        if (
            isinstance(token, bool)
            or not isinstance(token, int | np.integer)
            or not 0 <= token < vocab_size
        ):
            raise InvalidRequestError(
                f"prompt has token id {shown(token)}, outside the vocabulary of "
                f"{vocab_size}"
            )
    return np.asarray(prompt, np.int32)


def truncated(tokens: np.ndarray, keep_tokens: int | None) -> np.ndarray:
    """Return the last `keep_tokens` of a prompt i32[n], or all of it."""
    return tokens if keep_tokens is None else tokens[-keep_tokens:]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RequestRules:
    """What an engine takes: every request is held to this before it is queued.

    Attributes:
      vocab_size: of the model.
      max_model_len: longest prompt + output in tokens.
      has_tokenizer: stop strings can be found.
      block_tokens: of the prefix cache's blocks; None where there is no such cache.
    """

    vocab_size: int
    max_model_len: int
    has_tokenizer: bool
    block_tokens: int | None

    def accept(
        self,
        request_id: str,
        prompt: Sequence[int],
        sampling: SamplingParams,
        *,
        adapter_uid: str | None,
        outbox: Outbox,
        lease: AdapterLease | None,
        cache_salt: str | None,
        prefix_cache: bool,
    ) -> Submission:
        """Return a request that has been checked; see `Engine.prepare`."""
        check_request_id(request_id)
        check_cache_salt(cache_salt)
        tokens = prompt_array(prompt, self.vocab_size)
        tokens = truncated(tokens, sampling.truncate_prompt_tokens)
        self._check(tokens, sampling)
        block_keys = None
        # Who wants its prompt scored needs every token of it run.
        prefix_cache &= sampling.prompt_logprobs is None
        if prefix_cache and self.block_tokens is not None:
            block_keys = BlockKeys.of(
                tokens,
                adapter_uid=adapter_uid,
                salt=cache_salt,
                block_tokens=self.block_tokens,
            )
        return Submission(
            request_id=request_id,
            prompt=tokens,
            sampling=sampling,
            adapter_uid=adapter_uid,
            arrival_s=time.monotonic(),
            outbox=outbox,
            lease=lease,
            block_keys=block_keys,
        )

    def _check(self, tokens: np.ndarray, sampling: SamplingParams) -> None:
        """Raise InvalidRequestError where prompt or sampling exceed the limits."""
        if sampling.n > 1:
            raise InvalidRequestError(
                f"n={sampling.n} must be 1 in the request of a single completion"
            )
        total = len(tokens) + sampling.max_tokens
        if total > self.max_model_len:
            raise InvalidRequestError(
                f"prompt of {len(tokens)} tokens + max_tokens={sampling.max_tokens} = "
                f"{total} exceeds max_model_len={self.max_model_len}"
            )
        sampling.validate_for(self.vocab_size)
        if sampling.stop and not self.has_tokenizer:
            raise InvalidRequestError(
                f"stop={list(sampling.stop)} needs a tokenizer, and this model has "
                "none; use stop_token_ids"
            )
