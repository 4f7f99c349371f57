"""The library's front door: one base model, many adapters, one batch.

with LLM(model="smollm2-135m", adapters={"json": "path/to/peft_dir"}) as llm:
    outputs = llm.generate(["Hi", "Hello"], adapters=["json", None])
"""

import dataclasses
import functools
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from jchameleon.config import EngineConfig
from jchameleon.errors import ConfigError, InvalidRequestError, JChameleonError
from jchameleon.lifecycle import AdapterDrain, AdapterLifecycle
from jchameleon.lora.adapter import AdapterCard
from jchameleon.lora.peft import load_peft_adapter
from jchameleon.models.chat import ChatTemplate
from jchameleon.models.conversation import (
    Conversation,
    as_conversations,
    conversation_tokens,
)
from jchameleon.models.digests import model_digests
from jchameleon.models.export import save_model
from jchameleon.models.loader import LoadedModel, load_model
from jchameleon.outputs import (
    AdapterInfo,
    EngineFacts,
    EngineStats,
    RequestDelta,
    RequestOutput,
)
from jchameleon.requests import Caller, CallRequest, Prompt, RequestStream
from jchameleon.runtime.adapters import AdapterRegistry
from jchameleon.runtime.engine import Engine
from jchameleon.runtime.host_store import HostStore
from jchameleon.runtime.outbox import Outbox
from jchameleon.runtime.policy.presets import build_policies, load_policy
from jchameleon.runtime.programs import host_params
from jchameleon.runtime.records import StepRecord
from jchameleon.runtime.setup import build_executor, start_engine
from jchameleon.runtime.staging import choose_staging
from jchameleon.runtime.transfer import emulated_link
from jchameleon.sampling import SamplingParams


class LLM:
    """One model on one device with any number of LoRA adapters.

    Use as a context manager, or call `close()`. Methods may be called from several
    threads at once; their requests share batches.
    """

    def __init__(
        self,
        model: str | Path | LoadedModel = "smollm2-135m",
        *,
        adapters: Mapping[str, str | Path] | None = None,
        adapter_root: str | Path | None = None,
        **options: Any,
    ):
        """Load the model and adapters, compile all programs, start the engine.

        Args:
          model: preset name, GGUF file, or directory in Hugging Face's form or as
            `save` writes it; or what `load_model` returned for the same dtype.
          adapters: name -> PEFT directory.
          adapter_root: no file of an adapter outside this folder is ever opened.
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
        loaded = model
        if not isinstance(loaded, LoadedModel):
            loaded = load_model(str(loaded), dtype=config.dtype)
        elif loaded.dtype != config.dtype:
            raise ConfigError(
                f"model was loaded as {loaded.dtype}; dtype={config.dtype!r} must be "
                "the same"
            )
        self.model_config = loaded.config
        self.tokenizer = loaded.tokenizer
        self._chat_template = loaded.chat_template
        self._source = loaded.source
        self._host = HostStore(
            functools.partial(
                load_peft_adapter,
                model=loaded.config,
                max_rank=config.max_lora_rank,
                root=None if adapter_root is None else Path(adapter_root),
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
            loaded,
            config,
            self._executor,
            planner,
            log,
            choose_staging(self._executor, self._host),
            self._registry,
        )
        self._caller = Caller(
            self._engine, self._registry, self.tokenizer, self.model_config.name
        )
        try:
            self._adapters = AdapterLifecycle(
                self._registry, self._host, self._engine, self._executor
            )
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
            finish_reason "error", and a `fault` that says what kind of reason it was.
        """
        call = self._caller.call(prompts, adapters, sampling, cache_salt)
        with self._caller.opened(call):
            return call.outputs()

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        adapters: str | None | Sequence[str | None] = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cache_salt: str | None | Sequence[str | None] = None,
    ) -> RequestStream:
        """Return an iterator over pieces of output; arguments as in `generate`.

        Validation happens here, and so it is settled what the adapters' names stand
        for; the requests start at the first `next`. Closing it cancels what is left.
        """
        call = self._caller.call(prompts, adapters, sampling, cache_salt)

        def deltas() -> Generator[RequestDelta, None, None]:
            with self._caller.opened(call):
                yield from call.deltas()

        return RequestStream(deltas(), call.submissions)

    def prepare(
        self,
        request_id: str,
        prompt: Prompt,
        adapter: str | None,
        sampling: SamplingParams,
        *,
        cache_salt: str | None,
        outbox: Outbox,
    ) -> CallRequest:
        """Return a validated request, for callers that submit at their own pace.

        `engine.submit` takes its submissions; each sends its deltas to `outbox`.
        Whoever does not submit one abandons it.

        Raises:
          JChameleonError: as `generate`.
        """
        return self._caller.request(
            request_id, prompt, adapter, sampling, cache_salt, outbox
        )

    def cancel(self, request_id: str) -> None:
        """End a request as "aborted", all its completions; unknown ids are ignored."""
        self._caller.cancel(request_id)

    def register_adapter(
        self,
        name: str,
        path: str | Path,
        *,
        replace: bool = False,
        pin: bool = False,
        expected_uid: str | None = None,
    ) -> AdapterInfo:
        """Register a PEFT directory under a name while requests run.

        It has been read and checked in full when this returns. The same content under
        the same name again is no change.

        Args:
          replace: let the name stand for this content from now on, whatever it stands
            for. Requests accepted before finish on the old content, which is then
            forgotten unless another name stands for it. A pin moves to the new one.
          pin: keep it on the device, as `pin_adapter` does.
          expected_uid: refuse any other content than that of this uid.

        Raises:
          AdapterContentError: it is not the expected content.
          AdapterError: it cannot be applied exactly as PEFT would, or touches
            projections that the engine was not started for.
          AdapterConflictError: the name stands for other content.
          CapacityError: it cannot fit in the pool, or not be pinned beside others.
        """
        return self._adapters.register(
            name, path, replace=replace, pin=pin, expected_uid=expected_uid
        )

    def adapter_bytes(self, rank: int) -> int:
        """Return what an adapter of this rank takes on the device."""
        return self._executor.layout.num_pages(rank) * self._page_bytes

    def validate_adapter(self, name: str, path: str | Path) -> AdapterCard:
        """Check a PEFT directory in full, as `register_adapter` does; change nothing.

        Raises:
          AdapterError, CapacityError: as `register_adapter`.
        """
        return self._adapters.validate(name, path)

    def unregister_adapter(
        self, name: str, *, timeout_s: float | None = None, force: bool = False
    ) -> None:
        """Take no more requests for a name, wait for those it has, and forget it.

        New requests are refused from the first moment. When this returns, nothing that
        was accepted under the name is left, and device pages, host memory and all
        counters of its content are gone, unless another name stands for it. The name
        may be registered again at any time, also while old requests drain.

        Args:
          timeout_s: wait no longer than this; None waits for ever. The adapter stays
            draining after that, and another call goes on waiting. An open `stream` of
            the caller's own counts too.
          force: end its requests as "aborted" instead.

        Raises:
          UnknownAdapterError: no adapter has this name, not even one that drains.
          AdapterBusyError: requests are left after `timeout_s`; says how many.
        """
        self._adapters.unregister(name, timeout_s=timeout_s, force=force)

    def begin_unregister(self, name: str, *, force: bool = False) -> AdapterDrain:
        """Do as `unregister_adapter`; return what to wait for instead of waiting."""
        return self._adapters.begin_unregister(name, force=force)

    def pin_adapter(self, name: str) -> None:
        """Keep an adapter on the device from now on; it is loaded if it is not there.

        Raises:
          UnknownAdapterError: no adapter has this name.
          CapacityError: an accepted request could not run beside it any more.
        """
        self._adapters.pin(name)

    def unpin_adapter(self, name: str) -> None:
        """Let a pinned adapter be evicted again; one that is not pinned stays so.

        It stays on the device as long as another name pins the same content.

        Raises:
          UnknownAdapterError: no adapter has this name.
        """
        self._adapters.unpin(name)

    def list_adapters(self) -> list[AdapterInfo]:
        """Return all registered adapters and those that still drain, by name."""
        return self._adapters.infos()

    def facts(self) -> EngineFacts:
        """Return what the engine is."""
        executor = self._executor
        return EngineFacts(
            device=executor.device.device_kind,
            backend=executor.backend,
            dtype=str(executor.dtype),
            lora_targets=executor.layout.targets,
            pool_bytes=executor.pool_bytes,
            policy=load_policy(executor.config.policy).source,
        )

    def digests(self) -> dict[str, str | None]:
        """Return checksums of weights, tokenizer and chat template; takes seconds."""
        leaves = self._executor.params.leaves
        return model_digests(leaves, self.tokenizer, self._chat_template)

    def stats(self) -> EngineStats:
        """Return the engine's totals."""
        host = self._host.stats()
        link = emulated_link(self._executor.config)
        return EngineStats.of(
            self._engine.books(),
            page_bytes=self._page_bytes,
            total_pages=self._executor.num_pages - 2,
            host_bytes=host.host_bytes,
            host_adapters=host.host_adapters,
            host_hits=host.host_hits,
            disk_reads=host.disk_reads,
            emulated_link=None if link is None else str(link),
            programs=len(self._executor.compile_seconds),
        )

    def chat_prompt(self, messages: str | Sequence[Mapping[str, Any]]) -> str:
        """Return the prompt text of a conversation, ready for `generate`.

        A string stands for one user message. Special tokens that a content spells are
        special in this text; `chat_tokens` keeps them apart.

        Raises:
          InvalidRequestError: the model has no chat template.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self._template.render(messages, add_generation_prompt=True)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        adapters: str | None | Sequence[str | None] = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations: `generate` for their `chat_tokens`.

        Args:
          messages: one conversation or a list of them. A conversation is a list of
            {"role": "system", "user" or "assistant", "content": text}, or a string,
            which is one message of a user.
          adapters, sampling: as in `generate`, a conversation being a prompt.

        Raises:
          JChameleonError: as in `generate` and `chat_tokens`.
        """
        prompts = [self.chat_tokens(one) for one in as_conversations(messages)]
        return self.generate(prompts, adapters, sampling)

    def chat_tokens(self, messages: Conversation) -> list[int]:
        """Return the prompt of a conversation as token ids, for `generate`.

        Only the template's own special tokens are special: a content that spells one,
        such as "<|im_end|>", is plain text.

        Raises:
          InvalidRequestError: the model has no chat template or tokenizer, messages are
            malformed, or the template cannot tell them from its own text.
        """
        if self.tokenizer is None:
            raise InvalidRequestError(
                f"model {self.model_config.name!r} has no tokenizer; pass token ids"
            )
        return conversation_tokens(self._template, self.tokenizer, messages)

    def save(self, path: str | Path, *, form: str = "orbax") -> None:
        """Write the model, without adapters, to a new directory that `LLM` loads.

        Args:
          path: absent or empty; it appears when all is written.
          form: "orbax", or "hf" for a Hugging Face directory.

        Raises:
          ModelSaveError: the path holds something, or cannot be written.
        """
        save_model(
            LoadedModel(
                config=self.model_config,
                params=host_params(self._executor.params),
                tokenizer=self.tokenizer,
                chat_template=self._chat_template,
                source=self._source,
            ),
            Path(path),
            form=form,
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
        """Whether `chat` works."""
        return self._chat_template is not None

    @property
    def _template(self) -> ChatTemplate:
        if self._chat_template is None:
            raise InvalidRequestError(
                f"model {self.model_config.name!r} has no chat template; "
                "pass plain prompts"
            )
        return self._chat_template

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
