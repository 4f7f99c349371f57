"""`jchameleon plan`: how many requests a second a GPU holds at an SLO."""

import argparse
from pathlib import Path
from typing import Any

from jchameleon.cli.options import comma_names, print_facts, write_report
from jchameleon.config import (
    ATTENTION_PROJECTIONS,
    EngineConfig,
    ModelConfig,
    default_max_model_len,
    preset_names,
)
from jchameleon.errors import ConfigError

DEFAULT_SEEDS = 5

INPUT_LEN = "lognormal:1020:0.641:14050"
OUTPUT_LEN = "lognormal:129:0.724:1000"
"""Azure LLM inference trace 2023, conversations, by its published percentiles, as in
`configs/paper/a40-llama-7b.toml`."""

MAX_RUNNING = 256
MAX_BATCH_TOKENS = 2048
"""What a GPU can use; an engine's own defaults are for a CPU."""


def add_command(commands: Any) -> None:
    """Add `plan` to the subcommands of an argument parser."""
    parser = commands.add_parser(
        "plan",
        help="how many requests a second a GPU holds at an SLO",
        description="Simulate the engine's planner on a GPU that need not be there and "
        "scan loads for the highest that keeps the SLO. The cost model is a guess, so "
        "all is done for a pessimistic, a nominal and an optimistic one. The same "
        "arguments give the same JSON, byte for byte.",
    )
    parser.set_defaults(run=run)
    what = parser.add_argument_group("what is planned")
    what.add_argument("--gpu", required=True, metavar="G", help="a40, a100 or h100")
    what.add_argument(
        "--model", required=True, metavar="M", help="preset, model directory or .gguf"
    )
    what.add_argument(
        "--adapters",
        type=int,
        default=100,
        metavar="N",
        help="how many; a multiple of the number of ranks (default: %(default)s)",
    )
    what.add_argument(
        "--ranks",
        default="8,16,32,64,128",
        metavar="R,R,...",
        help="equally many adapters of each (default: %(default)s)",
    )
    what.add_argument(
        "--lora-targets",
        type=comma_names,
        default=ATTENTION_PROJECTIONS,
        metavar="P,P,...",
        help="projections that adapters touch (default: "
        f"{','.join(ATTENTION_PROJECTIONS)})",
    )
    what.add_argument(
        "--slo-ttft",
        type=float,
        required=True,
        metavar="S",
        help="bound on the time to first token, in seconds",
    )
    what.add_argument(
        "--percentile",
        type=float,
        default=99.0,
        metavar="P",
        help="of the times that the SLO bounds (default: %(default)g)",
    )
    what.add_argument(
        "--policy",
        metavar="P",
        help=f"preset or .toml file (default: {EngineConfig().policy})",
    )
    _add_workload(parser.add_argument_group("requests"))
    engine = parser.add_argument_group("engine")
    engine.add_argument("--max-running", type=int, default=MAX_RUNNING, metavar="N")
    engine.add_argument(
        "--max-batch-tokens", type=int, default=MAX_BATCH_TOKENS, metavar="N"
    )
    engine.add_argument(
        "--max-model-len",
        type=int,
        metavar="N",
        help="longest prompt and output together; longer prompts are cut (default: the "
        "model's context, at most 4096)",
    )
    runs = parser.add_argument_group("runs")
    runs.add_argument(
        "--seeds",
        type=int,
        default=DEFAULT_SEEDS,
        metavar="N",
        help="default: %(default)s",
    )
    runs.add_argument("--seed", type=int, default=0, metavar="S", help="the first one")
    runs.add_argument(
        "--duration",
        type=float,
        metavar="S",
        help="seconds of arrivals in a run (default: 800 requests that count, and at "
        "least 20 SLOs)",
    )
    runs.add_argument("--json", type=Path, metavar="FILE", help="write everything")


def _add_workload(load: Any) -> None:
    load.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="CSV with columns TIMESTAMP, ContextTokens, GeneratedTokens to draw "
        "lengths from, in place of the two below",
    )
    load.add_argument(
        "--input-len",
        default=INPUT_LEN,
        metavar="L",
        help="N, LOW:HIGH or lognormal:MEDIAN:SIGMA:MOST (default: %(default)s)",
    )
    load.add_argument(
        "--output-len",
        default=OUTPUT_LEN,
        metavar="L",
        help="likewise (default: %(default)s)",
    )
    load.add_argument(
        "--length-scale",
        type=float,
        default=1.0,
        metavar="X",
        help="what lengths of a trace or a lognormal law are multiplied with",
    )
    load.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="limit that every request names (default: the longest output)",
    )
    load.add_argument(
        "--popularity",
        default="power:1",
        metavar="LAW",
        help="uniform, zipf:A, power:A or power:A:B (default: %(default)s)",
    )
    load.add_argument(
        "--arrivals",
        default="poisson",
        metavar="PROCESS",
        help="poisson, fixed, trace, gamma:CV or bursty:FACTOR:ON_S:OFF_S (default: "
        "%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Plan, and say what came of it."""
    from jchameleon.sim.capacity import plan_capacity

    if args.json is not None and not args.json.parent.is_dir():
        raise ConfigError(f"cannot write {args.json}: {args.json.parent} is no folder")
    report = plan_capacity(_question(args))
    _print(report)
    if args.json is not None:
        write_report(args.json, report)
    return 0


def _question(args: argparse.Namespace) -> Any:
    from jchameleon.sim.capacity import Question
    from jchameleon.sim.profile import AdapterMix
    from jchameleon.workload.arrivals import read_trace
    from jchameleon.workload.generator import Length, Popularity, Workload

    model = _model(args.model)
    policy = {} if args.policy is None else {"policy": args.policy}
    return Question(
        gpu=args.gpu,
        model=model,
        adapters=AdapterMix(count=args.adapters, ranks=_ranks(args.ranks)),
        engine=EngineConfig(
            dtype="bfloat16",
            max_running=args.max_running,
            max_batch_tokens=args.max_batch_tokens,
            lora_targets=args.lora_targets,
            **policy,
        ),
        workload=Workload(
            process=args.arrivals,
            input_len=Length.parse(args.input_len),
            output_len=Length.parse(args.output_len),
            length_scale=args.length_scale,
            popularity=Popularity.parse(args.popularity),
            max_model_len=(
                default_max_model_len(model)
                if args.max_model_len is None
                else args.max_model_len
            ),
        ),
        slo_ttft_s=args.slo_ttft,
        percent=args.percentile,
        max_tokens=args.max_tokens,
        trace=None if args.trace is None else read_trace(args.trace),
        num_seeds=args.seeds,
        seed=args.seed,
        duration_s=args.duration,
    )


def _model(name: str) -> ModelConfig:
    if name in preset_names():
        return ModelConfig.preset(name)
    from jchameleon.models.loader import load_model_card

    return load_model_card(name).config


def _ranks(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"ranks={text!r} must be integers with commas between them"
        ) from error


def _print(report: dict[str, Any]) -> None:
    memory, settings = report["memory"], report["settings"]
    workload, adapters = settings["workload"], settings["adapters"]
    percent = report["percentile"]
    print_facts(
        {
            "model": f"{report['model']} on {report['gpu']}, bfloat16",
            "adapters": f"{adapters['count']} of ranks "
            f"{', '.join(map(str, adapters['ranks']))}",
            "policy": settings["policy"]["source"],
            "requests": f"{workload['process']}, {settings['max_tokens']} tokens of "
            f"output at the most, {workload['max_model_len']} in all",
            "SLO": f"P{percent:g} of TTFT within {report['slo_ttft_s']:g} s",
            "runs": f"{report['num_seeds']} seeds from {workload['seed']}; times are "
            "guesses, from shares of the GPU's peaks",
        }
    )
    _print_memory(memory)
    _print_cases(report)
    capacity, half = report["capacity_rps"], report["half_width_95_rps"]
    spread = "" if half is None else f" +- {half:.3g} (95 % over seeds)"
    low, high = report["range_rps"]
    print(
        f"\nholds {capacity:.3g}{spread} requests/s; {low:.3g} to {high:.3g} by the "
        "cost model"
    )


def _print_memory(memory: dict[str, Any]) -> None:
    parts = {
        "CUDA context and reserve": memory["context_bytes"]
        + memory["reserve_bytes"]
        + memory["unused_bytes"],
        "weights": memory["weights_bytes"],
        "temporaries, logits": memory["temporaries_bytes"] + memory["logits_bytes"],
        "adapters on their way": memory["staging_bytes"],
        "pool": memory["pool_bytes"],
        "GPU": memory["device_bytes"],
    }
    print(f"\n{'memory':28}{'GB':>8}")
    for name, value in parts.items():
        print(f"{name:28}{value / 1e9:>8.2f}")
    print(
        f"the pool: {memory['kv_tokens']} KV tokens; or {memory['adapters_fit']} "
        f"adapters ({memory['adapters_fit_bytes'] / 1e9:.2f} GB) and "
        f"{memory['kv_tokens_beside']} KV tokens"
    )


def _print_cases(report: dict[str, Any]) -> None:
    cases = report["cases"]
    percent = f"p{report['percentile']:g}"
    rows: dict[str, list[str]] = {}

    def add(name: str, values: list[float | None], scale: float = 1.0) -> None:
        rows[name] = ["-" if v is None else _cell(scale * v) for v in values]

    def take(*path: str) -> list[Any]:
        found = []
        for case in cases.values():
            value = case
            for key in path:
                value = None if value is None else value.get(key)
            found.append(value)
        return found

    for name in ("compute", "bandwidth", "lora", "link"):
        add(f"share of peak, {name}", take("shares", name))
    add(f"TTFT alone, {percent}, ms", take("ttft_alone_s", percent), 1e3)
    add("requests/s", take("capacity_rps"))
    add("  95 % over seeds, +-", take("half_width_95_rps"))
    add("  step of the scan", take("step_rps"))
    add("  seconds of a run", take("duration_s"))
    share = next((s for s in take("at_load", "share") if s is not None), 0.0)
    add(f"at {share:.0%} of that, requests/s", take("at_load", "rate_rps"))
    for kind in ("ttft", "tbt"):
        for point in ("p50", "p99"):
            title = f"  {kind.upper()} {point}, ms"
            add(title, take("at_load", f"{kind}_s", point), 1e3)
    add("  adapter hit rate", take("at_load", "cache", "hit_rate"))
    for key, title in (("pool_kv", "KV"), ("pool_adapters", "adapters")):
        add(f"  pool with {title}", take("at_load", "usage", key))
    add("  time in prompts", take("at_load", "usage", "prefill_busy"))
    add("  time in decode", take("at_load", "usage", "decode_busy"))
    add("  link busy", take("at_load", "link_busy"))
    rows["saturates first"] = [name or "-" for name in take("saturated", "resource")]
    late = f"ttft_{percent}_s"
    add(f"  TTFT {percent} above it, s", take("saturated", late, "as_it_is"))
    add("  pool free above it", take("saturated", "usage", "pool_free"))
    for name in ("compute", "memory", "rows", "link"):
        add(f"  with twice the {name}, s", take("saturated", late, name))
    print(f"\n{'':32}" + "".join(f"{name:>13}" for name in cases))
    for name, cells in rows.items():
        print(f"{name:32}" + "".join(f"{cell:>13}" for cell in cells))


def _cell(value: float) -> str:
    """Return three digits, or all before the point."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
