"""The least that a program must do, beside what it does.

A floor is a bound and no estimate: it counts every byte that has to come from or go to
device memory once, lets everything else stay on chip, and takes the GPU's peak figures.
"""

import dataclasses
import functools

import aot_hlo
import aot_moved
import numpy as np
from aot_programs import Program, Shapes
from aot_target import Target

from jchameleon.pallas.paged_attention import CONTEXT_TOKENS_PER_STEP
from jchameleon.runtime.batch import StepRow
from jchameleon.runtime.programs import StepBatch, model_step
from jchameleon.runtime.transfer import piece_pages


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """The requests of a step: as many rows, or prompts, as the program takes.

    Attributes:
      context_tokens: of every row in decode; the length of every prompt in prefill.
      ranks: of the adapters, in turn; every row has an adapter of its own.
    """

    context_tokens: int
    ranks: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Floor:
    """Fewest bytes by cause, and operations, of one program."""

    weights_bytes: int = 0
    kv_bytes: int = 0
    adapters_bytes: int = 0
    activations_bytes: int = 0
    flops: int = 0

    @property
    def fewest_bytes(self) -> int:
        """All that must cross the memory bus."""
        return (
            self.weights_bytes
            + self.kv_bytes
            + self.adapters_bytes
            + self.activations_bytes
        )

    def is_memory_bound(self, target: Target) -> bool:
        """Return whether the bytes take longer than the operations."""
        return (
            self.fewest_bytes / target.bandwidth_bytes_per_s
            >= self.flops / target.bf16_flops_per_s
        )

    def seconds(self, target: Target) -> float:
        """Return the least time at the GPU's peaks: bytes and operations overlap."""
        return max(
            self.fewest_bytes / target.bandwidth_bytes_per_s,
            self.flops / target.bf16_flops_per_s,
        )


def decode_floor(shapes: Shapes, rows: int, traffic: Traffic) -> Floor:
    """Return the floor of one token for each of `rows` requests."""
    return _step_floor(
        shapes,
        tokens=rows,
        kv_read_tokens=rows * (traffic.context_tokens - 1),
        attended_tokens=rows * traffic.context_tokens,
        ranks=row_ranks(traffic, rows),
        tokens_per_adapter=1,
        logits=rows,
    )


def prefill_floor(shapes: Shapes, tokens: int, traffic: Traffic) -> Floor:
    """Return the floor of prompts from their first token on, `tokens` in all.

    Their keys and values are written; that attention reads them again may stay on
    chip.
    """
    length = min(traffic.context_tokens, tokens)
    prompts = tokens // length
    return _step_floor(
        shapes,
        tokens=tokens,
        kv_read_tokens=0,
        attended_tokens=prompts * length * (length + 1) // 2,
        ranks=row_ranks(traffic, prompts),
        tokens_per_adapter=length,
        logits=prompts,
    )


def commit_floor(shapes: Shapes) -> Floor:
    """Return the floor of a piece of an adapter: read once, written once."""
    piece = piece_pages(shapes.layout) * shapes.page_bytes * shapes.model.num_layers
    return Floor(adapters_bytes=2 * piece)


def row_ranks(traffic: Traffic, count: int) -> list[int]:
    """Return the rank of each row's adapter."""
    return [traffic.ranks[i % len(traffic.ranks)] for i in range(count)]


def program_floor(shapes: Shapes, program: Program, traffic: Traffic) -> Floor:
    """Return the floor of a program of `compile_programs`."""
    kind, _, size = program.name.rstrip("]").partition("[")
    if kind == "commit":
        return commit_floor(shapes)
    floor = decode_floor if kind == "decode" else prefill_floor
    return floor(shapes, int(size), traffic)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Moved:
    """Bytes that a program moves, for one step of some traffic.

    Attributes:
      kernels: of our own kernels by name, over all layers.
      others: by everything else that is launched: XLA's products and fusions.
    """

    kernels: dict[str, int]
    others: int

    @property
    def moved_bytes(self) -> int:
        """All of it."""
        return sum(self.kernels.values()) + self.others


def program_moved(shapes: Shapes, program: Program, traffic: Traffic) -> Moved:
    """Return the bytes that a program of `compile_programs` moves."""
    kind, _, size = program.name.rstrip("]").partition("[")
    trips: dict[str, int] = {}
    of_kernel: dict[str, aot_moved.Traffic] = {}
    if kind != "commit":
        batch = traffic_batch(shapes, int(size), traffic, prefill=kind == "prefill")
        context = int(batch.context_tokens.max())
        trips["paged_attention"] = -(-context // CONTEXT_TOKENS_PER_STEP)
        trips["multi_lora"] = int(getattr(batch.lora, "count", 1))
        if program.own_kernels:
            of_kernel = kernel_traffic(shapes, batch)
    kernels = dict.fromkeys(of_kernel, 0)

    def of_loop(one: aot_hlo.Instruction) -> int:
        return next((n for scope, n in trips.items() if scope in one.scope), 1)

    def count(one: aot_hlo.Instruction) -> int:
        name = aot_hlo.kernel_name(one)
        kernels[name] += of_kernel[name].moved_bytes
        return 0

    others = aot_hlo.moved_bytes(program.module, of_loop, count)
    return Moved(kernels=kernels, others=others)


def kernel_traffic(shapes: Shapes, batch: StepBatch) -> dict[str, aot_moved.Traffic]:
    """Return what one call of each kernel moves in a step, by the kernel's name."""
    step = functools.partial(
        model_step,
        treedef=shapes.params.treedef,
        layout=shapes.layout,
        block_tokens=shapes.config.kv_block_tokens,
        ops=shapes.ops,
    )
    return aot_moved.count_step(step, shapes.params.leaves, list(shapes.pools), batch)


def traffic_batch(
    shapes: Shapes, tokens: int, traffic: Traffic, *, prefill: bool
) -> StepBatch:
    """Return the batch that the engine would build for this traffic."""
    builder = shapes.builder
    length = min(traffic.context_tokens, tokens) if prefill else 1
    count = tokens // length
    blocks = shapes.max_blocks
    uids = [f"adapter-{i}" for i in range(count)]
    for uid, rank in zip(uids, row_ranks(traffic, count), strict=True):
        builder.place(uid, (2,) * shapes.layout.num_pages(rank))
    rows = [
        StepRow(
            tokens=np.zeros(length, np.int32),
            start=0 if prefill else traffic.context_tokens - 1,
            pages=np.full(blocks, 2, np.int32),
            adapter_uid=uid,
            sampling=None,
        )
        for uid in uids
    ]
    batch = builder.build(rows, tokens, prefill=prefill)
    for uid in uids:
        builder.remove(uid)
    return batch


def _step_floor(
    shapes: Shapes,
    *,
    tokens: int,
    kv_read_tokens: int,
    attended_tokens: int,
    ranks: list[int],
    tokens_per_adapter: int,
    logits: int,
) -> Floor:
    model, item = shapes.model, shapes.pools[0].dtype.itemsize
    d, layers = model.hidden_size, model.num_layers
    embed = model.vocab_size * d
    all_elems = sum(leaf.size for leaf in shapes.params.leaves)
    # Of an embedding table that is no output head only the tokens' rows are read.
    read_elems = all_elems if model.tie_embeddings else all_elems - embed
    matrices = all_elems - (embed if model.tie_embeddings else 2 * embed)
    rank_elems = layers * sum(
        sum(model.projection_shape(target)) for target in shapes.layout.targets
    )
    return Floor(
        weights_bytes=read_elems * item,
        kv_bytes=(kv_read_tokens + tokens) * model.kv_elems * layers * item,
        adapters_bytes=sum(ranks) * rank_elems * item,
        # Embeddings in, the residual stream and the logits out.
        activations_bytes=2 * tokens * d * item + logits * model.vocab_size * 4,
        flops=2 * matrices * tokens
        + 2 * embed * logits
        + 4 * attended_tokens * model.q_dim * layers
        + 2 * sum(ranks) * rank_elems * tokens_per_adapter,
    )
