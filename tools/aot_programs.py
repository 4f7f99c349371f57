"""Compile an engine's programs for a GPU that is not there, from shapes only."""

import dataclasses
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aot_hlo
import jax
import jax.numpy as jnp
import numpy as np
from aot_kernels import Kernel, read_kernels
from aot_target import BACKENDS, Target

from jchameleon.config import (
    RESERVED_PAGES,
    EngineConfig,
    ModelConfig,
    default_max_model_len,
)
from jchameleon.lora.layout import ChunkLayout
from jchameleon.models.llama import Llama
from jchameleon.models.params import param_shapes
from jchameleon.pallas import operations
from jchameleon.pallas.gpu_device import arch_of
from jchameleon.pallas.operations import Operations
from jchameleon.runtime.batch import BatchBuilder, StepBatch
from jchameleon.runtime.drawing import Drawing
from jchameleon.runtime.programs import ModelParams, compile_commit, compile_step
from jchameleon.runtime.setup import chunk_layout
from jchameleon.runtime.shapes import piece_pages, sampler_rows

POOL_SHARE = 0.9
"""Share of device memory that weights and pool take together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
    """An engine without arrays: all that its programs are compiled from.

    Attributes:
      pools: L descriptions of bf16[P, E].
      max_blocks: KV blocks of the longest request.
    """

    model: ModelConfig
    config: EngineConfig
    layout: ChunkLayout
    ops: Operations
    params: ModelParams
    pools: list[jax.ShapeDtypeStruct]
    builder: BatchBuilder
    max_blocks: int
    device: Any

    @property
    def page_bytes(self) -> int:
        """Bytes of a page in one layer."""
        return self.layout.page_elems * self.pools[0].dtype.itemsize


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """One compiled program and what its compile left behind.

    Attributes:
      own_kernels: names of those of `kernels` that XLA did not generate.
    """

    name: str
    compile_s: float
    argument_bytes: int
    temp_bytes: int
    alias_bytes: int
    output_bytes: int
    weight_copies: int
    pool_copies: int
    remat_ops: int
    command_buffers: int
    commands: int
    launches: int
    kernels: list[Kernel]
    own_kernels: frozenset[str]
    module: aot_hlo.Module


def choose_backend(name: str, target: Target) -> Operations:
    """Return the operations of a backend as an engine on this GPU has them.

    Raises:
      ValueError: there is no such backend for a GPU.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} must be one of {', '.join(BACKENDS)}")
    if name == "xla":
        return operations.XLA
    return operations.pallas_operations(arch_of(target.capability))


def describe_engine(
    model: ModelConfig,
    target: Target,
    device: Any,
    config: EngineConfig,
    ops: Operations,
) -> Shapes:
    """Return the shapes of an engine that fills `POOL_SHARE` of a GPU's memory.

    Raises:
      ValueError: the model leaves no room for a pool.
    """
    sharding = jax.sharding.SingleDeviceSharding(device)

    def describe(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    tree = jax.tree.map(
        describe, param_shapes(model), is_leaf=lambda node: isinstance(node, tuple)
    )
    params = ModelParams.from_model(Llama(model, tree))
    layout = chunk_layout(model, config, ())
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in params.leaves)
    page_bytes = layout.page_elems * 2 * model.num_layers
    pages = int(POOL_SHARE * target.memory_bytes - weights) // page_bytes
    if pages <= RESERVED_PAGES:
        raise ValueError(
            f"{model.name} has {weights / 1e9:.1f} GB of weights and leaves no room "
            f"for a pool on {target.name} of {target.memory_bytes / 1e9:.1f} GB"
        )
    max_len = config.max_model_len or default_max_model_len(model)
    max_blocks = -(-max_len // config.kv_block_tokens)
    return Shapes(
        model=model,
        config=config,
        layout=layout,
        ops=ops,
        params=params,
        pools=[describe((pages, layout.page_elems))] * model.num_layers,
        builder=BatchBuilder(
            layout,
            block_tokens=config.kv_block_tokens,
            max_blocks=max_blocks,
            max_chunks=layout.num_chunks(config.max_lora_rank),
            dtype=np.dtype(jnp.bfloat16),
            ops=ops,
        ),
        max_blocks=max_blocks,
        device=device,
    )


def compile_programs(
    shapes: Shapes, target: Target, dump_dir: Path, *, rows: int, prefill_tokens: int
) -> list[Program]:
    """Return decode[rows], prefill[prefill_tokens] and commit."""

    def step(num_tokens: int, *, prefill: bool) -> Any:
        return compile_step(
            shapes.params,
            shapes.pools,
            _batch_shapes(shapes, num_tokens, prefill=prefill),
            layout=shapes.layout,
            block_tokens=shapes.config.kv_block_tokens,
            ops=shapes.ops,
        )

    pages = piece_pages(shapes.layout)
    jobs: list[tuple[str, Callable[[], Any]]] = [
        (f"decode[{rows}]", lambda: step(rows, prefill=False)),
        (f"prefill[{prefill_tokens}]", lambda: step(prefill_tokens, prefill=True)),
        (f"commit[{pages}]", lambda: compile_commit(shapes.pools, pages)),
    ]
    return [_compile(name, job, shapes, target, dump_dir) for name, job in jobs]


def compile_sampling(shapes: Shapes, num_tiles: int) -> dict[str, float]:
    """Return compile seconds, by name, of the programs that draw tokens."""
    drawing = Drawing(shapes.model.vocab_size, shapes.device)
    drawing.compile(sampler_rows(num_tiles))
    return dict(drawing.compile_seconds)


def _batch_shapes(shapes: Shapes, num_tokens: int, *, prefill: bool) -> StepBatch:
    sharding = jax.sharding.SingleDeviceSharding(shapes.device)
    batch = shapes.builder.build([], num_tokens, prefill=prefill)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            np.shape(leaf), np.asarray(leaf).dtype, sharding=sharding
        ),
        batch,
    )


def _compile(
    name: str,
    job: Callable[[], Any],
    shapes: Shapes,
    target: Target,
    dump_dir: Path,
) -> Program:
    before = set(dump_dir.iterdir()) if dump_dir.is_dir() else set()
    start_s = time.monotonic()
    compiled = job()
    compile_s = time.monotonic() - start_s
    dumped = set(dump_dir.iterdir()) - before
    memory = compiled.memory_analysis()
    module = aot_hlo.parse_module(compiled.as_text())
    thunks = aot_hlo.read_thunks(_thunk_text(dumped))
    weights = {leaf.size for leaf in shapes.params.leaves if leaf.ndim > 1}
    pools = {shapes.pools[0].size}
    kernels = read_kernels(
        [path for path in dumped if path.suffix == ".ptx"], thunks.launches, target
    )
    # XLA numbers kernels of one name.
    own = {
        kernel.name
        for kernel in kernels
        if re.sub(r"_+\d+$", "", kernel.name) in aot_hlo.own_kernels(module)
        or kernel.name in aot_hlo.own_kernels(module)
    }
    return Program(
        name=name,
        compile_s=compile_s,
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        weight_copies=len(aot_hlo.weight_copies(module, weights - pools)),
        pool_copies=len(aot_hlo.pool_copies(module, pools)),
        remat_ops=aot_hlo.count_rematerialised(module),
        command_buffers=thunks.command_buffers,
        commands=thunks.commands,
        launches=thunks.kernels,
        kernels=kernels,
        own_kernels=frozenset(own),
        module=module,
    )


def _thunk_text(dumped: set[Path]) -> str:
    """Return the last form of the thunk sequence that a compile has dumped."""
    for ending in ("thunk_sequence_after_thunk_passes.txt", "thunk_sequence.txt"):
        found = sorted(path for path in dumped if path.name.endswith(ending))
        if found:
            return found[-1].read_text("utf-8")
    return ""
