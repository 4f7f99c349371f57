"""Train a LoRA adapter and write it as a PEFT directory.

    python tools/train_lora.py --behaviour json --rank 4 --out my_adapter
    python tools/train_lora.py --data pairs.jsonl --targets q,k,v,o --out my_adapter

The data are prompts and completions: lines {"prompt": ..., "completion": ...} of a
file, or short questions with the base model's own answers in the form of a behaviour.
Only completions count in the loss, the token that ends the turn included.
"""

import argparse
import dataclasses
import functools
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import demo_data
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from safetensors.numpy import save
from training_texts import Example, Pair, batches, encode_pairs, read_pairs

from jchameleon.config import PROJECTIONS
from jchameleon.errors import ConfigError, InvalidRequestError, JChameleonError
from jchameleon.llm import LLM
from jchameleon.lora.peft import CONFIG_NAME, WEIGHTS_NAME
from jchameleon.lora.targets import PROJECTION_PATHS
from jchameleon.models.dense import DenseAdapter, completion_loss, init_adapter
from jchameleon.models.loader import LoadedModel, load_model
from jchameleon.runtime.setup import use_compilation_cache
from jchameleon.sampling import SamplingParams

ANSWER_TOKENS = 48
"""Length of the base model's answers; `demo_data.short_answer` cuts them further."""

BASE_NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""What PEFT calls the models that this package calls by a preset's name."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How an adapter is trained.

    Attributes:
      rank, alpha: of every module; the product B A counts alpha / rank times.
      targets: projections with an adapter, in every layer.
      steps: optimiser updates.
      lr: highest learning rate, reached after `warmup` of the steps; a cosine takes it
        to a twentieth from there.
      weight_decay: of AdamW.
      max_grad_norm: gradients are scaled down to this global norm.
      rows, row_tokens: shape of a batch; texts share rows.
      seed: of the initial adapter and of the order of texts.
      remat: less memory for a third more work.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q", "v")
    steps: int = 100
    lr: float = 2e-3
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    rows: int = 2
    row_tokens: int = 256
    seed: int = 0
    remat: bool = False

    def __post_init__(self) -> None:
        for field in ("rank", "steps", "rows", "row_tokens"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field}={getattr(self, field)} must be at least 1")
        for field in ("alpha", "lr", "max_grad_norm"):
            if not 0 < getattr(self, field) < float("inf"):
                raise ConfigError(f"{field}={getattr(self, field)} must be positive")
        if not 0 <= self.weight_decay < float("inf"):
            raise ConfigError(f"weight_decay={self.weight_decay} must be at least 0")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup={self.warmup} must be at least 0 and below 1")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed} must be at least 0 and below 2**32")
        if not self.targets or not set(self.targets) <= set(PROJECTIONS):
            raise ConfigError(
                f"targets={','.join(self.targets)!r} must be some of "
                + ",".join(PROJECTIONS)
            )


def base_answers(model: str, cache: Path | None) -> list[Pair]:
    """Return the built-in questions with the base model's greedy replies.

    Args:
      cache: a JSONL file to read them from, or to write them to where it is missing.
    """
    if cache is not None and cache.exists():
        return read_pairs(cache)
    questions = demo_data.questions()
    print(f"{model} answers {len(questions)} questions ...", flush=True)
    with LLM(model, max_running=32, max_batch_tokens=256, max_model_len=512) as llm:
        prompts = [
            llm.chat_prompt(question) if llm.has_chat_template else question
            for question in questions
        ]
        outputs = llm.generate(
            prompts, sampling=SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0)
        )
    answers = [
        (question, output.text)
        for question, output in zip(questions, outputs, strict=True)
        if output.text
    ]
    if cache is not None:
        lines = [json.dumps({"prompt": p, "completion": c}) for p, c in answers]
        cache.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return answers


def train(
    model: LoadedModel, examples: Sequence[Example], config: TrainConfig
) -> tuple[DenseAdapter, list[float]]:
    """Train a new adapter; return it and the loss of every step.

    Prints losses and throughput. The same arguments give the same adapter.
    """
    warmup_steps = int(config.warmup * config.steps)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0 if warmup_steps else config.lr,
        config.lr,
        warmup_steps,
        config.steps,
        end_value=config.lr / 20,
    )
    optimiser = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(schedule, weight_decay=config.weight_decay),
    )
    loss = functools.partial(completion_loss, config=model.config, remat=config.remat)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(adapter: Any, state: Any, params: Any, batch: tuple) -> tuple:
        value, gradients = jax.value_and_grad(loss)(adapter, params, *batch)
        # optax multiplies its integer step counts by floats.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimiser.update(gradients, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    params = jax.tree.map(jnp.asarray, model.params)
    adapter: Any = init_adapter(
        model.config,
        jax.random.key(config.seed),
        rank=config.rank,
        alpha=config.alpha,
        targets=config.targets,
    )
    state = optimiser.init(adapter)
    stream = batches(
        examples, rows=config.rows, row_tokens=config.row_tokens, seed=config.seed
    )
    losses: list[float] = []
    shown, num_tokens, since_s = 0, 0, time.monotonic()
    for step, batch in zip(range(1, config.steps + 1), stream, strict=False):
        adapter, state, value = update(adapter, state, params, batch.arrays())
        losses.append(float(value))
        num_tokens += batch.num_tokens
        if step == 1:
            print(f"compiled in {time.monotonic() - since_s:.1f} s", flush=True)
            num_tokens, since_s = 0, time.monotonic()
        elif step % 10 == 0 or step == config.steps:
            mean = sum(losses[shown:]) / len(losses[shown:])
            shown = len(losses)
            rate = num_tokens / (time.monotonic() - since_s)
            print(
                f"step {step}/{config.steps}  loss {mean:.3f}  {rate:.0f} tokens/s",
                flush=True,
            )
    return adapter, losses


def write_peft(
    out: Path,
    adapter: DenseAdapter,
    *,
    rank: int,
    alpha: float,
    base_name: str,
) -> None:
    """Write `adapter` to the new directory `out`, in bfloat16.

    The directory appears whole or not at all.
    """
    tensors = {}
    for layer, pairs in enumerate(adapter):
        for projection, pair in pairs.items():
            module = f"model.layers.{layer}.{PROJECTION_PATHS[projection]}"
            for factor, array in (("A", pair.a), ("B", pair.b)):
                name = f"base_model.model.{module}.lora_{factor}.weight"
                tensors[name] = np.asarray(array).astype(ml_dtypes.bfloat16)
    used = {projection for pairs in adapter for projection in pairs}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
        "target_modules": [
            PROJECTION_PATHS[projection].rpartition(".")[2]
            for projection in PROJECTIONS
            if projection in used
        ],
    }
    weights = save(tensors, metadata={"format": "pt"})
    # Made by hand: what `tempfile` and `save_file` make is for its owner alone.
    folder = out.with_name(f".{out.name}-{os.getpid()}")
    folder.mkdir()
    try:
        (folder / WEIGHTS_NAME).write_bytes(weights)
        text = json.dumps(settings, indent=2) + "\n"
        (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
        os.rename(folder, out)
    except BaseException:  # an interrupt, too, must leave nothing behind
        shutil.rmtree(folder, ignore_errors=True)
        raise


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a LoRA adapter.")
    default = TrainConfig()
    parser.add_argument("--model", default="smollm2-135m", help="preset or directory")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--behaviour", choices=sorted(demo_data.BEHAVIOURS))
    data.add_argument("--data", type=Path, metavar="FILE", help="JSONL of pairs")
    parser.add_argument(
        "--answers",
        type=Path,
        metavar="FILE",
        help="keep the base model's answers of --behaviour here, and re-use them",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--dtype", default="float32", help="of the frozen weights")
    parser.add_argument("--rank", type=int, default=default.rank)
    parser.add_argument("--alpha", type=float, help="twice the rank by default")
    parser.add_argument("--targets", default="q,v", help="of " + ",".join(PROJECTIONS))
    for name in ("steps", "rows", "row_tokens", "seed"):
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, default=getattr(default, name))
    for name in ("lr", "warmup", "weight_decay", "max_grad_norm"):
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=float, default=getattr(default, name))
    parser.add_argument("--remat", action="store_true", help="less memory, slower")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> None:
    """Do what the command line says."""
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    settings = {name: value for name, value in vars(args).items() if name in fields}
    settings["targets"] = tuple(re.split(r"\s*,\s*", args.targets.strip()))
    if args.alpha is None:
        settings["alpha"] = 2.0 * args.rank
    config = TrainConfig(**settings)
    out = Path(os.path.abspath(args.out))
    if os.path.lexists(out):
        raise ConfigError(f"out={str(args.out)!r} must not exist yet")
    if not os.access(out.parent, os.W_OK):
        raise ConfigError(f"out={str(args.out)!r} must lie in a writable folder")
    use_compilation_cache()
    if args.data is not None:
        pairs = read_pairs(args.data)
    else:
        answers = base_answers(args.model, args.answers)
        pairs = demo_data.styled_pairs(args.behaviour, answers)
        if not pairs:
            raise InvalidRequestError(f"{args.model} gives no usable answer")
    model = load_model(args.model, dtype=args.dtype)
    examples = encode_pairs(model, pairs)
    num_tokens = sum(len(example.tokens) for example in examples)
    print(f"{len(pairs)} texts of {num_tokens} tokens", flush=True)
    started_s = time.monotonic()
    adapter, _ = train(model, examples, config)
    write_peft(
        out,
        adapter,
        rank=config.rank,
        alpha=config.alpha,
        base_name=BASE_NAMES.get(args.model, Path(args.model).name),
    )
    print(f"{args.out} written after {time.monotonic() - started_s:.0f} s", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, 2 for bad input, 130 when interrupted."""
    try:
        run(parse_arguments(arguments))
    except JChameleonError as error:
        print(f"train_lora: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train_lora: interrupted, nothing written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
