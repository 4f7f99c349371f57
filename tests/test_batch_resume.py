"""Batches that are stopped, killed, torn or of another run, and go on or do not."""

import dataclasses
import errno
import fcntl
import json
import stat

import pytest
from adapter_versions import write_version
from batch_rig import (
    body,
    by_id,
    plain,
    read_rows,
    run,
    sorted_rows,
    write_lines,
)

from jchameleon import LLM
from jchameleon.batch import BatchConfig, open_batch, run_batch
from jchameleon.batch.files import replacing
from jchameleon.batch.manifest import manifest_path
from jchameleon.batch.results import Results
from jchameleon.errors import BatchError, BatchStoppedError

pytest_plugins = ["batch_fixtures"]


def stop_after(count):
    """Return a question that says stop after it was put so often."""
    seen = []

    def should_stop():
        seen.append(None)
        return len(seen) > count

    return should_stop


@pytest.mark.parametrize("ordered", [False, True])
def test_stopped_run_goes_on_by_id_to_the_same_rows(llm, tmp_path, ordered):
    lines = [plain(f"id {i % 7}/{i}", adapter_id=f"v{i % 3}") for i in range(60)]
    source = write_lines(tmp_path / "in", lines)
    config = BatchConfig(ordered=ordered, window_lines=16)
    whole = run_batch(llm, source, tmp_path / "whole", config)
    assert whole.finished
    resumed, runs = dataclasses.replace(config, resume=True), 0
    kept = ok = 0
    while True:
        summary = run_batch(
            llm, source, tmp_path / "out", resumed, should_stop=stop_after(160)
        )
        runs += 1
        assert summary.kept == kept + ok
        kept, ok = summary.kept, summary.ok
        if summary.finished:
            break
    assert runs > 2
    assert sorted_rows(tmp_path / "out") == sorted_rows(tmp_path / "whole")
    if ordered:
        assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
        ids = [row["custom_id"] for row in read_rows(tmp_path / "out")]
        assert ids == [line["custom_id"] for line in lines]


def test_torn_last_line_is_dropped_and_its_line_runs_again(llm, tmp_path):
    lines = [plain(f"{i}") for i in range(8)]
    run(llm, tmp_path, lines)
    expected = sorted_rows(tmp_path / "out")
    data = (tmp_path / "out").read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    for cut in (1, ends[0] - 1, ends[3] + 40, len(data) - 1):
        whole = sum(end <= cut for end in ends)
        for tail in (b"", b"\0" * 100, b"\0\0\n"):
            (tmp_path / "out").write_bytes(data[:cut] + tail)
            config = BatchConfig(resume=True)
            summary = run_batch(llm, tmp_path / "in", tmp_path / "out", config)
            assert (summary.kept, summary.ok) == (whole, 8 - whole)
            assert sorted_rows(tmp_path / "out") == expected


def test_output_that_is_not_this_runs_is_refused_and_left_as_it_is(llm, tmp_path):
    lines = [plain(f"{i}") for i in range(4)]
    run(llm, tmp_path, lines)
    good = (tmp_path / "out").read_bytes().splitlines(keepends=True)
    stranger = good[0].replace(b'"custom_id": "', b'"custom_id": "x')
    config = BatchConfig(resume=True)
    for data, message in (
        (good[0] + b"junk\n" + good[1], "line 2 is no row"),
        (good[0] + b'{"custom_id": "1"}\n' + good[1], "line 2 is no row"),
        (good[0] + stranger + good[1], "on line 2 is of no line of the input"),
        (good[0] + good[0] + good[1], "on line 2 is there twice"),
        (good[0] + b"a note at the end\n", "line 2 is no row"),
    ):
        (tmp_path / "out").write_bytes(data)
        with pytest.raises(BatchError, match=message):
            run_batch(llm, tmp_path / "in", tmp_path / "out", config)
        assert (tmp_path / "out").read_bytes() == data


def test_existing_output_is_never_erased(llm, tmp_path):
    (tmp_path / "out").write_text("dear diary")
    with pytest.raises(BatchError, match="is there already and is never erased"):
        run(llm, tmp_path, [plain("a")])
    assert (tmp_path / "out").read_text() == "dear diary"
    config = BatchConfig(resume=True)
    with pytest.raises(BatchError, match="its manifest .* cannot be read"):
        run_batch(llm, tmp_path / "in", tmp_path / "out", config)
    assert (tmp_path / "out").read_text() == "dear diary"


def test_resume_begins_where_there_is_nothing_yet(llm, tmp_path):
    summary, rows = run(llm, tmp_path, [plain("a")], resume=True)
    assert summary.finished and set(rows) == {"a"}
    # A process that ended between making the two files leaves this.
    (tmp_path / "blank").write_bytes(b"")
    summary, rows = run(llm, tmp_path, [plain("a")], "blank", resume=True)
    assert summary.finished and set(rows) == {"a"}


def test_output_that_another_run_writes_is_refused(llm, tmp_path):
    source = write_lines(tmp_path / "in", [plain(f"{i}") for i in range(9)])
    out, errors = tmp_path / "out", []

    def second():
        if not errors:
            with pytest.raises(BatchError) as caught:
                run_batch(llm, source, out, BatchConfig(resume=True))
            errors.append(str(caught.value))
        return False

    run_batch(llm, source, out, should_stop=second)
    assert "is being written by another run" in errors[0]
    assert len(by_id(read_rows(out))) == 9


def test_nobody_writes_a_manifest_for_an_output_that_another_run_holds(llm, tmp_path):
    out = tmp_path / "out"
    out.touch()
    with open(out, "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(BatchError, match="is being written by another run"):
            run(llm, tmp_path, [plain("a")], resume=True)
    assert not manifest_path(out).exists()


def test_file_that_is_replaced_before_it_is_locked_is_not_written(
    tmp_path, monkeypatch
):
    out = tmp_path / "out"
    out.write_bytes(b"old\n")

    def replace_and_lock(fd, how, real=fcntl.flock):
        (tmp_path / "new").write_bytes(b"new\n")
        (tmp_path / "new").rename(out)
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", replace_and_lock)
    with pytest.raises(BatchError, match="is being written by another run"):
        Results.reopen(out, sync_rows=1)
    monkeypatch.undo()
    results = Results.reopen(out, sync_rows=1)
    results.append(b"more\n")
    results.close()
    assert out.read_bytes() == b"new\nmore\n"


def test_file_without_locks_is_written_with_a_warning(tmp_path, monkeypatch, caplog):
    def cannot(fd, how):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", cannot)
    results = Results.create(tmp_path / "out", sync_rows=1)
    results.append(b"row\n")
    results.close()
    assert (tmp_path / "out").read_bytes() == b"row\n"
    assert "cannot be locked" in caplog.text


def test_file_that_is_replaced_keeps_who_may_read_it(tmp_path):
    out, fresh = tmp_path / "out", tmp_path / ".out.new"
    out.write_bytes(b"old")
    out.chmod(0o640)
    (tmp_path / "other").write_bytes(b"other")
    fresh.symlink_to(tmp_path / "other")  # nothing is written through it
    with replacing(out) as file:
        assert stat.S_IMODE(fresh.stat().st_mode) == 0o640
        file.write(b"new")
    assert out.read_bytes() == b"new" and stat.S_IMODE(out.stat().st_mode) == 0o640
    assert (tmp_path / "other").read_bytes() == b"other" and not fresh.exists()


def test_rows_that_wait_are_kept_when_the_engine_dies(tmp_path):
    source = write_lines(
        tmp_path / "in",
        [
            plain("slow", max_tokens=120),
            *(plain(f"{i}", max_tokens=2) for i in range(6)),
        ],
    )
    died = []
    with LLM("tiny", max_running=4, max_batch_tokens=64, max_model_len=128) as llm:

        def should_stop():
            if len(llm.step_records) > 40 and not died:
                died.append(llm.engine.close())
            return False

        config = BatchConfig(ordered=True)
        with pytest.raises(BatchStoppedError):
            run_batch(llm, source, tmp_path / "out", config, should_stop=should_stop)
    assert by_id(read_rows(tmp_path / "out")).keys() == {f"{i}" for i in range(6)}


def test_retried_errors_leave_one_row_an_id_in_any_order(llm, tmp_path):
    lines = [plain(f"{i}", adapter_id="late" if i % 3 == 1 else None) for i in range(9)]
    for ordered in (False, True):
        name = f"out{ordered}"
        summary, rows = run(llm, tmp_path, lines, name, ordered=ordered)
        assert (summary.ok, summary.failed) == (6, 3)
        # The adapter comes too late for the manifest; it is let through by hand.
        write_version(tmp_path / "late", 5)
        llm.register_adapter("late", tmp_path / "late")
        path = manifest_path(tmp_path / name)
        table = json.loads(path.read_text())
        table["adapters"]["late"] = llm.list_adapters()[0].uid
        path.write_text(json.dumps(table))
        again = BatchConfig(resume=True, ordered=ordered)
        summary = run_batch(llm, tmp_path / "in", tmp_path / name, again)
        assert (summary.kept, summary.kept_failed, summary.ok) == (9, 3, 0)
        again = dataclasses.replace(again, retry_errors=True)
        summary = run_batch(llm, tmp_path / "in", tmp_path / name, again)
        llm.unregister_adapter("late")
        assert (summary.kept, summary.kept_failed, summary.ok) == (6, 0, 3)
        healed = read_rows(tmp_path / name)
        assert all(body(row) for row in by_id(healed).values())
        assert not list(tmp_path.glob(".*.new"))
        if ordered:
            assert [row["custom_id"] for row in healed] == [*"012345678"]


DIFFERENT = {
    "input_sha256": lambda table: table.update(input_sha256="0" * 64),
    "model": lambda table: table.update(model="other"),
    "model_name": lambda table: table.update(model_name="other"),
    "model_config.num_layers": lambda table: table["model_config"].update(num_layers=9),
    **{
        f"model_sha256.{part}": lambda table, part=part: table["model_sha256"].update(
            {part: "0" * 64}
        )
        for part in ("weights", "tokenizer", "chat_template")
    },
    "dtype": lambda table: table.update(dtype="bfloat16"),
    "max_model_len": lambda table: table.update(max_model_len=9),
    "adapters.v1": lambda table: table["adapters"].update(v1="0" * 64),
    "adapters.v0": lambda table: table["adapters"].pop("v0"),
    "adapters.gone": lambda table: table["adapters"].update(gone="0" * 64),
    "lora_targets": lambda table: table.update(lora_targets=["q"]),
    "sampling.temperature": lambda table: table["sampling"].update(temperature=1.0),
    "sampling.stop": lambda table: table["sampling"].update(stop=["x"]),
    "seed": lambda table: table.update(seed=9),
    "version": lambda table: table.update(version="0.0.1"),
    "format": lambda table: table.update(format="jchameleon batch 0"),
    "max_line_bytes": lambda table: table.update(max_line_bytes=9),
}


@pytest.mark.parametrize("field", DIFFERENT)
def test_manifest_that_differs_is_refused_by_field(llm, tmp_path, field):
    run(llm, tmp_path, [plain("a")])
    path = manifest_path(tmp_path / "out")
    table = json.loads(path.read_text())
    assert field.partition(".")[0] in table
    DIFFERENT[field](table)
    path.write_text(json.dumps(table))
    before = (tmp_path / "out").read_bytes()
    with pytest.raises(BatchError) as caught:
        run(llm, tmp_path, [plain("a")], resume=True)
    assert f"cannot be resumed: {field} was" in str(caught.value)
    assert (tmp_path / "out").read_bytes() == before


def test_manifest_names_everything_that_the_cases_differ_in(llm, tmp_path):
    run(llm, tmp_path, [plain("a")])
    table = json.loads(manifest_path(tmp_path / "out").read_text())
    assert set(table) == {field.partition(".")[0] for field in DIFFERENT}


def test_changed_input_is_refused_before_a_model_is_needed(llm, tmp_path):
    run(llm, tmp_path, [plain("a")])
    source = write_lines(tmp_path / "in", [plain("a", "other")])
    for config in (BatchConfig(resume=True), BatchConfig(resume=True, seed=1)):
        with pytest.raises(BatchError, match="input_sha256 was"):
            with open_batch(source, tmp_path / "out", config):
                pass


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff"])
def test_damaged_manifest_is_refused(llm, tmp_path, content):
    run(llm, tmp_path, [plain("a")])
    manifest_path(tmp_path / "out").write_bytes(content)
    with pytest.raises(BatchError, match="manifest"):
        run(llm, tmp_path, [plain("a")], resume=True)
