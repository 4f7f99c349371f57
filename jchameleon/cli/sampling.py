"""Command-line options for how tokens are drawn: the fields of `SamplingParams`."""

import argparse
import dataclasses
from typing import Any

from jchameleon.sampling import SamplingParams

DEFAULTS = SamplingParams(max_tokens=64, temperature=0.0)

# Field, type of its value and help, for options of one value.
NUMBERS: tuple[tuple[str, type, str], ...] = (
    ("n", int, "replies to each prompt; needs a temperature"),
    ("max_tokens", int, "output tokens at most"),
    ("min_tokens", int, "output tokens before anything but max-tokens ends it"),
    ("temperature", float, "0 takes the likeliest token"),
    ("top_k", int, "draw among this many; 0 is all"),
    ("top_p", float, "draw among the likeliest that reach this"),
    ("min_p", float, "draw among those this likely beside the likeliest"),
    ("repetition_penalty", float, "above 1: repeat prompt and reply less"),
    ("presence_penalty", float, "above 0: tokens of the reply come again less"),
    ("frequency_penalty", float, "the same, for each time they came"),
    ("seed", int, "makes drawn tokens repeatable"),
    (
        "logprobs",
        int,
        "log-probabilities, of so many others too; generate needs --json",
    ),
    ("prompt_logprobs", int, "the same for the prompt's tokens"),
    ("truncate_prompt_tokens", int, "keep this many tokens from the prompt's end"),
    ("time_limit_s", float, "end with what there is after so many seconds"),
)
SWITCHES = (
    ("include_stop", "keep the text of --stop in the reply"),
    ("ignore_eos", "go on past the model's end token"),
)


def add_sampling(group: Any) -> None:
    """Add the options to a group of an argument parser."""
    for field, kind, text in NUMBERS:
        default = getattr(DEFAULTS, field)
        group.add_argument(
            _flag(field),
            type=kind,
            default=default,
            metavar="N" if kind is int else "X",
            help=text if default is None else f"{text} (default: %(default)s)",
        )
    group.add_argument(
        "--stop",
        action="extend",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="end the reply before this text; may be repeated",
    )
    group.add_argument(
        "--stop-token-id",
        dest="stop_token_ids",
        action="extend",
        nargs="+",
        type=int,
        default=[],
        metavar="ID",
        help="end the reply at this token; may be repeated",
    )
    group.add_argument(
        "--logit-bias",
        action="extend",
        nargs="+",
        type=_bias,
        default=[],
        metavar="ID=X",
        help="add this to a token's logit; may be repeated",
    )
    for field, text in SWITCHES:
        group.add_argument(_flag(field), action="store_true", help=text)


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """Return what parsed options ask for.

    Raises:
      InvalidRequestError: a value is out of its range.
    """
    fields = [field for field, _, _ in NUMBERS] + [field for field, _ in SWITCHES]
    return dataclasses.replace(
        DEFAULTS,
        **{field: getattr(args, field) for field in fields},
        stop=args.stop,
        stop_token_ids=args.stop_token_ids,
        logit_bias=tuple(args.logit_bias),
    )


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def _bias(text: str) -> tuple[int, float]:
    token_id, equals, bias = text.partition("=")
    try:
        if equals:
            return int(token_id), float(bias)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} must be ID=X, such as 42=-1.5")
