"""Runs the lines of a batch on an engine that has something to do until the last one.

So many completions are open at once that as many wait as run: when one ends, the engine
has the next. Nothing is held for a line but while it is open.
"""

import collections
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from jchameleon.batch.index import LineIndex
from jchameleon.batch.lines import Line, LineRequest, request_of
from jchameleon.batch.order import Feed, Reorder
from jchameleon.batch.progress import BatchSummary, Progress
from jchameleon.batch.results import Results
from jchameleon.batch.rows import FAULT_STATUS, answer_row, error_row
from jchameleon.batch.settings import BatchConfig
from jchameleon.errors import (
    BatchStoppedError,
    CapacityError,
    EngineDeadError,
    InvalidRequestError,
    QueueFullError,
    UnknownAdapterError,
)
from jchameleon.runtime.outbox import Delta, Outbox, TokenLogprobs

if TYPE_CHECKING:
    from jchameleon.llm import LLM
    from jchameleon.requests import CallRequest
    from jchameleon.runtime.submission import Submission

logger = logging.getLogger(__name__)

POLL_S = 0.1
"""How often a waiting run looks whether it is to stop or has progress to show."""


class _Gathered:
    """What a completion has sent so far, joined once at its end."""

    def __init__(self) -> None:
        self._token_ids: list[int] = []
        self._text: list[str] = []
        self._logprobs: list[TokenLogprobs] | None = None
        self._prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
        self._last: Delta | None = None

    def add(self, delta: Delta) -> None:
        """Take the next delta."""
        self._token_ids += delta.token_ids
        if delta.text:
            self._text.append(delta.text)
        if delta.logprobs is not None:
            self._logprobs = self._logprobs or []
            self._logprobs += delta.logprobs
        self._prompt_logprobs = self._prompt_logprobs or delta.prompt_logprobs
        if delta.finish_reason is not None:
            self._last = delta

    def whole(self) -> Delta:
        """Return all of it as one delta."""
        assert self._last is not None, "it has not ended"
        logprobs = self._logprobs
        return self._last._replace(
            token_ids=tuple(self._token_ids),
            text="".join(self._text),
            logprobs=None if logprobs is None else tuple(logprobs),
            prompt_logprobs=self._prompt_logprobs,
        )


class _OpenLine:
    """A line that the engine has, in whole or in part."""

    def __init__(
        self, position: int, line: Line, request: LineRequest, call: "CallRequest"
    ) -> None:
        self.position = position
        self.line = line
        self.request = request
        self.call = call
        self.gathered = [_Gathered() for _ in call.submissions]
        self.unfinished = len(call.submissions)


class Runner:
    """One run over the lines that have no row yet."""

    def __init__(
        self,
        llm: "LLM",
        index: LineIndex,
        results: Results,
        config: BatchConfig,
        summary: BatchSummary,
        *,
        adapters: Mapping[str, str],
        model_name: str | None,
        progress: Progress | None,
        should_stop: Callable[[], bool],
    ) -> None:
        """Run nothing yet.

        Args:
          adapters: the uid that each name stands for in this run.
          model_name, progress, should_stop: as those of `Batch.run`.
        """
        self._llm = llm
        self._index = index
        self._results = results
        self._config = config
        self._summary = summary
        self._adapters = adapters
        self._base_names = {llm.model_config.name, model_name}
        self._progress = progress
        self._should_stop = should_stop
        self._feed = Feed(index.adapters, index.done, window_lines=config.window_lines)
        self._reorder = None
        if config.ordered:
            self._reorder = Reorder(
                index.done,
                max_rows=config.max_held_rows,
                max_bytes=config.max_held_bytes,
            )
        self._max_open = config.max_open or 2 * llm.engine.max_running
        self._outbox = Outbox()
        # What an earlier run has cancelled may still bear its name in the engine.
        self._name = f"batch-{secrets.token_hex(4)}"
        # Of the line that is being handed over, and all that the engine has, by id.
        self._waiting: collections.deque[tuple[_OpenLine, Submission]]
        self._waiting = collections.deque()
        self._open: dict[str, tuple[_OpenLine, int]] = {}
        # Lines whose row is an error and is not written yet.
        self._failed: set[int] = set()
        self._start_s = time.monotonic()
        before = llm.stats()
        self._before = before.hits, before.misses

    def run(self) -> None:
        """Run until every line has a row, or until it is told to stop.

        Raises:
          BatchStoppedError: the engine has ended, or the input or an adapter that a
            line names has changed.
          OSError: the output cannot be written.
        """
        try:
            while not self._should_stop():
                self._show()
                if self._hand_over():
                    continue
                if self._open:
                    self._receive()
                elif self._waiting:
                    time.sleep(POLL_S)  # requests of others fill the engine's queue
                else:
                    self._summary.finished = True
                    return
            self._write_held()
        except BatchStoppedError:
            self._write_held()
            raise
        except EngineDeadError as error:
            self._write_held()
            raise BatchStoppedError(str(error)) from error
        finally:
            # What still runs has no row: the next run does it again.
            for name in self._open:
                self._llm.engine.cancel(name)
            for _, submission in self._waiting:
                submission.abandon()
            self._note_time()

    def _hand_over(self) -> bool:
        """Give the engine one more completion; return whether it may take another."""
        if len(self._open) >= self._max_open:
            return False
        if not self._waiting:
            return self._prepare_next()
        open_line, submission = self._waiting[0]
        try:
            self._llm.engine.submit(submission)
        except QueueFullError:
            return False
        self._waiting.popleft()
        self._open[submission.request_id] = open_line, submission.completion
        return True

    def _prepare_next(self) -> bool:
        """Make the next line ready; one that cannot run gets its row at once.

        Returns:
          whether there was one.
        """
        position = self._next_position()
        if position is None:
            return False
        line = self._index.line(position)
        try:
            request = request_of(line, self._config.sampling, self._config.seed)
            call = self._call(position, request)
        except (BatchStoppedError, EngineDeadError):
            raise
        except UnknownAdapterError as error:
            self._fail(position, line, 404, "model_not_found", str(error))
        except CapacityError as error:
            self._fail(position, line, 400, "capacity", str(error))
        except InvalidRequestError as error:
            self._fail(position, line, 400, "invalid_request", str(error))
        except Exception as error:  # whatever one line provokes ends that line only
            logger.exception("line %r failed", line.key)
            why = f"the request failed: {type(error).__name__}: {error}"
            self._fail(position, line, 500, "internal", why)
        else:
            open_line = _OpenLine(position, line, request, call)
            self._waiting.extend((open_line, one) for one in call.submissions)
        return True

    def _next_position(self) -> int | None:
        """Return the line that should run next, None if none should or is left."""
        reorder = self._reorder
        if reorder is not None and reorder.is_full:
            return reorder.head if self._feed.take_this(reorder.head) else None
        return self._feed.take()

    def _call(self, position: int, request: LineRequest) -> "CallRequest":
        """Return a line's request, tokenised and checked by the engine.

        Raises:
          JChameleonError: as `LLM.prepare`.
          BatchStoppedError: the adapter was replaced since the run began.
        """
        adapter = request.name
        if request.may_be_base and adapter in self._base_names:
            adapter = None
        prompt = request.prompt
        if request.messages is not None:
            prompt = self._llm.chat_tokens(request.messages)
        assert prompt is not None, "a request has one or the other"
        call = self._llm.prepare(
            f"{self._name}-{position}",
            prompt,
            adapter,
            request.sampling,
            cache_salt=request.cache_salt,
            outbox=self._outbox,
        )
        # Looked at when it is claimed: the name may stand for other content any time.
        uid = call.submissions[0].adapter_uid
        if adapter is not None and uid != self._adapters.get(adapter):
            for submission in call.submissions:
                submission.abandon()
            if adapter not in self._adapters:
                raise UnknownAdapterError(
                    f"adapter {adapter!r} was registered after the run began"
                )
            raise BatchStoppedError(
                f"adapter {adapter!r} was replaced since the run began: its rows would "
                "be of two contents"
            )
        return call

    def _receive(self) -> None:
        """Wait for output and take it; a line that ends with it gets its row."""
        try:
            name, delta = self._outbox.get(POLL_S)
        except TimeoutError:
            self._llm.engine.check_alive()
            return
        open_line, completion = self._open[name]
        open_line.gathered[completion].add(delta)
        self._summary.output_tokens += len(delta.token_ids)
        if delta.finish_reason is None:
            return
        if delta.fault in ("engine", "closed"):
            raise EngineDeadError(delta.error or "the engine has ended")
        del self._open[name]
        open_line.unfinished -= 1
        if not open_line.unfinished:
            self._end(open_line)

    def _end(self, one: _OpenLine) -> None:
        """Write the row of a line whose completions have all ended."""
        output = one.call.output([part.whole() for part in one.gathered])
        self._summary.prompt_tokens += len(output.prompt_token_ids)
        for part in output.outputs:
            if part.finish_reason in ("aborted", "error"):
                status = FAULT_STATUS.get(part.fault, 500)
                why = part.error or "the request was aborted"
                self._fail(one.position, one.line, status, part.fault or "error", why)
                return
        name = one.request.name
        row = answer_row(
            one.line,
            one.request,
            output,
            model=self._llm.model_config.name if name is None else name,
            tokenizer=self._llm.tokenizer,
        )
        self._write(one.position, row)

    def _fail(
        self, position: int, line: Line, status: int, code: str, why: str
    ) -> None:
        self._failed.add(position)
        self._write(position, error_row(line.key, status, code, " ".join(why.split())))

    def _write(self, position: int, row: bytes) -> None:
        ready = [(position, row)]
        if self._reorder is not None:
            ready = list(self._reorder.add(position, row))
        for place, one in ready:
            self._append(place, one)

    def _write_held(self) -> None:
        """Write rows that wait for earlier ones, where a later run can order them."""
        if self._reorder is not None and self._results.is_file:
            for position, row in self._reorder.rest():
                self._append(position, row)

    def _append(self, position: int, row: bytes) -> None:
        self._results.append(row)
        self._index.done[position] = True
        if position in self._failed:
            self._failed.remove(position)
            self._summary.failed += 1
        else:
            self._summary.ok += 1

    def _show(self) -> None:
        now_s = time.monotonic()
        if self._progress is not None and self._progress.is_due(now_s):
            self._note_time()
            self._progress.show(self._summary, now_s)

    def _note_time(self) -> None:
        """Bring the summary up to date."""
        self._summary.wall_s = time.monotonic() - self._start_s
        with contextlib.suppress(EngineDeadError):
            stats = self._llm.stats()
            self._summary.hits = stats.hits - self._before[0]
            self._summary.misses = stats.misses - self._before[1]
