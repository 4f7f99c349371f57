"""`jchameleon adapters`: what is in an adapter's files, and a server's adapters."""

import argparse
import json
from pathlib import Path
from typing import Any

from jchameleon.cli.options import add_model, print_facts
from jchameleon.cli.server_adapters import add_actions
from jchameleon.config import EngineConfig


def add_command(commands: Any) -> None:
    """Add `adapters` and its actions to the subcommands of an argument parser."""
    adapters = commands.add_parser(
        "adapters", help="check adapter files, manage a server's adapters"
    )
    actions = adapters.add_subparsers(dest="action", required=True, metavar="ACTION")
    parser = actions.add_parser(
        "inspect",
        help="check an adapter and say what is in it",
        description="Check a PEFT directory against a model and describe it.",
    )
    parser.set_defaults(run=run_inspect)
    parser.add_argument("dir", type=Path, metavar="DIR", help="a PEFT directory")
    add_model(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_actions(actions)


def run_inspect(args: argparse.Namespace) -> None:
    """Check an adapter against a model's shape and say what is in it."""
    from jchameleon.lora.inspect import describe_adapter
    from jchameleon.lora.peft import load_peft_adapter
    from jchameleon.models.loader import load_model_config

    model = load_model_config(args.model)
    max_rank = EngineConfig().max_lora_rank
    adapter = load_peft_adapter(args.dir, model, max_rank=max_rank)
    facts = {"model": model.name, **describe_adapter(adapter)}
    if args.json:
        print(json.dumps(facts, ensure_ascii=False))
        return
    facts["layers"] = _ranges(facts["layers"])
    print_facts(facts)


def _ranges(numbers: list[int]) -> list[str]:
    """Return runs of ascending numbers as first-last."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ["-".join(map(str, run)) for run in runs]
