"""Prompts and completions as packed batches of tokens, for tools/train_lora.py."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from jchameleon.errors import ConfigError, InvalidRequestError
from jchameleon.models.loader import LoadedModel

Pair = tuple[str, str]
"""(prompt, completion) as text."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One text as tokens; the last `num_labels` of them are the completion."""

    tokens: tuple[int, ...]
    num_labels: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Texts packed into rows, as `models.dense.completion_loss` takes them.

    Attributes:
      tokens, positions, segments: i32[B, T]; segment -1 is padding.
      sources, labels: i32[N]; label -1 is padding.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    sources: np.ndarray
    labels: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Tokens without the padding."""
        return int((self.segments >= 0).sum())

    def arrays(self) -> tuple[np.ndarray, ...]:
        """Return the arrays in the order in which `completion_loss` takes them."""
        return self.tokens, self.positions, self.segments, self.sources, self.labels


def read_pairs(path: Path) -> list[Pair]:
    """Read lines {"prompt": string, "completion": string}; blank lines are skipped.

    Raises:
      InvalidRequestError: unreadable, or a line is something else; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"cannot read {path}: {error}") from error
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise InvalidRequestError(f"{path}:{number} is not JSON: {error}") from None
        texts = [
            entry.get(key) if isinstance(entry, dict) else None
            for key in ("prompt", "completion")
        ]
        if not all(isinstance(text, str) and text for text in texts):
            raise InvalidRequestError(
                f'{path}:{number} must have non-empty strings "prompt" and "completion"'
            )
        pairs.append((texts[0], texts[1]))
    if not pairs:
        raise InvalidRequestError(f"{path} has no pairs")
    return pairs


def encode_pairs(model: LoadedModel, pairs: Sequence[Pair]) -> list[Example]:
    """Return the texts as the engine would see them: chat prompt, reply, end of turn.

    Raises:
      InvalidRequestError: the model has no tokenizer or no token that ends a turn, or
        a text exceeds its context.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InvalidRequestError(f"model {model.config.name!r} has no tokenizer")
    end = end_of_turn(model)
    examples = []
    for prompt, completion in pairs:
        if model.chat_template is not None:
            prompt = model.chat_template.render([{"role": "user", "content": prompt}])
        prompt_ids = tokenizer.encode(prompt)
        # Encoded apart, because in serving the prompt's last token is fixed when the
        # reply's first one is chosen.
        reply = tokenizer.encode(completion, add_special=False, parse_special=False)
        tokens = (*prompt_ids, *reply, end)
        if len(tokens) > model.config.max_position_embeddings:
            raise InvalidRequestError(
                f"prompt {prompt!r:.60} and its completion have {len(tokens)} tokens, "
                f"the model's context is {model.config.max_position_embeddings}"
            )
        examples.append(Example(tokens=tokens, num_labels=len(reply) + 1))
    return examples


def end_of_turn(model: LoadedModel) -> int:
    """Return the token that ends a reply.

    A model may have several; what the chat template puts behind a reply decides.

    Raises:
      InvalidRequestError: the model has none.
    """
    assert model.tokenizer is not None
    ends = model.tokenizer.eos_token_ids or model.config.eos_token_ids
    if not ends:
        raise InvalidRequestError(f"model {model.config.name!r} has no end token")
    if model.chat_template is not None:
        turns = [{"role": "user", "content": "?"}]
        reply = {"role": "assistant", "content": "reply"}
        text = model.chat_template.render([*turns, reply], add_generation_prompt=False)
        behind = text.rpartition("reply")[2]
        for token in model.tokenizer.encode(behind, add_special=False):
            if token in ends:
                return token
    return ends[0]


def batches(
    examples: Sequence[Example], *, rows: int, row_tokens: int, seed: int
) -> Iterator[Batch]:
    """Yield batches of one shape for ever, every text once per pass, in random order.

    A text goes into the first row with room for it.

    Raises:
      ConfigError: a text is longer than a row.
    """
    longest = max(len(example.tokens) for example in examples)
    if longest > row_tokens:
        raise ConfigError(f"{row_tokens=} must be at least the longest text, {longest}")
    num_labels = sum(example.num_labels for example in examples)
    share = num_labels / sum(len(example.tokens) for example in examples)
    most_labels = max(example.num_labels for example in examples)
    # A batch closes early when its labels are used up before its rows.
    label_slots = max(most_labels, int(rows * row_tokens * min(1.0, 1.2 * share)))
    label_slots = -(-label_slots // 32) * 32
    free, free_labels = [row_tokens] * rows, label_slots
    chosen: list[list[Example]] = [[] for _ in range(rows)]
    rng = np.random.default_rng(seed)
    while True:
        for index in rng.permutation(len(examples)):
            example = examples[index]
            row = next((r for r in range(rows) if free[r] >= len(example.tokens)), None)
            if row is None or free_labels < example.num_labels:
                yield pack(chosen, row_tokens=row_tokens, label_slots=label_slots)
                free, free_labels = [row_tokens] * rows, label_slots
                chosen = [[] for _ in range(rows)]
                row = 0
            chosen[row].append(example)
            free[row] -= len(example.tokens)
            free_labels -= example.num_labels


def pack(
    rows: Sequence[Sequence[Example]], *, row_tokens: int, label_slots: int
) -> Batch:
    """Return texts as arrays, those of a row side by side."""
    tokens = np.zeros((len(rows), row_tokens), np.int32)
    positions = np.zeros_like(tokens)
    segments = np.full_like(tokens, -1)
    sources = np.zeros(label_slots, np.int32)
    labels = np.full(label_slots, -1, np.int32)
    used = 0
    for i, row in enumerate(rows):
        start = 0
        for segment, example in enumerate(row):
            stop, count = start + len(example.tokens), example.num_labels
            tokens[i, start:stop] = example.tokens
            positions[i, start:stop] = np.arange(stop - start)
            segments[i, start:stop] = segment
            labels[used : used + count] = example.tokens[-count:]
            last = i * row_tokens + stop - 1
            sources[used : used + count] = np.arange(last - count, last)
            start, used = stop, used + count
    return Batch(
        tokens=tokens,
        positions=positions,
        segments=segments,
        sources=sources,
        labels=labels,
    )
