"""`jchameleon adapters list|get|register|unregister|pin|unpin`: on a running server."""

import argparse
import dataclasses
import datetime
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jchameleon.cli.connection import add_server, connection
from jchameleon.cli.options import print_facts

if TYPE_CHECKING:
    from jchameleon.client import Adapter, Client

COLUMNS = (
    "adapter_id",
    "rank",
    "state",
    "pinned",
    "running",
    "waiting",
    "hits",
    "misses",
    "evictions",
    "size_bytes",
    "source_path",
)


def add_actions(actions: Any) -> None:
    """Add the actions to the subcommands of `adapters`."""
    listing = actions.add_parser("list", help="list a server's adapters")
    listing.add_argument(
        "prefix", nargs="?", default="", metavar="PREFIX", help="that ids begin with"
    )
    _finish(listing, lambda client, args: client.list_adapters(args.prefix))

    register = _action(
        actions,
        "register",
        "let a server serve an adapter",
        lambda client, args: client.register_adapter(
            args.id,
            args.path,
            expected_uid=args.expected_uid,
            pin=args.pin,
            validate_only=args.validate_only,
            replace=args.replace,
        ),
    )
    register.add_argument(
        "path", metavar="PATH", help="directory below the server's adapter root"
    )
    register.add_argument(
        "--expected-uid",
        default="",
        metavar="UID",
        help="refuse other content than this uid's",
    )
    for flag, text in (
        ("--pin", "load it and keep it on the device"),
        ("--validate-only", "check everything, register nothing"),
        ("--replace", "let the id stand for this content from now on"),
    ):
        register.add_argument(flag, action="store_true", help=text)

    unregister = _action(
        actions,
        "unregister",
        "take an adapter from a server, when its requests have ended",
        lambda client, args: client.unregister_adapter(
            args.id, force=args.force, timeout_s=args.timeout
        ),
    )
    unregister.add_argument(
        "--force", action="store_true", help="end its requests instead of waiting"
    )
    unregister.add_argument(
        "--timeout", type=float, metavar="S", help="wait so long for its requests"
    )
    _action(
        actions,
        "get",
        "describe an adapter of a server",
        lambda client, args: client.get_adapter(args.id),
    )
    _action(
        actions,
        "pin",
        "load an adapter and keep it on the device",
        lambda client, args: client.pin_adapter(args.id),
    )
    _action(
        actions,
        "unpin",
        "let an adapter be evicted again",
        lambda client, args: client.unpin_adapter(args.id),
    )


def _action(
    actions: Any,
    name: str,
    text: str,
    work: "Callable[[Client, argparse.Namespace], Adapter]",
) -> argparse.ArgumentParser:
    """Add an action on one adapter and return its parser."""
    parser = actions.add_parser(name, help=text)
    parser.add_argument("id", metavar="ID", help="the adapter's id")
    _finish(parser, work)
    return parser


def _finish(parser: argparse.ArgumentParser, work: Callable[..., Any]) -> None:
    """Add what all actions have, and what is run."""
    add_server(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")

    def run(args: argparse.Namespace) -> None:
        from jchameleon.client import Client

        with Client(**connection(args)) as client:
            _show(work(client, args), as_json=args.json)

    parser.set_defaults(run=run)


def _show(found: "Adapter | tuple[Adapter, ...]", *, as_json: bool) -> None:
    """Print one adapter as facts, several as a table; or one JSON value."""
    if not isinstance(found, tuple):
        facts = _facts(found)
        print(json.dumps(facts)) if as_json else print_facts(facts)
        return
    rows = [_facts(adapter) for adapter in found]
    if as_json:
        print(json.dumps(rows))
        return
    table = [list(COLUMNS), *([_cell(row[c]) for c in COLUMNS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def _facts(adapter: "Adapter") -> dict[str, Any]:
    """Return an adapter with nothing but what JSON has."""
    facts = dataclasses.asdict(adapter)
    for key, value in facts.items():
        if isinstance(value, datetime.datetime):
            facts[key] = value.isoformat(timespec="seconds")
        elif isinstance(value, tuple):
            facts[key] = list(value)
    return facts


def _cell(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
