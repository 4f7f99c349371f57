"""The page of the paper's figures, of a short run and of the one that is kept."""

import html.parser
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree

import paper_charts
import paper_examples
import pytest
import reproduce_paper
from paper_cells import Store, World, run_cells
from paper_figures import Scale, Seen
from paper_report import beside, drawings, page, write_report
from test_reproduce_paper import PAPER
from tool_runs import ROOT


class Page(html.parser.HTMLParser):
    """Counts what a page holds and notes what it would fetch."""

    def __init__(self):
        super().__init__()
        self.tags, self.fetched = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [
            (tag, name, value)
            for name, value in attrs
            if name in ("src", "href", "xlink:href", "data", "srcset", "action")
        ]


@pytest.fixture(scope="module", params=["short", "kept"])
def data(request, tmp_path_factory):
    """Every figure with little behind it, and the run that docs/simulator.md is of."""
    if request.param == "kept":
        return json.loads((ROOT / "docs" / "paper.json").read_text("utf-8"))
    folder = tmp_path_factory.mktemp("paper")
    profile = folder / "short.toml"
    profile.write_text(PAPER.read_text().replace("skip_s = 60.0 ", "skip_s = 2.0 ", 1))
    scale = Scale(
        world=World(profile=profile, trace=None, duration_s=12.0),
        seeds=1,
        variants=("default", "m4w"),
        rates_rps=(8.0, 9.0),
        scan_rps=(6.0, 30.0),
        device_rps=(1.0, 50.0),
        adapters=(10, 100),
        mix_adapters=(10, 400),
    )
    figures = list(reproduce_paper.FIGURES.values())
    cells = [cell for figure in figures for cell in figure.cells(scale)]
    results = run_cells(Store(folder / "cells", scale.world), cells, processes=1)
    found = reproduce_paper.data_of(figures, Seen(scale, results), quick=True)
    return json.loads(json.dumps(found))


def is_quick(data):
    return data["run"]["mode"] == "quick run"


def test_every_figure_has_data_and_a_drawing_with_marks(data):
    left_out = [] if is_quick(data) else ["23", "24"]
    assert [figure["figure"] for figure in data["figures"]] == [
        number
        for number in (
            *("2", "3", "4", "6", "8", "10", "11", "12", "13", "14", "15", "16", "17"),
            *("18", "19", "20", "21", "22", "23", "24", "25", "mix"),
        )
        if number not in left_out
    ]
    for figure in data["figures"]:
        if figure["figure"] == "25":  # said not to be modelled
            (one,) = figure["checks"]
            assert one["verdict"] == "not exercised" and one["why"]
            continue
        assert figure["panels"], figure["figure"]
        for panel in figure["panels"]:
            assert panel["settings"]["pool_tokens"] > 0
            for chart in panel["charts"]:
                values = [
                    value
                    for points in chart["series"].values()
                    for value in points
                    if value is not None
                ]
                assert values, chart["title"]
                assert paper_charts.marks(paper_charts.draw(chart)) > 0, chart["title"]
        assert len(drawings(figure)) >= len(figure["panels"])


def test_every_result_of_the_paper_has_a_verdict(data):
    rows = {one["row"] for f in data["figures"] for one in f["checks"]} - {""}
    assert len(rows) == (14 if is_quick(data) else 12)
    for figure in data["figures"]:
        for one in figure["checks"]:
            assert one["verdict"] in ("reproduces", "does not", "not exercised")
            assert one["why"] or one["verdict"] != "not exercised"


def test_drawings_stay_within_their_frame(data):
    number = re.compile(r"-?\d+\.?\d*")
    for figure in data["figures"]:
        for name, svg in drawings(figure).items():
            root = xml.etree.ElementTree.fromstring(svg)
            _, _, width, height = map(float, root.attrib["viewBox"].split())
            for element in root:
                kind = element.tag.rpartition("}")[2]
                get = element.attrib.get
                if kind == "polyline":
                    places = list(map(float, number.findall(get("points"))))
                    xs, ys = places[::2], places[1::2]
                elif kind == "circle":
                    xs, ys = [float(get("cx"))], [float(get("cy"))]
                elif kind == "rect" and get("x"):
                    x, y = float(get("x")), float(get("y"))
                    xs = [x, x + float(get("width"))]
                    ys = [y, y + float(get("height"))]
                else:
                    continue
                assert 0 <= min(xs) and max(xs) <= width, (name, element.attrib)
                assert 0 <= min(ys) and max(ys) <= height, (name, element.attrib)


def test_the_page_needs_nothing_from_elsewhere(data, tmp_path):
    path = write_report(data, tmp_path)
    text = path.read_text("utf-8")
    assert not re.search(r"https?:|//|@import|url\(|<script|<link|<img", text)
    parsed = Page()
    parsed.feed(text)
    assert parsed.fetched == []
    drawn = [drawings(figure) for figure in data["figures"]]
    assert parsed.tags.count("svg") == sum(map(len, drawn)) > 40
    assert {p.stem for p in (tmp_path / "figures").iterdir()} == {
        name for names in drawn for name in names
    }
    for one in (
        "stall",
        "pool, GB",
        "length scale",
        "cache at start",
        data["run"]["lengths"],
    ):
        assert one in text


def test_names_are_escaped(data):
    one = {**data, "run": {**data["run"], "lengths": "<b>&"}}
    assert "&lt;b&gt;&amp;" in page(one)


@pytest.mark.skipif(
    not any(map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))),
    reason="no Chromium on this machine",
)
def test_a_browser_draws_every_figure(data, tmp_path):
    path = write_report(data, tmp_path)
    names = ("chromium", "google-chrome", "chromium-browser")
    browser = next(filter(None, map(shutil.which, names)))
    # Widths as laid out end up in the title, which --dump-dom prints.
    probe = (
        "<script>document.title = [...document.querySelectorAll('svg')]"
        ".filter(s => s.getBoundingClientRect().width > 100).length</script></body>"
    )
    probed = tmp_path / "probed.html"
    probed.write_text(path.read_text("utf-8").replace("</body>", probe))
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        + [f"--user-data-dir={tmp_path / 'profile'}", probed.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    shown = sum(len(drawings(figure)) for figure in data["figures"])
    assert f"<title>{shown}</title>" in done.stdout


def test_bars_are_as_high_as_their_values():
    chart = {
        "kind": "bars",
        "title": "t",
        "up": "ms",
        "groups": ["a", "b", "c"],
        "series": {"ours": [10.0, -5.0, None]},
        "halves": {"ours": {"0": 2.0}},
    }
    svg = paper_charts.draw(chart)
    bars = re.findall(r'class="bar".*?y="([\d.]+)".*?height="([\d.]+)"', svg)
    (top, high), (zero, low) = [tuple(map(float, bar)) for bar in bars]
    assert high == pytest.approx(2 * low, abs=0.2)
    assert top + high == pytest.approx(zero, abs=0.2)
    (whisker,) = re.findall(r'points="([^"]+)"[^>]*stroke="#000000"', svg)
    ends = [float(point.split(",")[1]) for point in whisker.split()]
    assert abs(ends[1] - ends[0]) == pytest.approx(0.4 * high, abs=0.2)


def test_the_paper_stands_beside_ours():
    one = {
        "kind": "near",
        "unit": "%",
        "what": "w",
        "paper": -8.8,
        "ours": -3.0,
        "half_width_95": 1.0,
        "verdict": "does not",
        "variant": "m2",
    }
    idle = {**one, "what": "v", "verdict": "not exercised"}
    (chart,) = beside({"figure": "18", "checks": [one, idle]})
    assert chart["series"] == {"paper": [-8.8], "m2": [-3.0]}
    assert chart["groups"] == ["w"] and chart["halves"] == {"m2": {"0": 1.0}}


@pytest.mark.parametrize("name, counts", [("a", (3, 2, 1)), ("b", (4, 1, 1))])
def test_figure_10_admits_what_the_paper_says(name, counts):
    by_size, by_lane = paper_examples.admitted(paper_examples.EXAMPLES[name][0])
    assert tuple(by_size.values()) == tuple(by_lane.values()) == counts


def test_figure_2_adds_up_to_the_published_times(data):
    figure = data["figures"][0]
    series = figure["panels"][0]["charts"][0]["series"]
    assert series["TTFT"] == pytest.approx([74, 78, 88, 107, 144], rel=0.03)
    parts = zip(series["base"], series["adapter compute"], series["load"], strict=True)
    assert [sum(part) for part in parts] == pytest.approx(series["TTFT"], rel=1e-3)
