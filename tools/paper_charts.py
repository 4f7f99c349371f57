"""Drawings of the paper report, from plain values: lines, bars; all of it SVG text."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jchameleon.client.chart import COLOURS, FONT, line_chart, stroke, text

WIDTH, HEIGHT = 880, 420
LEFT, RIGHT, TOP, BOTTOM = 80, 210, 40, 50
TICKS = 5
ROOM = 0.78
"""Of a group's width that its bars take."""


def draw(chart: Mapping[str, Any]) -> str:
    """Return the SVG of a chart: "log lines", "lines" or "bars".

    Points whose value is None are left out.
    """
    kind = chart["kind"]
    if kind == "bars":
        return _bars(chart)
    series = {
        name: [(x, y) for x, y in points if y is not None]
        for name, points in chart["series"].items()
    }
    series = {name: points for name, points in series.items() if points}
    if kind == "log lines":
        # A logarithm has no place for 0.
        series = {n: [(x, max(y, 1e-3)) for x, y in p] for n, p in series.items()}
        return line_chart(
            chart["title"], series, across=chart["across"], limit=chart.get("limit")
        )
    return _lines(chart, series)


def marks(svg: str) -> int:
    """Return how many data marks a drawing of `draw` has: points, bars and lines."""
    return svg.count("<circle") + svg.count('class="bar"') + svg.count('class="line"')


def _open(title: str) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'{FONT} role="img" aria-label="{html.escape(title)}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        text(LEFT, 24, title, bold=True),
    ]


def _ticks(low: float, high: float) -> list[float]:
    """Return round values from about `low` to about `high`, at most 11."""
    span = (high - low) or abs(high) or 1.0
    raw = span / TICKS
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * i, 12) for i in range(first, max(last, first + 1) + 1)]


class _Axis:
    """Values upwards, with lines and labels."""

    def __init__(self, values: Sequence[float], label: str) -> None:
        self.ticks = _ticks(min(values), max(values))
        self.label = label

    def y(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def parts(self) -> list[str]:
        parts = [
            f'<g transform="rotate(-90)">{text(-HEIGHT / 2, 16, self.label)}</g>',
        ]
        for value in self.ticks:
            y = self.y(value)
            grey = "#888888" if value == 0 else "#dddddd"
            parts.append(stroke([(LEFT, y), (WIDTH - RIGHT, y)], grey))
            parts.append(text(LEFT - 8, y + 4, f"{value:g}", anchor="end"))
        return parts


def _legend(index: int, name: str) -> list[str]:
    x, y = WIDTH - RIGHT + 20, TOP + 10 + 20 * index
    colour = COLOURS[index % len(COLOURS)]
    box = f'<rect x="{x}" y="{y - 5}" width="20" height="10" fill="{colour}"/>'
    return [box, text(x + 28, y + 4, name)]


def _lines(
    chart: Mapping[str, Any], series: Mapping[str, Sequence[tuple[float, float]]]
) -> str:
    parts = _open(chart["title"])
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    axis = _Axis([0.0, *ys], chart["up"])
    low, high = min(xs), max(xs)
    across = _ticks(low, high)
    low, high = min(low, across[0]), max(high, across[-1])
    scale = (WIDTH - LEFT - RIGHT) / ((high - low) or 1.0)
    parts += axis.parts()
    for value in across:
        x = LEFT + scale * (value - low)
        parts.append(text(x, HEIGHT - BOTTOM + 20, f"{value:g}", anchor="middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(text(middle, HEIGHT - 10, chart["across"], anchor="middle"))
    for index, (name, points) in enumerate(series.items()):
        colour = COLOURS[index % len(COLOURS)]
        places = [(LEFT + scale * (x - low), axis.y(y)) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(
            f'<polyline class="line" points="{path}" fill="none" stroke="{colour}" '
            'stroke-width="2"/>'
        )
        if len(places) <= 20:
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
                for x, y in places
            ]
        parts += _legend(index, name)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _bars(chart: Mapping[str, Any]) -> str:
    """Draw groups of bars; `halves` are their intervals to each side."""
    groups, series = chart["groups"], chart["series"]
    halves = chart.get("halves", {})
    ends = [0.0]
    for name, values in series.items():
        for index, value in enumerate(values):
            if value is not None:
                half = (halves.get(name) or {}).get(str(index)) or 0.0
                ends += [value + half, value - half]
    axis = _Axis(ends, chart["up"])
    parts = [*_open(chart["title"]), *axis.parts()]
    each = (WIDTH - LEFT - RIGHT) / len(groups)
    wide = ROOM * each / len(series)
    for place, group in enumerate(groups):
        middle = LEFT + each * (place + 0.5)
        parts += _words(middle, HEIGHT - BOTTOM + 16, group, each)
    for index, (name, values) in enumerate(series.items()):
        colour = COLOURS[index % len(COLOURS)]
        parts += _legend(index, name)
        for place, value in enumerate(values):
            if value is None:
                continue
            x = LEFT + each * (place + 0.5 - ROOM / 2) + wide * index
            top, bottom = sorted((axis.y(value), axis.y(0.0)))
            parts.append(
                f'<rect class="bar" x="{x:.1f}" y="{top:.1f}" width="{wide:.1f}" '
                f'height="{max(bottom - top, 1.0):.1f}" fill="{colour}"/>'
            )
            half = (halves.get(name) or {}).get(str(place))
            if half:
                at = x + wide / 2
                ends_y = [(at, axis.y(value - half)), (at, axis.y(value + half))]
                parts.append(stroke(ends_y, "#000000"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _words(x: float, y: float, what: str, width: float) -> list[str]:
    """Return a label in up to three lines that fit a width."""
    most = max(6, int(width / 6.5))
    lines = [""]
    for word in what.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > most:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return [
        text(x, y + 14 * index, line, anchor="middle")
        for index, line in enumerate(lines[:3])
    ]
