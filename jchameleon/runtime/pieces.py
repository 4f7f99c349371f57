"""Pieces that an adapter is cut into for its way into the pool.

A piece is what one run of the commit program writes: a fixed number of pages.
"""

import dataclasses

import jax
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Part of an adapter on its way into the pool.

    Attributes:
      pages: i32[N], target pages; padding repeats the first row with its page.
      block: f[L, N, E] on the device.
    """

    pages: np.ndarray
    block: jax.Array


def split_blocks(
    packed: np.ndarray,  # f[L, n, E]
    piece: int,
) -> list[np.ndarray]:  # of f[L, piece, E]
    """Return new arrays that hold the pages of an adapter, piece by piece."""
    return [packed[:, rows] for rows in _piece_rows(packed.shape[1], piece)]


def split_targets(
    pages: tuple[int, ...],  # n target pages
    piece: int,
) -> list[np.ndarray]:  # of i32[piece]
    """Return the target pages of the blocks of `split_blocks`."""
    targets = np.asarray(pages, np.int32)
    return [targets[rows] for rows in _piece_rows(len(pages), piece)]


def _piece_rows(num_pages: int, piece: int) -> list[np.ndarray]:
    """Return the pages of each piece; padding repeats its first one."""
    out = []
    for start in range(0, num_pages, piece):
        rows = np.arange(start, start + piece)
        rows[rows >= num_pages] = start
        out.append(rows)
    return out
