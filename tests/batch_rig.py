"""Batches of the tiny model: inputs, processes, and a reader of rows of its own.

The reader knows OpenAI's API reference (batch output object, completion object, chat
completion object) and nothing of this package.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from serve_process import environment

from jchameleon.batch import BatchConfig, run_batch
from jchameleon.sampling import SamplingParams

ENGINE = ["--max-running", "4", "--max-batch-tokens", "64", "--max-model-len", "128"]
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
SMALL = {"max_running": 4, "max_batch_tokens": 64, "max_model_len": 128}


def write_lines(path, lines):
    """Write an input; each line is an object, a text or bytes."""
    with open(path, "wb") as file:
        for line in lines:
            if isinstance(line, dict):
                line = json.dumps(line)
            if isinstance(line, str):
                line = line.encode("utf-8")
            file.write(line + b"\n")
    return path


def plain(custom_id, prompt="hello", **fields):
    """Return a line in the plain form whose tokens are always the same."""
    fields = {"max_tokens": 6, "ignore_eos": True, **fields}
    return {"custom_id": custom_id, "prompt": prompt, **fields}


def enveloped(custom_id, url="/v1/completions", **body):
    """Return a line in OpenAI's form."""
    body = {"model": "tiny", "max_tokens": 6, "ignore_eos": True, **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def read_rows(path):
    """Return the rows of an output, each checked, in order."""
    data = Path(path).read_bytes()
    assert not data or data.endswith(b"\n")
    return [check_row(json.loads(line)) for line in data.splitlines()]


def by_id(rows):
    """Return rows by custom_id, each of which is there once."""
    table = {row["custom_id"]: row for row in rows}
    assert len(table) == len(rows), "an id has two rows"
    return table


def sorted_rows(path):
    """Return an output's rows sorted by custom_id."""
    return [row for _, row in sorted(by_id(read_rows(path)).items())]


def check_row(row):
    """Assert that a row is one of OpenAI's batch outputs, and return it."""
    assert set(row) == {"id", "custom_id", "response", "error"}
    assert row["id"].startswith("batch_req_") and isinstance(row["custom_id"], str)
    response = row["response"]
    assert set(response) == {"status_code", "request_id", "body"}
    assert isinstance(response["request_id"], str) and response["request_id"]
    if row["error"] is not None:
        assert set(row["error"]) == {"code", "message"}
        assert 400 <= response["status_code"] < 600
        inner = response["body"]["error"]
        assert set(inner) == {"message", "type", "param", "code"}
        assert inner["message"] == row["error"]["message"] != ""
        assert "\n" not in inner["message"]
        return row
    assert response["status_code"] == 200
    body = response["body"]
    chat = body["object"] == "chat.completion"
    assert chat or body["object"] == "text_completion"
    assert isinstance(body["id"], str) and isinstance(body["model"], str)
    assert body["created"] == 0
    usage = body["usage"]
    assert set(usage) == {"prompt_tokens", "completion_tokens", "total_tokens"}
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert [choice["index"] for choice in body["choices"]] == [
        *range(len(body["choices"]))
    ]
    for choice in body["choices"]:
        assert choice["finish_reason"] in ("stop", "length", "time_limit")
        if chat:
            assert choice["message"]["role"] == "assistant"
            assert isinstance(choice["message"]["content"], str)
            _check_chat_logprobs(choice["logprobs"])
        else:
            assert isinstance(choice["text"], str)
            _check_logprobs(choice["logprobs"])
    return row


def _check_logprobs(logprobs):
    if logprobs is None:
        return
    assert set(logprobs) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert len({len(column) for column in logprobs.values()}) == 1
    assert all(isinstance(token, str) for token in logprobs["tokens"])
    assert all(-9999.0 <= value <= 0 for value in logprobs["token_logprobs"])
    columns = zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)
    for (token, value), top in zip(columns, logprobs["top_logprobs"], strict=True):
        assert top[token] == value
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])


def _check_chat_logprobs(logprobs):
    if logprobs is None:
        return
    for entry in logprobs["content"]:
        for one in (entry, *entry["top_logprobs"]):
            assert isinstance(one["token"], str) and -9999.0 <= one["logprob"] <= 0
            if not one["token"].startswith(("bytes:", "token_id:")):
                assert bytes(one["bytes"]).decode("utf-8") == one["token"]
        values = [one["logprob"] for one in entry["top_logprobs"]]
        assert values == sorted(values, reverse=True)


def command(source, output, *options):
    """Return the command that runs a batch of the tiny model."""
    files = ["-i", str(source), "-o", str(output)]
    program = [sys.executable, "-m", "jchameleon", "batch", "--model", "tiny"]
    return [*program, *ENGINE, *files, *options]


def run_command(source, output, *options, **kwargs):
    """Run a batch as a process to its end."""
    kwargs = {"text": True, "stdin": subprocess.DEVNULL, "timeout": 120, **kwargs}
    if "input" in kwargs:
        del kwargs["stdin"]
    return subprocess.run(
        command(source, output, *options),
        env=environment(),
        capture_output=True,
        **kwargs,
    )


def start_command(source, output, *options):
    """Start a batch as a process."""
    return subprocess.Popen(
        command(source, output, *options),
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def count_rows(path):
    """Return how many whole rows an output has; 0 if there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_rows(path, count, process):
    """Wait until an output has so many rows, or the process has ended."""
    end_s = time.monotonic() + 120
    while count_rows(path) < count and process.poll() is None:
        assert time.monotonic() < end_s, "no rows come"
        time.sleep(0.002)


def rss_bytes():
    """Return the resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def run(llm, path, lines, name="out", **fields):
    """Run lines and return the summary and the rows by id."""
    source = write_lines(path / "in", lines)
    summary = run_batch(llm, source, path / name, BatchConfig(**fields))
    return summary, by_id(read_rows(path / name))


def body(row):
    assert row["error"] is None, row
    return row["response"]["body"]
