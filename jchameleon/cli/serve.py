"""`jchameleon serve`: answer over gRPC until a signal."""

import argparse
import os
from pathlib import Path
from typing import Any, NoReturn

from jchameleon.models.loader import load_model_card
from jchameleon.runtime.policy.presets import build_policies, load_policy


def add_command(commands: Any) -> None:
    """Add `serve` to the subcommands of an argument parser."""
    parser = commands.add_parser(
        "serve",
        help="answer over gRPC until a signal",
        description="Serve a model and its adapters over gRPC. Options go before what "
        "the file says. SIGTERM or SIGINT lets running requests end, a second one "
        "does not. Exit codes: 0 ended by a signal, 1 a fault, 2 wrong configuration "
        "or files, 130 ended by a second signal.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "config",
        type=Path,
        nargs="?",
        metavar="CONFIG.toml",
        help="docs/serving.md lists its tables; without one, defaults count",
    )
    _add(parser, "model", "--model", metavar="M", help="preset, directory or .gguf")
    _add(parser, "server.host", "--host", metavar="ADDRESS", help="where to listen")
    _add(parser, "server.port", "--port", type=int, metavar="N", help="0 is a free one")
    _add(
        parser,
        "server.metrics_port",
        "--metrics-port",
        type=int,
        metavar="N",
        help="of Prometheus' HTTP endpoint; 0 is a free one",
    )
    _add(
        parser,
        "server.allow_insecure",
        "--allow-insecure",
        action="store_true",
        help="let other machines connect without TLS",
    )
    _add(
        parser,
        "server.shutdown_timeout_s",
        "--shutdown-timeout-s",
        type=float,
        metavar="S",
        help="running requests get so long to end after the first signal",
    )
    _add(
        parser,
        "server.log_format",
        "--log-format",
        metavar="F",
        help="json, one object a line, or text",
    )
    _add(
        parser,
        "adapters.root",
        "--adapter-root",
        metavar="DIR",
        help="folder that adapters lie below",
    )


def _add(parser: argparse.ArgumentParser, field: str, flag: str, **how: Any) -> None:
    """Add an option that sets a field of the configuration, where it is given."""
    parser.add_argument(flag, dest=field, default=argparse.SUPPRESS, **how)


def run(args: argparse.Namespace) -> NoReturn:
    """Serve until a signal, and end the process."""
    # gRPC's own lines on standard error would stand beside ours.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from jchameleon.serving.settings import ServerConfig

    config = ServerConfig.load(args.config, overrides=_overrides(args))
    # What is small is checked first: the policy, and a model's files but the weights.
    build_policies(load_policy(config.engine.policy))
    load_model_card(config.model)
    from jchameleon.serving.process import run_server

    run_server(config)


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that were given as a table like the file's."""
    table: dict[str, Any] = {}
    for name, value in vars(args).items():
        part, _, field = name.partition(".")
        if field:
            table.setdefault(part, {})[field] = value
        elif name == "model":
            table[name] = value
    return table
