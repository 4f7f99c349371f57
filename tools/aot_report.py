"""Judge an engine's programs on a GPU that is not there.

    python tools/aot_report.py --target a40 --model llama-7b --rows 16 \
        --prefill-tokens 1024 --json build/aot.json

Compiles what the engine would compile at start, from shapes only, and prints what the
compiler says of it: memory, copies, kernels, launches; and how far from the least
number of bytes each program is. Nothing runs: times are compile times and bounds.
docs/gpu.md says what the figures mean.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aot_bars
import aot_target

MODELS = ("llama-7b", "llama-13b", "llama-3-8b", "smollm2-135m")
CONTEXT_TOKENS = 1024
RANKS = (8, 16, 32, 64, 128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """All programs of one engine on one target.

    Attributes:
      sampling_compile_s: by program, of those that draw tokens.
      floors: `aot_floor.Floor` of each program, in their order.
      moved: `aot_floor.Moved` of each program.
    """

    target: aot_target.Target
    shapes: Any
    programs: list[Any]
    floors: list[Any]
    moved: list[Any]
    sampling_compile_s: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return what --json writes."""
        return {
            "target": self.target.name,
            "programs": [
                {
                    "name": program.name,
                    "compile_s": program.compile_s,
                    "argument_bytes": program.argument_bytes,
                    "temp_bytes": program.temp_bytes,
                    "alias_bytes": program.alias_bytes,
                    "weight_copies": program.weight_copies,
                    "pool_copies": program.pool_copies,
                    "kernels": [
                        {
                            "name": kernel.name,
                            "registers": kernel.registers,
                            "spill_bytes": kernel.spill_bytes,
                            "shared_bytes": kernel.shared_bytes,
                            "occupancy": kernel.occupancy,
                            "mma": kernel.instructions.mma,
                            "vector_loads": kernel.vector_loads,
                        }
                        for kernel in program.kernels
                    ],
                    "floor_s": floor.seconds(self.target),
                    "moved_bytes": moved.moved_bytes,
                    "moved_bytes_by_kernel": moved.kernels,
                    "fewest_bytes": floor.fewest_bytes,
                }
                for program, floor, moved in zip(
                    self.programs, self.floors, self.moved, strict=True
                )
            ],
        }


def report(
    target_name: str,
    model_name: str,
    dump_dir: Path,
    *,
    rows: int,
    prefill_tokens: int,
    backend: str = "pallas",
    context_tokens: int = CONTEXT_TOKENS,
    ranks: Sequence[int] = RANKS,
    max_lora_rank: int = 256,
    kv_block_tokens: int = 16,
) -> Report:
    """Compile and judge; `aot_target.prepare(dump_dir)` comes before.

    Raises:
      ValueError: an option contradicts another, the model or the target.
    """
    target = aot_target.read_target(target_name)
    import aot_floor
    import aot_programs

    from jchameleon.config import EngineConfig, ModelConfig, default_max_model_len

    model = ModelConfig.preset(model_name)
    max_model_len = default_max_model_len(model)
    _check_traffic(rows, prefill_tokens, context_tokens, ranks, max_lora_rank)
    if context_tokens > max_model_len:
        raise ValueError(
            f"context_tokens={context_tokens} exceeds {model.name}'s {max_model_len}"
        )
    config = EngineConfig(
        dtype="bfloat16",
        max_running=rows,
        max_batch_tokens=max(prefill_tokens, rows + 32),
        max_model_len=max_model_len,
        max_lora_rank=max_lora_rank,
        kv_block_tokens=kv_block_tokens,
    )
    shapes = aot_programs.describe_engine(
        model,
        target,
        aot_target.open_device(target),
        config,
        aot_programs.choose_backend(backend, target),
    )
    programs = aot_programs.compile_programs(
        shapes, target, dump_dir, rows=rows, prefill_tokens=prefill_tokens
    )
    traffic = aot_floor.Traffic(context_tokens=context_tokens, ranks=tuple(ranks))
    return Report(
        target=target,
        shapes=shapes,
        programs=programs,
        floors=[
            aot_floor.program_floor(shapes, program, traffic) for program in programs
        ],
        moved=[
            aot_floor.program_moved(shapes, program, traffic) for program in programs
        ],
        sampling_compile_s=aot_programs.compile_sampling(shapes, rows),
    )


def print_report(done: Report) -> None:
    """Print tables for people; Markdown, so that they can be kept."""
    pool = done.shapes.pools[0]
    print(
        f"{done.shapes.model.name} on {done.target.name} (compute capability "
        f"{done.target.capability}), backend {done.shapes.ops.name}, pool of "
        f"{pool.shape[0]} pages of {done.shapes.page_bytes / 1024:.0f} KiB a layer\n"
    )
    print(
        "| program | compile s | argument MB | temp MB | alias MB | weight copies "
        "| pool copies | launches | command buffers (commands) | remat |"
    )
    print("|---" * 10 + "|")
    for one in done.programs:
        print(
            f"| {one.name} | {one.compile_s:.1f} | {one.argument_bytes / 1e6:.1f} "
            f"| {one.temp_bytes / 1e6:.1f} | {one.alias_bytes / 1e6:.1f} "
            f"| {one.weight_copies} | {one.pool_copies} | {one.launches} "
            f"| {one.command_buffers} ({one.commands}) | {one.remat_ops} |"
        )
    for one in done.programs:
        for warning in aot_bars.compile_warnings(one):
            print(f"\nwarning: {warning}")
    sampling = ", ".join(f"{k} {v:.1f} s" for k, v in done.sampling_compile_s.items())
    print(f"\nsampling, compile: {sampling}\n")
    print(
        "| program | weights MB | KV MB | adapters MB | activations MB | GFLOP "
        "| floor ms | bound by | moved MB | moved / fewest |"
    )
    print("|---" * 10 + "|")
    for one, floor, moved in zip(done.programs, done.floors, done.moved, strict=True):
        bound = "memory" if floor.is_memory_bound(done.target) else "operations"
        print(
            f"| {one.name} | {floor.weights_bytes / 1e6:.1f} "
            f"| {floor.kv_bytes / 1e6:.1f} | {floor.adapters_bytes / 1e6:.1f} "
            f"| {floor.activations_bytes / 1e6:.2f} | {floor.flops / 1e9:.1f} "
            f"| {floor.seconds(done.target) * 1e3:.3f} | {bound} "
            f"| {moved.moved_bytes / 1e6:.1f} "
            f"| {moved.moved_bytes / floor.fewest_bytes:.2f} |"
        )
    for one, moved in zip(done.programs, done.moved, strict=True):
        if moved.kernels:
            parts = {**moved.kernels, "all else": moved.others}
            shown = ", ".join(f"{k} {v / 1e6:.0f}" for k, v in parts.items())
            print(f"\n{one.name} moves, MB: {shown}")
    for one in done.programs:
        _print_kernels(one)


def _print_kernels(program: Any) -> None:
    print(f"\n{program.name}: {len(program.kernels)} kernels")
    print(
        "| kernel | registers | spill B | shared B | threads | blocks/SM | occupancy "
        "| mma | of them halved | 16 B copies | 16 B loads | 2 B loads |"
    )
    print("|---" * 12 + "|")
    for kernel in sorted(program.kernels, key=lambda kernel: kernel.name):
        found = kernel.instructions
        print(
            f"| {kernel.name} | {kernel.registers} | {kernel.spill_bytes} "
            f"| {kernel.shared_bytes} | {kernel.threads} | {kernel.blocks} "
            f"| {kernel.occupancy:.2f} | {found.mma} | {found.halved} "
            f"| {found.copies_16} | {found.loads_16} | {found.loads_2} |"
        )


def _check_traffic(
    rows: int,
    prefill_tokens: int,
    context_tokens: int,
    ranks: Sequence[int],
    max_lora_rank: int,
) -> None:
    if rows < 1:
        raise ValueError(f"rows={rows} must be at least 1")
    if prefill_tokens < 32 or prefill_tokens % 32:
        raise ValueError(
            f"prefill_tokens={prefill_tokens} must be a positive multiple of 32"
        )
    if context_tokens < 1:
        raise ValueError(f"context_tokens={context_tokens} must be at least 1")
    if prefill_tokens % min(context_tokens, prefill_tokens):
        raise ValueError(
            f"prefill_tokens={prefill_tokens} must be whole prompts of "
            f"context_tokens={context_tokens}"
        )
    if not ranks or any(not 1 <= rank <= max_lora_rank for rank in ranks):
        raise ValueError(
            f"ranks={','.join(map(str, ranks))} must lie in 1..{max_lora_rank}"
        )


def _ranks(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 2 for a refused option or missing wheels."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", required=True, choices=aot_target.TARGETS)
    parser.add_argument("--model", required=True, choices=MODELS)
    parser.add_argument("--rows", type=int, required=True, help="of decode")
    parser.add_argument("--prefill-tokens", type=int, required=True)
    parser.add_argument("--backend", choices=aot_target.BACKENDS, default="pallas")
    parser.add_argument("--context-tokens", type=int, default=CONTEXT_TOKENS)
    parser.add_argument("--ranks", type=_ranks, default=RANKS, help="8,16,32")
    parser.add_argument("--max-lora-rank", type=int, default=256)
    parser.add_argument("--kv-block-tokens", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--dump", type=Path, help="keep what XLA dumps there")
    options = parser.parse_args(argv)
    missing = aot_target.missing_wheels()
    if missing is not None:
        print(f"aot_report: {missing}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="aot-") as folder:
        dump_dir = options.dump or Path(folder)
        aot_target.prepare(dump_dir)
        try:
            done = report(
                options.target,
                options.model,
                dump_dir,
                rows=options.rows,
                prefill_tokens=options.prefill_tokens,
                backend=options.backend,
                context_tokens=options.context_tokens,
                ranks=options.ranks,
                max_lora_rank=options.max_lora_rank,
                kv_block_tokens=options.kv_block_tokens,
            )
        except ValueError as error:
            print(f"aot_report: {error}", file=sys.stderr)
            return 2
    print_report(done)
    if options.json is not None:
        options.json.write_text(json.dumps(done.to_dict(), indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
