"""How far a batch is: a line that is drawn again on a terminal, lines elsewhere."""

import dataclasses
from typing import TextIO

TERMINAL_EVERY_S, PLAIN_EVERY_S = 0.5, 10.0
"""How often: a person watches, or a log grows."""

_BAR_CHARS = 20


@dataclasses.dataclass(slots=True)
class BatchSummary:
    """What became of a batch, while it runs and in the end.

    Attributes:
      total: lines of the input that are not empty.
      kept: of them, lines that had a row when the run began.
      ok, failed: lines that got a row in this run.
      kept_failed: of the kept rows, error rows.
      prompt_tokens, output_tokens: of this run's lines.
      wall_s: how long it ran.
      hits, misses: of the adapter cache meanwhile.
      finished: every line has a row; else the run was told to stop.
    """

    total: int
    kept: int = 0
    ok: int = 0
    failed: int = 0
    kept_failed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    wall_s: float = 0.0
    hits: int = 0
    misses: int = 0
    finished: bool = False

    @property
    def done(self) -> int:
        """Lines that have a row."""
        return self.kept + self.ok + self.failed

    @property
    def hit_rate(self) -> float | None:
        """Part of the admissions with an adapter that found it on the device."""
        uses = self.hits + self.misses
        return self.hits / uses if uses else None

    @property
    def eta_s(self) -> float | None:
        """Seconds until all lines have rows, at the rate of this run so far."""
        ran = self.ok + self.failed
        if not ran or self.wall_s <= 0:
            return None
        return (self.total - self.done) * self.wall_s / ran

    def report(self) -> str:
        """Return the line that ends a run."""
        kept = ""
        if self.kept:
            kept = f", {self.kept} had rows before ({self.kept_failed} of them failed)"
        return (
            f"batch: {self.ok} ok, {self.failed} failed, of {self.total} lines{kept}; "
            f"{self.wall_s:.1f} s, {self._rates()}"
        )

    def status(self) -> str:
        """Return how far it is, short enough for a terminal."""
        eta_s = self.eta_s
        share = self.done / self.total if self.total else 1.0
        filled = int(_BAR_CHARS * share)
        return (
            f"[{'#' * filled}{'.' * (_BAR_CHARS - filled)}] {self.done}/{self.total} "
            f"({share:.0%}), {self.failed + self.kept_failed} failed, {self._rates()}, "
            f"ETA {'-' if eta_s is None else _clock(eta_s)}"
        )

    def _rates(self) -> str:
        prompt, output = self.prompt_tokens, self.output_tokens
        seconds = max(self.wall_s, 1e-9)
        rate = self.hit_rate
        return (
            f"{prompt / seconds:.1f} prompt tok/s, {output / seconds:.1f} output tok/s,"
            f" adapter hits {'-' if rate is None else f'{rate:.1%}'}"
        )


class Progress:
    """Shows a summary on a stream, no more often than a reader can follow."""

    def __init__(self, stream: TextIO | None, *, start_s: float) -> None:
        """Show nothing yet; a stream of None is one that was closed."""
        self._stream = stream
        self._is_terminal = stream is not None and stream.isatty()
        self._every_s = TERMINAL_EVERY_S if self._is_terminal else PLAIN_EVERY_S
        self._next_s = start_s + self._every_s
        self._drawn_chars = 0

    def is_due(self, now_s: float) -> bool:
        """Return whether it is time to show something."""
        return now_s >= self._next_s

    def show(self, summary: BatchSummary, now_s: float) -> None:
        """Show how far it is."""
        self._next_s = now_s + self._every_s
        text = summary.status()
        if self._is_terminal:
            self._write("\r" + text.ljust(self._drawn_chars))
            self._drawn_chars = len(text)
        else:
            self._write(f"batch: {text}\n")

    def clear(self) -> None:
        """Take what is drawn off a terminal."""
        if self._drawn_chars:
            self._write("\r" + " " * self._drawn_chars + "\r")
            self._drawn_chars = 0

    def close(self, summary: BatchSummary) -> None:
        """Show the end."""
        self.clear()
        self._write(summary.report() + "\n")

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            pass  # nobody reads it any more; that is no reason to stop


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"
