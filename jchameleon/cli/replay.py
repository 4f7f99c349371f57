"""`jchameleon replay`: whether a plan log's events still give its plans."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

DIFFERENT = 3
"""Exit code of a replay whose plans are not those of the log."""


def add_command(commands: Any) -> None:
    """Add `replay` to the subcommands of an argument parser."""
    parser = commands.add_parser(
        "replay",
        help="check that a plan log gives the same plans again",
        description="Give a plan log's events to a new planner with the policies that "
        "the log names, and compare each plan to the last bit. Exit code 3: one "
        "differs.",
    )
    parser.set_defaults(run=run_replay)
    parser.add_argument("log", type=Path, metavar="LOG", help="what plan_log wrote")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run_replay(args: argparse.Namespace) -> int:
    """Replay a log, say what was found, and return the exit code."""
    from jchameleon.runtime.policy.replay import replay

    report = replay(args.log)
    difference = report.first_difference
    facts = dataclasses.asdict(report)
    if args.json:
        print(json.dumps({"identical": difference is None, **facts}))
    else:
        del facts["first_difference"], facts["cut_off"]
        width = max(map(len, facts))
        for key, value in facts.items():
            print(f"{key:<{width}}  {value}")
        if report.cut_off:
            print("the log is cut off; what is whole of it was replayed")
        print("identical" if difference is None else f"different: {difference}")
    return 0 if difference is None else DIFFERENT
