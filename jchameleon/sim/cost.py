"""What a step works on, and who says how long that takes."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

from jchameleon.config import PREFILL_TILE_TOKENS
from jchameleon.runtime.policy.plan import Plan


@dataclasses.dataclass(kw_only=True, slots=True)
class StepWork:
    """What one iteration runs. The base model has rank 0.

    Attributes:
      prefill_tokens: of all prompt chunks.
      prefill_lora_tokens: those of them that run through an adapter.
      prefill_token_ranks: sum of tokens times rank over chunks.
      prefill_tile_tokens: of chunks filled up to whole tiles, as the engine runs them.
      prefill_pairs: pairs of a prompt token and one that it attends to, with itself.
      decode_rows: requests that decode; decode_lora_rows: those through an adapter.
      decode_kv_tokens: sum of the tokens that rows attend to.
      decode_ranks: sum of ranks over rows.
    """

    prefill_tokens: int = 0
    prefill_lora_tokens: int = 0
    prefill_token_ranks: int = 0
    prefill_tile_tokens: int = 0
    prefill_pairs: int = 0
    decode_rows: int = 0
    decode_lora_rows: int = 0
    decode_kv_tokens: int = 0
    decode_ranks: int = 0


class CostModel(Protocol):
    """Says how long steps take; copies of adapters are the link's affair."""

    def step_s(self, work: StepWork) -> float:
        """Return the duration of one iteration, in seconds."""


class Row(Protocol):
    """What `work_of` has to know of a running request.

    Attributes:
      rank: of its adapter, 0 for the base model.
      context_tokens: of its prompt and its output so far.
    """

    rank: int
    context_tokens: int


def work_of(plan: Plan, rows: Mapping[str, Row]) -> StepWork:
    """Return what a plan's step runs, for rows as they are before it."""
    work = StepWork()
    for chunk in plan.prefill:
        rank, length = rows[chunk.request_id].rank, chunk.length
        work.prefill_tokens += length
        tiles = -(-length // PREFILL_TILE_TOKENS)
        work.prefill_tile_tokens += tiles * PREFILL_TILE_TOKENS
        work.prefill_pairs += length * chunk.start + length * (length + 1) // 2
        if rank:
            work.prefill_lora_tokens += length
            work.prefill_token_ranks += length * rank
    lora_rows = kv_tokens = ranks = 0
    for request_id in plan.decode:
        row = rows[request_id]
        kv_tokens += row.context_tokens
        if row.rank:
            lora_rows += 1
            ranks += row.rank
    work.decode_rows = len(plan.decode)
    work.decode_lora_rows = lora_rows
    work.decode_kv_tokens = kv_tokens
    work.decode_ranks = ranks
    return work
