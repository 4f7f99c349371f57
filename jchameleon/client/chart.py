"""A line chart as SVG, with a logarithmic axis upwards."""

import html
import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 880, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 210, 40, 50
COLOURS = (
    "#1f77b4",
    "#ff7f0e",
    "#2ca02c",
    "#d62728",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#7f7f7f",
    "#bcbd22",
    "#17becf",
)
FONT = 'font-family="Helvetica,Arial,sans-serif" font-size="13"'

Points = Sequence[tuple[float, float]]
"""(across, upwards), by the first."""


def line_chart(
    title: str,
    lines: Mapping[str, Points],
    *,
    across: str,
    limit: float | None = None,
) -> str:
    """Return an SVG, one line per name.

    Args:
      lines: by name, at least one point; what goes upwards, milliseconds where there is
        a limit, must be above 0.
      across: what the other axis shows; each of its values is labelled.
      limit: an SLO, drawn as a dashed line.
    """
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    ys += [] if limit is None else [limit]
    low_x, high_x = min(xs), max(xs)
    low_y = 10 ** math.floor(math.log10(min(ys)))
    high_y = 10 ** math.ceil(math.log10(max(ys)))
    if high_y == low_y:
        high_y *= 10

    def place(x: float, y: float) -> tuple[float, float]:
        right = (x - low_x) / (high_x - low_x) if high_x > low_x else 0.5
        up = math.log(y / low_y) / math.log(high_y / low_y)
        return (
            LEFT + right * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM),
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'{FONT} role="img" aria-label="{html.escape(title)}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        text(LEFT, 24, title, bold=True),
    ]
    value = low_y
    while value <= high_y:
        _, y = place(low_x, value)
        parts.append(stroke([(LEFT, y), (WIDTH - RIGHT, y)], "#dddddd"))
        parts.append(text(LEFT - 8, y + 4, f"{value:g}", anchor="end"))
        value *= 10
    for value in sorted(set(xs)):
        x, y = place(value, low_y)
        parts.append(text(x, y + 20, f"{value:g}", anchor="middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(text(middle, HEIGHT - 10, across, anchor="middle"))
    if limit is not None:
        (x, y), (end, _) = place(low_x, limit), place(high_x, limit)
        parts.append(stroke([(x, y), (end, y)], "#000000", dashes="6 4"))
        parts.append(text(x + 4, y - 6, f"SLO {limit:.3g} ms"))
    for index, (name, points) in enumerate(lines.items()):
        colour = COLOURS[index % len(COLOURS)]
        places = [place(x, y) for x, y in points]
        parts.append(stroke(places, colour))
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
            for x, y in places
        ]
        at = TOP + 10 + 20 * index
        parts.append(
            stroke([(WIDTH - RIGHT + 20, at), (WIDTH - RIGHT + 44, at)], colour)
        )
        parts.append(text(WIDTH - RIGHT + 50, at + 4, name))
    return "\n".join([*parts, "</svg>"]) + "\n"


def text(x: float, y: float, what: str, *, anchor: str = "start", bold: bool = False):
    """Return a text element."""
    weight = ' font-weight="bold"' if bold else ""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f"<text {place}{weight}>{html.escape(what)}</text>"


def stroke(points: Points, colour: str, *, dashes: str = "none") -> str:
    """Return a line through points."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" '
        f'stroke-dasharray="{dashes}"/>'
    )
