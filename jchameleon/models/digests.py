"""Checksums of a model: two that agree give the same outputs for the same requests."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from jchameleon.models.chat import ChatTemplate
from jchameleon.models.tokenizer import Tokenizer

HASHING_THREADS = 4
"""Hashing runs without the interpreter, and tensors are many."""


def model_digests(
    leaves: Sequence[jax.Array],
    tokenizer: Tokenizer | None,
    chat_template: ChatTemplate | None,
) -> dict[str, str | None]:
    """Return checksums of "weights", "tokenizer" and "chat_template".

    Every byte counts. Tensors are brought to the host a few at a time, in their order;
    the weights of a 7B model take some seconds. None is what a model does not have.
    """
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        parts = list(threads.map(_leaf_digest, leaves))
    template = None
    if chat_template is not None:
        content = [chat_template.source, sorted(chat_template.special_tokens.items())]
        template = _digest(json.dumps(content).encode())
    return {
        "weights": _digest(b"".join(parts)),
        "tokenizer": None if tokenizer is None else _digest(tokenizer.content()),
        "chat_template": template,
    }


def _leaf_digest(leaf: jax.Array) -> bytes:
    values = np.ascontiguousarray(np.asarray(leaf))
    content = hashlib.sha256(f"{values.dtype.name}{values.shape}".encode())
    content.update(values.view(np.uint8).reshape(-1).data)
    return content.digest()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
