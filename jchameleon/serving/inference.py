"""InferenceService: Generate, GenerateStream, Tokenize."""

import asyncio
import concurrent.futures
import contextlib
import re
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TypeVar

import grpc

from jchameleon.llm import LLM
from jchameleon.requests import CallRequest
from jchameleon.runtime.outbox import Delta
from jchameleon.serving.admission import Admission, Ticket
from jchameleon.serving.catalog import AdapterCatalog
from jchameleon.serving.convert import (
    Replies,
    check_deadline,
    deadline_exceeded,
    prompt_of,
    sampling_params,
)
from jchameleon.serving.front import Call
from jchameleon.serving.guard import Send
from jchameleon.serving.observer import RequestObserver, RequestWatch
from jchameleon.serving.proto.jchameleon.v1 import inference_pb2 as pb
from jchameleon.serving.status import (
    StatusError,
    answer_to,
    invalid,
    status_of_fault,
)
from jchameleon.serving.streams import LoopOutbox, Stream

SHORT_REQUEST_BYTES = 2048
"""Requests up to this are tokenised and checked at once: a turn of another thread takes
longer. The whole message counts: many empty turns of a chat take long too."""

TOKENISING_THREADS = 2
"""Tokenising holds the interpreter for a good part: more would not be faster."""

T = TypeVar("T")

REQUEST_ID = re.compile(r"[!-~]{1,128}")


class InferenceService:
    """Runs requests on an engine; event loop only."""

    def __init__(
        self,
        llm: Callable[[], LLM],
        outbox: LoopOutbox,
        admission: Admission,
        observer: RequestObserver,
        catalog: AdapterCatalog,
    ) -> None:
        """Create the service.

        Args:
          llm: returns the model, or raises the StatusError that says why not now.
        """
        self._llm = llm
        self._outbox = outbox
        self._admission = admission
        self._observer = observer
        self._catalog = catalog
        self._threads = concurrent.futures.ThreadPoolExecutor(
            TOKENISING_THREADS, thread_name_prefix="jchameleon-tokenise"
        )

    def close(self) -> None:
        """Tokenise nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def generate(
        self, request: pb.GenerateRequest, context: Call
    ) -> pb.GenerateResponse:
        """Answer when all completions have ended."""
        wholes: dict[int, Delta] = {}
        async with self._running(request, context) as run:
            while deltas := await run.next():
                for index, delta in deltas:
                    before = wholes.get(index)
                    wholes[index] = delta if before is None else before.then(delta)
            run.check_end()
            return run.replies.piece(sorted(wholes.items()))

    async def generate_stream(
        self, request: pb.GenerateRequest, context: Call, send: Send
    ) -> None:
        """Send pieces as they come."""
        async with self._running(request, context) as run:
            while deltas := await run.next():
                await send(run.replies.piece(deltas))
            run.check_end()

    async def tokenize(
        self, request: pb.TokenizeRequest, context: Call
    ) -> pb.TokenizeResponse:
        """Return the token ids of a prompt."""
        llm = self._llm()
        check_model(request.model, llm)

        def encode() -> list[int]:
            prompt = prompt_of(request, llm.chat_tokens)
            if not isinstance(prompt, str):
                return list(prompt)
            if llm.tokenizer is None:
                raise no_tokenizer(llm)
            return llm.tokenizer.encode(prompt)

        with self._admission.enter():
            token_ids = await self._on_thread(encode, lambda _: None)
        return pb.TokenizeResponse(token_ids=token_ids, max_model_len=llm.max_model_len)

    @contextlib.asynccontextmanager
    async def _running(
        self, request: pb.GenerateRequest, context: Call
    ) -> AsyncIterator["_Run"]:
        """Hand a request to the engine; what still runs at the end is cancelled."""
        watch = self._observer.opened(request.request_id)
        code, reason = grpc.StatusCode.CANCELLED, ""  # unless it ends otherwise
        try:
            llm = self._llm()
            check_model(request.model, llm)
            self._catalog.use(request.adapter_id)
            deadline_s = check_deadline(context)
            with self._admission.enter(request.sampling.n) as ticket:
                call = await self._prepare(llm, request, deadline_s)
                with _submitted(llm, call, self._outbox, ticket) as stream:
                    prompt_tokens = len(call.submissions[0].prompt)
                    watch.admitted(call.request_id, request.adapter_id, prompt_tokens)
                    replies = Replies(request, call.request_id, call)
                    yield _Run(
                        stream,
                        replies,
                        ticket,
                        watch,
                        context,
                        deadline_s,
                        self._catalog,
                        call.submissions[0].adapter_uid,
                    )
            code = grpc.StatusCode.OK
        except Exception as error:
            answer = answer_to(error)
            code, reason = answer.code, answer.reason
            raise
        finally:
            watch.ended(code, reason)

    async def _prepare(
        self, llm: LLM, request: pb.GenerateRequest, deadline_s: float | None
    ) -> CallRequest:
        """Return the request, tokenised and checked; long ones on another thread."""
        request_id = request.request_id or f"gen-{secrets.token_hex(8)}"
        if not REQUEST_ID.fullmatch(request_id):
            raise invalid(
                "request_id",
                f"request_id={request_id[:40]!r} must have 1 to 128 printable ASCII "
                "characters and no spaces",
            )
        if self._outbox.is_open(request_id):
            raise StatusError(
                grpc.StatusCode.ALREADY_EXISTS,
                "DUPLICATE_REQUEST_ID",
                f"request_id={request_id!r} is in flight",
            )

        def prepare() -> CallRequest:
            if request.WhichOneof("prompt") == "text" and llm.tokenizer is None:
                raise no_tokenizer(llm)
            return llm.prepare(
                request_id,
                prompt_of(request, llm.chat_tokens),
                request.adapter_id or None,
                sampling_params(request, deadline_s=deadline_s),
                cache_salt=request.cache_salt or None,
                outbox=self._outbox,
            )

        if request.ByteSize() <= SHORT_REQUEST_BYTES:
            return prepare()
        return await self._on_thread(prepare, _abandon)

    async def _on_thread(self, job: Callable[[], T], forget: Callable[[T], None]) -> T:
        """Run a long job beside the loop.

        A job of a caller that leaves is dropped while it waits for a thread, else
        `forget` gets its result: nobody's jobs pile up in front of other people's.
        """

        def end(done: "concurrent.futures.Future[T]") -> None:
            if done.exception() is None:
                forget(done.result())

        running = self._threads.submit(job)
        try:
            return await asyncio.shield(asyncio.wrap_future(running))
        except asyncio.CancelledError:
            if not running.cancel():
                running.add_done_callback(end)
            raise


def _abandon(call: CallRequest) -> None:
    """Give up the claims of a request whose caller went away while it was checked."""
    for submission in call.submissions:
        submission.abandon()


@contextlib.contextmanager
def _submitted(
    llm: LLM, call: CallRequest, outbox: LoopOutbox, ticket: Ticket
) -> Iterator[Stream]:
    """Submit all completions of a call; at the end cancel those that still run."""
    submissions = call.submissions
    names = tuple(one.request_id for one in submissions)
    stream = None
    try:
        ticket.wait_with(len(submissions[0].prompt))
        taken = [name for name in names if outbox.is_open(name)]
        if taken:  # since it was looked at first, before tokenising
            raise StatusError(
                grpc.StatusCode.ALREADY_EXISTS,
                "DUPLICATE_REQUEST_ID",
                f"request_id={taken[0]!r} is in flight",
            )
        stream = outbox.open(names)
        for submission in submissions:
            llm.engine.submit(submission)
            stream.submitted(submission.request_id)
        yield stream
    finally:
        if stream is not None:
            stream.close()
        for submission in submissions:
            submission.abandon()  # nothing happens to what was submitted
            if stream is not None and submission.request_id in stream.unfinished:
                llm.engine.cancel(submission.request_id)


class _Run:
    """A call under way: what it has sent so far, and how it ended."""

    def __init__(
        self,
        stream: Stream,
        replies: Replies,
        ticket: Ticket,
        watch: RequestWatch,
        context: Call,
        deadline_s: float | None,
        catalog: AdapterCatalog,
        adapter_uid: str | None,
    ) -> None:
        self.replies = replies
        self._stream = stream
        self._ticket = ticket
        self._watch = watch
        self._catalog = catalog
        self._adapter_uid = adapter_uid
        self._context = context
        self._has_deadline = deadline_s is not None
        self._aborted: StatusError | None = None
        self._left = len(stream.unfinished)

    async def next(self) -> list[tuple[int, Delta]]:
        """Wait for more; return nothing when all completions have ended.

        Raises:
          StatusError: one has failed, or the deadline has passed.
        """
        if not self._left:
            return []
        deltas = await self._stream.get()
        self._ticket.started()
        for _, delta in deltas:
            self._watch.piece(len(delta.token_ids))
            if delta.finish_reason is not None:
                self._left -= 1
                self._finish(delta)
        return deltas

    def _finish(self, delta: Delta) -> None:
        self._watch.finished(delta)
        if delta.finish_reason == "error":
            raise self._failure(delta)
        if delta.finish_reason == "time_limit" and self._is_late():
            raise deadline_exceeded()
        if delta.finish_reason == "aborted":
            why = delta.error or "the request was aborted"
            self._aborted = status_of_fault(delta.fault or "cancelled", why)

    def check_end(self) -> None:
        """Raise CANCELLED where the call was aborted; what it had has been sent."""
        if self._aborted is not None:
            raise self._aborted

    def _failure(self, delta: Delta) -> StatusError:
        reason = delta.error or "it failed"
        if delta.fault == "adapter" and self._adapter_uid is not None:
            self._catalog.note_lost(self._adapter_uid, reason)
        return status_of_fault(delta.fault, reason)

    def _is_late(self) -> bool:
        """Return whether the RPC's deadline ended it, not a limit of its own."""
        left_s = self._context.time_remaining()
        return self._has_deadline and left_s is not None and left_s <= 0.001


def check_model(name: str, llm: LLM) -> None:
    """Raise NOT_FOUND unless `name` is empty or the model that is served."""
    served = llm.model_config.name
    if name not in ("", served):
        raise StatusError(
            grpc.StatusCode.NOT_FOUND,
            "UNKNOWN_MODEL",
            f"model={name[:80]!r} is not served; {served!r} is",
        )


def no_tokenizer(llm: LLM) -> StatusError:
    """Return the status of a text that nothing here can tokenise."""
    return StatusError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "NO_TOKENIZER",
        f"model {llm.model_config.name!r} has no tokenizer; send token_ids",
    )
