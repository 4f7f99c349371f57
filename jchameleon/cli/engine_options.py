"""Command-line options of an engine and its adapters."""

import argparse
import re
from typing import Any

from jchameleon.cli.options import comma_names
from jchameleon.config import EngineConfig
from jchameleon.errors import InvalidRequestError
from jchameleon.runtime.policy.presets import (
    build_policies,
    load_policy,
    policy_preset_names,
)

# Options that are handed to the engine as they are, when given.
ENGINE_FIELDS = (
    "max_model_len",
    "max_running",
    "max_batch_tokens",
    "pool_bytes",
    "lora_targets",
    "max_lora_rank",
    "host_cache_bytes",
    "policy",
    "prefix_cache",
    "plan_log",
)


def add_engine(engine: Any) -> None:
    """Add the options to a group of an argument parser."""
    engine.add_argument(
        "--dtype",
        default="float32",
        metavar="D",
        help="float32 or bfloat16 (default: %(default)s)",
    )
    engine.add_argument(
        "--pool-bytes",
        type=_byte_count,
        metavar="N",
        help="memory for KV cache and adapters together, e.g. 512MiB",
    )
    for flag, text in (
        ("--max-model-len", "longest prompt and reply together, in tokens"),
        ("--max-running", "replies made at once"),
        ("--max-batch-tokens", "tokens of one iteration"),
        ("--max-lora-rank", "adapters above are refused"),
    ):
        engine.add_argument(flag, type=int, metavar="N", help=text)
    engine.add_argument(
        "--lora-targets",
        type=comma_names,
        metavar="P,P,...",
        help="projections that adapters may touch, among q,k,v,o,gate,up,down",
    )
    engine.add_argument(
        "--policy",
        metavar="NAME_OR_TOML",
        help="how requests and adapters are scheduled: a .toml file or one of "
        f"{', '.join(policy_preset_names())} (default: {EngineConfig().policy})",
    )
    engine.add_argument(
        "--prefix-cache",
        action=argparse.BooleanOptionalAction,
        help="share the KV cache of what prompts begin with (default: yes)",
    )
    engine.add_argument(
        "--host-cache-bytes",
        type=_byte_count,
        metavar="N",
        help="host memory that keeps adapter weights, e.g. 4GiB (the default)",
    )
    engine.add_argument(
        "--plan-log",
        metavar="FILE",
        help="record events and plans, for jchameleon replay",
    )


def engine_table(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of `EngineConfig` that were given, checked.

    Raises:
      ConfigError: a value is wrong, or the policy cannot be built.
    """
    table = {
        field: getattr(args, field)
        for field in ENGINE_FIELDS
        if getattr(args, field) is not None
    }
    build_policies(load_policy(EngineConfig(dtype=args.dtype, **table).policy))
    return table


def add_adapter(parser: Any) -> None:
    """Add `--adapter`."""
    parser.add_argument(
        "--adapter",
        action="extend",
        nargs="+",
        type=_named_dir,
        default=[],
        metavar="NAME=DIR",
        help="a PEFT directory and the name to use it by; may be repeated",
    )


def named_adapters(given: list[tuple[str, str]]) -> dict[str, str]:
    """Return name -> directory.

    Raises:
      InvalidRequestError: a name is given twice; the last one does not count.
    """
    adapters: dict[str, str] = {}
    for name, directory in given:
        if adapters.setdefault(name, directory) != directory:
            raise InvalidRequestError(
                f"adapter name {name!r} is given twice, with {adapters[name]!r} and "
                f"{directory!r}"
            )
    return adapters


def _named_dir(text: str) -> tuple[str, str]:
    name, equals, directory = text.partition("=")
    if not (name and equals and directory):
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=DIR")
    return name, directory


def _byte_count(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,18})\s*(|[KMGT]iB)", text)
    if not match:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a number of bytes, or one with KiB, MiB, GiB or TiB"
        )
    power = ("", "KiB", "MiB", "GiB", "TiB").index(match[2])
    return int(match[1]) * 1024**power
