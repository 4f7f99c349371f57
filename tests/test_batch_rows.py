"""Rows of batches: what a line that ran, or could not, becomes."""

import contextlib
import dataclasses
import io
import shutil

import numpy as np
import pytest
from adapter_versions import TINY, write_version
from batch_rig import (
    GREEDY,
    SMALL,
    body,
    by_id,
    enveloped,
    plain,
    read_rows,
    run,
    sorted_rows,
    write_lines,
)
from random_adapters import write_random_adapter

from jchameleon.batch import BatchConfig, Progress, run_batch
from jchameleon.errors import BatchError, ConfigError
from jchameleon.llm import LLM
from jchameleon.models.loader import load_model
from jchameleon.sampling import SamplingParams

pytest_plugins = ["batch_fixtures"]


def test_greedy_rows_are_what_generate_returns(llm, tmp_path):
    prompts = [f"prompt {i} " * (1 + i % 5) for i in range(40)]
    names = [None if i % 4 == 3 else f"v{i % 3}" for i in range(40)]
    lines = []
    for i, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
        if i % 2:
            fields = {"model": name or "tiny", "prompt": prompt}
            lines.append(enveloped(f"id {i}", return_token_ids=True, **fields))
        else:
            fields = {"adapter_id": name, "return_token_ids": True}
            lines.append(plain(f"id {i}", prompt, **fields))
    summary, rows = run(llm, tmp_path, lines)
    assert (summary.ok, summary.failed, summary.total) == (40, 0, 40)
    assert summary.finished and summary.output_tokens == 240
    outputs = llm.generate(prompts, names, GREEDY)
    assert summary.prompt_tokens == sum(len(o.prompt_token_ids) for o in outputs)
    for i, output in enumerate(outputs):
        got = body(rows[f"id {i}"])
        [choice] = got["choices"]
        assert choice["text"] == output.text
        assert choice["token_ids"] == list(output.token_ids)
        assert got["prompt_token_ids"] == list(output.prompt_token_ids)
        assert choice["finish_reason"] == output.finish_reason == "length"
        assert got["usage"]["prompt_tokens"] == len(output.prompt_token_ids)
        assert got["usage"]["completion_tokens"] == 6
        assert got["model"] == (names[i] or "tiny")


def test_chat_rows_are_what_chat_returns(llm, tmp_path):
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "é"},
    ]
    lines = [
        enveloped("a", "/v1/chat/completions", messages=talk, model="v1"),
        {"custom_id": "b", "messages": talk, "max_tokens": 6, "ignore_eos": True},
        enveloped("c", "/v1/chat/completions", messages=[{"role": "x", "content": ""}]),
    ]
    summary, rows = run(llm, tmp_path, lines)
    outputs = llm.chat([talk, talk], ["v1", None], GREEDY)
    for key, output in zip("ab", outputs, strict=True):
        got = body(rows[key])
        assert got["object"] == "chat.completion"
        [choice] = got["choices"]
        assert choice["message"] == {"role": "assistant", "content": output.text}
    assert rows["c"]["response"]["status_code"] == 400
    assert "role 'x'" in rows["c"]["error"]["message"]
    assert (summary.ok, summary.failed) == (2, 1)


def test_log_probabilities_are_generates_in_both_shapes(llm, tmp_path):
    fields = {"logprobs": 3, "prompt_logprobs": 1, "return_token_ids": True}
    talk = [{"role": "user", "content": "x"}]
    lines = [
        plain("a", "some text", **fields),
        {**plain("b"), "messages": talk, "logprobs": True, "top_logprobs": 2},
        {**plain("c"), "messages": talk, "logprobs": True},
    ]
    for line in lines[1:]:
        del line["prompt"]
    _, rows = run(llm, tmp_path, lines)
    sampling = dataclasses.replace(GREEDY, logprobs=3, prompt_logprobs=1)
    [output] = llm.generate(["some text"], sampling=sampling)
    got = body(rows["a"])
    found = got["choices"][0]["logprobs"]
    assert found["token_logprobs"] == pytest.approx(
        [next(iter(one.values())) for one in output.logprobs], abs=1e-4
    )
    assert [len(one) for one in found["top_logprobs"]] == [
        len(one) for one in output.logprobs
    ]
    first, *rest = got["prompt_logprobs"]
    assert first is None
    assert [set(one) for one in rest] == [
        {str(i) for i in one} for one in output.prompt_logprobs[1:]
    ]
    [chat] = llm.chat([talk], sampling=dataclasses.replace(GREEDY, logprobs=2))
    for key, top in (("b", 2), ("c", 0)):
        content = body(rows[key])["choices"][0]["logprobs"]["content"]
        assert len(content) == 6
        for entry, one in zip(content, chat.logprobs, strict=True):
            assert len(entry["top_logprobs"]) == top
            best = sorted(one.values(), reverse=True)[:top]
            values = [e["logprob"] for e in entry["top_logprobs"]]
            assert values == pytest.approx(best, abs=1e-4)


def test_sampled_rows_depend_on_the_runs_seed_and_their_id_alone(llm, tmp_path):
    fields = {"temperature": 1.0, "n": 2}
    lines = [plain(f"id {i}", **fields) for i in range(12)]
    lines.append(plain("own seed", seed=5, **fields))
    _, first = run(llm, tmp_path, lines, "one", seed=3)
    _, turned = run(llm, tmp_path, lines[::-1], "two", seed=3, window_lines=1)
    assert first == turned
    _, other = run(llm, tmp_path, lines, "three", seed=4)
    assert {key for key in first if first[key] == other[key]} == {"own seed"}
    texts = {c["text"] for row in first.values() for c in body(row)["choices"]}
    assert len(texts) > 20
    assert [len(body(row)["choices"]) for row in first.values()] == [2] * 13


def test_bad_lines_become_rows_and_the_others_run(llm, tmp_path):
    lines = [
        plain("good"),
        "junk",
        b"\xff\xfe",
        "",
        plain("unknown", adapter_id="nobody"),
        enveloped("unknown model", prompt="x", model="gpt-4o"),
        plain("base by name", adapter_id="tiny"),
        plain("too long", "x" * 200),
        plain("vocabulary", [999]),
        plain("empty", ""),
        plain("stream", stream=True),
        plain("context", max_tokens=1000),
        {"custom_id": 7, "prompt": "x"},
        enveloped("also good", prompt="x"),
    ]
    summary, rows = run(llm, tmp_path, lines)
    codes = {key: row["response"]["status_code"] for key, row in rows.items()}
    assert codes == {
        "good": 200,
        "line-2": 400,
        "line-3": 400,
        "unknown": 404,
        "unknown model": 404,
        "base by name": 404,
        "too long": 400,
        "vocabulary": 400,
        "empty": 400,
        "stream": 400,
        "context": 400,
        "line-13": 400,
        "also good": 200,
    }
    assert (summary.ok, summary.failed) == (2, 11)
    assert "unknown adapter 'nobody'" in rows["unknown"]["error"]["message"]
    assert "custom_id=7" in rows["line-13"]["error"]["message"]
    assert not llm.engine.heartbeat().open_requests


def test_input_of_bad_lines_only_ends(llm, tmp_path):
    summary, rows = run(llm, tmp_path, ["junk"] * 300, window_lines=7, ordered=True)
    assert (summary.failed, len(rows)) == (300, 300)


def test_empty_input_gives_an_empty_output(llm, tmp_path):
    summary, rows = run(llm, tmp_path, ["", "  "])
    assert summary.finished and (summary.total, rows) == (0, {})


def test_adapter_whose_files_are_torn_in_the_middle_fails_its_lines_only(
    llm, folder, tmp_path
):
    """The engine holds some adapters; `bad` is torn after it was registered."""
    write_version(tmp_path / "bad", 77)
    llm.register_adapter("bad", tmp_path / "bad")
    weights = tmp_path / "bad" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    names = ["v0", "bad", None, "v1"]
    lines = [plain(f"{i}", adapter_id=names[i % 4]) for i in range(32)]
    try:
        summary, rows = run(llm, tmp_path, lines)
    finally:
        llm.unregister_adapter("bad")
    bad = {key for key in rows if int(key) % 4 == 1}
    assert {key for key, row in rows.items() if row["error"]} == bad
    assert {rows[key]["response"]["status_code"] for key in bad} == {424}
    assert {rows[key]["error"]["code"] for key in bad} == {"adapter"}
    assert (summary.ok, summary.failed) == (24, 8)
    # Put right, they run again; what was good stays as it was.
    write_version(tmp_path / "bad", 77)
    llm.register_adapter("bad", tmp_path / "bad")
    again = BatchConfig(resume=True, retry_errors=True)
    # The manifest is of the run without it: names and contents are the same again.
    summary = run_batch(llm, tmp_path / "in", tmp_path / "out", again)
    llm.unregister_adapter("bad")
    assert (summary.kept, summary.ok, summary.failed) == (24, 8, 0)
    healed = by_id(read_rows(tmp_path / "out"))
    assert all(body(row) for row in healed.values())
    assert {k: v for k, v in healed.items() if k not in bad} == {
        k: v for k, v in rows.items() if k not in bad
    }


def test_grouped_windows_load_an_adapter_once_where_they_do_not_all_fit(tmp_path):
    """Room for two adapters and the rows; six take turns line by line."""
    adapters = {}
    for number in range(6):
        adapters[f"v{number}"] = write_version(tmp_path / f"v{number}", number)
    lines = [plain(f"{i}", adapter_id=f"v{i % 6}") for i in range(120)]
    loads = {}
    pages = 26
    for window_lines in (1, 120):
        with LLM("tiny", adapters=adapters, pool_bytes=pages * 8192, **SMALL) as llm:
            config = {"window_lines": window_lines, "name": f"out{window_lines}"}
            _, rows = run(llm, tmp_path, lines, **config)
            loads[window_lines] = llm.stats().loads
        assert all(body(row) for row in rows.values())
    assert sorted_rows(tmp_path / "out1") == sorted_rows(tmp_path / "out120")
    assert loads[120] == 6 < loads[1]


def test_model_without_a_tokenizer_answers_in_token_ids(tmp_path):
    model = dataclasses.replace(load_model("tiny", dtype="float32"), tokenizer=None)
    with LLM(model, **SMALL) as llm:
        lines = [plain("ids", [5, 6], logprobs=1), plain("text", "x")]
        _, rows = run(llm, tmp_path, lines)
    [choice] = body(rows["ids"])["choices"]
    assert choice["text"] == "" and len(choice["token_ids"]) == 6
    assert choice["logprobs"]["tokens"] == [
        f"token_id:{i}" for i in choice["token_ids"]
    ]
    assert "no tokenizer" in rows["text"]["error"]["message"]


def test_adapter_by_the_models_own_name_is_refused(folder, tmp_path):
    with LLM("tiny", adapters={"tiny": folder / "v0"}, **SMALL) as llm:
        with pytest.raises(BatchError, match="adapter name 'tiny' is taken"):
            run(llm, tmp_path, [plain("a")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": -1}, "seed=-1"),
        ({"seed": True}, "seed=True"),
        ({"sampling": SamplingParams(seed=1)}, "sampling.seed=1 must be None"),
        ({"sampling": None}, "sampling=None"),
        ({"retry_errors": True}, "must come with resume=True"),
        ({"ordered": 1}, "ordered=1 must be"),
        ({"window_lines": 0}, "window_lines=0"),
        ({"sync_rows": 1.5}, "sync_rows=1.5"),
        ({"max_line_bytes": 1 << 31}, "max_line_bytes=2147483648"),
        ({"max_open": 0}, "max_open=0"),
        ({"max_held_rows": 0}, "max_held_rows=0"),
        ({"max_held_bytes": 0}, "max_held_bytes=0"),
    ],
)
def test_wrong_configuration_is_refused_by_field(fields, message):
    with pytest.raises(ConfigError) as caught:
        BatchConfig(**fields)
    assert message in str(caught.value)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_one_line_on_a_terminal_and_lines_elsewhere(llm, tmp_path):
    source = write_lines(
        tmp_path / "in", [plain(f"{i}", adapter_id="v0") for i in "ab"]
    )
    for stream in (Terminal(), io.StringIO()):
        progress = Progress(stream, start_s=0.0)
        progress._every_s = progress._next_s = 0.0  # shows whatever happens
        out = tmp_path / f"out{stream.isatty()}"
        summary = run_batch(llm, source, out, progress=progress)
        progress.close(summary)
        text = stream.getvalue()
        assert text.endswith(summary.report() + "\n")
        assert "0/2 (0%), 0 failed, 0.0 prompt tok/s" in text and "ETA -" in text
        assert "1/2 (50%)" in text and "ETA 0:00:" in text
        assert text.count("\n") == (1 if stream.isatty() else text.count("ETA") + 1)
        report = summary.report()
        assert report.startswith("batch: 2 ok, 0 failed, of 2 lines; ")
        assert "adapter hits 50.0%" in report or "adapter hits 100.0%" in report


def test_progress_survives_a_stream_that_is_closed(llm, tmp_path):
    stream = io.StringIO()
    stream.close()
    with contextlib.suppress(ValueError):
        stream.isatty()
    broken = Terminal()
    progress = Progress(broken, start_s=0.0)
    broken.close()
    source = write_lines(tmp_path / "in", [plain("a")])
    summary = run_batch(llm, source, tmp_path / "out", progress=progress)
    progress.close(summary)
    assert summary.ok == 1


def test_index_digest_of_ids_is_what_rows_are_named_by(llm, tmp_path):
    _, rows = run(llm, tmp_path, [plain("a"), plain("b")])
    ids = {row["id"] for row in rows.values()}
    assert len(ids) == 2
    for row in rows.values():
        digest = row["id"].removeprefix("batch_req_")
        assert row["response"]["request_id"] == f"req-{digest}"
        assert body(row)["id"] == f"cmpl-{digest}"
    shutil.copy(tmp_path / "in", tmp_path / "again")
    run_batch(llm, tmp_path / "again", tmp_path / "second")
    assert sorted_rows(tmp_path / "second") == sorted_rows(tmp_path / "out")


def test_adapters_of_any_rank_mix_in_a_batch(tmp_path):
    adapters = {
        f"r{rank}": write_random_adapter(
            tmp_path / f"r{rank}", TINY, rank=rank, targets=("q", "v"), seed=rank
        )
        for rank in (2, 8, 16)
    }
    names = [*adapters, None]
    with LLM("tiny", adapters=adapters, **SMALL) as llm:
        lines = [plain(f"{i}", adapter_id=names[i % 4]) for i in range(16)]
        summary, rows = run(llm, tmp_path, lines)
        expected = llm.generate(["hello"] * 4, names, GREEDY)
    assert summary.hit_rate is not None and 0 < summary.hit_rate < 1
    texts = np.array([body(rows[f"{i}"])["choices"][0]["text"] for i in range(16)])
    assert texts.reshape(4, 4).tolist() == [[o.text for o in expected]] * 4
