"""`jchameleon generate`: answer prompts, each through the base model or an adapter."""

import argparse
import concurrent.futures
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jchameleon.cli.options import add_model, comma_names
from jchameleon.cli.sampling import add_sampling, sampling_params
from jchameleon.config import PREFILL_TILE_TOKENS, EngineConfig
from jchameleon.errors import (
    InvalidRequestError,
    RequestFailedError,
    UnknownAdapterError,
)
from jchameleon.models.loader import load_model
from jchameleon.runtime.policy.presets import (
    build_policies,
    load_policy,
    policy_preset_names,
)
from jchameleon.sampling import SamplingParams

if TYPE_CHECKING:
    from jchameleon.llm import LLM
    from jchameleon.outputs import CompletionOutput, RequestOutput

BASE = "base"
"""What `--use` calls the model without an adapter."""

# Options that are handed to the engine as they are, when given.
ENGINE_FIELDS = (
    "max_model_len",
    "max_running",
    "max_batch_tokens",
    "pool_bytes",
    "lora_targets",
    "max_lora_rank",
    "host_cache_bytes",
    "policy",
    "prefix_cache",
    "plan_log",
)


def run(args: argparse.Namespace) -> None:
    """Answer prompts; everything that can be checked is, before the model loads."""
    sampling = sampling_params(args)
    if not args.json:
        for field in ("logprobs", "prompt_logprobs"):
            if getattr(sampling, field) is not None:
                option = field.replace("_", "-")
                raise InvalidRequestError(f"--{option} needs --json to show them")
    engine = {
        field: getattr(args, field)
        for field in ENGINE_FIELDS
        if getattr(args, field) is not None
    }
    build_policies(load_policy(EngineConfig(dtype=args.dtype, **engine).policy))
    prompts = _prompts(args.prompt, args.prompt_file)
    adapters = _adapters(args.adapter)
    uses = _uses(args.use, adapters, num_prompts=len(prompts))
    defaults = EngineConfig()
    rows = min(defaults.max_running, len(uses) * sampling.n)
    rows = engine.setdefault("max_running", rows)
    engine.setdefault(
        "max_batch_tokens", min(defaults.max_batch_tokens, _enough(prompts, rows))
    )

    # Weights are read on one core while jax is imported on another.
    with concurrent.futures.ThreadPoolExecutor(1) as reader:
        read = reader.submit(load_model, args.model, dtype=args.dtype)
        from jchameleon import LLM

        model = read.result()
    with LLM(model, adapters=adapters, dtype=args.dtype, **engine) as llm:
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
    _add_engine(parser.add_argument_group("engine"))


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
    parser.add_argument(
        "--adapter",
        action="extend",
        nargs="+",
        type=_named_dir,
        default=[],
        metavar="NAME=DIR",
        help="a PEFT directory and the name to use it by; may be repeated",
    )
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


def _add_engine(engine: Any) -> None:
    engine.add_argument(
        "--dtype",
        default="float32",
        metavar="D",
        help="float32 or bfloat16 (default: %(default)s)",
    )
    engine.add_argument(
        "--pool-bytes",
        type=_byte_count,
        metavar="N",
        help="memory for KV cache and adapters together, e.g. 512MiB",
    )
    for flag, text in (
        ("--max-model-len", "longest prompt and reply together, in tokens"),
        ("--max-running", "replies made at once"),
        ("--max-batch-tokens", "tokens of one iteration"),
        ("--max-lora-rank", "adapters above are refused"),
    ):
        engine.add_argument(flag, type=int, metavar="N", help=text)
    engine.add_argument(
        "--lora-targets",
        type=comma_names,
        metavar="P,P,...",
        help="projections that adapters may touch, among q,k,v,o,gate,up,down",
    )
    engine.add_argument(
        "--policy",
        metavar="NAME_OR_TOML",
        help="how requests and adapters are scheduled: a .toml file or one of "
        f"{', '.join(policy_preset_names())} (default: {EngineConfig().policy})",
    )
    engine.add_argument(
        "--prefix-cache",
        action=argparse.BooleanOptionalAction,
        help="share the KV cache of what prompts begin with (default: yes)",
    )
    engine.add_argument(
        "--host-cache-bytes",
        type=_byte_count,
        metavar="N",
        help="host memory that keeps adapter weights, e.g. 4GiB (the default)",
    )
    engine.add_argument(
        "--plan-log",
        metavar="FILE",
        help="record events and plans, for jchameleon replay",
    )


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


def _adapters(given: list[tuple[str, str]]) -> dict[str, str]:
    """Return name -> directory; a name given twice is an error, not the last one."""
    adapters: dict[str, str] = {}
    for name, directory in given:
        if name == BASE:
            raise InvalidRequestError(
                f"adapter name {BASE!r} is taken: it stands for the model itself"
            )
        if adapters.setdefault(name, directory) != directory:
            raise InvalidRequestError(
                f"adapter name {name!r} is given twice, with {adapters[name]!r} and "
                f"{directory!r}"
            )
    return adapters


def _enough(prompts: list[str], rows: int) -> int:
    """Return tokens of an iteration that take all prompts at once beside `rows`.

    Programs for more of either than there will be only take time to load. A token is a
    byte of text or more; a chat template and padding add to that, and what does not fit
    after all runs in chunks.
    """
    tokens = rows + sum(len(prompt.encode()) + 96 for prompt in prompts)
    return -(-tokens // PREFILL_TILE_TOKENS) * PREFILL_TILE_TOKENS


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


def _named_dir(text: str) -> tuple[str, str]:
    name, equals, directory = text.partition("=")
    if not (name and equals and directory):
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=DIR")
    return name, directory


def _byte_count(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,18})\s*(|[KMGT]iB)", text)
    if not match:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a number of bytes, or one with KiB, MiB, GiB or TiB"
        )
    power = ("", "KiB", "MiB", "GiB", "TiB").index(match[2])
    return int(match[1]) * 1024**power
