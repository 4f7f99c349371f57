"""The step program against a plain numpy Llama, however a prompt is cut into steps."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jchameleon.config import PROJECTIONS, TRASH_PAGE, ModelConfig, RopeScaling
from jchameleon.lora.adapter import HostAdapter, LoraPair
from jchameleon.lora.layout import ChunkLayout
from jchameleon.models.dense import dense_logits, from_host
from jchameleon.models.llama import Llama
from jchameleon.models.loader import load_model
from jchameleon.models.params import numpy_dtype, random_params
from jchameleon.pallas.multi_lora import LoraWork, build_lora_work, max_work_items
from jchameleon.runtime import setup
from jchameleon.runtime.programs import ModelParams, StepBatch, model_step

TINY = ModelConfig.preset("tiny")
BLOCK_TOKENS = 16
MAX_BLOCKS = 12
TILE = 32
FUSED = {
    "qkv": ("q", "k", "v"),
    "o": ("o",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}


def numpy_frequencies(config):
    """Return the rotary frequencies, theta ** (-2 i / HD), one pair at a time."""
    out = []
    scaling = config.rope_scaling
    for i in range(config.head_dim // 2):
        frequency = config.rope_theta ** (-2 * i / config.head_dim)
        if scaling is not None and scaling.kind == "linear":
            frequency /= scaling.factor
        elif scaling is not None:
            wavelength = 2 * math.pi / frequency
            longest = scaling.original_max_position / scaling.low_freq_factor
            shortest = scaling.original_max_position / scaling.high_freq_factor
            if wavelength > longest:
                frequency /= scaling.factor
            elif wavelength > shortest:
                ratio = scaling.original_max_position / wavelength
                smooth = (ratio - scaling.low_freq_factor) / (
                    scaling.high_freq_factor - scaling.low_freq_factor
                )
                frequency = (1 - smooth) * frequency / scaling.factor + (
                    smooth * frequency
                )
        out.append(frequency)
    return np.array(out)


def numpy_llama(config, params, tokens, adapter=None):
    """Return float64 logits [n, V] of a text; rows are tokens, weights [out, in]."""

    def norm(x, weight):
        return (
            x
            / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps)
            * (weight.astype(np.float64))
        )

    def project(layer, group, x):
        y = x @ params["layers"][layer][group].astype(np.float64).T
        at = 0
        for projection in FUSED[group]:
            width = config.projection_shape(projection)[1]
            pair = adapter.modules.get((layer, projection)) if adapter else None
            if pair is not None:
                y[:, at : at + width] += pair.scale * ((x @ pair.a.T) @ pair.b.T)
            at += width
        return y

    def rotate(x):  # [n, heads, HD]
        angle = np.arange(len(x))[:, None, None] * numpy_frequencies(config)
        a, b = np.split(x, 2, axis=-1)
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    count = len(tokens)
    x = params["embed"].astype(np.float64)[tokens]
    for i, layer in enumerate(params["layers"]):
        qkv = project(i, "qkv", norm(x, layer["attn_norm"]))
        qkv = qkv.reshape(count, -1, config.head_dim)
        keys_at, values_at = config.num_heads, config.num_heads + config.num_kv_heads
        q, k = rotate(qkv[:, :keys_at]), rotate(qkv[:, keys_at:values_at])
        v = qkv[:, values_at:]
        out = np.empty((count, config.num_heads, config.head_dim))
        for head in range(config.num_heads):
            kv_head = head // (config.num_heads // config.num_kv_heads)
            scores = q[:, head] @ k[:, kv_head].T / math.sqrt(config.head_dim)
            scores[np.triu_indices(count, 1)] = -np.inf
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[:, head] = weights / weights.sum(1, keepdims=True) @ v[:, kv_head]
        x = x + project(i, "o", out.reshape(count, -1))
        h = project(i, "gate_up", norm(x, layer["mlp_norm"]))
        gate, up = np.split(h, 2, axis=1)
        x = x + project(i, "down", gate / (1 + np.exp(-gate)) * up)
    head = params["embed"] if config.tie_embeddings else params["lm_head"]
    return norm(x, params["final_norm"]) @ head.astype(np.float64).T


@dataclasses.dataclass(frozen=True, eq=False)
class Served:
    """A model with random weights, and its step programs."""

    config: ModelConfig
    params: dict
    split: ModelParams
    layout: ChunkLayout
    step: object


@functools.cache
def served(config=TINY, dtype="float32"):
    params = random_params(config, numpy_dtype(dtype), seed=0)
    rng = np.random.default_rng(1)
    norms = [params["final_norm"]]
    for layer in params["layers"]:
        norms += [layer["attn_norm"], layer["mlp_norm"]]
    for weight in norms:  # all ones would hide a missing or a swapped one
        weight[...] = rng.uniform(0.5, 1.5, weight.shape)
    split = ModelParams.from_model(Llama(config, jax.tree.map(jnp.asarray, params)))
    layout = ChunkLayout(
        config, PROJECTIONS, 2 * config.num_kv_heads * BLOCK_TOKENS * config.head_dim
    )
    step = functools.partial(
        model_step, treedef=split.treedef, layout=layout, block_tokens=BLOCK_TOKENS
    )
    return Served(config, params, split, layout, jax.jit(step, donate_argnums=1))


@functools.cache
def random_adapter(config, rank, seed):
    rng = np.random.default_rng(seed)
    modules = {}
    for layer in range(config.num_layers):
        for projection in PROJECTIONS:
            d_in, d_out = config.projection_shape(projection)
            modules[layer, projection] = LoraPair(
                a=rng.standard_normal((rank, d_in)).astype(np.float32) / d_in**0.5,
                b=rng.standard_normal((d_out, rank)).astype(np.float32) / rank**0.5,
                scale=0.5,
            )
    return HostAdapter.build(modules, source="test")


@dataclasses.dataclass(frozen=True, eq=False)
class Ask:
    """A prompt and its adapter."""

    tokens: np.ndarray
    adapter: HostAdapter | None = None


class Runner:
    """Runs steps over a pool in which everything that no one wrote is NaN."""

    def __init__(self, model, asks, *, seed=0):
        self.model, self.asks = model, asks
        layout, dtype = model.layout, model.params["embed"].dtype
        adapters = {ask.adapter.uid: ask.adapter for ask in asks if ask.adapter}
        chunk_pages = sum(layout.num_pages(a.rank) for a in adapters.values())
        num_pages = 2 + 3 * MAX_BLOCKS + chunk_pages + 7
        free = (np.random.default_rng(seed).permutation(num_pages - 2) + 2).tolist()
        shape = (model.config.num_layers, num_pages, layout.page_elems)
        pools = np.full(shape, np.nan, dtype)
        pools[:, 0] = 0
        self.uids = list(adapters)
        self.adapter_pages = []
        for adapter in adapters.values():
            own = [free.pop() for _ in range(layout.num_pages(adapter.rank))]
            pools[:, own] = layout.pack(adapter, dtype=dtype)
            table = np.array(own, np.int32).reshape(-1, layout.pages_per_chunk)
            self.adapter_pages.append(table)
        self.kv_pages = [
            np.array([free.pop() for _ in range(-(-len(ask.tokens) // BLOCK_TOKENS))])
            for ask in asks
        ]
        self.pools = [jnp.asarray(pool) for pool in pools]

    def step(self, parts, *, num_tokens, tile):
        """Run (ask, start, length) parts; return logits [V] after each."""
        num_tiles = num_tokens // tile
        tokens = np.zeros(num_tokens, np.int32)
        positions = np.zeros(num_tokens, np.int32)
        kv_pages = np.full(num_tokens, TRASH_PAGE, np.int32)
        table = np.zeros((num_tiles, MAX_BLOCKS), np.int32)
        context = np.ones(num_tiles, np.int32)
        logit_tokens = np.arange(num_tiles, dtype=np.int32) * tile
        token_adapter = np.full(num_tokens, -1, np.int32)
        first, ends = 0, []
        for index, start, length in parts:
            ask, pages = self.asks[index], self.kv_pages[index]
            at = np.arange(start, start + length)
            own = first * tile + np.arange(length)
            tokens[own], positions[own] = ask.tokens[at], at
            kv_pages[own] = pages[at // BLOCK_TOKENS]
            if ask.adapter:
                token_adapter[own] = self.uids.index(ask.adapter.uid)
            for n in range(-(-length // tile)):
                table[first, : len(pages)] = pages
                context[first] = start + min((n + 1) * tile, length)
                first += 1
            ends.append(first - 1)
            logit_tokens[first - 1] = own[-1]
        work = build_lora_work(
            token_adapter,
            self.adapter_pages,
            num_items=max_work_items(num_tokens, tile, 4),
            pages_per_chunk=self.model.layout.pages_per_chunk,
        )
        batch = StepBatch(
            tokens=tokens,
            positions=positions,
            kv_pages=kv_pages,
            page_table=table,
            context_tokens=context,
            logit_tokens=logit_tokens,
            lora=LoraWork(**work),
        )
        logits, self.pools, _ = self.model.step(
            self.model.split.leaves, self.pools, batch
        )
        return np.asarray(logits)[:, ends].T


def prompt(length, *, seed=0):
    return np.random.default_rng([seed, length]).integers(0, TINY.vocab_size, length)


def test_prompt_cut_anywhere_gives_the_logits_of_the_whole():
    model = served()
    asks = [
        Ask(prompt(173), random_adapter(TINY, 17, 1)),
        Ask(prompt(97)),
        Ask(prompt(64), random_adapter(TINY, 8, 2)),
    ]
    expected = [numpy_llama(TINY, model.params, a.tokens, a.adapter) for a in asks]

    def check(runner, parts, *, num_tokens, tile):
        found = runner.step(parts, num_tokens=num_tokens, tile=tile)
        for (index, start, length), logits in zip(parts, found, strict=True):
            wanted = expected[index][start + length - 1]
            np.testing.assert_allclose(logits, wanted, atol=1e-5, rtol=0)

    for index, ask in enumerate(asks):  # whole
        runner = Runner(model, asks)
        check(runner, [(index, 0, len(ask.tokens))], num_tokens=192, tile=TILE)

    for chunk in (32, 64, 96):  # alone, with the odd tail in a step of its own
        runner = Runner(model, asks, seed=chunk)
        for start in range(0, 173, chunk):
            part = (0, start, min(chunk, 173 - start))
            check(runner, [part], num_tokens=192, tile=TILE)

    runner = Runner(model, asks, seed=1)  # packed, chunks of other lengths each step
    packed = [
        [(0, 0, 64), (1, 0, 32), (2, 0, 64)],
        [(1, 32, 64), (0, 64, 96)],
        [(0, 160, 13), (1, 96, 1)],
    ]
    for parts in packed:
        check(runner, parts, num_tokens=192, tile=TILE)

    runner = Runner(model, asks, seed=2)  # every token a step, in company
    for at in range(173):
        parts = [(i, at, 1) for i in (2, 0, 1) if at < len(asks[i].tokens)]
        check(runner, parts, num_tokens=4, tile=1)

    runner = Runner(model, asks, seed=3)  # a prompt, then decode behind it
    parts = [(0, 0, 96), (1, 0, 45)]
    check(runner, parts, num_tokens=192, tile=TILE)
    for at in range(20):
        parts = [(1, 45 + at, 1), (0, 96 + at, 1)]
        check(runner, parts, num_tokens=4, tile=1)


def test_dense_forward_agrees_with_the_step():
    model = served()
    ask = Ask(prompt(40), random_adapter(TINY, 17, 1))
    runner = Runner(model, [ask])
    found = [runner.step([(0, at, 1)], num_tokens=4, tile=1)[0] for at in range(40)]
    dense = dense_logits(
        jax.tree.map(jnp.asarray, model.params),
        jnp.asarray(ask.tokens, jnp.int32)[None],
        config=TINY,
        adapter=from_host(ask.adapter, TINY),
    )
    np.testing.assert_allclose(found, dense[0], atol=1e-5, rtol=0)


SMALL = ModelConfig(
    name="small",
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    rope_theta=500.0,
    max_position_embeddings=1024,
)
# Wavelengths from 6 to 1,800 tokens: some kept, some blended, some stretched.
LLAMA3 = RopeScaling(
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position=128,
)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": RopeScaling(kind="linear", factor=4.0)},
        {"rope_scaling": LLAMA3},
        {"num_kv_heads": 6, "tie_embeddings": True, "rms_norm_eps": 0.1},
        {"num_kv_heads": 1, "rope_theta": 10000.0},
    ],
    ids=["gqa", "linear", "llama3", "mha-tied", "mqa"],
)
def test_model_of_any_shape_agrees_with_numpy(changes):
    config = dataclasses.replace(SMALL, **changes)
    model = served(config)
    tokens = np.random.default_rng(3).integers(0, config.vocab_size, 160)
    asks = [Ask(tokens, random_adapter(config, 8, 4)), Ask(tokens[:33])]
    runner = Runner(model, asks)
    for start in range(0, 160, 64):
        parts = [(0, start, min(64, 160 - start))]
        if start == 0:
            parts.append((1, 0, 33))
        found = runner.step(parts, num_tokens=128, tile=TILE)
        for (index, first, length), logits in zip(parts, found, strict=True):
            ask = asks[index]
            wanted = numpy_llama(config, model.params, ask.tokens, ask.adapter)
            np.testing.assert_allclose(
                logits, wanted[first + length - 1], atol=1e-5, rtol=0
            )


def test_bfloat16_stays_near_numpy():
    model = served(SMALL, "bfloat16")
    ask = Ask(prompt(70) % SMALL.vocab_size, random_adapter(SMALL, 8, 4))
    wanted = numpy_llama(SMALL, model.params, ask.tokens, ask.adapter)
    runner = Runner(model, [ask])
    for start, length in ((0, 32), (32, 38)):
        found = runner.step([(0, start, length)], num_tokens=128, tile=TILE)[0]
        assert found.dtype == np.float32
        error = found - wanted[start + length - 1]
        assert np.sqrt(np.mean(error**2)) < 0.03 * wanted.std()


def test_parameters_on_a_cpu_are_the_loaded_arrays():
    loaded = load_model("tiny", dtype="float32")
    placed = setup._place_params(loaded)
    addresses = {leaf.unsafe_buffer_pointer() for leaf in placed.leaves}
    arrays = jax.tree.leaves(loaded.params)
    assert {array.ctypes.data for array in arrays} == addresses
