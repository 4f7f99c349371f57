"""Measure block sizes of the kernels on this machine's GPU, and keep the best.

    python tools/tune.py --model llama-7b
    python tools/tune.py --model llama-3-8b --decode 16 64 --prefill 1024
    python tools/tune.py --model llama-7b --dry-run     # candidates; needs no GPU

For each kernel of each step it compiles what the operation's own checks let through,
drops what does not compile and what gives other values than plain operations do, times
the rest in turn, and writes the fastest to `configs/tuned/<device>.json`, where engines
on such a device find it. Another one than today's choice must win by `MARGIN`. Entries
of other shapes stay. docs/gpu.md says more.
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from kernel_cases import TOLERANCE, Case, all_cases, worst_error
from kernel_timing import Program, Timing, compile_program, measure
from kernel_world import MAX_TURNS, Load, World, make_world

from jchameleon.config import EngineConfig, ModelConfig
from jchameleon.pallas.gpu_device import arch_of
from jchameleon.pallas.gpu_tunables import TUNABLES
from jchameleon.pallas.tuned import Key, read_table, table_path, write_entry

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("llama-7b", "llama-13b", "llama-3-8b", "smollm2-135m", "tiny")
RANKS = (8, 16, 32, 64, 128)

MARGIN = 0.03
"""Least gain for which the heuristic's choice is left: less is the timer's noise."""

CHOICES: dict[str, dict[str, tuple[Any, ...]]] = {
    "lora_shrink": {
        "block_k": (32, 64, 128, 256),
        "splits": (1, 2, 3, 4, 6, 8),
        "lookup": ("static", "hoist", "select"),
        "num_warps": (1, 2, 4, 8),
        "num_stages": (2, 3, 4, 5),
    },
    "lora_expand": {
        "block_n": (32, 64, 128, 256),
        "num_warps": (1, 2, 4, 8),
        "num_stages": (1, 2, 3, 4, 5),
    },
    "attention_decode": {
        "bn": (16, 32, 64, 128),
        "splits": (1, 2, 4, 8, 16, 32),
        "num_warps": (2, 4, 8),
        "num_stages": (2, 3, 4),
    },
    "attention_prefill": {
        "bm": (32, 64, 128, 256),
        "bn": (16, 32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
    },
    "rope_write": {
        "rows": (1, 2, 4, 8, 16),
        "num_warps": (1, 2, 4),
        "num_stages": (1,),
    },
}
"""Values of each field that are tried; `programs` is scaled, see `candidates`."""

PROGRAM_FACTORS = (0.5, 1.0, 2.0)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What came of one case.

    Attributes:
      seconds: of each candidate that ran, by its place; the first is the default.
      failed: those that did not compile, run, or agree, and why.
    """

    key: Key
    configs: list[Any]
    seconds: dict[int, list[float]]
    failed: dict[int, str]


def candidates(key: Key, chosen: Any, *, most: int) -> list[Any]:
    """Return at most `most` valid configurations, nearest to `chosen` first.

    The first is `chosen`; then come those that differ from it in one field, in two,
    and so on. A list that is cut short therefore still tries every field.
    """
    fields = dict(CHOICES[key.op])
    if hasattr(chosen, "programs"):
        scaled = (max(1, int(chosen.programs * f)) for f in PROGRAM_FACTORS)
        fields["programs"] = tuple(dict.fromkeys(scaled))
    before = dataclasses.asdict(chosen)
    found = []
    for values in itertools.product(*fields.values()):
        named = dict(zip(fields, values, strict=True))
        try:
            config = dataclasses.replace(chosen, **named)
            TUNABLES[key.op].check(config, dict(key.shape))
        except ValueError:
            continue
        if config != chosen:
            found.append(config)
    found.sort(
        key=lambda config: sum(
            before[name] != value for name, value in dataclasses.asdict(config).items()
        )
    )
    return [chosen, *found][:most]


def tune_case(
    case: Case, world: World, configs: Sequence[Any], timing: Timing
) -> Result:
    """Compile, check and time configurations of one kernel."""
    arrays = case.make_arrays()
    first = (world.pool, world.steps[0], arrays)
    expected = jax.jit(case.reference)(*first)
    tolerance = TOLERANCE[world.dtype.name]
    inputs = (world.pool, world.steps, arrays)
    programs: dict[str, Program] = {}
    failed: dict[int, str] = {}
    for i, config in enumerate(configs):
        # A compiler may refuse in many ways: too much shared memory, registers, ptxas.
        try:
            found = jax.jit(case.values(config))(*first)
            error = worst_error(found, expected)
            if error > tolerance:
                failed[i] = f"values off by {error:.2g} of the largest"
                continue
            state = case.make_state()
            programs[str(i)] = compile_program(case.program(config), state, inputs)
        except Exception as error:
            failed[i] = f"{type(error).__name__}: {str(error).splitlines()[0]:.120}"
    seconds = {}
    if programs:
        samples = measure(
            programs,
            case.make_state(),
            inputs,
            kernels=len(world.steps),
            timing=timing,
        )
        seconds = {int(i): values for i, values in samples.items()}
    return Result(key=case.key, configs=list(configs), seconds=seconds, failed=failed)


def select(seconds: Mapping[int, Sequence[float]]) -> int | None:
    """Return the place of the fastest median, 0 unless it is `MARGIN` faster than that.

    None where nothing ran.
    """
    medians = {i: statistics.median(values) for i, values in seconds.items()}
    if not medians:
        return None
    best = min(medians, key=lambda i: (medians[i], i))
    if 0 in medians and medians[best] > (1 - MARGIN) * medians[0]:
        return 0
    return best


def result_entry(result: Result) -> dict[str, Any] | None:
    """Return the table's entry for a result, None where nothing ran."""
    best = select(result.seconds)
    if best is None:
        return None
    default = result.seconds.get(0)
    return write_entry(
        result.key,
        result.configs[best],
        jax=jax.__version__,
        us=_microseconds(result.seconds[best]),
        default_us=None if default is None else _microseconds(default),
    )


def update_table(path: Path, device: str, entries: Sequence[Mapping[str, Any]]) -> None:
    """Write entries into a device's table, over those of their keys; whole or not.

    Raises:
      ConfigError: the table that is there is wrong, or an entry is.
    """
    kept = []
    if path.is_file():
        read_table(path, device, TUNABLES)
        kept = json.loads(path.read_text("utf-8"))["entries"]
    names = {_identity(entry) for entry in entries}
    merged = [entry for entry in kept if _identity(entry) not in names] + list(entries)
    merged.sort(key=_identity)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    # An entry a line: a change of the table is read line by line.
    lines = ",\n".join("  " + json.dumps(entry) for entry in merged)
    head = f'{{\n "device": {json.dumps(device)},\n "entries": [\n'
    new.write_text(f"{head}{lines}\n ]\n}}\n", "utf-8")
    read_table(new, device, TUNABLES)
    os.replace(new, path)


def loads(args: argparse.Namespace) -> Iterator[Load]:
    """Return the steps that were asked for."""
    for phase in ("decode", "prefill"):
        for tokens in getattr(args, phase):
            context = args.context if phase == "decode" else min(args.context, tokens)
            yield Load(
                phase=phase,
                tokens=tokens,
                context_tokens=context,
                ranks=tuple(args.ranks),
            )


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """Return the engine whose steps are measured."""
    return EngineConfig(
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        lora_targets=args.targets and tuple(args.targets),
    )


def see_gpu() -> Any | None:
    """Return the NVIDIA GPU of this machine, or None."""
    device = jax.devices()[0]
    return device if device.platform in ("gpu", "cuda") else None


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a command line say what runs."""
    parser.add_argument("--decode", type=int, nargs="*", default=[16, 64])
    parser.add_argument("--prefill", type=int, nargs="*", default=[512, 1024])
    parser.add_argument("--context", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--targets", nargs="+", help="LoRA targets; q k v o if none")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(TOLERANCE))
    parser.add_argument("--max-model-len", type=int, help="of the engine")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--turns", type=int, default=MAX_TURNS, help=argparse.SUPPRESS)
    parser.add_argument(
        "--interpret", action="store_true", help="without a GPU; for tests"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, choices=MODELS)
    parser.add_argument("--ops", nargs="+", choices=sorted(TUNABLES), help="or all")
    parser.add_argument("--most", type=int, default=64, help="candidates of a case")
    parser.add_argument("--dry-run", action="store_true", help="list candidates")
    parser.add_argument("--out", type=Path, help="the table to write")
    add_load_arguments(parser)
    args = parser.parse_args()
    if args.most < 1:
        parser.error(f"--most={args.most} must be at least 1")
    gpu = None if args.interpret else see_gpu()
    if gpu is None and not args.dry_run and not args.interpret:
        print("tune: no GPU was seen; --dry-run lists candidates", file=sys.stderr)
        return 2
    arch = None if gpu is None else arch_of(gpu.compute_capability)
    device = "interpreted" if gpu is None else gpu.device_kind
    path = args.out or table_path(device, ROOT / "configs" / "tuned")
    if args.interpret and args.out is None:
        parser.error("--interpret needs --out: its table is of no device")
    model = ModelConfig.preset(args.model)
    timing = Timing(rounds=args.rounds, queue_s=1e-4 if args.interpret else 0.02)
    for load in loads(args):
        world = make_world(
            model,
            engine_config(args),
            load,
            arch=arch,
            interpret=args.interpret,
            max_turns=2 if args.dry_run else args.turns,
        )
        entries = []
        for case in all_cases(world):
            if args.ops and case.key.op not in args.ops:
                continue
            configs = candidates(case.key, case.chosen, most=args.most)
            print(f"{load.name} {case.name}: {len(configs)} candidates", flush=True)
            if args.dry_run:
                for config in configs:
                    print(f"  {config}")
                continue
            result = tune_case(case, world, configs, timing)
            entry = result_entry(result)
            for i, reason in result.failed.items():
                print(f"  dropped {configs[i]}: {reason}")
            if entry is not None:
                print(
                    f"  {entry['us']} us, default {entry['default_us']}: "
                    f"{result.configs[select(result.seconds)]}"
                )
                entries.append(entry)
        if entries:
            # After each step: a session that ends early has kept what it measured.
            update_table(path, device, entries)
            print(f"wrote {path}", flush=True)
    return 0


def _identity(entry: Mapping[str, Any]) -> str:
    return json.dumps([entry[name] for name in ("op", "phase", "dtype", "shape")])


def _microseconds(seconds: Sequence[float]) -> float:
    return round(1e6 * statistics.median(seconds), 3)


if __name__ == "__main__":
    sys.exit(main())
