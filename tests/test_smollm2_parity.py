"""SmolLM2-135M from its GGUF against transformers and PEFT on the same weights."""

import dataclasses

import numpy as np
import pytest
from engine_harness import (
    TIE_GAP,
    ForcedRow,
    GreedyComparison,
    forced_logits,
    import_oracle,
    poison_pool,
    quiet,
    random_peft_model,
)
from smollm2 import smollm2_path, transformers_smollm2

from jchameleon.llm import LLM
from jchameleon.outputs import RequestOutput
from jchameleon.sampling import SamplingParams

NEW_TOKENS = 32
TOLERANCE = 1e-4
"""Largest difference of a logit, relative to the row's largest magnitude."""

QUESTIONS = (
    "What is the capital of France?",
    "Write two sentences about the sea.",
    "Explain what a prime number is to a child, then name three of them.",
)
CONTINUATIONS = (
    "The",
    "def fibonacci(n):\n    ",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,",
    "A river begins where rain and melting snow gather faster than the ground can "
    "drink them. At first it is narrow and quick, and it carries stones that knock "
    "against each other until they are round. Further down, where the land is flat, "
    "it slows and spreads, and what it carried sinks to the bottom as sand and mud. "
    "People have always settled there, because the mud is rich and the water is "
    "close. They built bridges and mills, they dug canals to lead the water to their "
    "fields, and they raised walls of earth against the floods of spring. In time the "
    "villages became towns, the mills became factories, and the river carried boats "
    "loaded with grain, timber, cloth and salt from one market to the next. Some "
    "floods were so high that people still mark them on the walls of their houses. "
    "Today many of these walls are being moved back again, so that the river may "
    "flood a meadow now and then without harm to anyone. The most important lesson "
    "from all of this is that",
)
ADAPTED = "Tell me a short story about a fox."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One batch of ours, and what transformers and PEFT say after the same tokens.

    Attributes:
      reference: per row f32[NEW_TOKENS, V].
      without_adapter: f32[NEW_TOKENS, V], the base model's after the tokens of the
        last row, the only one with an adapter.
    """

    llm: LLM
    outputs: list[RequestOutput]
    reference: list[np.ndarray]
    without_adapter: np.ndarray


@pytest.fixture(scope="module")
def oracle():
    with import_oracle() as oracle:
        yield oracle


@pytest.fixture(scope="module")
def run(oracle, tmp_path_factory):
    path = smollm2_path()
    folder = tmp_path_factory.mktemp("adapter")
    with quiet():
        model = random_peft_model(
            oracle,
            transformers_smollm2(),
            folder,
            seed=0,
            strength=0.25,
            r=16,
            lora_alpha=24,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        )
    with LLM(
        path,
        adapters={"random": folder},
        max_running=8,
        max_batch_tokens=40,
        max_model_len=256,
        max_lora_rank=16,
        pool_bytes=256 << 20,
    ) as llm:
        poison_pool(llm)
        chats = [llm.chat_prompt(text) for text in (*QUESTIONS, ADAPTED)]
        outputs = llm.generate(
            [*CONTINUATIONS, *chats],
            adapters=[None] * (len(CONTINUATIONS) + len(QUESTIONS)) + ["random"],
            sampling=SamplingParams(
                max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True
            ),
        )
        with model.disable_adapter():
            *base, without_adapter = [teacher_forced(oracle, model, o) for o in outputs]
        yield Run(
            llm=llm,
            outputs=outputs,
            reference=[*base, teacher_forced(oracle, model, outputs[-1])],
            without_adapter=without_adapter,
        )
    model.unload()  # the base model belongs to other tests too


def teacher_forced(oracle, model, output):
    """Return f32[n, V], what the reference would choose each of our tokens from.

    One pass over prompt and tokens: where its best token is ours at every place, it
    would have produced the same tokens itself.
    """
    ids = oracle.torch.tensor([[*output.prompt_token_ids, *output.token_ids[:-1]]])
    with oracle.torch.inference_mode():
        return model(ids, logits_to_keep=NEW_TOKENS).logits[0].numpy()


def test_greedy_tokens_in_one_batch_are_those_of_transformers(run):
    lengths = [len(output.prompt_token_ids) for output in run.outputs]
    assert min(lengths) <= 2
    assert max(lengths) >= 190
    assert max(len(record.decode) for record in run.llm.step_records) == 8
    comparison = GreedyComparison()
    for output, reference in zip(run.outputs, run.reference, strict=True):
        assert output.finish_reason == "length"
        print(f"{output.adapter}: {output.text!r}")
        comparison.add(output.request_id, output.token_ids, reference, gap=TIE_GAP)
    comparison.check()


def test_logits_in_one_batch_are_those_of_transformers_and_peft(run):
    rows = [
        ForcedRow(
            prompt=output.prompt_token_ids,
            forced=output.token_ids[:-1],
            adapter=output.adapter,
        )
        for output in run.outputs
    ]
    found = forced_logits(run.llm, rows, chunk_tokens=32)
    for output, reference, logits in zip(
        run.outputs, run.reference, found, strict=True
    ):
        assert logits.shape == reference.shape
        error = np.abs(logits - reference).max(axis=1) / np.abs(reference).max(axis=1)
        print(f"{output.request_id}: largest relative difference {error.max():.2g}")
        assert np.all(error <= TOLERANCE), (output.request_id, error)


def test_reference_adapter_changes_the_logits_at_every_position(run):
    adapted = run.reference[-1]
    effect = np.abs(adapted - run.without_adapter).max(axis=1)
    assert np.all(effect >= 1000 * TOLERANCE * np.abs(adapted).max(axis=1))
