"""Options of commands that speak with a running server."""

import argparse
import os
from pathlib import Path
from typing import Any

DEFAULT_SERVER = "127.0.0.1:50051"


def add_server(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which server, and how to reach it."""
    group = parser.add_argument_group("server")
    group.add_argument(
        "--server",
        default=DEFAULT_SERVER,
        metavar="HOST:PORT",
        help="default: %(default)s",
    )
    group.add_argument(
        "--token-file", type=Path, metavar="FILE", help="its first line is the token"
    )
    group.add_argument("--tls", action="store_true", help="use TLS, with system roots")
    for flag, what in (
        ("--tls-root-cert", "what the server's certificate is checked against"),
        ("--tls-client-cert", "certificate that is shown to the server"),
        ("--tls-client-key", "its key"),
    ):
        group.add_argument(flag, metavar="FILE", help=f"{what} (PEM)")


def connection(args: argparse.Namespace) -> dict[str, Any]:
    """Return what parsed options say, as arguments of a client.

    Raises:
      ConfigError: a file cannot be read.
    """
    # gRPC's own lines on standard error would stand beside ours.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from jchameleon.client.connection import Tls, read_token

    files = {
        field: getattr(args, f"tls_{field}")
        for field in ("root_cert", "client_cert", "client_key")
    }
    has_tls = args.tls or any(files.values())
    return {
        "target": args.server,
        "token": None if args.token_file is None else read_token(args.token_file),
        "tls": Tls(**files) if has_tls else None,
    }
