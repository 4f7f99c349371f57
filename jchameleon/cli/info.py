"""`jchameleon info`: what a model is, and what serving it takes."""

import argparse
import json
from typing import Any

from jchameleon.cli.options import add_model, comma_names, print_facts
from jchameleon.config import ATTENTION_PROJECTIONS


def add_command(commands: Any) -> None:
    """Add `info` to the subcommands of an argument parser."""
    parser = commands.add_parser(
        "info",
        help="say what a model is and what serving it takes",
        description="Say what a model is, from its small files: its shape, tokenizer "
        "and context, and the bytes of parameters, KV cache and adapters.",
    )
    parser.set_defaults(run=run_info)
    add_model(parser)
    parser.add_argument(
        "--dtype",
        default="float32",
        metavar="D",
        help="of parameters, KV cache and adapters: float32 or bfloat16 (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--lora-targets",
        type=comma_names,
        default=ATTENTION_PROJECTIONS,
        metavar="P,P,...",
        help="projections that adapters touch, among q,k,v,o,gate,up,down (default: "
        f"{','.join(ATTENTION_PROJECTIONS)})",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run_info(args: argparse.Namespace) -> None:
    """Describe a model."""
    from jchameleon.models.describe import describe_model

    facts = describe_model(args.model, dtype=args.dtype, targets=args.lora_targets)
    if args.json:
        print(json.dumps(facts, ensure_ascii=False))
    else:
        print_facts(facts)
