"""The library's front door: one base model, many adapters, one batch.

with LLM(model="smollm2-135m", adapters={"json": "path/to/peft_dir"}) as llm:
    outputs = llm.generate(["Hi", "Hello"], adapters=["json", None])
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from jchameleon.config import PROJECTIONS, EngineConfig
from jchameleon.errors import InvalidRequestError, JChameleonError, QueueFullError
from jchameleon.lora.adapter import HostAdapter
from jchameleon.lora.peft import load_peft_adapter
from jchameleon.models.loader import load_model
from jchameleon.outputs import AdapterInfo, EngineStats, RequestDelta, RequestOutput
from jchameleon.runtime.adapters import AdapterRegistry
from jchameleon.runtime.engine import Engine
from jchameleon.runtime.host_store import HostStore
from jchameleon.runtime.outbox import Delta, Outbox
from jchameleon.runtime.policy.presets import build_policies, load_policy
from jchameleon.runtime.policy.residency import AdapterStats
from jchameleon.runtime.records import StepRecord
from jchameleon.runtime.setup import build_executor, start_engine
from jchameleon.runtime.submission import Submission
from jchameleon.runtime.transfer import emulated_link
from jchameleon.sampling import SamplingParams

Prompt = str | Sequence[int]


class LLM:
    """One model on one device with any number of LoRA adapters.

    Use as a context manager, or call `close()`. Methods may be called from several
    threads at once; their requests share batches.
    """

    def __init__(
        self,
        model: str | Path = "smollm2-135m",
        *,
        adapters: Mapping[str, str | Path] | None = None,
        **options: Any,
    ):
        """Load the model and adapters, compile all programs, start the engine.

        Args:
          model: preset name, Hugging Face directory or GGUF file.
          adapters: name -> PEFT directory.
          options: fields of `EngineConfig`.

        Raises:
          JChameleonError: one of its kinds, for whatever is wrong, before any device
            work where that can be known.
        """
        config = EngineConfig.from_dict(options)
        policy = load_policy(config.policy)
        build_policies(policy)
        # From here on the table, so that a file of the user's is read once.
        config = dataclasses.replace(config, policy=policy.to_dict())
        if not isinstance(adapters, Mapping | None):
            raise InvalidRequestError(
                f"adapters={adapters!r:.60} must map names to PEFT directories"
            )
        loaded = load_model(str(model), dtype=config.dtype)
        self.model_config = loaded.config
        self.tokenizer = loaded.tokenizer
        self._chat_template = loaded.chat_template
        self._host = HostStore(
            functools.partial(
                load_peft_adapter, model=loaded.config, max_rank=config.max_lora_rank
            ),
            budget_bytes=config.host_cache_bytes,
        )
        self._registry = AdapterRegistry(self._host)
        for name, path in (adapters or {}).items():
            self._registry.add(name, self._registry.load(name, path))
        cards = [self._registry.card(u) for u in self._registry.names().values()]
        # Bad input is found by here or by the first lines of this; then device work.
        self._executor, planner, log = build_executor(loaded, config, cards)
        self._engine = start_engine(
            loaded, config, self._executor, planner, log, self._registry.get
        )
        self._ids = itertools.count()
        try:
            for card in cards:
                self._engine.register_adapter(card)
        except JChameleonError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine; requests in flight end as "aborted"."""
        self._engine.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        adapters: str | None | Sequence[str | None] = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cache_salt: str | None | Sequence[str | None] = None,
    ) -> list[RequestOutput]:
        """Run prompts to their ends and return their outputs in order.

        Args:
          prompts: one or a list; each a string or a list of token ids.
          adapters: one name for all, or one per prompt; None is the base model.
          sampling: one for all, or one per prompt.
          cache_salt: one for all, or one per prompt. Requests share cached KV blocks
            only with those of the same salt, so that a tenant cannot tell from the
            time to its first token what others asked.

        Raises:
          JChameleonError: a prompt, adapter or sampling value is wrong; nothing of the
            call has run then. A request that fails later is returned with
            finish_reason "error".
        """
        batch = self._prepare(prompts, adapters, sampling, cache_salt)
        pieces = [Delta() for _ in batch]
        for index, _, delta in self._run(batch):
            pieces[index] = pieces[index].then(delta)
        return [
            request.output(piece) for request, piece in zip(batch, pieces, strict=True)
        ]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        adapters: str | None | Sequence[str | None] = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cache_salt: str | None | Sequence[str | None] = None,
    ) -> Iterator[RequestDelta]:
        """Yield pieces of output as they come; arguments as in `generate`.

        Validation happens here; the requests start at the first `next`. Closing the
        iterator early cancels what still runs.
        """
        batch = self._prepare(prompts, adapters, sampling, cache_salt)

        def deltas() -> Iterator[RequestDelta]:
            for index, request_id, delta in self._run(batch):
                yield RequestDelta(
                    index=index,
                    request_id=request_id,
                    text=delta.text,
                    token_ids=delta.token_ids,
                    finish_reason=delta.finish_reason,
                    error=delta.error,
                    timing=delta.timing,
                )

        return deltas()

    def cancel(self, request_id: str) -> None:
        """End a running request as "aborted"; unknown ids are ignored."""
        self._engine.cancel(request_id)

    def add_adapter(self, name: str, path: str | Path) -> AdapterInfo:
        """Register a PEFT directory while requests run.

        The same content under the same name again is no change.

        Raises:
          AdapterError: it cannot be applied exactly as PEFT would, or touches
            projections that the engine was not started for.
          AdapterConflictError: the name stands for other content.
        """
        adapter = self._registry.load(name, path)
        self._register(name, adapter)
        [stats] = self._engine.adapter_stats([adapter.uid])
        return self._info(name, adapter.uid, stats)

    def pin_adapter(self, name: str) -> None:
        """Keep an adapter on the device from now on; it is loaded if it is not there.

        Raises:
          UnknownAdapterError: no adapter has this name.
          CapacityError: an accepted request could not run beside it any more.
        """
        self._engine.pin_adapter(self._registry.resolve(name), pinned=True)

    def unpin_adapter(self, name: str) -> None:
        """Let a pinned adapter be evicted again; one that is not pinned stays so.

        Raises:
          UnknownAdapterError: no adapter has this name.
        """
        self._engine.pin_adapter(self._registry.resolve(name), pinned=False)

    def list_adapters(self) -> list[AdapterInfo]:
        """Return all registered adapters, by name."""
        names = self._registry.names()
        stats = self._engine.adapter_stats(list(names.values()))
        infos = [
            self._info(name, uid, row)
            for (name, uid), row in zip(names.items(), stats, strict=True)
        ]
        return sorted(infos, key=lambda info: info.name)

    def stats(self) -> EngineStats:
        """Return the engine's totals."""
        books = self._engine.books()
        host = self._host.stats()
        link = emulated_link(self._executor.config)
        return EngineStats(
            page_bytes=self._page_bytes,
            total_pages=self._executor.num_pages - 2,
            kv_pages=books.kv_pages,
            cached_pages=books.cached_pages,
            adapter_pages=books.resident_pages + books.loading_pages,
            free_pages=books.free_pages,
            hits=books.hits,
            misses=books.misses,
            loads=books.loads,
            load_failures=books.load_failures,
            evictions=books.evictions,
            host_bytes=host.host_bytes,
            host_adapters=host.host_adapters,
            host_hits=host.host_hits,
            disk_reads=host.disk_reads,
            emulated_link=None if link is None else str(link),
            bypasses=books.bypasses,
            squashes=books.squashes,
            growth_squashes=books.growth_squashes,
            grown_pages=books.grown_pages,
            stalls=books.stalls,
            lanes=books.lanes,
            prefix_queried_tokens=books.prefix_queried_tokens,
            prefix_hit_tokens=books.prefix_hit_tokens,
            evicted_blocks=books.evicted_blocks,
            waiting=books.waiting,
            running=books.running,
            programs=len(self._executor.compile_seconds),
        )

    def chat_prompt(self, messages: str | Sequence[Mapping[str, Any]]) -> str:
        """Return the prompt text of a conversation, ready for `generate`.

        A string stands for one user message.

        Raises:
          InvalidRequestError: the model has no chat template.
        """
        if self._chat_template is None:
            raise InvalidRequestError(
                f"model {self.model_config.name!r} has no chat template; "
                "pass plain prompts"
            )
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self._chat_template.render(
            [dict(message) for message in messages], add_generation_prompt=True
        )

    @property
    def engine(self) -> Engine:
        """The engine behind this object, for callers that submit at their own pace."""
        return self._engine

    @property
    def max_model_len(self) -> int:
        """Longest prompt + output in tokens."""
        return self._executor.max_model_len

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat_prompt` works."""
        return self._chat_template is not None

    @property
    def compile_seconds(self) -> dict[str, float]:
        """Seconds that each program took to compile or to read from the cache."""
        return dict(self._executor.compile_seconds)

    @property
    def step_records(self) -> list[StepRecord]:
        """What the last iterations ran, oldest first."""
        return self._engine.step_records

    @property
    def _page_bytes(self) -> int:
        return self._executor.pool_bytes // self._executor.num_pages

    def _register(self, name: str, adapter: HostAdapter) -> None:
        self._registry.check(name, adapter)
        # The engine first: a name must never lead to an adapter it does not know.
        self._engine.register_adapter(adapter.card)
        self._registry.add(name, adapter)

    def _info(self, name: str, uid: str, stats: AdapterStats) -> AdapterInfo:
        card = self._registry.card(uid)
        pages = self._executor.layout.num_pages(card.rank)
        return AdapterInfo(
            name=name,
            uid=uid,
            rank=card.rank,
            targets=tuple(p for p in PROJECTIONS if p in card.targets),
            source=card.source,
            device_bytes=pages * self._page_bytes,
            resident=stats.state == "resident",
            in_host_memory=self._host.holds(uid),
            pinned=stats.pinned,
            hits=stats.hits,
            misses=stats.misses,
            loads=stats.loads,
            evictions=stats.evictions,
            load_failures=stats.failures,
        )

    def _prepare(
        self,
        prompts: Prompt | Sequence[Prompt],
        adapters: str | None | Sequence[str | None],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        cache_salt: str | None | Sequence[str | None],
    ) -> list["_Prepared"]:
        """Validate a whole call before any of it runs."""
        prompt_list = as_prompt_list(prompts)
        names = per_prompt("adapters", adapters, (str, type(None)), len(prompt_list))
        params = per_prompt(
            "sampling",
            SamplingParams() if sampling is None else sampling,
            (SamplingParams,),
            len(prompt_list),
        )
        salts = per_prompt(
            "cache_salt", cache_salt, (str, type(None)), len(prompt_list)
        )
        outbox = Outbox()
        batch = []
        for prompt, name, one, salt in zip(
            prompt_list, names, params, salts, strict=True
        ):
            uid = None if name is None else self._registry.resolve(name)
            if isinstance(prompt, str):
                if self.tokenizer is None:
                    raise InvalidRequestError(
                        f"model {self.model_config.name!r} has no tokenizer; "
                        "pass token ids"
                    )
                if not prompt:
                    raise InvalidRequestError("prompt is empty")
                tokens: Sequence[int] = self.tokenizer.encode(prompt)
            else:
                tokens = prompt
            submission = self._engine.prepare(
                f"req-{next(self._ids)}",
                tokens,
                one,
                adapter_uid=uid,
                outbox=outbox,
                cache_salt=salt,
            )
            batch.append(_Prepared(submission=submission, adapter=name))
        return batch

    def _run(self, batch: Sequence["_Prepared"]) -> Iterator[tuple[int, str, Delta]]:
        """Submit all and yield (index, request id, delta) until all have ended.

        A call may be larger than the engine's queue: what does not fit yet is
        submitted as earlier requests end.
        """
        open_requests: dict[str, int] = {}
        submitted = 0
        try:
            while submitted < len(batch) or open_requests:
                try:
                    while submitted < len(batch):
                        submission = batch[submitted].submission
                        self._engine.submit(submission)
                        open_requests[submission.request_id] = submitted
                        submitted += 1
                except QueueFullError:
                    if not open_requests:
                        raise
                request_id, delta = batch[0].submission.outbox.get()
                index = open_requests[request_id]
                if delta.finish_reason is not None:
                    del open_requests[request_id]
                yield index, request_id, delta
        finally:
            for request_id in open_requests:
                self._engine.cancel(request_id)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Prepared:
    """A validated request of one call; all of a call share an outbox."""

    submission: Submission
    adapter: str | None

    def output(self, whole: Delta) -> RequestOutput:
        assert whole.finish_reason is not None and whole.timing is not None
        return RequestOutput(
            request_id=self.submission.request_id,
            adapter=self.adapter,
            prompt_token_ids=tuple(self.submission.prompt.tolist()),
            token_ids=whole.token_ids,
            text=whole.text,
            finish_reason=whole.finish_reason,
            error=whole.error,
            timing=whole.timing,
        )


def as_prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return a list of prompts; one string or one list of token ids is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise InvalidRequestError(
            f"prompts of type {type(prompts).__name__} must be a string, a list of "
            "strings or a list of lists of token ids"
        )
    if not prompts:
        return []
    if all(isinstance(item, int) and not isinstance(item, bool) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    for item in prompts:
        if isinstance(item, str):
            continue
        if not isinstance(item, Sequence) or isinstance(item, bytes):
            raise InvalidRequestError(
                f"prompt {item!r:.60} must be a string or a list of token ids"
            )
    return list(prompts)  # type: ignore[arg-type]


def per_prompt(field: str, value: Any, kinds: tuple[type, ...], count: int) -> list:
    """Return one value per prompt; a single value stands for all.

    Raises:
      InvalidRequestError: wrong type, or a list of another length than the prompts.
    """
    if isinstance(value, kinds):
        return [value] * count
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise InvalidRequestError(f"{field}={value!r:.60} must be {names} or a list")
    for item in value:
        if not isinstance(item, kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise InvalidRequestError(
                f"{field} has {item!r:.60}, which must be {names}"
            )
    if len(value) != count:
        raise InvalidRequestError(
            f"{field} has {len(value)} entries for {count} prompts"
        )
    return list(value)
