"""Logs of a server: one line an event, as JSON or as text, that never holds it up.

Events carry numbers, ids and codes. Prompts, outputs, messages of refusals (which quote
what was sent) and tokens of callers are in none.
"""

import datetime
import json
import logging
import queue
import threading
from typing import Any, Literal, TextIO

LogFormat = Literal["json", "text"]
LOG_FORMATS = ("json", "text")

QUEUED_LINES = 10_000
"""Lines that wait for a reader who is slow; further ones are dropped."""

CLOSE_S = 2.0
"""Most that the last lines may take at the end of the process."""

FIELDS = "event_fields"
LIBRARY_EVENT = "log"
"""The event of records that code below the server writes, with a message."""


def log_event(
    logger: logging.Logger, event: str, *, level: int = logging.INFO, **fields: Any
) -> None:
    """Log an event; fields that are None are left out."""
    known = {name: value for name, value in fields.items() if value is not None}
    logger.log(level, event, extra={FIELDS: known})


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, event, then the event's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        return json.dumps(_facts(self, record), default=str)


class TextFormatter(logging.Formatter):
    """What JSON says, for people; a traceback takes lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of a record."""
        facts = _facts(self, record)
        trace = facts.pop("exception", None)
        head = f"{facts.pop('time')} {facts.pop('level'):<7} {facts.pop('event')}"
        tail = [f"{name}={value}" for name, value in facts.items()]
        line = " ".join([head, *tail])
        return line if trace is None else f"{line}\n{trace}"


def _facts(formatter: logging.Formatter, record: logging.LogRecord) -> dict[str, Any]:
    time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
    facts: dict[str, Any] = {
        "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": record.levelname.lower(),
    }
    fields = getattr(record, FIELDS, None)
    if fields is None:
        facts |= {"event": LIBRARY_EVENT, "logger": record.name}
        facts["message"] = record.getMessage()
    else:
        facts |= {"event": record.getMessage(), **fields}
    if record.exc_info:
        facts["exception"] = formatter.formatException(record.exc_info)
    return facts


class LineWriter(logging.Handler):
    """Writes records on a thread of its own, so that a full pipe holds up nobody.

    Attributes:
      dropped: lines that found no room, or could not be written.
    """

    def __init__(self, stream: TextIO) -> None:
        """Start the thread; it writes to `stream`."""
        super().__init__()
        self.dropped = 0
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(QUEUED_LINES)
        self._thread = threading.Thread(target=self._write, name="logs", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record's line."""
        try:
            self._lines.put_nowait(self.format(record))
        except Exception:  # whatever cannot be logged: serving goes on
            self.dropped += 1

    def close(self) -> None:
        """Write what waits, as far as that is quick."""
        try:
            self._lines.put_nowait(None)
            self._thread.join(CLOSE_S)
        except queue.Full:  # nobody reads
            pass
        super().close()

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError):  # disk full, reader gone, stream closed
                self.dropped += 1


def start_logs(log_format: LogFormat, stream: TextIO) -> LineWriter:
    """Send the process's logs to `stream` from now on; close what this returns."""
    writer = LineWriter(stream)
    writer.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers = [writer]
    root.setLevel(logging.WARNING)
    logging.getLogger("jchameleon").setLevel(logging.INFO)
    logging.captureWarnings(True)
    return writer
