"""A request while it waits or runs: its tokens, pages, text and time marks."""

import numpy as np

from jchameleon.models.tokenizer import Tokenizer
from jchameleon.runtime.batch import StepRow
from jchameleon.runtime.block_keys import next_key
from jchameleon.runtime.decode_rows import DecodeTable
from jchameleon.runtime.drawing import DrawnToken, RowSampling
from jchameleon.runtime.edits import RowEdits
from jchameleon.runtime.faults import Fault
from jchameleon.runtime.logprobs import unpack_logprobs
from jchameleon.runtime.outbox import (
    Delta,
    FinishReason,
    RequestTiming,
    TokenLogprobs,
)
from jchameleon.runtime.output import OutputText
from jchameleon.runtime.scoring import Targets
from jchameleon.runtime.submission import Submission


class LiveRequest:
    """Engine-side state of one request; engine thread only.

    Attributes:
      submission: what was asked.
      num_tokens: prompt and output tokens so far.
      place: in the table of decode rows while it runs, else -1.
      bypasses: times that a younger request was admitted over it.
      cached_tokens: tokens that it did not run because their KV entries were cached.
    """

    # What every token reads comes first and in one place: after a step the caches of
    # the processor hold weights, and each line of memory has to be fetched again.
    __slots__ = (
        "num_tokens",
        "_tokens",
        "_pages",
        "place",
        "_table",
        "_block_tokens",
        "_last_key",
        "_edits",
        "_first_token_s",
        "_first_end_tokens",
        "_end_token_ids",
        "_has_stop",
        "_max_tokens",
        "_adapter_uid",
        "_how_to_draw",
        "_owes_prompt_logprobs",
        "submission",
        "_num_keys",
        "_text",
        "_num_pages",
        "_prompt_logprobs",
        "_cache_hit",
        "_waits_since_s",
        "_queue_s",
        "_waits_for_adapter_since_s",
        "_load_s",
        "_lane",
        "_wrs",
        "_squashes",
        "bypasses",
        "cached_tokens",
    )

    def __init__(
        self,
        submission: Submission,
        *,
        seed: tuple[int, int],
        tokenizer: Tokenizer | None,
        eos_token_ids: frozenset[int],
    ):
        prompt, sampling = submission.prompt, submission.sampling
        self.submission = submission
        self.num_tokens = len(prompt)
        self._end_token_ids = frozenset() if sampling.ignore_eos else eos_token_ids
        if sampling.stop_token_ids:
            self._end_token_ids |= frozenset(sampling.stop_token_ids)
        self._edits: RowEdits | None = None
        if sampling.edits_logits:
            self._edits = RowEdits(sampling, prompt, end_token_ids=self._end_token_ids)
        self._prompt_logprobs: list[TokenLogprobs | None] = [None]
        self._owes_prompt_logprobs = sampling.prompt_logprobs is not None
        self._adapter_uid = submission.adapter_uid
        self._has_stop = bool(sampling.stop)
        self._first_end_tokens = len(prompt) + sampling.min_tokens + 1
        self._max_tokens = len(prompt) + sampling.max_tokens
        self._tokens = np.zeros(self._max_tokens, np.int32)
        self._tokens[: len(prompt)] = prompt
        self._how_to_draw = (
            0.0 if sampling.greedy else sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            sampling.min_p,
            seed,
        )
        self._text = OutputText(
            tokenizer, sampling.stop, include_stop=sampling.include_stop
        )
        self.place = -1
        self._table: DecodeTable | None = None
        self._pages: np.ndarray | None = None  # i32[NB], its own row of the table
        self._cache_hit: bool | None = None
        self._num_pages = 0
        self._waits_since_s: float | None = submission.arrival_s
        self._queue_s = 0.0
        self._waits_for_adapter_since_s: float | None = None
        self._load_s = 0.0
        self._first_token_s: float | None = None
        self._lane: int | None = None
        self._wrs: float | None = None
        self._squashes = 0
        self.bypasses = 0
        self.cached_tokens = 0
        keys = submission.block_keys
        self._last_key = None if keys is None else keys.last
        self._num_keys = 0 if keys is None else len(keys.keys)
        self._block_tokens = 1 if keys is None else keys.block_tokens

    def admit(
        self, pages: tuple[int, ...], table: DecodeTable, *, hit: bool, now_s: float
    ) -> None:
        """Take the KV pages that the plan hands out, and a place in the table.

        `hit`: its adapter is resident.
        """
        self._table = table
        self.place = table.take(self._sampling(), adapter_uid=self._adapter_uid)
        self._pages = table.pages[self.place]
        self._num_pages = 0
        self.grow(pages)
        if self.submission.adapter_uid is not None:
            if self._cache_hit is None:
                self._cache_hit = hit
            if not hit:
                self._waits_for_adapter_since_s = now_s
        self._leave_queue(now_s)

    def _leave_queue(self, now_s: float) -> None:
        if self._waits_since_s is not None:
            self._queue_s += now_s - self._waits_since_s
            self._waits_since_s = None

    def grow(self, pages: tuple[int, ...]) -> None:
        """Take more KV pages behind those it has."""
        assert self._pages is not None, "grows before it was admitted"
        end = self._num_pages + len(pages)
        self._pages[self._num_pages : end] = pages
        self._num_pages = end

    def swap(self, first_block: int, pages: tuple[int, ...]) -> None:
        """Take other pages, with the same KV entries, for those from a block on."""
        assert self._pages is not None, "swaps before it was admitted"
        self._pages[first_block : first_block + len(pages)] = pages

    def filled_key(self) -> str | None:
        """Return the key of the block that the last step filled with output, if any.

        To be asked once after each step that drew a token for it, before `add`: all
        tokens that it has then have their KV entries.
        """
        if self.num_tokens % self._block_tokens or self._last_key is None:
            return None
        blocks = self.num_tokens // self._block_tokens
        if blocks == self._num_keys:
            return None
        assert blocks == self._num_keys + 1, "a block was left out"
        start = self.num_tokens - self._block_tokens
        self._last_key = next_key(self._last_key, self._tokens[start : self.num_tokens])
        self._num_keys = blocks
        return self._last_key

    def squash(self, now_s: float) -> None:
        """Give the pages back; the tokens stay, to be run again from the first on."""
        self.adapter_arrived(now_s)
        self._waits_since_s = now_s
        self._squashes += 1
        self.leave()

    def leave(self) -> None:
        """Give the place in the table back, if it has one."""
        if self._table is not None:
            self._table.release(self.place)
        self._table = self._pages = None
        self.place = -1

    def enter_lane(self, lane: int, wrs: float) -> None:
        """Note the lane that it was admitted through and its size."""
        self._lane, self._wrs = lane, wrs

    def adapter_arrived(self, now_s: float) -> None:
        """Note that it no longer waits for its adapter."""
        if self._waits_for_adapter_since_s is not None:
            self._load_s += now_s - self._waits_for_adapter_since_s
            self._waits_for_adapter_since_s = None

    def row(self, start: int, end: int) -> StepRow:
        """Return tokens `start` to `end` as part of prefill, drawing after the last."""
        assert self._pages is not None, "planned before it was admitted"
        return StepRow(
            tokens=self._tokens[start:end],
            start=start,
            pages=self._pages,
            adapter_uid=self._adapter_uid,
            sampling=self._sampling() if end == self.num_tokens else None,
            targets=self._targets(start, end) if self._owes_prompt_logprobs else None,
        )

    def _sampling(self) -> RowSampling:
        return RowSampling(
            *self._how_to_draw,
            position=self.num_tokens,
            edits=self._edits,
            logprobs=self.submission.sampling.logprobs,
        )

    def _targets(self, start: int, end: int) -> Targets | None:
        """Return the prompt tokens after tokens `start` to `end` still to be scored.

        After a squash the prompt runs again, and what is known is not asked for again.
        """
        prompt = self.submission.prompt
        known = len(self._prompt_logprobs)
        if self.submission.sampling.prompt_logprobs is None or known == len(prompt):
            return None
        tokens = prompt[known : end + 1]
        if not len(tokens):
            return None
        assert start < known, "prompt tokens were left out"
        return Targets(offset=known - 1 - start, tokens=tokens)

    def add_scores(self, packed: np.ndarray) -> None:
        """Take i32[n, 2, 1 + K] of the next prompt tokens."""
        count = self.submission.sampling.prompt_logprobs
        assert count is not None, "scored without having asked"
        self._prompt_logprobs += [unpack_logprobs(one, count) for one in packed]

    def add(self, token: int, now_s: float) -> FinishReason | None:
        """Append a drawn token and return why the request ends here, if it does."""
        self._tokens[self.num_tokens] = token
        self.num_tokens = num_tokens = self.num_tokens + 1
        if self._table is not None:
            self._table.set_last(self.place, token, num_tokens)
        if self._edits is not None:
            self._edits.add(token)
            if self._edits.over:
                self._edits = None
                if self._table is not None:
                    self._table.drop_edits(self.place)
        if self._first_token_s is None:
            self._first_token_s = now_s
        may_end = num_tokens >= self._first_end_tokens
        if may_end and token in self._end_token_ids:
            if self.submission.sampling.include_stop:
                self._text.push(token)
            return "stop"
        # Without stop strings the text decides nothing, and `delta` sees to it later.
        if self._has_stop and self._text.push(token, may_stop=may_end):
            return "stop"
        if num_tokens == self._max_tokens:
            if not self._has_stop:
                self._text.push(token)
            return "length"
        return None

    def delta(self, drawn: DrawnToken) -> Delta:
        """Return what is new with a drawn token, which is not the last.

        To be asked after each `add`, before the next one.
        """
        if not self._has_stop:
            self._text.push(drawn.token)
        logprobs = None if drawn.logprobs is None else (drawn.logprobs,)
        return Delta(
            token_ids=(drawn.token,),
            text=self._text.take(),
            logprobs=logprobs,
            prompt_logprobs=self._take_prompt_logprobs(),
        )

    def _take_prompt_logprobs(self) -> tuple[TokenLogprobs | None, ...] | None:
        """Return those of the whole prompt, if they are asked for; once."""
        if not self._owes_prompt_logprobs:
            return None
        if len(self._prompt_logprobs) < len(self.submission.prompt):
            return None
        self._owes_prompt_logprobs = False
        return tuple(self._prompt_logprobs)

    def last_delta(
        self,
        reason: FinishReason,
        now_s: float,
        *,
        error: str | None = None,
        fault: Fault | None = None,
        drawn: DrawnToken | None = None,
    ) -> Delta:
        """Return the end of the output, with a last token and the request's timing."""
        logprobs = drawn.logprobs if drawn is not None else None
        return Delta(
            token_ids=() if drawn is None else (drawn.token,),
            text=self._text.close(),
            logprobs=None if logprobs is None else (logprobs,),
            prompt_logprobs=self._take_prompt_logprobs(),
            finish_reason=reason,
            error=error,
            fault=fault,
            timing=self.timing(now_s),
        )

    def timing(self, now_s: float) -> RequestTiming:
        """Return where its time went if it ends now."""
        self.adapter_arrived(now_s)
        self._leave_queue(now_s)
        first_s, arrival_s = self._first_token_s, self.submission.arrival_s
        return RequestTiming(
            queue_s=self._queue_s,
            adapter_load_s=self._load_s,
            ttft_s=None if first_s is None else first_s - arrival_s,
            total_s=now_s - arrival_s,
            adapter_cache_hit=self._cache_hit,
            lane=self._lane,
            wrs=self._wrs,
            bypasses=self.bypasses,
            squashes=self._squashes,
            cached_tokens=self.cached_tokens,
        )
