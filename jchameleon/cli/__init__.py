"""The command line: `jchameleon generate`, `batch`, `serve`, `info` and others.

Exit codes: 0 done; 1 a fault of this program (with a traceback), or a batch that had
to stop; 2 wrong usage or input, with one line on stderr; 3 a replay whose plans differ
from the log's, or a batch with rows that failed; 130 interrupted, 143 a batch that was
told to terminate.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from jchameleon import __version__
from jchameleon.cli import (
    adapters,
    batch,
    bench,
    export,
    generate,
    info,
    plan,
    replay,
    serve,
    simulate,
)
from jchameleon.errors import JChameleonError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code.

    Wrong usage and `--help` leave through SystemExit, as argparse does it.
    """
    args = _parser().parse_args(argv)
    try:
        code: int | None = args.run(args)
        if sys.stdout is not None:  # closed by whoever started us
            sys.stdout.flush()
    except JChameleonError as error:
        print(f"jchameleon: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jchameleon: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader went away (`| head`). Python would complain once more when it
        # flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code or 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="jchameleon",
        description="One base model, many LoRA adapters, one batch.",
    )
    parser.add_argument(
        "--version", action="version", version=f"jchameleon {__version__}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    generate.add_command(commands)
    batch.add_command(commands)
    serve.add_command(commands)
    info.add_command(commands)
    export.add_command(commands)
    adapters.add_command(commands)
    bench.add_command(commands)
    replay.add_command(commands)
    simulate.add_command(commands)
    plan.add_command(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is a `--help` away."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {_one_line(message)} (see --help)\n")


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
