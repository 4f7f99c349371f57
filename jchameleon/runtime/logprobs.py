"""Log-probabilities of tokens: computed on the device, read as one small array."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jchameleon.runtime.outbox import TokenLogprobs
from jchameleon.sampling import MAX_LOGPROBS


def pack_logprobs(
    logits: jax.Array,  # f32[V, R]
    tokens: jax.Array,  # i32[R]; what is no token's id gives values without meaning
) -> jax.Array:  # i32[R, 2, 1 + K]
    """Return ids, and the bits of f32 log-probabilities, of `tokens` and the likeliest.

    K is `MAX_LOGPROBS`, or V if that is less. The distribution is the softmax of the
    logits as they are.
    """
    total = jax.nn.logsumexp(logits, axis=0)  # [R]
    best, ids = lax.top_k(logits.T, min(MAX_LOGPROBS, logits.shape[0]))  # [R, K]
    own = jnp.take_along_axis(logits, tokens[None, :], axis=0, mode="clip").T
    values = jnp.concatenate([own, best], axis=1) - total[:, None]
    ids = jnp.concatenate([tokens[:, None], ids.astype(jnp.int32)], axis=1)
    return jnp.stack([ids, lax.bitcast_convert_type(values, jnp.int32)], axis=1)


def unpack_logprobs(
    packed: np.ndarray,  # i32[2, 1 + K]
    count: int,
) -> TokenLogprobs:
    """Return one row's token and, of the likeliest, the first `count`."""
    ids = packed[0, : 1 + count].tolist()
    values = np.ascontiguousarray(packed[1, : 1 + count]).view(np.float32).tolist()
    found: TokenLogprobs = {}
    for token_id, value in zip(ids, values, strict=True):
        found.setdefault(token_id, value)
    return found
