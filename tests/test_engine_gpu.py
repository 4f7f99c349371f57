"""The engine over the kernels for GPUs: the tokens of the XLA form."""

import jax
import numpy as np
import pytest
from gpu_backends import COMPILED, has_nvidia_gpu
from random_adapters import write_random_adapter

from jchameleon import LLM, SamplingParams
from jchameleon.config import ModelConfig

NEEDS_CPU = pytest.mark.skipif(
    has_nvidia_gpu(), reason="engines on a GPU compile the kernels"
)
TINY = ModelConfig.preset("tiny")
RANKS = (8, 40, 3, 16, 24)
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {
        f"a{i}": write_random_adapter(
            folder / f"a{i}", TINY, rank=rank, targets=TARGETS, seed=i
        )
        for i, rank in enumerate(RANKS)
    }


@pytest.fixture(scope="module")
def requests():
    rng = np.random.default_rng(0)
    lengths = (1, 17, 40, 70, 33, 5, 16, 64, 31, 12)
    prompts = [rng.integers(0, 200, n).tolist() for n in lengths]
    names = [None, "a0", "a1", "a2", "a1", "a3", None, "a4", "a0", "a2"]
    return prompts, names


def generate(paths, requests, backend, **options):
    """Return tokens of all requests and the engine's counts, in a pool too small.

    Pages of 8 KiB over both layers; the adapters alone need 13 chunks of 8 pages.
    """
    with LLM(
        "tiny",
        adapters=paths,
        backend=backend,
        max_running=4,
        max_model_len=96,
        max_batch_tokens=64,
        max_lora_rank=40,
        pool_bytes=60 * 8192,
        **options,
    ) as llm:
        outputs = llm.generate(
            *requests, SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
        )
        return [output.token_ids for output in outputs], llm.stats()


@pytest.fixture
def exact_products():
    """Let XLA multiply float32 as IEEE does, on every thread: GPUs' default is TF32."""
    before = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", "highest")
    yield
    jax.config.update("jax_default_matmul_precision", before)


@pytest.mark.parametrize(
    "backend",
    [pytest.param("interpret", marks=NEEDS_CPU), COMPILED],
)
def test_engine_over_gpu_kernels_gives_the_tokens_of_xla(
    paths, requests, backend, request
):
    """Kernels are interpreted on a CPU, compiled on a GPU: the engine's own choice."""
    if backend == "compiled":
        request.getfixturevalue("exact_products")
    expected, _ = generate(paths, requests, "xla")
    found, stats = generate(paths, requests, "pallas")
    assert found == expected
    assert len({tuple(tokens) for tokens in found}) == len(found)
    # Adapters were evicted and came back while others ran.
    assert stats.evictions > 0
    assert stats.loads > len(RANKS)
