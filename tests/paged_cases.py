"""Steps of paged attention with what a loop over tokens makes of them."""

import dataclasses
import math

import numpy as np

from jchameleon.config import TRASH_PAGE


@dataclasses.dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    head_dim: int
    block_tokens: int = 16
    dtype: str = "float32"

    @property
    def page_elems(self):
        return 2 * self.kv_heads * self.block_tokens * self.head_dim


@dataclasses.dataclass(frozen=True)
class Part:
    """Tokens start .. start + length - 1 of a request, which has `start` before them.

    `shared` first blocks are those of the request before it.
    """

    start: int
    length: int
    shared: int = 0


def put(pool, shape, page, slot, k, v):
    """Place one token's [KVH, HD] key and value; a page is [2, KVH, BT, HD]."""
    for half, values in enumerate((k, v)):
        for head in range(shape.kv_heads):
            row = half * shape.kv_heads + head
            at = (row * shape.block_tokens + slot) * shape.head_dim
            pool[page, at : at + shape.head_dim] = values[head]


def attend_densely(q, k, v):
    """Return [H, HD] for one query [H, HD] over keys and values [n, KVH, HD]."""
    q, k, v = (array.astype(np.float64) for array in (q, k, v))
    out = np.empty_like(q)
    for head in range(len(q)):
        kv_head = head // (len(q) // k.shape[1])
        scores = k[:, kv_head] @ q[head] / math.sqrt(q.shape[1])
        weights = np.exp(scores - scores.max())
        out[head] = weights / weights.sum() @ v[:, kv_head]
    return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """Arguments of the operations, and what they must return.

    Attributes:
      pool, after: f[P, E], before and after this step's keys and values are written.
      q, k, v: f[heads, HD, T].
      kv_pages, positions: i32[T].
      table: i32[NT, NB].
      context: i32[NT].
      real: i64[n], the tokens that are no padding.
      expected: f64[H, HD, n], attention of the real tokens.
    """

    pool: np.ndarray
    after: np.ndarray
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    kv_pages: np.ndarray
    table: np.ndarray
    positions: np.ndarray
    context: np.ndarray
    real: np.ndarray
    expected: np.ndarray


def make_step(shape, parts, *, num_tokens, tile, max_context=300, seed=0):
    """Return a step of `parts` from the first tile on; the other tiles are padding.

    Pages lie in random order. Every slot that no token wrote, in pages of these
    requests and in all others, is NaN, and so are keys and values of padding tokens.
    """
    rng = np.random.default_rng([seed, num_tokens])
    dtype = np.dtype(shape.dtype)
    block = shape.block_tokens
    max_blocks = -(-max_context // block)
    num_pages = 3 + 8 * max_blocks
    free = (rng.permutation(num_pages - 2) + 2).tolist()
    pool = np.full((num_pages, shape.page_elems), np.nan, dtype)
    pool[0] = 0

    num_tiles = num_tokens // tile
    q = rng.standard_normal((shape.heads, shape.head_dim, num_tokens)).astype(dtype)
    k = np.full((shape.kv_heads, shape.head_dim, num_tokens), np.nan, dtype)
    v = k.copy()
    kv_pages = np.full(num_tokens, TRASH_PAGE, np.int32)
    table = np.zeros((num_tiles, max_blocks), np.int32)
    positions = np.zeros(num_tokens, np.int32)
    context = np.ones(num_tiles, np.int32)
    writes, queries = [], []
    first = 0
    pages, keys, values = [], None, None
    for part in parts:
        total = part.start + part.length
        shared = pages[: part.shared]
        pages = shared + [free.pop() for _ in range(-(-total // block) - len(shared))]
        old = (keys, values)
        keys = 2 * rng.standard_normal((total, shape.kv_heads, shape.head_dim))
        keys = keys.astype(dtype)
        values = rng.standard_normal(keys.shape).astype(dtype)
        if shared:
            same = len(shared) * block
            keys[:same], values[:same] = old[0][:same], old[1][:same]
        for at in range(part.start):
            put(pool, shape, pages[at // block], at % block, keys[at], values[at])
        for i in range(part.length):
            at, token = part.start + i, first * tile + i
            k[:, :, token], v[:, :, token] = keys[at], values[at]
            kv_pages[token], positions[token] = pages[at // block], at
            writes.append((pages[at // block], at % block, keys[at], values[at]))
            queries.append((token, keys[: at + 1], values[: at + 1]))
        for n in range(-(-part.length // tile)):
            table[first, : len(pages)] = pages
            context[first] = min(part.start + (n + 1) * tile, total)
            first += 1
    assert first <= num_tiles

    after = pool.copy()
    for write in writes:
        put(after, shape, *write)
    return Step(
        pool=pool,
        after=after,
        q=q,
        k=k,
        v=v,
        kv_pages=kv_pages,
        table=table,
        positions=positions,
        context=context,
        real=np.array([token for token, _, _ in queries]),
        expected=np.stack(
            [attend_densely(q[:, :, token], ks, vs) for token, ks, vs in queries],
            axis=-1,
        ),
    )


def check_attention(out, step, name="", *, slack=1):
    """Hold attention of a step to the loop; padding tokens' must be finite."""
    out = np.asarray(out)
    dtype = step.q.dtype
    assert out.dtype == dtype
    found = out[:, :, step.real].astype(np.float64)
    tolerance = slack * (2e-5 if dtype == np.float32 else 3e-2)
    assert (np.abs(found - step.expected) <= tolerance).all(), name
    assert np.isfinite(out.astype(np.float32)).all(), name
