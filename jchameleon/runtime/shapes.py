"""The sizes that programs are compiled for, and what of memory follows from them.

No jax here: what an engine will take can be told where there is none.
"""

from jchameleon.config import PREFILL_TILE_TOKENS, EngineConfig, ModelConfig
from jchameleon.lora.layout import ChunkLayout

DECODE_ROWS = (1, 4, 16, 32, 64, 128, 256)
"""Rows of decode programs, up to the power of two that holds `max_running`.

Fewer than all powers of two: every size is a program to compile at start.
"""

PREFILL_SIZES = 5
"""Prefill programs at most."""

CHUNKS_PER_PIECE = 4
"""Chunks that one commit program writes: 32 ranks bound the staging memory."""

LEAST_TEMP_BYTES = 8_000_000
DECODE_TEMP_BYTES = 500_000
"""Temporary memory of decode, for each row."""

PREFILL_TEMP_BYTES = 130_000
"""Temporary memory of prefill, for each token. All three are bars that programs made of
our kernels are held to when they are compiled for A40, A100 and H100 (docs/gpu.md)."""


def decode_buckets(max_running: int) -> tuple[int, ...]:
    """Return the row counts of decode programs, the last at least `max_running`."""
    largest = 1 << (max_running - 1).bit_length()
    return (*(size for size in DECODE_ROWS if size < largest), largest)


def prefill_buckets(max_batch_tokens: int) -> tuple[int, ...]:
    """Return the token counts of prefill programs: whole tiles, evenly spread.

    At most `PREFILL_SIZES`, from one tile to `max_batch_tokens`, each at most twice
    the one before where that suffices, else a constant factor apart.
    """
    largest = max_batch_tokens // PREFILL_TILE_TOKENS
    factor = max(2.0, largest ** (1 / (PREFILL_SIZES - 1)))
    sizes = {largest}
    size = 1.0
    while round(size) < largest:
        sizes.add(round(size))
        size *= factor
    return tuple(size * PREFILL_TILE_TOKENS for size in sorted(sizes))


def sampler_rows(num_tiles: int) -> int:
    """Return the rows of the sampler for a step with this many logits: a decode size.

    Prefill steps share the samplers of decode that way.
    """
    return next(
        (size for size in DECODE_ROWS if size >= num_tiles),
        1 << (num_tiles - 1).bit_length(),
    )


def piece_pages(layout: ChunkLayout) -> int:
    """Return the fixed number of pages of a `Piece`."""
    return CHUNKS_PER_PIECE * layout.pages_per_chunk


def staged_pages(layout: ChunkLayout, rank: int) -> int:
    """Return the pages that the pieces of an adapter take on their way."""
    return -(-layout.num_chunks(rank) // CHUNKS_PER_PIECE) * piece_pages(layout)


def returned_bytes(config: EngineConfig, model: ModelConfig, item_bytes: int) -> int:
    """Return the most bytes that the steps of an iteration return and samplers edit.

    Logits f32[V, R], twice where a row edits them, and the stream f[D, T], of a
    prefill and a decode step: both are dispatched before either is waited for.

    Args:
      item_bytes: of an element of the stream.
    """
    rows = decode_buckets(config.max_running)[-1]
    tokens = prefill_buckets(config.max_batch_tokens)[-1]
    total = 0
    for tile, length in ((PREFILL_TILE_TOKENS, tokens), (1, rows)):
        logits_bytes = 4 * model.vocab_size * sampler_rows(length // tile)
        total += 2 * logits_bytes + item_bytes * model.hidden_size * length
    return total


def most_temp_bytes(num_tokens: int, *, decode: bool) -> int:
    """Return the bar of a program's temporaries: no compile, so no exact figure."""
    per_token = DECODE_TEMP_BYTES if decode else PREFILL_TEMP_BYTES
    return max(LEAST_TEMP_BYTES, per_token * num_tokens)


def largest_temp_bytes(config: EngineConfig) -> int:
    """Return the bar of the temporaries of an engine's largest program."""
    return max(
        most_temp_bytes(decode_buckets(config.max_running)[-1], decode=True),
        most_temp_bytes(prefill_buckets(config.max_batch_tokens)[-1], decode=False),
    )
