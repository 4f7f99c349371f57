"""Regular expressions of adapter files, kept from running for ever.

An adapter's config may hold regular expressions, and anybody can write one that
backtracks exponentially. A pattern is therefore refused when its worst case on a module
name is out of hand, and all matching of one adapter together has a time budget.
"""

import math
import re
import time
from collections.abc import Mapping

from jchameleon.errors import AdapterError
from jchameleon.lora.safetensors import short

_MAX_SEARCH_BITS = 28.0
"""Largest log2 of the ways in which a pattern may split a module name: seconds."""

_NAME_CHARS = 48
"""Length of the longest module name, in round numbers."""

_REPEAT = re.compile(r"(?:[*+?]|\{\d*,?\d*\})[?+]?")
_VERBOSE = re.compile(r"\(\?[a-zA-Z-]*x|\(\?#")


class MatchBudget:
    """CPU time that the patterns of one adapter may use."""

    def __init__(self, limit_s: float = 2.0) -> None:
        self.limit_s = limit_s
        self._end_s = time.thread_time() + limit_s

    def check(self, field: str) -> None:
        """Raise AdapterError, naming `field`, when the time is used up."""
        if time.thread_time() > self._end_s:
            raise AdapterError(
                f"{field}: matching patterns took more than {self.limit_s} s"
            )


class PatternTable:
    """A `rank_pattern` or `alpha_pattern`: the first pattern that matches counts."""

    def __init__(
        self, field: str, table: Mapping[str, float], *, budget: MatchBudget
    ) -> None:
        self._field = field
        self._budget = budget
        self._rules = []
        for key, value in table.items():
            budget.check(field)
            # The form in which PEFT matches these keys: a whole name or a dotted tail.
            regex = compile_pattern(f"a key of {field}", rf"(.*\.)?({key})$")
            self._rules.append((regex, value))

    def get(self, module: str, default: float) -> float:
        """Return the value of the first pattern that matches `module`."""
        self._budget.check(self._field)
        for regex, value in self._rules:
            if regex.match(module):
                return value
        return default


def compile_pattern(field: str, pattern: str) -> re.Pattern[str]:
    """Compile `pattern`.

    Raises:
      AdapterError: no regular expression, or one that could backtrack for ever.
    """
    try:
        bits = search_bits(pattern)
        if bits > _MAX_SEARCH_BITS:
            raise ValueError(
                f"backtracks over up to 2**{bits:.0f} splits, limit is "
                f"2**{_MAX_SEARCH_BITS:.0f}"
            )
        return re.compile(pattern)
    except (ValueError, re.error, RecursionError, OverflowError) as error:
        raise AdapterError(
            f"{field}: regular expression {short(pattern)}: {error}"
        ) from error


def search_bits(pattern: str) -> float:
    """Bound log2 of the ways in which `pattern` can match a module name.

    k repeats in sequence split n characters in at most C(n + k, k) ways, an optional
    item in 2, an alternation in as many as it has branches. Branches of an alternation
    are tried one after the other, so the costliest one counts.

    Raises:
      ValueError: a repeated group holds a repeat or an alternation (exponential), or
        the pattern uses verbose syntax, which this scan does not read.
    """
    if _VERBOSE.search(pattern):
        raise ValueError("verbose mode and comments are not supported")
    stack = [_Group()]
    at = 0
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            at += 2
        elif char == "[":
            at = _class_end(pattern, at)
        elif char == "(":
            stack.append(_Group())
            at += 2 if pattern.startswith("(?", at) else 1
        elif char == "|":
            stack[-1].next_branch()
            at += 1
        elif char == ")" and len(stack) > 1:
            inner = stack.pop()
            inner.close()
            at += 1
            repeat = _REPEAT.match(pattern, at)
            if repeat and repeat[0][0] != "?" and (inner.repeats or inner.bits):
                raise ValueError("a repeated group holds a repeat or an alternation")
            stack[-1].repeats += inner.repeats
            stack[-1].bits += inner.bits
        elif repeat := _REPEAT.match(pattern, at):
            if char == "?":
                stack[-1].bits += 1.0
            else:
                stack[-1].repeats += 1
            at = repeat.end()
        else:
            at += 1
    whole = stack[0]
    whole.close()
    ways = math.comb(_NAME_CHARS + whole.repeats, whole.repeats)
    return math.log2(ways) + whole.bits


class _Group:
    """Cost of the branch being read, and the largest of the branches before it."""

    def __init__(self) -> None:
        self.repeats = 0
        self.bits = 0.0
        self._branches = 1
        self._most_repeats = 0
        self._most_bits = 0.0

    def next_branch(self) -> None:
        self._most_repeats = max(self._most_repeats, self.repeats)
        self._most_bits = max(self._most_bits, self.bits)
        self._branches += 1
        self.repeats, self.bits = 0, 0.0

    def close(self) -> None:
        """Turn the cost of the last branch into that of the whole group."""
        self.repeats = max(self._most_repeats, self.repeats)
        self.bits = max(self._most_bits, self.bits) + math.log2(self._branches)


def _class_end(pattern: str, at: int) -> int:
    at += 1
    if pattern.startswith("^", at):
        at += 1
    if pattern.startswith("]", at):
        at += 1
    while at < len(pattern) and pattern[at] != "]":
        at += 2 if pattern[at] == "\\" else 1
    return at + 1
