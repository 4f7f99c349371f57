"""A batch from its input's first look to its output's last row."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jchameleon.batch.index import LineIndex, build_index
from jchameleon.batch.manifest import (
    check_manifest,
    early_facts,
    engine_facts,
    manifest_path,
    write_manifest,
)
from jchameleon.batch.progress import BatchSummary, Progress
from jchameleon.batch.results import KeptRows, Results, is_file, rewrite
from jchameleon.batch.runner import Runner
from jchameleon.batch.settings import BatchConfig
from jchameleon.batch.source import open_source
from jchameleon.errors import BatchError, BatchStoppedError

if TYPE_CHECKING:
    from jchameleon.llm import LLM


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Errors of a disk that are no fault of the output's name."""


class Batch:
    """An input that was read once, and an output that can be written.

    Attributes:
      index: of the input's lines.
    """

    def __init__(
        self, index: LineIndex, output: str | Path, config: BatchConfig
    ) -> None:
        """Of `open_batch`."""
        self.index = index
        self._output = output
        self._config = config
        self._is_file = is_file(output)
        self._path = Path(output)
        self._facts = early_facts(config, index.sha256)
        self._check_output()

    def __len__(self) -> int:
        """Lines that are not empty."""
        return len(self.index)

    def run(
        self,
        llm: "LLM",
        *,
        model_name: str | None = None,
        progress: Progress | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> BatchSummary:
        """Run all lines that have no row; returns when each has one, or told to stop.

        Args:
          model_name: what lines may call the base model besides the model's own name.
          progress: shows how far it is.
          should_stop: asked all the time; true ends the run with what is done.

        Returns:
          what became of the lines; `finished` is false where it was stopped.

        Raises:
          BatchError: the output is not this run's, or cannot be opened; nothing ran.
          BatchStoppedError: the run ended early; what is written can be resumed.
          BrokenPipeError: nobody reads the output any more.
        """
        facts = {**self._facts, **engine_facts(llm, model_name)}
        if base := {llm.model_config.name, model_name} & set(facts["adapters"]):
            raise BatchError(
                f"adapter name {base.pop()!r} is taken: lines mean the model by it"
            )
        summary = BatchSummary(total=len(self.index))
        try:
            results, kept = self._open_results(facts, summary)
        except OSError as error:
            is_full = error.errno in FULL
            raise (BatchStoppedError if is_full else BatchError)(
                f"output {str(self._output)!r} cannot be written: {error}"
            ) from error
        try:
            try:
                Runner(
                    llm,
                    self.index,
                    results,
                    self._config,
                    summary,
                    adapters=facts["adapters"],
                    model_name=model_name,
                    progress=progress,
                    should_stop=should_stop,
                ).run()
            finally:
                results.sync()
            if summary.finished and self._config.ordered and kept:
                results = self._put_in_order(results)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise BatchStoppedError(
                f"output {str(self._output)!r} cannot be written: {error}"
            ) from error
        finally:
            with contextlib.suppress(OSError):  # it was synced, or has failed before
                results.close()
        return summary

    def _check_output(self) -> None:
        """Raise BatchError where it is clear before a model is loaded."""
        resume = self._config.resume
        if not self._is_file:
            if resume:
                raise BatchError(
                    f"output {str(self._output)!r} is no file that can be resumed"
                )
        elif self._path.exists():
            if not resume:
                raise BatchError(
                    f"output {str(self._output)!r} is there already and is never "
                    "erased; resume it, or use another"
                )
            if not self._is_blank():
                check_manifest(self._path, self._facts)
        elif not os.access(self._path.absolute().parent, os.W_OK | os.X_OK):
            raise BatchError(
                f"output {str(self._output)!r}: its folder is not there or cannot be "
                "written to"
            )

    def _open_results(
        self, facts: dict[str, object], summary: BatchSummary
    ) -> tuple[Results, KeptRows | None]:
        """Open the output and mark the lines that have rows."""
        config, path = self._config, self._path
        if not self._is_file:
            return Results.stream(self._output), None
        if not path.exists():
            return self._begin(facts), None
        if not config.resume:
            raise FileExistsError("another run has made it meanwhile")
        results = Results.reopen(path, sync_rows=config.sync_rows)
        try:
            if self._is_blank():
                write_manifest(path, facts)
            check_manifest(path, facts)
            kept = KeptRows(path, results, self.index)
            if config.retry_errors and kept.failed.any():
                good = np.flatnonzero(self.index.done & ~kept.failed)
                by_place = good[np.argsort(kept.offsets[good])]
                results = rewrite(path, results, kept, by_place, config.sync_rows)
                kept.failed[:] = False
                self.index.done[:] = False
                self.index.done[good] = True
        except BaseException:
            results.close()
            raise
        summary.kept = int(self.index.done.sum())
        summary.kept_failed = int(kept.failed.sum())
        return results, kept

    def _begin(self, facts: dict[str, object]) -> Results:
        """Make the output, and only then the manifest: it is of whoever made that."""
        results = Results.create(self._path, sync_rows=self._config.sync_rows)
        try:
            write_manifest(self._path, facts)
        except BaseException:
            self._path.unlink(missing_ok=True)  # while it is locked
            results.close()
            raise
        return results

    def _is_blank(self) -> bool:
        """Return whether a run ended between making the output and its manifest."""
        return self._path.stat().st_size == 0 and not manifest_path(self._path).exists()

    def _put_in_order(self, results: Results) -> Results:
        """Rewrite an output whose rows a resumed run could not append in order."""
        rows = KeptRows(self._path, results, self.index)
        if rows.are_in_order:
            return results
        every = np.arange(len(self.index))
        return rewrite(self._path, results, rows, every, self._config.sync_rows)


@contextlib.contextmanager
def open_batch(
    input_path: str | Path,
    output_path: str | Path,
    config: BatchConfig,
    adapters: Sequence[str] = (),
) -> Iterator[Batch]:
    """Read an input once and look at the output, before there is a model.

    Args:
      input_path: "-" is standard input, which is copied to a temporary file.
      output_path: "-" is standard output.
      adapters: names by which lines are grouped.

    Raises:
      BatchError: the input cannot be read or has a custom_id twice, or the output is
        there and is not to be resumed.
    """
    with open_source(input_path) as source:
        index = build_index(source, adapters, max_line_bytes=config.max_line_bytes)
        yield Batch(index, output_path, config)


def run_batch(
    llm: "LLM",
    input_path: str | Path,
    output_path: str | Path,
    config: BatchConfig | None = None,
    *,
    model_name: str | None = None,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> BatchSummary:
    """Run a file of requests on a model; the adapters are those registered with it.

    Arguments and errors as those of `open_batch` and `Batch.run`; a config of None is
    the default one. No signal is handled here: an interrupt ends the run with an
    exception, and what is written can be resumed.
    """
    names = [info.name for info in llm.list_adapters()]
    with open_batch(input_path, output_path, config or BatchConfig(), names) as batch:
        return batch.run(
            llm, model_name=model_name, progress=progress, should_stop=should_stop
        )
