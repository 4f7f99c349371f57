"""Options that several commands share."""

import argparse

DEFAULT_MODEL = "smollm2-135m"


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add `--model`, by default the preset whose weights are fetched on first use."""
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="M",
        help="preset, Hugging Face directory or .gguf file (default: %(default)s)",
    )
