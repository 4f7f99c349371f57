"""The report on the figures: one HTML page that needs nothing else, and SVG files."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import paper_charts
from paper_verdicts import DOES_NOT, NOT_EXERCISED, REPRODUCES, RULE

from jchameleon.errors import ConfigError

NAMESPACE = ' xmlns="http://www.w3.org/2000/svg"'
"""Files need it, a page does not; without it the page names no address at all."""

COLOURS = {REPRODUCES: "yes", DOES_NOT: "no", NOT_EXERCISED: "idle"}

STYLE = """
body { font: 15px/1.45 Helvetica, Arial, sans-serif; margin: 2em auto;
  max-width: 1180px; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 0.8em 0; font-size: 13px; }
td, th { border: 1px solid #ccc; padding: 3px 7px; text-align: left;
  vertical-align: top; }
th { background: #f3f3f3; }
.yes { background: #d9f0d9; } .no { background: #f7dcdc; } .idle { background: #eee; }
.charts { display: grid; grid-template-columns: 1fr 1fr; gap: 8px; }
.charts svg { width: 100%; height: auto; border: 1px solid #e5e5e5; }
small { color: #555; }
"""

SETTINGS = {
    "cost": "cost model",
    "stall": "stall",
    "pool_bytes": "pool, GB",
    "pool_tokens": "pool, KV tokens",
    "length_scale": "length scale",
    "lengths": "lengths",
    "cache_at_start": "cache at start",
    "adapters": "adapters",
    "slo_s": "SLO, s",
    "duration_s": "arrivals, s",
    "skip_s": "of which not counted",
    "model": "model",
}


def beside(figure: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return charts of the paper's numbers beside ours, one for each unit."""
    charts = []
    kept = [one for one in figure["checks"] if one["kind"] in ("near", "at most")]
    kept = [one for one in kept if one["verdict"] != NOT_EXERCISED]
    for unit in dict.fromkeys(one["unit"] for one in kept):
        mine = [one for one in kept if one["unit"] == unit]
        groups = list(dict.fromkeys(one["what"] for one in mine))
        paper = {one["what"]: one["paper"] for one in mine}
        series: dict[str, list] = {"paper": [paper[what] for what in groups]}
        halves: dict[str, dict[str, float]] = {}
        for variant in dict.fromkeys(one["variant"] for one in mine):
            found = {one["what"]: one for one in mine if one["variant"] == variant}
            series[variant] = [
                found[what]["ours"] if what in found else None for what in groups
            ]
            halves[variant] = {
                str(place): found[what]["half_width_95"]
                for place, what in enumerate(groups)
                if what in found and found[what]["half_width_95"] is not None
            }
        charts.append(
            {
                "kind": "bars",
                "title": f"Figure {figure['figure']}: the paper beside ours, {unit}",
                "up": unit,
                "groups": groups,
                "series": series,
                "halves": halves,
            }
        )
    return charts


def drawings(figure: Mapping[str, Any]) -> dict[str, str]:
    """Return the figure's SVGs by file name."""
    name = f"figure-{figure['figure'].zfill(2)}"
    found = {
        f"{name}-beside-{index}": paper_charts.draw(chart)
        for index, chart in enumerate(beside(figure))
    }
    for panel in figure["panels"]:
        for index, chart in enumerate(panel["charts"]):
            found[f"{name}-{panel['variant']}-{index}"] = paper_charts.draw(chart)
    return found


def write_report(data: Mapping[str, Any], out: Path) -> Path:
    """Write figures/*.svg and report.html; return the path of the page.

    Raises:
      ConfigError: a file cannot be written.
    """
    path = out / "report.html"
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
        for figure in data["figures"]:
            for name, svg in drawings(figure).items():
                (out / "figures" / f"{name}.svg").write_text(svg, encoding="utf-8")
        path.write_text(page(data), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    return path


def page(data: Mapping[str, Any]) -> str:
    """Return the whole report."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f"<title>Chameleon's figures, simulated</title><style>{STYLE}</style>",
        "</head><body>",
        "<h1>Chameleon's figures, simulated</h1>",
        f"<p>{_run(data['run'])}. Paper: Iliakopoulou et al., MICRO '25. "
        "A ratio between policies is a property of its settings as much as of the "
        "policies; they stand below every figure.</p>",
        f"<p>{_text(RULE)}</p>",
        *_variants(data),
        *_summary(data["figures"]),
    ]
    for figure in data["figures"]:
        parts += _section(figure)
    return "\n".join([*parts, "</body></html>"]) + "\n"


def _variants(data: Mapping[str, Any]) -> list[str]:
    """Return how many verdicts each cost model has."""
    checks = [one for figure in data["figures"] for one in figure["checks"]]
    rows = []
    for variant in dict.fromkeys(one["variant"] for one in checks):
        mine = [one["verdict"] for one in checks if one["variant"] == variant]
        rows.append([variant, *(str(mine.count(verdict)) for verdict in COLOURS)])
    head = ["cost model", *COLOURS]
    return ["<h2>Verdicts</h2>", *_table(head, [[_text(c) for c in r] for r in rows])]


def _summary(figures: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the table of the paper's results, a column for each cost model."""
    kept = [
        {**one, "figure": figure["figure"]}
        for figure in figures
        for one in figure["checks"]
        if one["row"]
    ]
    if not kept:
        return []
    variants = list(dict.fromkeys(one["variant"] for one in kept))
    lines = ["<h2>The paper's results</h2>", "<table><tr><th>figure</th>"]
    lines.append("<th>what</th><th>paper</th>")
    lines += [f"<th>{_text(variant)}</th>" for variant in variants]
    lines.append("</tr>")
    for row, what in dict.fromkeys((one["row"], one["what"]) for one in kept):
        mine = {
            one["variant"]: one
            for one in kept
            if (one["row"], one["what"]) == (row, what)
        }
        first = next(iter(mine.values()))
        lines.append(
            f"<tr><td>{_text(first['figure'])}</td><td>{_text(row)}: {_text(what)}</td>"
            f"<td>{_text(paper_text(first))}</td>"
        )
        for variant in variants:
            one = mine.get(variant)
            if one is None:
                lines.append("<td></td>")
            else:
                lines.append(
                    f'<td class="{COLOURS[one["verdict"]]}">{_text(ours_text(one))}<br>'
                    f"<small>{_verdict(one)}</small></td>"
                )
        lines.append("</tr>")
    return [*lines, "</table>"]


def _run(run: Mapping[str, Any]) -> str:
    """Return what a run was of."""
    seeds = f"{run['seeds']} seed" + ("s" if run["seeds"] > 1 else "")
    return _text(
        f"{run['mode']}: {seeds}, {run['duration_s']:g} s of arrivals, lengths "
        f"{run['lengths']}, jchameleon {run['version']}, code {run['code'][:12]}"
    )


def _section(figure: Mapping[str, Any]) -> list[str]:
    parts = [
        f'<h2 id="figure-{_text(figure["figure"])}">Figure {_text(figure["figure"])}: '
        f"{_text(figure['title'])}</h2>",
        f"<p>{_text(figure['shows'])}</p>",
        *([f"<p>Of another {_run(figure['run'])}.</p>"] if "run" in figure else []),
        '<div class="charts">',
        *(svg.replace(NAMESPACE, "") for svg in drawings(figure).values()),
        "</div>",
    ]
    rows = [
        [_text(label)]
        + [_setting(key, panel["settings"][key]) for panel in figure["panels"]]
        for key, label in SETTINGS.items()
    ]
    if figure["panels"]:
        head = ["settings", *(panel["variant"] for panel in figure["panels"])]
        parts += _table(head, rows)
    if figure["checks"]:
        parts.append("<table><tr><th>what</th><th>cost model</th><th>paper</th>")
        parts.append("<th>ours</th><th>verdict</th></tr>")
        for one in figure["checks"]:
            parts.append(
                f"<tr><td>{_text(one['what'])}</td><td>{_text(one['variant'])}</td>"
                f"<td>{_text(paper_text(one))}</td><td>{_text(ours_text(one))}</td>"
                f'<td class="{COLOURS[one["verdict"]]}">{_verdict(one)}</td></tr>'
            )
        parts.append("</table>")
    else:
        parts.append("<p>Shown only: there is no number to compare with.</p>")
    return parts


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table; cells of rows are HTML already."""
    lines = ["<table><tr>" + "".join(f"<th>{_text(h)}</th>" for h in head) + "</tr>"]
    lines += [
        "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows
    ]
    return [*lines, "</table>"]


def _setting(key: str, value: Any) -> str:
    if key == "pool_bytes":
        value = value / 1e9
    return f"{value:,.6g}" if isinstance(value, int | float) else _text(value)


def paper_text(one: Mapping[str, Any]) -> str:
    """Return what the paper says, of a check."""
    if one["kind"] in ("below", "above"):
        return "lower" if one["kind"] == "below" else "higher"
    most = "at most " if one["kind"] == "at most" else ""
    return f"{most}{_digits(one['paper'])} {one['unit']}"


def ours_text(one: Mapping[str, Any]) -> str:
    """Return what we see, of a check, with its interval."""
    if one["ours"] is None:
        return "-"
    half = one["half_width_95"]
    spread = "" if half is None else f" +- {_digits(half)}"
    return f"{_digits(one['ours'])}{spread} {one['unit']}"


def _verdict(one: Mapping[str, Any]) -> str:
    return _text(one["verdict"] + (f": {one['why']}" if one["why"] else ""))


def _digits(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def _text(what: Any) -> str:
    return html.escape(str(what))
