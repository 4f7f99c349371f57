"""In which order lines run and rows are written, and how many are open."""

import json

import pytest
from batch_rig import (
    GREEDY,
    SMALL,
    by_id,
    plain,
    read_rows,
    run,
    write_lines,
)

from jchameleon.batch import BatchConfig, run_batch
from jchameleon.batch.runner import Runner
from jchameleon.errors import BatchError, BatchStoppedError
from jchameleon.llm import LLM

pytest_plugins = ["batch_fixtures"]


def test_ordered_rows_stand_as_in_the_input_whatever_ends_first(llm, tmp_path):
    lines = [
        plain(f"{i}", adapter_id=f"v{i % 5}", max_tokens=40 if i % 9 == 0 else 2)
        for i in range(70)
    ]
    held = {"max_held_rows": 3, "max_held_bytes": 4000}
    for name, fields in (("a", {}), ("b", held), ("c", {"window_lines": 1})):
        run(llm, tmp_path, lines, name, ordered=True, **fields)
        ids = [row["custom_id"] for row in read_rows(tmp_path / name)]
        assert ids == [line["custom_id"] for line in lines]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_twice_the_rows_are_open_until_no_line_is_left(llm, tmp_path, monkeypatch):
    counts, receive = [], Runner._receive

    def counted(runner):
        counts.append(len(runner._open))
        receive(runner)

    monkeypatch.setattr(Runner, "_receive", counted)
    lines = [plain(f"{i}", n=1 + i % 5, temperature=1.0) for i in range(60)]
    summary, _ = run(llm, tmp_path, lines)
    assert summary.ok == 60
    most = 2 * SMALL["max_running"]
    full = counts.count(most)
    assert full > 100 and counts[:full] == [most] * full, "the batch ran dry"
    assert max(counts[full:]) < most


def test_requests_of_others_run_beside_a_batch(llm, tmp_path):
    expected = llm.generate("hello", sampling=GREEDY)[0].token_ids
    seen = []

    def ask():
        if len(seen) < 3:
            seen.append(llm.generate("hello", sampling=GREEDY)[0].token_ids)
        return False

    source = write_lines(tmp_path / "in", [plain(f"{i}") for i in range(20)])
    summary = run_batch(llm, source, tmp_path / "out", should_stop=ask)
    assert summary.ok == 20 and seen == [expected] * 3


def test_interrupt_in_the_library_leaves_whole_rows_and_no_requests(llm, tmp_path):
    source = write_lines(tmp_path / "in", [plain(f"{i}") for i in range(40)])
    calls = []

    def interrupt():
        calls.append(None)
        if len(calls) == 150:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        run_batch(llm, source, tmp_path / "out", should_stop=interrupt)
    assert 0 < len(read_rows(tmp_path / "out")) < 40
    llm.generate("x", sampling=GREEDY)
    assert not llm.engine.heartbeat().open_requests
    summary = run_batch(llm, source, tmp_path / "out", BatchConfig(resume=True))
    assert summary.finished and len(by_id(read_rows(tmp_path / "out"))) == 40


def test_engine_that_ends_stops_the_run_and_writes_no_rows_for_it(tmp_path):
    source = write_lines(tmp_path / "in", [plain(f"{i}") for i in range(40)])
    with LLM("tiny", **SMALL) as llm:
        calls = []

        def close():
            calls.append(None)
            if len(calls) == 150:
                llm.close()
            return False

        with pytest.raises(BatchStoppedError, match="closed"):
            run_batch(llm, source, tmp_path / "out", should_stop=close)
    rows = read_rows(tmp_path / "out")
    assert 0 < len(rows) < 40 and all(row["error"] is None for row in rows)


def test_adapter_that_is_replaced_under_a_run_stops_it(tmp_path, folder):
    lines = [plain(f"{i}", adapter_id="a") for i in range(40)]
    source = write_lines(tmp_path / "in", lines)
    with LLM("tiny", adapters={"a": folder / "v1"}, **SMALL) as llm:
        run_batch(llm, source, tmp_path / "whole")
        calls = []

        def replace():
            calls.append(None)
            if len(calls) == 100:
                llm.register_adapter("a", folder / "v2", replace=True)
            return False

        with pytest.raises(BatchStoppedError, match="'a' was replaced"):
            run_batch(llm, source, tmp_path / "out", should_stop=replace)
        with pytest.raises(BatchError, match=r"adapters\.a"):
            run_batch(llm, source, tmp_path / "out", BatchConfig(resume=True))
        assert llm.stats().running == 0
        # No claim is left that would keep it from going.
        llm.unregister_adapter("a", timeout_s=10)
    whole, rows = (by_id(read_rows(tmp_path / name)) for name in ("whole", "out"))
    assert 0 < len(rows) < 40
    assert rows == {key: whole[key] for key in rows}


def test_adapter_that_comes_after_the_start_is_unknown_to_the_run(tmp_path, folder):
    lines = [plain(f"{i}", adapter_id="late") for i in range(2)] + [plain("base")]
    source = write_lines(tmp_path / "in", lines)
    with LLM("tiny", **SMALL) as llm:
        registered = []

        def should_stop():
            if not registered:
                registered.append(llm.register_adapter("late", folder / "v1"))
            return False

        summary = run_batch(llm, source, tmp_path / "out", should_stop=should_stop)
        llm.unregister_adapter("late", timeout_s=10)
    assert (summary.ok, summary.failed) == (1, 2)
    rows = by_id(read_rows(tmp_path / "out"))
    assert rows["0"]["response"]["status_code"] == 404
    assert "after the run began" in json.dumps(rows["0"])
