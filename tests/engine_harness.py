"""What parity tests share: our executor driven by hand, the oracle, the tie rule."""

import contextlib
import dataclasses
import types
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jchameleon.config import PREFILL_TILE_TOKENS
from jchameleon.llm import LLM
from jchameleon.runtime.batch import StepRow
from jchameleon.runtime.executor import Executor
from jchameleon.runtime.pieces import Piece, split_blocks, split_targets
from jchameleon.runtime.shapes import piece_pages

TIE_GAP = 1e-4
"""Below this gap between the reference's two best logits, rounding picks the token."""

MOST_TIES = 0.001
"""Share of compared positions that may be ties; one is always allowed."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ForcedRow:
    """A prompt and the tokens that are fed after it, one per decode step."""

    prompt: Sequence[int]
    forced: Sequence[int]
    adapter: str | None


def poison_pool(llm: LLM) -> None:
    """Fill every page but the null page of an engine that holds nothing with NaN."""
    stats = llm.stats()
    assert stats.free_pages == stats.total_pages
    executor = llm._executor
    llm._engine.on_engine_thread(
        lambda: executor.poison(range(1, executor.num_pages)),
    )


def forced_logits(
    llm: LLM, rows: Sequence[ForcedRow], *, chunk_tokens: int, seed: int = 0
) -> list[np.ndarray]:
    """Run `rows` as one batch on the executor of an idle engine.

    KV blocks and adapters lie in shuffled free pages, all other free pages hold NaN.
    A step takes up to `chunk_tokens` of each prompt as far as the token budget allows;
    when all prompts are through, each decode step feeds one forced token to every row.

    Returns:
      per row f32[len(forced) + 1, V], what follows the prompt and each forced token.
    """

    def run() -> list[np.ndarray]:
        pool = llm._engine._planner._pool
        pages = pool.reserve("harness", pool.free_pages)
        names = {row.adapter for row in rows} - {None}
        try:
            llm._executor.poison([1, *pages])
            free = np.random.default_rng(seed).permutation(pages).tolist()
            for name in sorted(names):
                _place_adapter(llm, name, free)
            return _run_rows(llm._executor, rows, free, chunk_tokens)
        finally:
            for name in names:
                llm._executor.evict(_uid(name))
            pool.free("harness")

    return llm._engine.on_engine_thread(run)


def _uid(name: str) -> str:
    # Not the adapter's own: the engine may hold that one in pages of its choice.
    return f"harness:{name}"


def _place_adapter(llm: LLM, name: str, free: list[int]) -> None:
    executor, registry = llm._executor, llm._registry
    packed = executor.layout.pack(
        registry.get(registry.resolve(name)), dtype=executor.dtype
    )
    pages = tuple(free.pop() for _ in range(packed.shape[1]))
    piece = piece_pages(executor.layout)
    pieces = [
        Piece(pages=targets, block=jax.device_put(block, executor.device))
        for targets, block in zip(
            split_targets(pages, piece), split_blocks(packed, piece), strict=True
        )
    ]
    executor.commit(_uid(name), pages, pieces)


def _run_rows(
    executor: Executor, rows: Sequence[ForcedRow], free: list[int], chunk_tokens: int
) -> list[np.ndarray]:
    assert chunk_tokens % PREFILL_TILE_TOKENS == 0
    budget_tiles = executor.config.max_batch_tokens // PREFILL_TILE_TOKENS
    tables = [np.zeros(executor.max_blocks, np.int32) for _ in rows]
    for row, table in zip(rows, tables, strict=True):
        num_tokens = len(row.prompt) + len(row.forced)
        for block in range(-(-num_tokens // executor.config.kv_block_tokens)):
            table[block] = free.pop()

    def part(index: int, tokens: Sequence[int], start: int) -> StepRow:
        name = rows[index].adapter
        return StepRow(
            tokens=np.asarray(tokens, np.int32),
            start=start,
            pages=tables[index],
            adapter_uid=None if name is None else _uid(name),
            sampling=None,
        )

    found: list[list[np.ndarray]] = [[] for _ in rows]
    done = [0] * len(rows)
    while any(at < len(row.prompt) for at, row in zip(done, rows, strict=True)):
        step, tiles = {}, 0
        for index, row in enumerate(rows):
            piece = row.prompt[done[index] : done[index] + chunk_tokens]
            tiles_needed = -(-len(piece) // PREFILL_TILE_TOKENS)
            if piece and tiles + tiles_needed <= budget_tiles:
                step[index] = part(index, piece, done[index])
                tiles += tiles_needed
        assert step, f"{chunk_tokens=} exceeds the budget"
        logits = executor.logits(list(step.values()), prefill=True)
        for index, values in zip(step, logits, strict=True):
            done[index] += len(step[index].tokens)
            if done[index] == len(rows[index].prompt):
                found[index].append(values)
    for at in range(max(len(row.forced) for row in rows)):
        step = {
            index: part(index, row.forced[at : at + 1], len(row.prompt) + at)
            for index, row in enumerate(rows)
            if at < len(row.forced)
        }
        logits = executor.logits(list(step.values()), prefill=False)
        for index, values in zip(step, logits, strict=True):
            found[index].append(values)
    return [np.stack(values) for values in found]


def heard_compiles() -> list[str]:
    """Return a list to which every compile from now on adds its name."""
    heard: list[str] = []

    def listen(name: str, seconds: float, **_: Any) -> None:
        if "backend_compile" in name:
            heard.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.jit(lambda x: x * 3)(np.ones(3, np.float32))
    assert heard, "the listener hears nothing"
    heard.clear()
    return heard


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let the oracle warn as it likes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def import_oracle() -> Iterator[types.SimpleNamespace]:
    """Yield torch, transformers and peft, or skip; torch runs on one thread meanwhile.

    Its threads spin: beside ours, or on a busy machine, they cost far more than they
    gain on the sizes of a test.
    """
    reason = "oracle: Python 3.11 only"
    with quiet():
        oracle = types.SimpleNamespace(
            torch=pytest.importorskip("torch", reason=reason),
            transformers=pytest.importorskip("transformers", reason=reason),
            peft=pytest.importorskip("peft", reason=reason),
        )
    num_threads = oracle.torch.get_num_threads()
    oracle.torch.set_num_threads(1)
    try:
        yield oracle
    finally:
        oracle.torch.set_num_threads(num_threads)


def random_peft_model(
    oracle: types.SimpleNamespace,
    base: Any,
    folder: Path,
    *,
    seed: int,
    strength: float,
    **config: Any,
) -> Any:
    """Put a random adapter on `base`, save it as PEFT saves and return the PEFT model.

    Args:
      base: a transformers model; it is changed.
      strength: standard deviation of scale * B A beside that of the base weight,
        whatever rank and scale are.
      config: keywords of `LoraConfig`.
    """
    model = oracle.peft.get_peft_model(base, oracle.peft.LoraConfig(**config))
    generator = oracle.torch.Generator().manual_seed(seed)
    for module in model.modules():
        if not getattr(module, "lora_A", None):
            continue
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        size = strength * module.base_layer.weight.std().item()
        size /= abs(module.scaling["default"]) * a.shape[0] ** 0.5
        a.data.normal_(generator=generator)
        b.data.normal_(std=size, generator=generator)
    model.save_pretrained(folder)
    return model.eval()


@dataclasses.dataclass(slots=True)
class GreedyComparison:
    """Counts over the rows compared so far.

    Attributes:
      positions: compared, ties included.
      ties: rows whose comparison ended at a tie.
      chosen: distinct tokens that were compared.
    """

    positions: int = 0
    ties: int = 0
    chosen: set[int] = dataclasses.field(default_factory=set)

    def add(
        self, name: str, tokens: Sequence[int], reference: np.ndarray, *, gap: float
    ) -> None:
        """Compare a row up to the first tie of the reference.

        Args:
          name: of the row, for the message.
          tokens: what was produced, n of them.
          reference: f32[n, V], the reference's logits after the same tokens; where
            they agree so far, its best token is what it would produce itself.
          gap: between the two best logits, below which they are a tie.
        """
        assert len(tokens) == len(reference)
        for at, (token, logits) in enumerate(zip(tokens, reference, strict=True)):
            self.positions += 1
            second, best = np.partition(logits, -2)[-2:]
            if best - second < gap:
                self.ties += 1
                print(f"{name}: tie at {at}, gap {best - second:.2g}")
                return
            assert token == logits.argmax(), (
                f"{name}: token {at} is {token}, must be {logits.argmax()} "
                f"(gap {best - second:.2g})"
            )
            self.chosen.add(int(token))

    def check(self) -> None:
        """Assert that few comparisons ended early."""
        print(f"{self.positions} positions, {self.ties} ties")
        assert self.ties <= max(1, MOST_TIES * self.positions)
