"""The paper's figures by simulation: cells, resumption, wrong input."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import paper_cells
import pytest
import reproduce_paper
from paper_cells import Cell, Store, World, fingerprint, geometric, run_cells
from test_sim_profile import TINY
from tool_runs import ROOT, run_tool

from jchameleon.resources import configs_dir

PAPER = configs_dir() / "paper" / "a40-llama-7b.toml"
CELLS = [
    Cell(variant="default", policy=policy, rate_rps=rate, seed=seed)
    for policy in ("s-lora", "chameleon")
    for rate in (4.0, 8.0)
    for seed in (0, 1)
]


@pytest.fixture
def world(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return World(profile=path, trace=None, duration_s=10.0)


# Cells.


def test_cells_that_are_there_are_not_run_again(world, tmp_path, monkeypatch):
    store = Store(tmp_path / "cells", world)
    first = run_cells(store, CELLS, processes=1)
    assert len(list((tmp_path / "cells").iterdir())) == len(CELLS)

    def run_cell(world, cell):
        raise AssertionError("was there")

    monkeypatch.setattr(paper_cells, "run_cell", run_cell)
    again = run_cells(Store(tmp_path / "cells", world), CELLS, processes=1)
    assert again == first


def test_an_interrupted_run_goes_on_and_ends_as_one_that_was_not(
    world, tmp_path, monkeypatch
):
    real, ran = paper_cells.run_cell, []

    def run_cell(world, cell):
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(cell)
        return real(world, cell)

    monkeypatch.setattr(paper_cells, "run_cell", run_cell)
    store = Store(tmp_path / "cells", world)
    with pytest.raises(KeyboardInterrupt):
        run_cells(store, CELLS, processes=1)
    assert ran == CELLS[:3]
    monkeypatch.setattr(
        paper_cells, "run_cell", lambda w, c: ran.append(c) or real(w, c)
    )
    resumed = run_cells(store, CELLS, processes=1)
    assert ran == CELLS
    monkeypatch.setattr(paper_cells, "run_cell", real)
    whole = run_cells(Store(tmp_path / "others", world), CELLS, processes=1)
    assert resumed == whole


def test_half_a_file_is_run_again(world, tmp_path):
    store = Store(tmp_path / "cells", world)
    first = run_cells(store, CELLS[:1], processes=1)
    path = store.path(CELLS[0])
    for text in (path.read_text()[:100], "[]", "{}"):
        path.write_text(text)
        assert store.load(CELLS[0]) is None
        assert run_cells(store, CELLS[:1], processes=1) == first


def test_a_cell_is_named_by_all_it_depends_on(world, tmp_path):
    store = Store(tmp_path / "cells", world)
    cell = CELLS[0]
    others = [
        dataclasses.replace(cell, seed=5),
        dataclasses.replace(cell, rate_rps=5.0),
        dataclasses.replace(cell, policy="sjf"),
        dataclasses.replace(cell, variant="warm"),
        dataclasses.replace(cell, changes=(("adapters", 2),)),
        dataclasses.replace(cell, rate_rps=0.0, rates_rps=(4.0,)),
    ]
    paths = {store.path(one) for one in (cell, *others)}
    longer = Store(tmp_path / "cells", dataclasses.replace(world, duration_s=11.0))
    changed = tmp_path / "changed.toml"
    changed.write_text(TINY.replace("decode_s = 0.02", "decode_s = 0.03", 1))
    slower = Store(tmp_path / "cells", dataclasses.replace(world, profile=changed))
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n0,16,2\n1,16,2\n")
    traced = Store(tmp_path / "cells", dataclasses.replace(world, trace=trace))
    paths |= {one.path(cell) for one in (longer, slower, traced)}
    assert len(paths) == 10
    # And by nothing else, so that a copy of the profile finds it.
    copy = tmp_path / "copy.toml"
    copy.write_text(TINY)
    same = Store(tmp_path / "cells", dataclasses.replace(world, profile=copy))
    assert same.path(cell) == store.path(cell)


def test_a_scan_is_that_of_the_command_line(world, tmp_path):
    from jchameleon.sim import Load, find_load, load_profile

    rates = (4.0, 16.0, 64.0)
    cell = Cell(variant="warm", policy="s-lora", rates_rps=rates, seed=2)
    found = paper_cells.run_cell(world, cell)
    load = Load(policy="s-lora", rate_rps=1.0, seed=2, duration_s=10.0)
    profile = load_profile(world.profile, "warm")
    expected = find_load(profile, load, rates_rps=rates, num_seeds=1)
    assert found["scan"] == expected["seeds"][0]
    assert found["scan"]["over_slo_rps"] is not None


# Interrupts itself at a known place: from outside, a signal may come when all is done.
INTERRUPTED = """
import os, signal, sys

import paper_cells, reproduce_paper

save, saved = paper_cells.Store.save, []


def save_and_interrupt(*args):
    save(*args)
    saved.append(None)
    if len(saved) == 3:
        os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    paper_cells.Store.save = save_and_interrupt
    # A shell that runs tests in the background has them ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(reproduce_paper.main(sys.argv[1:]))
"""


def test_a_process_that_is_interrupted_keeps_what_it_has(tmp_path):
    profile = tmp_path / "tiny.toml"
    profile.write_text(TINY)
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    arguments = ["--figure", "13", "--profile", str(profile), "--duration", "12"]
    arguments += ["--variants", "default", "--seeds", "1"]
    out = tmp_path / "out"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tools")])
    done = subprocess.run(
        [sys.executable, script, *arguments, "--processes", "2", "--out", str(out)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )
    error = done.stderr
    assert done.returncode == 130, error
    assert "interrupted; what is finished is kept" in error
    kept = {path.name: path.read_bytes() for path in out.glob("cells/*.json")}
    assert len(kept) == 3
    assert not (out / "paper.json").exists()
    arguments += ["--processes", "1", "--out"]
    for folder in (out, tmp_path / "whole"):
        done = run_tool("reproduce_paper", *arguments, folder, folder=tmp_path)
        assert done.returncode == 0, done.stderr
    for name, content in kept.items():
        assert (out / "cells" / name).read_bytes() == content
    whole = (tmp_path / "whole" / "paper.json").read_bytes()
    assert (out / "paper.json").read_bytes() == whole


# Scales, and wrong input.


def test_rates_go_up_by_a_ratio_to_the_end():
    assert geometric(2, 16, 2) == (2.0, 4.0, 8.0, 16.0)
    assert geometric(1, 3, 1.5) == (1.0, 1.5, 2.25)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--figure", "5"], "figure='5' must be one of 2, 3, 4,"),
        (["--seeds", "0"], "seeds=0 must be at least 1"),
        (["--processes", "0"], "processes=0 must be at least 1"),
        (["--duration", "30"], "duration=30 must be finite and at least 70"),
        (["--duration", "nan"], "duration=nan must be finite and at least 70"),
        (["--variants", "m2,m9"], "variant='m9' is not in"),
        (["--trace", "no.csv"], "cannot read no.csv"),
        (["--profile", "no.toml"], "cannot read"),
        (["--render", "no.json"], "cannot read no.json"),
    ],
)
def test_wrong_input_ends_with_one_line(tmp_path, capsys, arguments, message):
    assert reproduce_paper.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "cells").exists()


def test_an_output_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = ["--figure", "2", "--out", str(tmp_path / "file")]
    assert reproduce_paper.main(arguments) == 2
    assert "cannot make" in capsys.readouterr().err


def test_a_json_of_something_else_is_refused(tmp_path, capsys):
    path = tmp_path / "other.json"
    for text in ("{", "[]", "{}"):
        path.write_text(text)
        arguments = ["--render", str(path), "--out", str(tmp_path)]
        assert reproduce_paper.main(arguments) == 2
        assert "must be a paper.json" in capsys.readouterr().err


def test_figures_without_cells_run_and_render_again(tmp_path, capsys):
    out = tmp_path / "out"
    assert reproduce_paper.main(["--figure", "2", "--out", str(out)]) == 0
    page_path = Path(capsys.readouterr().out.split()[-1])
    first = page_path.read_bytes()
    again = tmp_path / "again"
    arguments = ["--render", str(out / "paper.json"), "--out", str(again)]
    assert reproduce_paper.main(arguments) == 0
    assert (again / "report.html").read_bytes() == first


def test_runs_of_different_figures_are_drawn_as_one_and_say_which(tmp_path, capsys):
    files = []
    for number in ("10", "2"):
        out = tmp_path / number
        assert reproduce_paper.main(["--figure", number, "--out", str(out)]) == 0
        data = json.loads((out / "paper.json").read_text("utf-8"))
        data["run"]["seeds"] = int(number)
        files.append(out / "paper.json")
        files[-1].write_text(json.dumps(data))
    arguments = [text for path in files for text in ("--render", str(path))]
    arguments += ["--out", str(tmp_path / "both")]
    assert reproduce_paper.main(arguments) == 0
    text = (tmp_path / "both" / "report.html").read_text("utf-8")
    assert text.index("Figure 2:") < text.index("Figure 10:")
    assert text.index("run: 10 seeds") < text.index("Of another run: 2 seeds")
    assert text.count("Of another") == 1
    assert reproduce_paper.main([*arguments, "--render", str(files[0])]) == 2
    assert "figure 10 is in two of the files" in capsys.readouterr().err


def test_fingerprint_covers_the_policies(world):
    assert fingerprint(world) != fingerprint(dataclasses.replace(world, profile=PAPER))
    for name in paper_cells.SOURCES:
        assert (Path(paper_cells.jchameleon.__file__).parent / name).exists()
