"""A request from its arrival to its end, as the planner keeps it."""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

from jchameleon.runtime.policy.candidates import Adapter, State
from jchameleon.runtime.policy.plan import PrefillChunk
from jchameleon.runtime.policy.request import Request

if TYPE_CHECKING:
    from jchameleon.runtime.policy.prefix import Block


@dataclasses.dataclass(slots=True, eq=False)
class Row:
    """An accepted request: what is expected of it, how far plans have taken it.

    Attributes:
      seq: how many requests were accepted before it; its age among all others.
      predicted_tokens: expected output; doubled when it is outgrown.
      predicted_after: how many ends the predictor had seen when it said so.
      keys: of its full blocks as far as they are known, for the prefix cache; empty
        where it does not take part.
      blocks: the leading ones of its blocks that are in the cache, which it holds.
      kv_pages: pages that it holds, those of `blocks` first; 0 while it waits.
      prefill_tokens: tokens to run before it decodes: its prompt, and after a squash
        what it had produced by then.
      prefilled_tokens: those of them that plans have run or found in the cache.
      planned_tokens: output that plans have asked for.
      produced_tokens: output that was reported.
      squashes: times that a policy or an older row sent it back to wait.
      stalled: it cannot decode in this plan for want of a page.
    """

    request: Request
    adapter: Adapter | None
    seq: int
    predicted_tokens: int
    predicted_after: int
    keys: tuple[str, ...] = ()
    blocks: "list[Block]" = dataclasses.field(default_factory=list)
    kv_pages: int = 0
    prefill_tokens: int = 0
    prefilled_tokens: int = 0
    planned_tokens: int = 0
    produced_tokens: int = 0
    squashes: int = 0
    stalled: bool = False

    @property
    def decodes(self) -> bool:
        """Whether its next step is a decode."""
        # Never beyond max_tokens, however late its end is reported.
        return (
            self.prefilled_tokens == self.prefill_tokens
            and self.planned_tokens < self.request.max_tokens
        )

    @property
    def settled(self) -> bool:
        """Whether all output that plans asked for has been reported."""
        return self.planned_tokens == self.produced_tokens

    @property
    def known_tokens(self) -> int:
        """Tokens of prompt and output so far, which a start would have to run."""
        return self.request.prompt_tokens + self.produced_tokens

    @property
    def filled_tokens(self) -> int:
        """Tokens whose KV entries are there once all that was planned has run."""
        if self.prefilled_tokens < self.prefill_tokens:
            return self.prefilled_tokens
        return self.request.prompt_tokens + self.planned_tokens - 1

    def start(self, kv_pages: int) -> None:
        """Begin to run on `kv_pages` pages, from the first token on."""
        self.kv_pages = kv_pages
        self.prefill_tokens = self.known_tokens
        self.prefilled_tokens = 0

    def next_key(self, block_tokens: int) -> str | None:
        """Return the key of the block to fill next; None inside one or without keys."""
        index, inside = divmod(self.prefilled_tokens, block_tokens)
        if inside or index != len(self.blocks) or index >= len(self.keys):
            return None
        return self.keys[index]

    def stop(self) -> None:
        """Go back to wait; what was produced stays."""
        self.kv_pages = 0
        self.prefilled_tokens = self.prefill_tokens = 0
        self.stalled = False
        self.squashes += 1

    def produce(self, tokens: int) -> bool:
        """Add reported output; return whether it outgrew its prediction.

        The prediction is doubled then: a guess that was too low says little more than
        that the output is longer.
        """
        self.produced_tokens += tokens
        if self.produced_tokens <= self.predicted_tokens:
            return False
        doubled = max(2 * self.predicted_tokens, self.produced_tokens)
        self.predicted_tokens = min(doubled, self.request.max_tokens)
        return True


def reusable_blocks(row: Row, block_tokens: int) -> int:
    """Return how many leading blocks a row that starts could take from the cache.

    Its last token must run to give logits.
    """
    return (row.known_tokens - 1) // block_tokens


def lay_out(
    rows: Iterable[Row], *, budget_tokens: int, tile_tokens: int, block_tokens: int
) -> tuple[tuple[PrefillChunk, ...], tuple[str, ...]]:
    """Spend one iteration's tokens: every decode row, then prompts, both in order.

    A prompt whose next block is the same as that of one before it waits for that: it
    finds the block in the cache when the step is done.

    Args:
      rows: running requests in admission order; those laid out advance.
      budget_tokens: decode rows and padded chunks together.
      tile_tokens: chunks are padded to multiples of this.
      block_tokens: tokens of a KV block.

    Returns:
      the chunks and the ids that decode.
    """
    decode: list[str] = []
    prompts: list[Row] = []
    for row in rows:
        if row.prefilled_tokens < row.prefill_tokens:
            if row.adapter is None or row.adapter.state is State.RESIDENT:
                prompts.append(row)
        elif row.stalled:
            row.stalled = False
        elif row.planned_tokens < row.request.max_tokens:
            row.planned_tokens += 1
            decode.append(row.request.request_id)
    # Whole tiles: a chunk that ends before its prompt fills its last tile.
    tiles = (budget_tokens - len(decode)) // tile_tokens
    prefill: list[PrefillChunk] = []
    under_way: set[str] = set()
    for row in prompts:
        if tiles == 0:
            break
        key = row.next_key(block_tokens)
        if key is not None:
            # The block with the last token must run here, to give logits.
            is_last = row.prefilled_tokens + block_tokens >= row.prefill_tokens
            if key in under_way and not is_last:
                continue
            under_way.add(key)
        start = row.prefilled_tokens
        length = min(row.prefill_tokens - start, tiles * tile_tokens)
        prefill.append(PrefillChunk(row.request.request_id, start, length))
        tiles -= -(-length // tile_tokens)
        row.prefilled_tokens += length
        if row.prefilled_tokens == row.prefill_tokens:
            row.planned_tokens += 1  # the last chunk samples a token
    return tuple(prefill), tuple(decode)
