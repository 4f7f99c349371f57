"""Sampling fields and log-probabilities against transformers' forward pass and PEFT.

One small random model, an adapter row among base rows. The reference runs each row
alone, over the tokens that the engine drew, and shapes its logits with transformers'
own processors, or in numpy where it has none.
"""

import collections

import numpy as np
import pytest
from engine_harness import import_oracle, poison_pool, quiet, random_peft_model

from jchameleon.llm import LLM
from jchameleon.sampling import SamplingParams

VOCAB = 384
TOLERANCE = 1e-4
PROMPT_TOKENS = (70, 1, 33, 64, 5)
ADAPTERS = (None, None, "random", "random", None)
NEW_TOKENS = 20
TIE_GAP = 1e-3


@pytest.fixture(scope="module")
def oracle():
    with import_oracle() as oracle:
        yield oracle


@pytest.fixture(scope="module")
def models(oracle, tmp_path_factory):
    """Return (folder, reference model by adapter name)."""
    root = tmp_path_factory.mktemp("models")
    with quiet():
        oracle.torch.manual_seed(5)
        config = oracle.transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=None,
            initializer_range=1.2 * 64**-0.5,
        )
        base = oracle.transformers.LlamaForCausalLM(config).eval()
        base.save_pretrained(root / "model")
        adapted = random_peft_model(
            oracle,
            oracle.transformers.LlamaForCausalLM.from_pretrained(root / "model"),
            root / "random",
            seed=1,
            strength=0.5,
            r=16,
            lora_alpha=24,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        )
    return root, {None: base, "random": adapted}


def engine(root, **options):
    fields = {
        "max_running": 8,
        "max_batch_tokens": 64,
        "max_model_len": 256,
        "max_lora_rank": 16,
        "pool_bytes": 16 << 20,
    }
    return LLM(root / "model", adapters={"random": root / "random"}, **fields | options)


@pytest.fixture(scope="module")
def llm(models):
    with engine(models[0]) as llm:
        poison_pool(llm)
        yield llm


def prompts():
    rng = np.random.default_rng(3)
    return [rng.integers(0, VOCAB, n).tolist() for n in PROMPT_TOKENS]


def reference_logits(oracle, models, output):
    """Return f32[prompt + output - 1, V], what follows each token."""
    ids = [*output.prompt_token_ids, *output.token_ids[:-1]]
    with oracle.torch.inference_mode():
        logits = models[1][output.adapter](oracle.torch.tensor([ids])).logits
    return logits[0].float().numpy()


def log_softmax(logits):
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def check_logprobs(found, token, expected, count):
    """Compare one dict {token id: log-probability} with all f64[V] of them."""
    ids = list(found)
    assert ids[0] == token
    assert len(ids) in (count, count + 1)
    best = [i for i in ids if i != token or len(ids) == count]
    for token_id, value in found.items():
        assert value == pytest.approx(expected[token_id], abs=TOLERANCE)
    # The likeliest, in order, up to ties of rounding.
    ranked = np.sort(expected)[::-1][:count]
    values = sorted((expected[i] for i in best), reverse=True)
    np.testing.assert_allclose(values, ranked[: len(values)], atol=TOLERANCE)


@pytest.mark.parametrize("count", [0, 3, 20])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_logprobs_are_those_of_the_models_own_distribution(
    llm, oracle, models, count, temperature
):
    """Whatever else shapes the draw."""
    sampling = SamplingParams(
        max_tokens=NEW_TOKENS,
        temperature=temperature,
        seed=4,
        top_k=9,
        repetition_penalty=1.4,
        logit_bias={7: 5.0},
        logprobs=count,
    )
    outputs = llm.generate(prompts(), ADAPTERS, sampling)
    for output in outputs:
        assert output.prompt_logprobs is None
        assert len(output.logprobs) == len(output.token_ids) == NEW_TOKENS
        expected = log_softmax(reference_logits(oracle, models, output))
        expected = expected[len(output.prompt_token_ids) - 1 :]
        for found, token, row in zip(
            output.logprobs, output.token_ids, expected, strict=True
        ):
            check_logprobs(found, token, row, count)


@pytest.mark.parametrize("max_batch_tokens", [64, 256])
def test_prompt_logprobs_whole_or_in_chunks_are_those_of_the_forward_pass(
    oracle, models, max_batch_tokens
):
    sampling = SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=4)
    with engine(models[0], max_batch_tokens=max_batch_tokens) as llm:
        poison_pool(llm)
        outputs = llm.generate(prompts(), ADAPTERS, sampling)
        records = llm.step_records
    chunks = collections.Counter(i for r in records for i, _ in r.prefill)
    assert (max(chunks.values()) > 1) == (max_batch_tokens == 64)
    for output in outputs:
        prompt = output.prompt_token_ids
        expected = log_softmax(reference_logits(oracle, models, output))
        first, *rest = output.prompt_logprobs
        assert first is None and output.logprobs is None
        assert len(rest) == len(prompt) - 1
        for found, token, row in zip(rest, prompt[1:], expected, strict=False):
            check_logprobs(found, token, row, 4)


def greedy_by_reference(oracle, models, output, shape):
    """Assert that each token is the best of the reference's shaped logits.

    Args:
      shape: (token ids so far, torch f32[1, V]) -> f32[V], changed logits.
    """
    raw = reference_logits(oracle, models, output)
    start = len(output.prompt_token_ids)
    ids = [*output.prompt_token_ids, *output.token_ids]
    moved = 0
    for at, token in enumerate(output.token_ids, start=start):
        logits = oracle.torch.from_numpy(raw[at - 1].copy())[None]
        shaped = np.asarray(shape(ids[:at], logits))
        second, best = np.partition(shaped, -2)[-2:]
        if best - second < TIE_GAP:
            continue
        assert token == shaped.argmax(), (output.request_id, at)
        moved += token != raw[at - 1].argmax()
    return moved


def run_greedy(llm, **values):
    sampling = SamplingParams(
        max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, **values
    )
    return llm.generate(prompts(), ADAPTERS, sampling)


def test_repetition_penalty_draws_what_transformers_would(llm, oracle, models):
    processor = oracle.transformers.RepetitionPenaltyLogitsProcessor(3.0)

    def shape(ids, logits):
        return processor(oracle.torch.tensor([ids]), logits)[0]

    outputs = run_greedy(llm, repetition_penalty=3.0)
    assert sum(greedy_by_reference(oracle, models, o, shape) for o in outputs) > 5


@pytest.mark.parametrize("kind", ["presence", "frequency"])
def test_presence_and_frequency_penalties_draw_what_numpy_would(
    llm, oracle, models, kind
):
    moved = 0
    for output in run_greedy(
        llm, **{f"{kind}_penalty": 2.0, "repetition_penalty": 0.8}
    ):
        start = len(output.prompt_token_ids)

        def shape(ids, logits, start=start):
            logits = logits[0].numpy()
            for token in set(ids):
                logits[token] *= 1 / 0.8 if logits[token] > 0 else 0.8
            for token, count in collections.Counter(ids[start:]).items():
                logits[token] -= 2.0 * (count if kind == "frequency" else 1)
            return logits

        moved += greedy_by_reference(oracle, models, output, shape)
    assert moved > 5


def test_logit_bias_draws_what_numpy_would(llm, oracle, models):
    biases = {i: (-1.0) ** i * (i % 7) for i in range(200)}

    def shape(_, logits):
        logits = logits[0].numpy()
        for token, bias in biases.items():
            logits[token] += bias
        return logits

    outputs = run_greedy(llm, logit_bias=biases)
    assert sum(greedy_by_reference(oracle, models, o, shape) for o in outputs) > 5


def test_min_p_draws_only_what_the_warpers_leave(llm, oracle, models):
    transformers = oracle.transformers
    chain = [
        transformers.TemperatureLogitsWarper(1.3),
        transformers.TopKLogitsWarper(40),
        transformers.TopPLogitsWarper(0.95),
        transformers.MinPLogitsWarper(0.3),
    ]
    sampling = SamplingParams(
        max_tokens=60, temperature=1.3, top_k=40, top_p=0.95, min_p=0.3, seed=1
    )
    drawn, best = 0, 0
    for output in llm.generate(prompts(), ADAPTERS, sampling):
        raw = reference_logits(oracle, models, output)
        start = len(output.prompt_token_ids)
        for at, token in enumerate(output.token_ids, start=start):
            scores = oracle.torch.from_numpy(raw[at - 1].copy())[None]
            margin = scores - TIE_GAP  # of a token just at the limit
            margin[0, token] = scores[0, token] + TIE_GAP
            for warper in chain:
                margin = warper(None, margin)
            assert np.isfinite(margin[0, token].item()), (output.request_id, at)
            drawn += 1
            best += token == raw[at - 1].argmax()
    assert 0 < best < drawn
