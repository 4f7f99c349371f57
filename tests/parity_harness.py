"""Random models and adapters of a family, run by transformers and PEFT and by us.

All adapters and two base rows of a case run in one batch; the reference runs each row
by itself, its adapter loaded by PEFT from the same directory.
"""

import contextlib
import dataclasses
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from engine_harness import (
    TIE_GAP,
    ForcedRow,
    GreedyComparison,
    forced_logits,
    poison_pool,
    quiet,
    random_peft_model,
)

from jchameleon.llm import LLM
from jchameleon.sampling import SamplingParams

TOLERANCE = 1e-4
LEAST_EFFECT = 1000 * TOLERANCE
PROMPT_TOKENS = (1, 5, 16, 31, 32, 33, 47, 70)
NEW_TOKENS = 24

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCase:
    """A model and its adapters.

    Attributes:
      config: keywords of the family's configuration class in transformers.
      adapters: keywords of `LoraConfig` by name.
      family: what transformers' classes are called after.
    """

    config: dict
    adapters: dict[str, dict]
    family: str = "Llama"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """A row as transformers and PEFT run it, alone.

    Attributes:
      adapter: None for the base model.
      tokens: the greedy tokens, n of them.
      logits: f32[n, V], what each of them was chosen from.
      base_logits: f32[n, V], the base model's at the same places.
    """

    adapter: str | None
    prompt: list[int]
    tokens: list[int]
    logits: np.ndarray
    base_logits: np.ndarray


@contextlib.contextmanager
def run_case(
    oracle: Any, root: Path, case: ModelCase
) -> Iterator[tuple[LLM, list[Reference]]]:
    """Yield (LLM with all adapters, references of all rows) of one model."""
    with quiet():
        save_random_model(oracle, root / "model", case)
        for index, (name, config) in enumerate(case.adapters.items()):
            base = load_base(oracle, root)
            random_peft_model(
                oracle, base, root / name, seed=index, strength=0.5, **config
            )
        references = run_reference(oracle, root, case)
    with LLM(
        root / "model",
        adapters={name: root / name for name in case.adapters},
        max_running=8,
        max_batch_tokens=64,
        max_model_len=128,
        max_lora_rank=64,
        pool_bytes=32 << 20,
    ) as llm:
        poison_pool(llm)
        yield llm, references


def load_base(oracle: Any, root: Path) -> Any:
    model = oracle.transformers.AutoModelForCausalLM.from_pretrained(
        root / "model", dtype=oracle.torch.float32
    )
    return model.eval()


def save_random_model(oracle: Any, folder: Path, case: ModelCase) -> None:
    """Write a model none of whose parameters and outputs are trivial."""
    oracle.torch.manual_seed(zlib.crc32(repr(case.config).encode()))
    config_class = getattr(oracle.transformers, f"{case.family}Config")
    model_class = getattr(oracle.transformers, f"{case.family}ForCausalLM")
    model = model_class(
        config_class(
            **{
                "max_position_embeddings": 512,
                "bos_token_id": None,
                "eos_token_id": None,
                "initializer_range": 1.2 * case.config["hidden_size"] ** -0.5,
                **case.config,
            }
        )
    )
    for name, value in model.named_parameters():
        if "norm" in name:
            value.data.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            value.data.normal_(std=0.5)
    model.save_pretrained(folder)


def run_reference(oracle: Any, root: Path, case: ModelCase) -> list[Reference]:
    """Return the greedy run of every row."""
    rng = np.random.default_rng(7)
    base = load_base(oracle, root)
    vocab_size = case.config["vocab_size"]
    names = [*case.adapters]
    names = [None, *names[:4], None, *names[4:]]
    references = []
    for name, num_tokens in zip(names, PROMPT_TOKENS, strict=True):
        prompt = rng.integers(0, vocab_size, num_tokens).tolist()
        model = base
        if name is not None:
            model = oracle.peft.PeftModel.from_pretrained(
                load_base(oracle, root), root / name
            ).eval()
        with oracle.torch.inference_mode():
            ids = oracle.torch.tensor([prompt])
            out = model.generate(
                input_ids=ids,
                attention_mask=oracle.torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            forced = base(out.sequences[:, :-1]).logits[0, num_tokens - 1 :]
        references.append(
            Reference(
                adapter=name,
                prompt=prompt,
                tokens=out.sequences[0, num_tokens:].tolist(),
                logits=oracle.torch.cat(out.logits).numpy(),
                base_logits=forced.numpy(),
            )
        )
    return references


def check_effects(references: list[Reference]) -> None:
    """Assert that every adapter changes the logits at every position."""
    for reference in references:
        effect = np.abs(reference.logits - reference.base_logits).max(axis=1)
        assert effect.shape == (NEW_TOKENS,)
        if reference.adapter is None:
            assert effect.max() < TOLERANCE  # cache or no cache
        else:
            assert effect.min() >= LEAST_EFFECT, reference.adapter
        assert 1 < np.abs(reference.logits).max() < 20


def check_logits(llm: LLM, references: list[Reference], *, chunk_tokens: int) -> None:
    """Assert that all rows in one batch have the reference's logits."""
    rows = [
        ForcedRow(prompt=r.prompt, forced=r.tokens[:-1], adapter=r.adapter)
        for r in references
    ]
    found = forced_logits(llm, rows, chunk_tokens=chunk_tokens, seed=chunk_tokens)
    for reference, logits in zip(references, found, strict=True):
        assert logits.shape == reference.logits.shape
        error = np.abs(logits - reference.logits).max(axis=1)
        print(f"{reference.adapter}: largest difference {error.max():.2g}")
        assert np.all(error <= TOLERANCE), (reference.adapter, error)


def check_greedy_tokens(llm: LLM, references: list[Reference]) -> None:
    """Assert that the engine's greedy tokens of one batch are the reference's."""
    outputs = llm.generate(
        [r.prompt for r in references],
        adapters=[r.adapter for r in references],
        sampling=SamplingParams(
            max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True
        ),
    )
    assert max(len(record.decode) for record in llm.step_records) == len(references)
    comparison = GreedyComparison()
    for reference, output in zip(references, outputs, strict=True):
        assert output.finish_reason == "length"
        comparison.add(
            f"{reference.adapter}", output.token_ids, reference.logits, gap=TIE_GAP
        )
    comparison.check()
    assert len(comparison.chosen) >= 20, "a model that says little proves little"
