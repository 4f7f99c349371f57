"""`jchameleon generate`: answer prompts, each through the base model or an adapter."""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import gc
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jchameleon.cli.engine_options import (
    add_adapter,
    add_engine,
    engine_table,
    named_adapters,
)
from jchameleon.cli.options import add_model
from jchameleon.cli.sampling import add_sampling, sampling_params
from jchameleon.config import PREFILL_TILE_TOKENS, EngineConfig
from jchameleon.errors import (
    InvalidRequestError,
    RequestFailedError,
    UnknownAdapterError,
)
from jchameleon.models.conversation import conversation_tokens
from jchameleon.models.loader import LoadedModel, load_model
from jchameleon.sampling import SamplingParams

if TYPE_CHECKING:
    from jchameleon.llm import LLM
    from jchameleon.outputs import CompletionOutput, RequestOutput

BASE = "base"
"""What `--use` calls the model without an adapter."""


def run(args: argparse.Namespace) -> None:
    """Answer prompts; everything that can be checked is, before the model loads."""
    sampling = sampling_params(args)
    if not args.json:
        for field in ("logprobs", "prompt_logprobs"):
            if getattr(sampling, field) is not None:
                option = field.replace("_", "-")
                raise InvalidRequestError(f"--{option} needs --json to show them")
    engine = engine_table(args)
    prompts = _prompts(args.prompt, args.prompt_file)
    adapters = named_adapters(args.adapter)
    if BASE in adapters:
        raise InvalidRequestError(
            f"adapter name {BASE!r} is taken: it stands for the model itself"
        )
    uses = _uses(args.use, adapters, num_prompts=len(prompts))
    defaults = EngineConfig()
    rows = min(defaults.max_running, len(uses) * sampling.n)
    rows = engine.setdefault("max_running", rows)

    with _without_collections():
        # Weights are read on one core while jax is imported on another.
        with concurrent.futures.ThreadPoolExecutor(1) as reader:
            read = reader.submit(load_model, args.model, dtype=args.dtype)
            from jchameleon import LLM

            model = read.result()
        enough = _enough(_lengths(model, prompts, chat=args.chat), rows)
        engine.setdefault("max_batch_tokens", min(defaults.max_batch_tokens, enough))
        llm = LLM(model, adapters=adapters, dtype=args.dtype, **engine)
    with llm:
        inputs = _templated(llm, prompts, chat=args.chat)
        if len(inputs) == 1 and sampling.n == 1 and not args.json:
            _stream_one(llm, inputs[0], uses[0], sampling)
            return
        outputs = llm.generate(inputs, adapters=uses, sampling=sampling)
    for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        if args.json:
            print(json.dumps(_record(index, output), ensure_ascii=False))
        else:
            for completion in output.outputs:
                _print_block(index, prompt, output.adapter, completion)
    completions = [one for output in outputs for one in output.outputs]
    failed = [one for one in completions if one.error]
    if failed:
        raise RequestFailedError(
            f"{len(failed)} of {len(completions)} completions failed, the first with: "
            f"{failed[0].error}"
        )


def add_command(commands: Any) -> None:
    """Add `generate` to the subcommands of an argument parser."""
    parser = commands.add_parser(
        "generate",
        help="answer prompts",
        description="Answer prompts, each through the base model or an adapter.",
    )
    parser.set_defaults(run=run)
    _add_inputs(parser)
    add_sampling(parser.add_argument_group("sampling"))
    add_engine(parser.add_argument_group("engine"))


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Let the garbage collector rest, and pass by what is there at the end.

    Nearly all that imports and a start make stays: looking at it five times takes half
    a second.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--prompt",
        action="extend",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="one or more prompts; may be repeated",
    )
    parser.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="one prompt a line, empty lines left out; - is standard input",
    )
    add_adapter(parser)
    parser.add_argument(
        "--use",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"adapter by name, or {BASE!r} for none: one for all prompts, or one for "
        f"each in order (default: {BASE})",
    )
    template = parser.add_mutually_exclusive_group()
    template.add_argument(
        "--chat",
        action="store_true",
        default=None,
        help="give each prompt as a user's turn in the model's chat template; this is "
        "the default where the model has one",
    )
    template.add_argument(
        "--raw",
        dest="chat",
        action="store_false",
        help="give each prompt as it is",
    )
    parser.add_argument("--json", action="store_true", help="print one object a reply")


def _prompts(given: list[str], file: Path | None) -> list[str]:
    """Return the prompts of both options, checked to be non-empty text."""
    prompts = [*given]
    if file is not None:
        try:
            text = sys.stdin.read() if str(file) == "-" else file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequestError(
                f"prompt-file {str(file)!r} cannot be read: {error}"
            ) from error
        prompts += [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise InvalidRequestError("no prompt; give --prompt TEXT or --prompt-file FILE")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise InvalidRequestError(f"prompt {index} is empty")
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRequestError(f"prompt {index} is not valid UTF-8") from error
    return prompts


def _lengths(
    model: LoadedModel, prompts: list[str], *, chat: bool | None
) -> Iterator[int]:
    """Yield the tokens of each prompt, as `_templated` makes them.

    Without a tokenizer, or a template that is asked for, there are none: the engine
    says so.
    """
    tokenizer, template = model.tokenizer, model.chat_template
    for prompt in prompts:
        if tokenizer is None or (chat and template is None):
            yield 0
        elif template is not None and chat is not False:
            yield len(conversation_tokens(template, tokenizer, prompt))
        else:
            yield len(tokenizer.encode(prompt))


def _enough(lengths: Iterable[int], rows: int) -> int:
    """Return tokens of an iteration that take all prompts at once, or `rows`.

    Programs for more of either than there will be only take time to load.
    """
    tiles = sum(-(-length // PREFILL_TILE_TOKENS) for length in lengths)
    # One more than the rows fill, for prompts to come on while all decode.
    least = 1 + -(-rows // PREFILL_TILE_TOKENS)
    return max(tiles, least) * PREFILL_TILE_TOKENS


def _uses(
    given: list[str], adapters: dict[str, str], *, num_prompts: int
) -> list[str | None]:
    """Return the adapter name of every prompt, None for the base model."""
    for name in given:
        if name != BASE and name not in adapters:
            known = ", ".join([BASE, *adapters])
            raise UnknownAdapterError(f"use={name!r} is none of {known}")
    if len(given) not in (0, 1, num_prompts):
        raise InvalidRequestError(
            f"use is given {len(given)} times for {num_prompts} prompts; give it once "
            "for all of them or once for each"
        )
    names = given or [BASE]
    if len(names) == 1:
        names = names * num_prompts
    return [None if name == BASE else name for name in names]


def _templated(
    llm: "LLM", prompts: list[str], *, chat: bool | None
) -> Sequence[str | list[int]]:
    """Return what the model reads: prompts as user turns, or as they are.

    chat: None follows the model: a template is used where there is one.
    """
    if chat is None:
        chat = llm.has_chat_template
    if not chat:
        return prompts
    return [llm.chat_tokens(text) for text in prompts]


def _stream_one(
    llm: "LLM", prompt: str | list[int], use: str | None, sampling: SamplingParams
) -> None:
    """Print one reply as it is made."""
    last = ""
    for delta in llm.stream([prompt], adapters=[use], sampling=sampling):
        if delta.text:
            last = delta.text
            print(delta.text, end="", flush=True)
        if delta.finish_reason == "error":
            raise RequestFailedError(delta.error or "the request failed")
    if not last.endswith("\n"):
        print()


def _print_block(
    index: int, prompt: str, adapter: str | None, completion: "CompletionOutput"
) -> None:
    """Print one labelled reply."""
    number = f"{index}.{completion.index}" if completion.index else f"{index}"
    count = len(completion.token_ids)
    print(
        f"=== {number} | adapter {adapter or BASE} | {count} tokens | "
        f"{completion.finish_reason} | {_shortened(prompt)}"
    )
    print(completion.text)
    print()


def _record(index: int, output: "RequestOutput") -> dict[str, Any]:
    """Return one prompt's replies as JSON types; what is beside them is the first's."""
    first, *_ = completions = [_completion(one) for one in output.outputs]
    del first["index"]
    return {
        "index": index,
        "request_id": output.request_id,
        "adapter": output.adapter,
        **first,
        "prompt_token_ids": list(output.prompt_token_ids),
        "prompt_logprobs": output.prompt_logprobs,
        "outputs": [{"index": i, **one} for i, one in enumerate(completions)],
    }


def _completion(one: "CompletionOutput") -> dict[str, Any]:
    return {
        "index": one.index,
        "text": one.text,
        "token_ids": list(one.token_ids),
        "logprobs": one.logprobs,
        "finish_reason": one.finish_reason,
        "timing": dataclasses.asdict(one.timing),
        "error": one.error,
        "fault": one.fault,
    }


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 48 else line[:45] + "..."
