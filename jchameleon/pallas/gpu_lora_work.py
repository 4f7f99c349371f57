"""The lists by which the GPU's LoRA kernels find their work, built by the host.

A run is a stretch of neighbouring tokens of one adapter. Runs are cut into row blocks
of at most `block_rows` tokens, adapters into groups of `group_chunks` rank-8 chunks;
a work item is one pair of the two. Only what must be computed is listed: base tokens
are in no block, and a low rank has few groups. Sizes of the arrays depend on the shape
of the step alone, so one compiled program serves every mix of adapters.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jchameleon.config import PREFILL_TILE_TOKENS


class Blocking(NamedTuple):
    """How a kind of step is cut up.

    Attributes:
      block_rows: most tokens of a row block, M of the kernels' products.
      group_chunks: rank-8 chunks that one product takes. Two at least: they are the
        contraction of expand, and tensor cores want 16 (with 8, Triton takes every
        term of a bfloat16 product twice).
      run_tokens: least tokens between the starts of two runs.
    """

    block_rows: int
    group_chunks: int
    run_tokens: int


DECODE = Blocking(block_rows=16, group_chunks=2, run_tokens=1)
PREFILL = Blocking(block_rows=64, group_chunks=4, run_tokens=PREFILL_TILE_TOKENS)


def blocking(*, prefill: bool) -> Blocking:
    """Return how steps of this kind are cut up."""
    return PREFILL if prefill else DECODE


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuLoraWork:
    """The LoRA work of one step, the same for every layer.

    Attributes:
      counts: i32[2], live items and live blocks; beyond them lists are not read.
      items: i32[4, NW], per work item: first row of its chunks in `pages`, first
        token, end token, index of the group within its adapter.
      blocks: i32[4, RB], per row block: first row of its adapter in `pages`, first
        token, end token, groups of the adapter.
      pages: i32[C, W], pages of each chunk. An adapter's chunks are neighbours, and
        rows of zeros (the null page) fill its last group.
      prefill: the kind of step; static, since kernels differ by it.
    """

    counts: jax.Array
    items: jax.Array
    blocks: jax.Array
    pages: jax.Array
    prefill: bool = dataclasses.field(metadata={"static": True})


def work_sizes(
    num_tokens: int, *, prefill: bool, max_chunks: int
) -> tuple[int, int, int]:
    """Return (RB, NW, C) of the most demanding step of this shape.

    A run in decode may be a single token. In prefill a request starts at a tile of
    `PREFILL_TILE_TOKENS`, and no block is shorter than what is left of its run.

    Raises:
      ValueError: an extent is not positive.
    """
    if num_tokens < 1 or max_chunks < 1:
        raise ValueError(f"{num_tokens=} and {max_chunks=} must be at least 1")
    cut = blocking(prefill=prefill)
    num_blocks = -(-num_tokens // cut.run_tokens)
    groups = -(-max_chunks // cut.group_chunks)
    return num_blocks, num_blocks * groups, num_blocks * groups * cut.group_chunks


def build_gpu_lora_work(
    token_adapter: np.ndarray,  # i32[T]
    adapter_pages: Sequence[np.ndarray],  # per adapter index, i32[chunks, W]
    *,
    prefill: bool,
    max_chunks: int,
    pages_per_chunk: int,
) -> dict[str, Any]:
    """Return the fields of a `GpuLoraWork`, arrays as numpy's.

    Args:
      token_adapter: adapter index of each token, -1 for the base model. Decode steps
        that sort their rows by it share each load of a weight among 16 rows.
      max_chunks: chunks of the largest adapter allowed.

    Raises:
      ValueError: an adapter that no list describes, or of too many chunks; more runs
        than requests of this kind of step can make.
    """
    (num_tokens,) = token_adapter.shape
    num_blocks, num_items, num_chunks = work_sizes(
        num_tokens, prefill=prefill, max_chunks=max_chunks
    )
    work: dict[str, Any] = {
        "prefill": prefill,
        "counts": np.zeros(2, np.int32),
        "items": np.zeros((4, num_items), np.int32),
        "blocks": np.zeros((4, num_blocks), np.int32),
        "pages": np.zeros((num_chunks, pages_per_chunk), np.int32),
    }
    cut = blocking(prefill=prefill)
    edges = np.flatnonzero(token_adapter[1:] != token_adapter[:-1]) + 1
    starts = np.concatenate(([0], edges))
    ends = np.append(edges, num_tokens)
    owner = token_adapter[starts]
    if owner.min() < -1 or owner.max() >= len(adapter_pages):
        raise ValueError(
            f"token_adapter holds {owner.min()}..{owner.max()}, which must be within "
            f"-1..{len(adapter_pages) - 1}"
        )
    live = owner >= 0
    if not live.any():
        return work
    starts, ends, owner = starts[live], ends[live], owner[live]

    present, place = np.unique(owner, return_inverse=True)
    tables = [adapter_pages[i] for i in present]
    chunks = np.array([len(table) for table in tables])
    if chunks.min() < 1 or chunks.max() > max_chunks:
        raise ValueError(
            f"adapters of {chunks.min()}..{chunks.max()} chunks must have "
            f"1..{max_chunks=}"
        )
    rows = np.concatenate(tables)
    if rows.shape[1:] != (pages_per_chunk,):
        raise ValueError(f"chunks of {rows.shape[1:]} pages, not {pages_per_chunk=}")

    blocks_of_run = -(-(ends - starts) // cut.block_rows)
    count = int(blocks_of_run.sum())
    if count > num_blocks:
        raise ValueError(
            f"{count} row blocks of {len(starts)} runs exceed {num_blocks} of "
            f"{num_tokens=} {prefill=}"
        )
    groups = -(-chunks // cut.group_chunks)  # of each present adapter
    table_row = (np.cumsum(groups) - groups) * cut.group_chunks
    work["pages"][np.repeat(table_row, chunks) + _ranges(chunks)] = rows

    run = np.repeat(np.arange(len(starts)), blocks_of_run)
    first = starts[run] + _ranges(blocks_of_run) * cut.block_rows
    adapter = place[run]
    blocks = work["blocks"][:, :count]
    blocks[0] = table_row[adapter]
    blocks[1] = first
    blocks[2] = np.minimum(first + cut.block_rows, ends[run])
    blocks[3] = groups[adapter]

    group = _ranges(blocks[3])
    items = work["items"][:, : len(group)]
    items[:3] = np.repeat(blocks[:3], blocks[3], axis=1)
    items[0] += group.astype(np.int32) * cut.group_chunks
    items[3] = group
    work["counts"][:] = len(group), count
    return work


def _ranges(lengths: np.ndarray) -> np.ndarray:
    """Return 0..n-1 for each n of `lengths`, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
