"""`jchameleon export`: a model as a directory for other libraries, or for Orbax."""

import argparse
from pathlib import Path
from typing import Any

from jchameleon.cli.options import add_model


def add_command(commands: Any) -> None:
    """Add `export` to the subcommands of an argument parser."""
    parser = commands.add_parser(
        "export",
        help="write a model to a new directory",
        description="Write a model to a new directory: for Hugging Face's libraries "
        "(config.json, model.safetensors, tokenizer), or with the weights as an Orbax "
        "checkpoint (params/). jchameleon loads both.",
    )
    parser.set_defaults(run=run_export)
    add_model(parser)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="must be absent or empty; it appears when all is written",
    )
    parser.add_argument(
        "--format",
        default="hf",
        metavar="F",
        help="hf or orbax (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        metavar="D",
        help="float32 or bfloat16 (default: whichever holds all weights exactly)",
    )


def run_export(args: argparse.Namespace) -> None:
    """Write a model and say where; the target is checked before the model loads."""
    from jchameleon.models.export import check_target, save_model
    from jchameleon.models.loader import exact_dtype, load_model

    out = args.out.expanduser().absolute()
    check_target(out, args.format)
    dtype = exact_dtype(args.model) if args.dtype is None else args.dtype
    model = load_model(args.model, dtype=dtype)
    save_model(model, out, form=args.format)
    num_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}  {args.format}  {dtype}  {num_bytes} bytes")
