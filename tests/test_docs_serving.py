"""docs/serving.md names what there is, and all of it."""

import dataclasses
import re
from pathlib import Path

from server_harness import running_server

from jchameleon.serving.engine_metrics import EngineCollector
from jchameleon.serving.logs import LOG_FORMATS
from jchameleon.serving.metrics import PREFIX, Metrics
from jchameleon.serving.settings import _PARTS, EngineConfig, ServerConfig

DOCS = Path(__file__).parent.parent / "docs"
TEXT = (DOCS / "serving.md").read_text("utf-8")


def table_after(heading):
    """Return the cells of the first table after a heading, its head left out."""
    rows = TEXT.split(heading, 1)[1].splitlines()
    start = next(i for i, row in enumerate(rows) if row.startswith("|"))
    found = []
    for row in rows[start + 2 :]:
        if not row.startswith("|"):
            break
        found.append([cell.strip() for cell in row.strip("|").split("|")])
    return found


def test_metrics_table_has_exactly_the_servers_metrics():
    documented = {
        name: tuple(re.findall(r"`(\w+)`", labels))
        for names, labels, _ in table_after("## Metrics")
        for name in re.findall(r"`(\w+)`", names)
    }
    metrics = Metrics()
    with running_server({}, observer=metrics) as server:
        metrics.registry.register(EngineCollector(server.server))
        known = {
            family.name.removeprefix(PREFIX)
            for family in metrics.registry.collect()
            if family.name.startswith(PREFIX)
        }
    assert set(documented) == known
    for name, labels in documented.items():
        metric = metrics.registry._names_to_collectors.get(PREFIX + name)
        if metric is not None:
            assert labels == metric._labelnames


def test_configuration_table_has_every_key():
    documented = {
        cells[0].strip("`[]"): re.findall(r"`(\w+)`", cells[1])
        for cells in table_after("## Configuration")
    }
    assert documented.pop("(top)") == [
        field.name
        for field in dataclasses.fields(ServerConfig)
        if field.name not in _PARTS
    ]
    assert documented.pop("engine") == [EngineConfig.__name__]
    assert documented == {
        part: [field.name for field in dataclasses.fields(kind)]
        for part, kind in _PARTS.items()
        if part != "engine"
    }
    assert all(f in TEXT for f in LOG_FORMATS)


def test_demo_configuration_loads_and_names_the_demo_adapters():
    from jchameleon.resources import configs_dir, demo_adapters

    config = ServerConfig.load(configs_dir() / "serve-demo.toml")
    root = Path(config.adapters.root)
    assert {n: root / p for n, p in config.adapters.preload.items()} == demo_adapters()


def test_reliability_names_tests_that_are_there():
    text = (DOCS / "reliability.md").read_text("utf-8")
    names = set(re.findall(r"`(test_\w+\.py)`", text))
    assert len(names) > 5
    for name in names:
        assert (Path(__file__).parent / name).is_file(), name
