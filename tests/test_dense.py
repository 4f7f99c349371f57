"""The dense forward pass against transformers, and its own ways to say the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_files import CONFIG, write_hf

from jchameleon.errors import InvalidRequestError
from jchameleon.models.dense import (
    completion_loss,
    dense_logits,
    hidden_states,
    init_adapter,
)
from jchameleon.models.loader import load_model

ALL = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = write_hf(tmp_path_factory.mktemp("hf") / "model")
    loaded = load_model(str(path), dtype="float32")
    return path, loaded.config, jax.tree.map(jnp.asarray, loaded.params)


def random_adapter(config, *, targets=ALL, seed=0):
    """Return an adapter whose B is not zero."""
    adapter = init_adapter(
        config, jax.random.key(seed), rank=3, alpha=6.0, targets=targets
    )
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), jnp.float32), adapter
    )


def random_tokens(config, shape, *, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(3, config.vocab_size, shape), jnp.int32)


def assert_close_at_scale(actual, desired, tolerance):
    """Compare as shares of the largest value: small ones are sums of large ones.

    Which sums are made first, and so their rounding, differs among CPUs.
    """
    scale = float(jnp.max(jnp.abs(desired)))
    np.testing.assert_allclose(actual, desired, rtol=0, atol=tolerance * scale)


def test_dense_logits_equal_transformers(model):
    transformers = pytest.importorskip(
        "transformers", reason="oracle: Python 3.11 only"
    )
    torch = pytest.importorskip("torch", reason="oracle: Python 3.11 only")
    path, config, params = model
    reference = transformers.LlamaForCausalLM.from_pretrained(path)
    tokens = random_tokens(config, (3, 17))
    with torch.no_grad():
        expected = reference(torch.from_numpy(np.asarray(tokens, np.int64))).logits
    logits = dense_logits(params, tokens, config=config)
    assert logits.shape == (3, 17, config.vocab_size)
    np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-4, atol=1e-4)


def test_dense_logits_of_an_adapter_equal_merged_weights(model):
    _, config, params = model
    adapter = random_adapter(config, targets=("k", "o", "up"))
    merged = {**params, "layers": []}
    rows = {
        "k": ("qkv", config.q_dim),
        "o": ("o", 0),
        "up": ("gate_up", config.intermediate_size),
    }
    for layer, pairs in zip(params["layers"], adapter, strict=True):
        layer = {name: np.array(value) for name, value in layer.items()}
        for projection, (name, start) in rows.items():
            pair = pairs[projection]
            delta = pair.scale * (np.asarray(pair.b) @ np.asarray(pair.a))
            layer[name][start : start + len(delta)] += delta
        merged["layers"].append({n: jnp.asarray(value) for n, value in layer.items()})
    tokens = random_tokens(config, (2, 9))
    found = dense_logits(params, tokens, config=config, adapter=adapter)
    expected = dense_logits(merged, tokens, config=config)
    base = dense_logits(params, tokens, config=config)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(found - base).max() > 0.1


def test_hidden_states_of_packed_texts_are_those_of_each_alone(model):
    _, config, params = model
    first, second = random_tokens(config, (1, 6)), random_tokens(config, (1, 5), seed=1)
    packed = jnp.concatenate([first, second, jnp.zeros((1, 3), jnp.int32)], axis=1)
    positions = jnp.asarray([[*range(6), *range(5), 0, 0, 0]], jnp.int32)
    segments = jnp.asarray([[0] * 6 + [1] * 5 + [-1] * 3], jnp.int32)
    adapter = random_adapter(config)
    together = hidden_states(
        params,
        packed,
        config=config,
        adapter=adapter,
        positions=positions,
        segments=segments,
    )
    alone = [
        hidden_states(params, tokens, config=config, adapter=adapter)
        for tokens in (first, second)
    ]
    assert_close_at_scale(together[:, :11], jnp.concatenate(alone, axis=1), 1e-5)


def test_completion_loss_counts_labels_only(model):
    _, config, params = model
    tokens = random_tokens(config, (2, 8))
    adapter = random_adapter(config)
    logits = np.asarray(
        dense_logits(params, tokens, config=config, adapter=adapter), np.float64
    )
    chosen = [(0, 3), (0, 4), (1, 6)]
    losses = [
        np.log(np.exp(logits[r, t]).sum()) - logits[r, t, tokens[r, t + 1]]
        for r, t in chosen
    ]
    sources = [8 * r + t for r, t in chosen]
    labels = [int(tokens[r, t + 1]) for r, t in chosen]
    loss = completion_loss(
        adapter,
        params,
        tokens,
        jnp.tile(jnp.arange(8), (2, 1)),
        jnp.zeros((2, 8), jnp.int32),
        jnp.asarray([*sources, 0, 0]),
        jnp.asarray([*labels, -1, -1]),
        config=config,
    )
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)


def test_completion_loss_gradient_is_the_slope_with_and_without_remat(model):
    _, config, params = model
    tokens = random_tokens(config, (2, 8))
    adapter = random_adapter(config)
    batch = (
        tokens,
        jnp.tile(jnp.arange(8), (2, 1)),
        jnp.zeros((2, 8), jnp.int32),
        jnp.arange(4, 7),
        tokens[0, 5:8],
    )

    def loss(adapter, *, remat=False):
        return completion_loss(adapter, params, *batch, config=config, remat=remat)

    gradient = jax.jit(jax.grad(loss))(adapter)
    again = jax.jit(jax.grad(functools.partial(loss, remat=True)))(adapter)
    for one, other in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(again), strict=True
    ):
        assert_close_at_scale(one, other, 1e-4)
    direction = random_adapter(config, seed=1)
    step = 1e-3
    ends = [
        float(loss(jax.tree.map(lambda x, d, s=s: x + s * d, adapter, direction)))
        for s in (-step, step)
    ]
    slope = (ends[1] - ends[0]) / (2 * step)
    parts = jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, direction)
    found = float(sum(jax.tree.leaves(parts)))
    assert found == pytest.approx(slope, rel=2e-2)


def test_init_adapter_changes_nothing_yet_and_is_bounded(model):
    _, config, params = model
    adapter = init_adapter(
        config, jax.random.key(3), rank=5, alpha=10.0, targets=("q", "down")
    )
    tokens = random_tokens(config, (1, 7))
    np.testing.assert_array_equal(
        dense_logits(params, tokens, config=config, adapter=adapter),
        dense_logits(params, tokens, config=config),
    )
    for pairs in adapter:
        for pair, d_in in ((pairs["q"], 32), (pairs["down"], 64)):
            assert pair.a.shape == (5, d_in)
            assert pair.scale == 2.0
            most = np.abs(pair.a).max()
            assert 0.8 * d_in**-0.5 < most <= d_in**-0.5
            assert not pair.b.any()
    assert not np.array_equal(adapter[0]["q"].a, adapter[1]["q"].a)


VARIANTS = {
    "Mistral": {"sliding_window": 17},
    "Qwen2": {},
    "Qwen3": {"head_dim": 12},
    "Llama": {"attention_bias": True},
}


@pytest.mark.parametrize("family", VARIANTS)
def test_dense_logits_of_a_variant_equal_transformers(tmp_path, family):
    transformers = pytest.importorskip(
        "transformers", reason="oracle: Python 3.11 only"
    )
    torch = pytest.importorskip("torch", reason="oracle: Python 3.11 only")
    torch.manual_seed(1)
    reference = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(
            **{**CONFIG, "model_type": family.lower()}, **VARIANTS[family]
        )
    )
    for name, value in reference.named_parameters():
        value.data.normal_(mean=float("norm" in name), std=0.2)
    reference.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype="float32")
    params = jax.tree.map(jnp.asarray, loaded.params)
    tokens = random_tokens(loaded.config, (3, 17))
    with torch.no_grad():
        expected = reference(torch.from_numpy(np.asarray(tokens, np.int64))).logits
    logits = dense_logits(params, tokens, config=loaded.config)
    np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-4, atol=1e-4)
    assert np.std(expected.numpy()) > 0.1


def test_dense_rows_beyond_the_sliding_window_are_refused(tmp_path):
    path = write_hf(tmp_path, model_type="mistral", sliding_window=16)
    loaded = load_model(str(path), dtype="float32")
    params = jax.tree.map(jnp.asarray, loaded.params)
    with pytest.raises(InvalidRequestError, match="rows of 17 tokens.*window of 16"):
        dense_logits(
            params, random_tokens(loaded.config, (1, 17)), config=loaded.config
        )
