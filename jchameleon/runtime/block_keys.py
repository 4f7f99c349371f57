"""Keys of KV blocks: digests that are equal where everything before is.

Made on the caller's thread, so that policies compare keys and see no tokens. A key
stands for the adapter's content, the salt and all tokens up to the end of its block:
each is a digest of the one before it and of the block's own tokens.
"""

import base64
import dataclasses
import functools
import hashlib
import json

import numpy as np

from jchameleon.errors import InvalidRequestError
from jchameleon.sampling import shown

DIGEST_BYTES = 18
"""144 bits, 24 characters of base64 without padding.

Two of 2**32 blocks collide with a probability of 2**-81; who wants a collision on
purpose needs some 2**72 digests.
"""

MAX_SALT_CHARS = 256


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockKeys:
    """Keys of the full blocks of one prompt.

    Attributes:
      root: what the first key is made from.
      keys: of all full blocks, in order.
      block_tokens: tokens of a block.
    """

    root: str
    keys: tuple[str, ...]
    block_tokens: int

    @classmethod
    def of(
        cls,
        prompt: np.ndarray,  # i32[n]
        *,
        adapter_uid: str | None,
        salt: str | None,
        block_tokens: int,
    ) -> "BlockKeys":
        """Return the keys of a prompt."""
        root = key = _root(adapter_uid, salt)
        keys = []
        for start in range(0, len(prompt) - block_tokens + 1, block_tokens):
            key = next_key(key, prompt[start : start + block_tokens])
            keys.append(key)
        return cls(root=root, keys=tuple(keys), block_tokens=block_tokens)

    @property
    def last(self) -> str:
        """What the key of the next block is made from."""
        return self.keys[-1] if self.keys else self.root


@functools.lru_cache(maxsize=4096)
def _root(adapter_uid: str | None, salt: str | None) -> str:
    # JSON tells None from "None" and where one text ends.
    return _digest(json.dumps([adapter_uid, salt]).encode())


def next_key(parent: str, tokens: np.ndarray) -> str:
    """Return the key of the block of `tokens`, i32[n], behind that of `parent`."""
    return _digest(parent.encode() + tokens.astype("<i4", copy=False).tobytes())


def check_cache_salt(salt: str | None) -> None:
    """Raise InvalidRequestError unless `salt` is None or a text of 1 to 256 characters.

    Requests share cached blocks only with those of the same salt.
    """
    if salt is None:
        return
    if not isinstance(salt, str) or not 1 <= len(salt) <= MAX_SALT_CHARS:
        raise InvalidRequestError(
            f"cache_salt={shown(salt)} must be a text of 1 to {MAX_SALT_CHARS} "
            "characters, or None"
        )


def _digest(content: bytes) -> str:
    digest = hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
    return base64.b64encode(digest).decode()
