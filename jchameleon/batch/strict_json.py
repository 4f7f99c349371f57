"""JSON objects as RFC 8259 has them, and no others."""

import json
from typing import Any, NoReturn

from jchameleon.errors import InvalidRequestError

MAX_DEPTH = 64
"""Deepest nesting of a line: far above what a request needs, and far below where the
parser's answer depends on how deep its caller's stack is."""


def parse_object(raw: bytes) -> dict[str, Any]:
    """Return the object that a line holds.

    Raises:
      InvalidRequestError: it is not UTF-8, not JSON (NaN is not), no object, has a key
        twice, or nests too deep. The message has no part of the line in it.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"the line is not UTF-8 at byte {error.start}"
        ) from error
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_refuse_constant
        )
    except RecursionError as error:
        raise _too_deep() from error
    except InvalidRequestError:
        raise
    except ValueError as error:  # also an integer of thousands of digits
        raise InvalidRequestError(f"the line is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequestError("the line is not a JSON object")
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise _too_deep()
    return value


def has_lone_surrogate(value: Any, raw: bytes) -> bool:
    """Return whether a text of a parsed line is none that UTF-8 can write.

    JSON can spell half of a surrogate pair, such as "\\ud83d".
    """
    if b"\\u" not in raw:
        return False
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise InvalidRequestError("the line has a key twice")
    return table


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRequestError(f"the line is not JSON: it has {name}")


def _depth(value: Any) -> int:
    """Return how deep a value nests, without recursion."""
    level, depth = [value], 0
    while level:
        depth += 1
        below: list[Any] = []
        for item in level:
            children = item.values() if isinstance(item, dict) else item
            below += [one for one in children if isinstance(one, dict | list)]
        level = below
    return depth


def _too_deep() -> InvalidRequestError:
    return InvalidRequestError(f"the line is nested deeper than {MAX_DEPTH} levels")
