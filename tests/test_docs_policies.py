"""docs/policies.md is true: its tables hold, its examples run and do what it says."""

import inspect
import re
import runpy
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from jchameleon.errors import ConfigError
from jchameleon.runtime.policy.admission import Fifo
from jchameleon.runtime.policy.events import (
    AdapterRegistered,
    Arrival,
    LoadDone,
    StepDone,
)
from jchameleon.runtime.policy.eviction import Lru
from jchameleon.runtime.policy.limits import PlannerConfig
from jchameleon.runtime.policy.planner import Planner
from jchameleon.runtime.policy.predictor import MaxTokens
from jchameleon.runtime.policy.prefetch import NoPrefetch
from jchameleon.runtime.policy.presets import (
    build_policies,
    load_policy,
    policy_preset_names,
)
from jchameleon.runtime.policy.registry import (
    POLICY_KINDS,
    create_policy,
    policy_class,
    policy_names,
)
from jchameleon.runtime.policy.request import Request

PAGE = (Path(__file__).parent.parent / "docs" / "policies.md").read_text("utf-8")


def blocks():
    """Return the page's code blocks by the file name in their first line."""
    found = re.findall(r"^```\w+\n# (\S+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return dict(found)


def rows(columns):
    """Return the cells of all table rows with so many columns, heads included."""
    lines = [line for line in PAGE.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [row for row in cells if len(row) == columns]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the page's files, which Python imports from."""
    for name, content in blocks().items():
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_policies", raising=False)
    return tmp_path


def test_every_code_block_is_run_here():
    assert PAGE.count("```") == 2 * len(blocks())
    assert set(blocks()) == {
        "fair.toml",
        "low-median.toml",
        "my-policy.toml",
        "inline.py",
        "my_policies.py",
        "try_it.py",
        "write_adapters.py",
        "reload_cost.py",
    }


def test_table_of_presets_holds():
    written = {row[0]: row[1:6] for row in rows(7)[1:]}
    expected = {}
    for name in policy_preset_names():
        config = load_policy(name)
        four = [f"`{getattr(config, kind).name}`" for kind in POLICY_KINDS]
        expected[f"`{name}`"] = [*four, config.kv_reserve]
    assert written == expected


def test_table_of_options_holds():
    table = [
        row for row in rows(3) if row[1].startswith("`") and row[0] in POLICY_KINDS
    ]
    table = [row for row in table if row[1].strip("`") in policy_names(row[0])]
    assert len(table) == sum(len(policy_names(kind)) for kind in POLICY_KINDS)
    for kind, name, options in table:
        parameters = inspect.signature(policy_class(kind, name.strip("`"))).parameters
        expected = [f"`{p.name}={p.default!r}`" for p in parameters.values()]
        assert options == ", ".join(expected), name


def test_toml_file_and_inline_table_are_the_same(folder):
    values = runpy.run_path("inline.py")
    assert tomllib.loads(blocks()["my-policy.toml"]) == values["policy"]
    config = load_policy("my-policy.toml")
    assert config.to_dict() == {
        "source": "my-policy.toml",
        "admission": {"name": "chameleon", "lanes": "kmeans", "slo_s": 2.0},
        "eviction": {"name": "gdsf"},
        "predictor": {"name": "quantile"},
        "prefetch": {"name": "queued"},
        "kv": {"reserve": "max_tokens", "max_squashes": 1},
    }
    build_policies(config)


def test_turns_can_be_turned_off_as_the_page_says(folder):
    config = load_policy("low-median.toml")
    assert config.admission.options == {"rows_per_step": 1_000_000}
    assert config.eviction == load_policy("adaptive").eviction
    build_policies(config)


def test_turns_by_adapter_go_with_another_cache_as_the_page_says(folder):
    config = load_policy("fair.toml")
    assert config.admission.name == "vtc"
    assert config.eviction == load_policy("adaptive").eviction
    build_policies(config)


def test_policy_scores_as_the_page_says(folder, capsys):
    scores = runpy.run_path("try_it.py")["scores"]
    # (1 + uses) x 1/2 per half-life idle x reload seconds, worked by hand.
    np.testing.assert_array_equal(scores, [8 * 0.5 * 0.25, 2 * 0.25, 2 * 1.5])
    printed = re.search(r"print\(scores\)  # (\[.*?\])", PAGE)[1]
    assert capsys.readouterr().out.strip() == printed


@pytest.mark.parametrize("option", ["half_life_s", "keep_s"])
def test_policy_refuses_options_as_the_rules_ask(folder, option):
    message = f"^eviction='my_policies:ReloadCost': {option}=0 must be positive$"
    with pytest.raises(ConfigError, match=message):
        create_policy("eviction", "my_policies:ReloadCost", {option: 0})


class Run:
    """A planner for adapters of 4 pages, and requests of one page and one token."""

    def __init__(self, eviction):
        self.planner = Planner(
            PlannerConfig(
                num_pages=2 + 8 + 1,  # two adapters and a request
                block_tokens=16,
                max_running=4,
                max_batch_tokens=64,
                max_loads_in_flight=1,
                prefill_tile_tokens=32,
            ),
            admission=Fifo(),
            eviction=eviction,
            predictor=MaxTokens(),
            prefetch=NoPrefetch(),
        )
        names = ("often", "once", "new")
        self.evicted = []
        self.plan(0.0, *(AdapterRegistered(uid, 8, 4) for uid in names))

    def plan(self, now_s, *events):
        plan = self.planner.plan(now_s, events)
        self.evicted += plan.evicted
        return plan

    def request(self, now_s, uid):
        """Run one request from its arrival to its end a tenth of a second later."""
        request_id = f"{uid} at {now_s}"
        request = Request(
            request_id=request_id, prompt_tokens=8, max_tokens=1, adapter_uid=uid
        )
        plan = self.plan(now_s, Arrival(request))
        for load in plan.loads:
            plan = self.plan(now_s + 0.05, LoadDone(load.uid))
        assert [chunk.request_id for chunk in plan.prefill] == [request_id]
        done = StepDone(0.05, ((request_id, 1),), (request_id,))
        self.plan(now_s + 0.1, done)


@pytest.mark.parametrize(
    ("half_life_s", "leaves"),
    [
        # 1 + uses is 8 and 2, and "often" is idle for 20 s longer: 8 / 2^(1/3) > 2,
        (60.0, "once"),
        (20.0, "once"),  # 8 / 2 > 2,
        (5.0, "often"),  # 8 / 2^4 < 2.
    ],
)
def test_score_decides_which_adapter_is_evicted(folder, half_life_s, leaves):
    options = {"half_life_s": half_life_s}
    run = Run(create_policy("eviction", "my_policies:ReloadCost", options))
    for now_s in range(7):
        run.request(float(now_s), "often")
    run.request(26.0, "once")
    assert run.evicted == []
    run.request(27.0, "new")
    assert run.evicted == [leaves]


def test_least_recently_used_decides_otherwise():
    run = Run(Lru())
    for now_s in range(7):
        run.request(float(now_s), "often")
    run.request(26.0, "once")
    run.request(27.0, "new")
    assert run.evicted == ["often"]


def test_adapters_kept_long_enough_leave_unasked(folder):
    run = Run(create_policy("eviction", "my_policies:ReloadCost", {"keep_s": 10.0}))
    run.request(0.0, "often")
    run.request(5.0, "once")
    run.plan(10.0)
    assert run.evicted == []
    run.plan(10.2)  # idle since 0.1 s
    assert run.evicted == ["often"]
    forever = Run(create_policy("eviction", "my_policies:ReloadCost"))
    forever.request(0.0, "often")
    forever.plan(1e9)
    assert forever.evicted == []


def test_engine_evicts_by_the_page_s_policy(folder, capsys):
    runpy.run_path("write_adapters.py")
    left = runpy.run_path("reload_cost.py")["left"]
    assert left == {"often": 0, "once": 1, "new": 0}
    printed = re.search(r"print\(left\)  # (\{.*?\})", PAGE)[1]
    assert capsys.readouterr().out.strip() == printed
