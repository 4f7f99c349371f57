"""`jchameleon batch`: answer a file of requests with a file of rows."""

import argparse
import contextlib
import dataclasses
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jchameleon.batch import Batch, BatchConfig, BatchSummary, Progress, open_batch
from jchameleon.cli.engine_options import (
    add_adapter,
    add_engine,
    engine_table,
    named_adapters,
)
from jchameleon.cli.options import add_model
from jchameleon.cli.sampling import add_sampling, sampling_params
from jchameleon.config import EngineConfig
from jchameleon.errors import (
    BatchStoppedError,
    EngineDeadError,
    InvalidRequestError,
)
from jchameleon.models.loader import load_model

STOPPED, FAILED_ROWS = 1, 3
"""Exit codes: it ended early; it ended, and rows are errors."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)

DEFAULTS = BatchConfig()


def add_command(commands: Any) -> None:
    """Add `batch` to the subcommands of an argument parser."""
    parser = commands.add_parser(
        "batch",
        help="answer a file of requests",
        description="Answer a file of requests, one JSON object a line, with a file "
        "of rows (docs/batch.md). Exit codes: 0 all rows are answers, 1 it had to stop "
        "and can be resumed, 2 wrong usage or input, 3 some rows are errors, 130 or "
        "143 ended by a signal and can be resumed.",
    )
    parser.set_defaults(run=run)
    _add_files(parser)
    add_model(parser)
    add_adapter(parser)
    parser.add_argument(
        "--adapters-dir",
        type=Path,
        metavar="DIR",
        help="a folder of PEFT directories, each an adapter of its folder's name",
    )
    sampling = parser.add_argument_group(
        "sampling", "of lines that say nothing themselves; --seed is the run's"
    )
    add_sampling(sampling)
    add_engine(parser.add_argument_group("engine"))


def run(args: argparse.Namespace) -> int:
    """Run a batch; whatever can be checked is, before the model loads."""
    config = _config(args)
    engine = engine_table(args)
    adapters = _adapters(args)
    with open_batch(args.input, args.output, config, list(adapters)) as batch:
        rows = min(EngineConfig().max_running, max(1, len(batch)))
        engine.setdefault("max_running", rows)
        model = load_model(args.model, dtype=args.dtype)
        from jchameleon import LLM

        with LLM(model, adapters=adapters, dtype=args.dtype, **engine) as llm:
            return _run(args, batch, llm)


def _run(args: argparse.Namespace, batch: Batch, llm: Any) -> int:
    """Run until the end or a signal; return the exit code."""
    heard: list[int] = []
    progress = Progress(sys.stderr, start_s=time.monotonic())
    try:
        with _listening(heard):
            summary: BatchSummary = batch.run(
                llm,
                model_name=args.model,
                progress=progress,
                should_stop=lambda: bool(heard),
            )
    except (BatchStoppedError, EngineDeadError) as error:
        progress.clear()
        _say(f"error: {' '.join(str(error).split())}; {_how_to_resume(args)}")
        return STOPPED
    progress.close(summary)
    if not summary.finished:
        name = signal.Signals(heard[0]).name
        _say(f"{name}: stopped after {summary.done} rows; {_how_to_resume(args)}")
        return 128 + heard[0]
    return FAILED_ROWS if summary.failed + summary.kept_failed else 0


@contextlib.contextmanager
def _listening(heard: list[int]) -> Iterator[None]:
    """Note the first signal; a second one does what it would do anywhere."""

    def hear(number: int, _: Any) -> None:
        heard.append(number)
        for one, handler in before.items():
            signal.signal(one, handler)

    # Who starts it in the background may have it ignore SIGINT; then it does.
    heeded = [one for one in SIGNALS if signal.getsignal(one) != signal.SIG_IGN]
    before = {one: signal.signal(one, hear) for one in heeded}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-i",
        "--input",
        required=True,
        metavar="FILE",
        help="requests, one a line; - is standard input",
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="rows are appended here as they are ready, FILE.manifest.json says of "
        "what; a file that is there is refused; - is standard output",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with an output; lines that have a row do not run again",
    )
    parser.add_argument(
        "--retry-errors",
        action="store_true",
        help="with --resume: lines whose row is an error run again",
    )
    parser.add_argument(
        "--ordered",
        action="store_true",
        help="rows in the order of the input, not as they are ready",
    )
    for flag, field, text in (
        ("--window", "window_lines", "lines looked at together, grouped by adapter"),
        ("--sync-rows", "sync_rows", "rows after which the output is synced to disk"),
        ("--max-line-bytes", "max_line_bytes", "a longer line is an error row"),
    ):
        parser.add_argument(
            flag,
            dest=field,
            type=int,
            default=getattr(DEFAULTS, field),
            metavar="N",
            help=f"{text} (default: %(default)s)",
        )


def _config(args: argparse.Namespace) -> BatchConfig:
    """Return how the batch runs; `--seed` is the run's, not one of every line."""
    sampling = sampling_params(args)
    return BatchConfig(
        sampling=dataclasses.replace(sampling, seed=None),
        seed=0 if sampling.seed is None else sampling.seed,
        resume=args.resume,
        retry_errors=args.retry_errors,
        ordered=args.ordered,
        window_lines=args.window_lines,
        sync_rows=args.sync_rows,
        max_line_bytes=args.max_line_bytes,
    )


def _adapters(args: argparse.Namespace) -> dict[str, str]:
    """Return the adapters of both options, name -> directory.

    Raises:
      InvalidRequestError: a name is given twice, or there is no such folder.
    """
    given = list(args.adapter)
    folder = args.adapters_dir
    if folder is not None:
        try:
            entries = sorted(folder.iterdir())
        except OSError as error:
            raise InvalidRequestError(
                f"adapters-dir {str(folder)!r} cannot be read: {error}"
            ) from error
        given += [
            (entry.name, str(entry))
            for entry in entries
            if entry.is_dir() and not entry.name.startswith(".")
        ]
    return named_adapters(given)


def _how_to_resume(args: argparse.Namespace) -> str:
    """Return what to do next, for a message."""
    output = Path(args.output)
    if args.output != "-" and not output.exists():
        return "nothing was written; give the same command again"
    if not output.is_file():
        return "nothing of it can be resumed, as its output is no file"
    path = shlex.quote(args.output)
    return f"what {path} has stays; give the same command with --resume to go on"


def _say(text: str) -> None:
    if sys.stderr is None:
        return
    # Whoever reads it may have gone at the same signal; the exit code stays.
    with contextlib.suppress(OSError, ValueError):
        print(f"jchameleon: {text}", file=sys.stderr, flush=True)
