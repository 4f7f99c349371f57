"""Time every kernel of a model's layer on this machine's GPU.

    python tools/bench_kernels.py --model llama-7b --json build/kernels.json

Each kernel stands beside its floor (`kernel_baselines.py`) and, in the same run and in
turn with it, beside XLA's form of the same operation; LoRA also beside the gathering
and the one-hot product. All of them must first give the values of plain operations.
Block sizes are those that an engine takes on this device (`configs/tuned/`).
docs/gpu.md says what the figures mean.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from aot_target import Target, find_target
from bench_machine import describe_machine, versions
from bench_workload import spread
from kernel_baselines import (
    Floor,
    add_slabs,
    attention_baseline,
    attention_floor,
    lora_floor,
    lora_forms,
    lora_program,
    rope_baseline,
    rope_floor,
)
from kernel_cases import TOLERANCE, Case, all_cases, lora_inputs, worst_error
from kernel_timing import Program, Timing, compile_program, measure
from kernel_world import World, make_world
from tune import MODELS, add_load_arguments, engine_config, loads, see_gpu

from jchameleon import __version__
from jchameleon.config import RESERVED_PAGES, ModelConfig
from jchameleon.pallas.gpu_device import arch_of
from jchameleon.pallas.gpu_lora import multi_lora_gpu
from jchameleon.pallas.gpu_tunables import load_tuned
from jchameleon.pallas.tuned import UNTUNED, TunedTable
from jchameleon.runtime.programs import commit_load
from jchameleon.runtime.transfer import piece_pages

KERNEL = "kernel"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contest:
    """A kernel and its rivals.

    Attributes:
      forms: by name: function (pool, step, arrays) of one turn, and program of all.
        The first is the kernel.
      reference: function (pool, step, arrays) of what is right; None where there is no
        other way to compute it.
      steps: inputs of every turn.
      config: block sizes of the kernel, where it has any.
    """

    name: str
    forms: Mapping[str, tuple[Callable[..., Any], Program]]
    reference: Callable[..., Any] | None
    arrays: Any
    make_state: Callable[[], Any]
    steps: list[Any]
    floor: Floor
    config: Any = None


def contests(world: World, tuned: TunedTable) -> list[Contest]:
    """Return every kernel of a step; the commit of adapters is one more."""
    found = []
    floors = {"attention": attention_floor, "rope_write": rope_floor}
    rivals = {"attention": attention_baseline, "rope_write": rope_baseline}
    for case in all_cases(world):
        config = tuned.find(case.key) or case.chosen
        forms = {KERNEL: (case.values(config), case.program(config))}
        if case.group is None:
            kind = "rope_write" if case.name == "rope_write" else "attention"
            forms["xla"] = rivals[kind](world)
            floor = floors[kind](world)
        else:
            part = case.name.split()[0].removeprefix("lora_")
            floor = lora_floor(world, case.group, part)
        found.append(_contest(case, world, forms, floor, config))
        if case.name.startswith("lora_expand"):
            found.append(_whole_lora(case, world, tuned))
    return [*found, commit_contest(world)]


def _contest(
    case: Case, world: World, forms: Mapping[str, Any], floor: Floor, config: Any
) -> Contest:
    return Contest(
        name=case.name,
        forms=forms,
        reference=case.reference,
        arrays=case.make_arrays(),
        make_state=case.make_state,
        steps=world.steps,
        floor=floor,
        config=config,
    )


def _whole_lora(case: Case, world: World, tuned: TunedTable) -> Contest:
    """Return both kernels of a group together, against all other ways."""
    group = case.group
    assert group is not None

    def kernel(pool: Any, step: Any, y: Any, x: Any) -> jax.Array:
        return multi_lora_gpu(
            y,
            x,
            pool,
            step["lora"],
            group=group,
            arch=world.arch,
            tuned=tuned,
            interpret=world.interpret,
        )

    def of_arrays(form: Callable[..., Any]) -> Callable[..., Any]:
        return lambda pool, step, arrays: form(pool, step, *arrays)

    forms = {KERNEL: kernel, **lora_forms(world, group)}
    return Contest(
        name=f"multi_lora {group.name}",
        forms={
            name: (of_arrays(form), lora_program(form)) for name, form in forms.items()
        },
        reference=case.reference,
        arrays=case.make_arrays(),
        make_state=lambda: lora_inputs(world, group)[0],
        steps=add_slabs(world, group),
        floor=lora_floor(world, group, "both"),
    )


def commit_contest(world: World) -> Contest:
    """Return the write of a piece of an adapter into its pages of one layer."""
    count = piece_pages(world.layout)
    pages = np.random.default_rng(0).permutation(world.num_pages - RESERVED_PAGES)
    turns = min(len(world.steps), len(pages) // count)
    if turns < 1:
        raise ValueError(f"{world.num_pages=} hold no piece of {count} pages")
    pages = pages[: turns * count].astype(np.int32) + np.int32(RESERVED_PAGES)
    steps = jnp.asarray(pages.reshape(turns, count))
    block = world.random(1, count, world.layout.page_elems, seed=8)

    def form(pool: Any, step: Any, block: Any) -> jax.Array:
        return commit_load([pool], step, block)[0]

    def run(pool: Any, inputs: Any) -> tuple[Any, Any]:
        _, steps, block = inputs
        for step in steps:
            pool = form(pool, step, block)
        return pool, ()

    piece_bytes = count * world.layout.page_elems * world.dtype.itemsize
    return Contest(
        name="commit",
        forms={KERNEL: (form, run)},
        reference=None,
        arrays=block,
        make_state=lambda: jnp.array(world.pool),
        steps=list(steps),
        floor=Floor(bytes=2 * piece_bytes),
    )


def run_contest(
    contest: Contest, world: World, timing: Timing, target: Target | None
) -> dict[str, Any]:
    """Return one row of the report.

    Raises:
      RuntimeError: a form gives other values than plain operations.
    """
    first = (world.pool, contest.steps[0], contest.arrays)
    inputs = (world.pool, contest.steps, contest.arrays)
    errors: dict[str, float] = {}
    if contest.reference is not None:
        expected = jax.jit(contest.reference)(*first)
        for name, (form, _) in contest.forms.items():
            errors[name] = worst_error(jax.jit(form)(*first), expected)
            if errors[name] > TOLERANCE[world.dtype.name]:
                raise RuntimeError(
                    f"{world.load.name} {contest.name}: {name} is off by "
                    f"{errors[name]:.2g} of the largest value"
                )
    programs = {
        name: compile_program(program, contest.make_state(), inputs)
        for name, (_, program) in contest.forms.items()
    }
    samples = measure(
        programs,
        contest.make_state(),
        inputs,
        kernels=len(contest.steps),
        timing=timing,
    )
    row: dict[str, Any] = {
        "step": world.load.name,
        "kernel": contest.name,
        "turns": len(contest.steps),
        "config": contest.config and dataclasses.asdict(contest.config),
        "floor": dataclasses.asdict(contest.floor),
        "floor_us": None,
        "percent_of_floor": None,
        "forms": {
            name: {
                "us": spread([1e6 * value for value in values]),
                "error": errors.get(name),
                "speed_up": spread(
                    [v / k for v, k in zip(values, samples[KERNEL], strict=True)]
                ),
            }
            for name, values in samples.items()
        },
    }
    if target is not None:
        floor_s = contest.floor.seconds(
            target.bandwidth_bytes_per_s, target.bf16_flops_per_s
        )
        row["floor_us"] = 1e6 * floor_s
        row["percent_of_floor"] = 100 * floor_s / statistics.median(samples[KERNEL])
    return row


def print_row(row: Mapping[str, Any]) -> None:
    """Print one line for people."""
    forms = "  ".join(
        f"{name} {form['us']['median']:.1f} "
        f"[{form['us']['min']:.1f}-{form['us']['max']:.1f}]"
        for name, form in row["forms"].items()
    )
    floor = "no floor"
    if row["floor_us"] is not None:
        floor = f"floor {row['floor_us']:.1f}, {row['percent_of_floor']:.0f}% of it"
    print(f"{row['step']:14} {row['kernel']:20} {forms}  {floor}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, choices=MODELS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report")
    add_load_arguments(parser)
    args = parser.parse_args()
    gpu = None if args.interpret else see_gpu()
    if gpu is None and not args.interpret:
        print("bench_kernels: no GPU was seen", file=sys.stderr)
        return 2
    kind = "interpreted" if gpu is None else gpu.device_kind
    capability = "" if gpu is None else gpu.compute_capability
    target, how = find_target(kind, capability)
    tuned = UNTUNED if gpu is None else load_tuned(kind)
    print(
        f"{args.model} {args.dtype} on {kind}, peaks: {how}; "
        f"{len(tuned.entries)} tuned; microseconds, median of {args.rounds} [spread]"
    )
    rows = []
    for load in loads(args):
        world = make_world(
            ModelConfig.preset(args.model),
            engine_config(args),
            load,
            arch=None if gpu is None else arch_of(capability),
            interpret=args.interpret,
            max_turns=args.turns,
        )
        timing = Timing(rounds=args.rounds, queue_s=1e-4 if args.interpret else 0.02)
        for contest in contests(world, tuned):
            rows.append(run_contest(contest, world, timing, target))
            print_row(rows[-1])
    report = {
        "settings": {k: v for k, v in vars(args).items() if k != "json"},
        "machine": describe_machine(),
        "peaks": how,
        "versions": {"jchameleon": __version__, **versions(("numpy", "jax", "jaxlib"))},
        "rows": rows,
    }
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
