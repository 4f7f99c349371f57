"""Log lines, and readers of them that are slow or gone."""

import io
import json
import logging
import os
import threading

import pytest

from jchameleon.serving.logs import (
    JsonFormatter,
    LineWriter,
    TextFormatter,
    log_event,
)


@pytest.fixture
def logger():
    logger = logging.Logger("test")
    yield logger
    for handler in logger.handlers:
        handler.close()


def lines_of(logger, formatter, action):
    stream = io.StringIO()
    writer = LineWriter(stream)
    writer.setFormatter(formatter)
    logger.addHandler(writer)
    action()
    writer.close()
    return stream.getvalue()


def test_json_line_has_time_level_event_and_fields(logger):
    def act():
        log_event(logger, "request_end", request_id="a\nb", adapter_id=None, tokens=3)

    text = lines_of(logger, JsonFormatter(), act)
    assert text.count("\n") == 1
    facts = json.loads(text)
    assert facts.pop("time").endswith("Z")
    assert facts == {
        "level": "info",
        "event": "request_end",
        "request_id": "a\nb",
        "tokens": 3,
    }


def test_exception_is_one_json_line(logger):
    def act():
        try:
            raise ValueError("two\nlines")
        except ValueError:
            logger.exception("it %s", "failed")

    text = lines_of(logger, JsonFormatter(), act)
    assert text.count("\n") == 1
    facts = json.loads(text)
    assert facts["event"] == "log"
    assert facts["message"] == "it failed"
    assert "ValueError: two\nlines" in facts["exception"]


def test_text_line_reads_as_text(logger):
    def act():
        log_event(logger, "ready", level=logging.WARNING, seconds=1.5)

    text = lines_of(logger, TextFormatter(), act)
    assert text.endswith(" warning ready seconds=1.5\n")


def test_full_pipe_holds_up_nobody(logger):
    """The reader sleeps: lines are queued, then dropped, and no call waits."""
    read_end, write_end = os.pipe()
    stream = open(write_end, "w")
    writer = LineWriter(stream)
    writer.setFormatter(JsonFormatter())
    logger.addHandler(writer)

    def act():
        for number in range(15_000):
            log_event(logger, "x" * 50, number=number)

    acting = threading.Thread(target=act, daemon=True)
    acting.start()
    acting.join(60)
    assert not acting.is_alive()
    assert writer.dropped > 0
    # Let the writer's thread end, so that it takes nothing along.
    draining = threading.Thread(target=drain, args=(read_end,), daemon=True)
    draining.start()
    writer.close()
    stream.close()
    draining.join()


def drain(read_end):
    while os.read(read_end, 1 << 16):
        pass
    os.close(read_end)


def test_reader_that_is_gone_costs_lines_only(logger):
    read_end, write_end = os.pipe()
    os.close(read_end)
    stream = open(write_end, "w", buffering=1)
    writer = LineWriter(stream)
    writer.setFormatter(JsonFormatter())
    logger.addHandler(writer)
    log_event(logger, "first")
    log_event(logger, "second")
    writer.close()
    assert writer.dropped == 2
    with pytest.raises(BrokenPipeError):
        stream.close()
