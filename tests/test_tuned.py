"""Tables of measured block sizes: what is taken from them, and what is refused."""

import copy
import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lora_world import QKVO
from paged_cases import Part, Shape, check_attention, make_step

from jchameleon.config import ModelConfig
from jchameleon.errors import ConfigError
from jchameleon.lora.layout import ChunkLayout
from jchameleon.pallas import _compat, gpu_tunables, operations, tuned
from jchameleon.pallas.gpu_attention import (
    DecodeConfig,
    decode_config,
    decode_key,
    paged_attention_gpu,
)
from jchameleon.pallas.gpu_kv import KvConfig, rope_write_gpu, rope_write_key
from jchameleon.pallas.gpu_lora import multi_lora_gpu
from jchameleon.pallas.gpu_lora_config import (
    choose_expand,
    choose_shrink,
    expand_key,
    shrink_key,
)
from jchameleon.pallas.gpu_lora_work import GpuLoraWork, build_gpu_lora_work
from jchameleon.pallas.gpu_operations import gpu_forms
from jchameleon.pallas.gpu_prefill_attention import PrefillConfig, prefill_key
from jchameleon.pallas.gpu_tunables import TUNABLES
from jchameleon.pallas.tuned import read_table, table_path, write_entry

DEVICE = "NVIDIA Test 9000"
TINY = ModelConfig.preset("tiny")
SMALL = Shape(heads=4, kv_heads=2, head_dim=16)
LAYOUT = ChunkLayout(TINY, QKVO, 1024)
QKV = LAYOUT.groups[0]
TOKENS = 4

SHRINK = choose_shrink(QKV, 1024, num_items=12, prefill=False, elem_bytes=4)
EXPAND = choose_expand(QKV, 1024, num_blocks=4, prefill=False, elem_bytes=4)
OF_STEP = {"num_tokens": TOKENS, "prefill": False, "dtype": "float32"}
KEYS = {
    "lora_shrink": shrink_key(QKV, 1024, num_items=12, **OF_STEP),
    "lora_expand": expand_key(QKV, 1024, num_blocks=4, **OF_STEP),
    "attention_decode": decode_key(
        10, 4, 2, 16, block_tokens=16, max_context_tokens=160, dtype="float32"
    ),
    "attention_prefill": prefill_key(
        96, 32, 4, 2, 16, block_tokens=16, dtype="float32"
    ),
    "rope_write": rope_write_key(
        3, 4, 2, 16, block_tokens=16, norms=False, dtype="float32"
    ),
}
CONFIGS = {
    "lora_shrink": dataclasses.replace(SHRINK, block_k=16, splits=2, programs=1),
    "lora_expand": dataclasses.replace(EXPAND, block_n=16, programs=3),
    "attention_decode": DecodeConfig(bn=32, splits=3, num_warps=2, num_stages=1),
    "attention_prefill": PrefillConfig(bm=64, bn=16, num_warps=2, num_stages=1),
    "rope_write": KvConfig(rows=2, num_warps=2),
}
ENTRIES = [write_entry(KEYS[op], CONFIGS[op], jax="0.10.2", us=1.5) for op in KEYS]


def write(folder, entries, device=DEVICE, **more):
    path = table_path(device, folder)
    path.write_text(json.dumps({"device": device, "entries": entries, **more}))
    return path


@pytest.fixture
def table(tmp_path):
    return read_table(write(tmp_path, ENTRIES), DEVICE, TUNABLES)


@pytest.fixture
def launches(monkeypatch):
    """Return what reaches the kernels' calls; they run all the same."""
    seen = {}
    launch = _compat.triton_call

    def note(kernel, *, name, **options):
        seen[name] = options
        return launch(kernel, name=name, **options)

    monkeypatch.setattr(_compat, "triton_call", note)
    return seen


def test_table_returns_what_was_written(table):
    assert set(KEYS) == set(TUNABLES)
    for op, key in KEYS.items():
        assert table.find(key) == CONFIGS[op]
        assert type(table.find(key)) is TUNABLES[op].config
        assert table.find(key._replace(dtype="bfloat16")) is None
        assert table.find(key._replace(shape=key.shape[1:])) is None
    assert tuned.UNTUNED.find(KEYS["rope_write"]) is None


def test_tables_of_one_content_are_one_key(tmp_path, table):
    again = read_table(write(tmp_path, ENTRIES), DEVICE, TUNABLES)
    assert again == table and hash(again) == hash(table)
    forms = gpu_forms("sm_86", interpret=True, tuned=table)
    assert gpu_forms("sm_86", interpret=True, tuned=again) is forms
    assert gpu_forms("sm_86", interpret=True, tuned=tuned.UNTUNED) is not forms


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A40", "nvidia-a40.json"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3.json"),
        ("NVIDIA A100-SXM4-40GB", "nvidia-a100-sxm4-40gb.json"),
    ],
)
def test_file_is_named_by_the_device(device, name):
    assert table_path(device).name == name
    assert table_path(device).parent.name == "tuned"


def test_tables_that_ship_are_right():
    folder = table_path("any").parent
    assert (folder / "README.md").is_file()
    for path in folder.glob("*.json"):
        device = json.loads(path.read_text("utf-8"))["device"]
        assert table_path(device) == path
        read_table(path, device, TUNABLES)


def entry_index(op):
    return list(KEYS).index(op)


@pytest.mark.parametrize(
    ("op", "place", "value", "rule"),
    [
        ("rope_write", ("op",), "softmax", ".op='softmax' must be one of attention_d"),
        ("rope_write", ("op",), [], ".op=[] must be one of"),
        ("rope_write", ("phase",), "decode", ".phase='decode' must be one of any"),
        ("rope_write", ("dtype",), "int8", ".dtype='int8' must be one of bfloat16"),
        ("rope_write", ("date",), "today", " has unknown ['date']; it needs op"),
        ("rope_write", ("shape", "rows"), 1, ".shape has unknown ['rows']; it"),
        ("rope_write", ("shape", "tokens"), None, ".shape lacks ['tokens']"),
        ("rope_write", ("shape", "tokens"), "3", ".shape.tokens='3' must be an int"),
        ("rope_write", ("config", "bm"), 1, ".config has unknown ['bm']; it needs"),
        ("rope_write", ("config", "rows"), None, ".config lacks ['rows']"),
        ("rope_write", ("config", "rows"), True, ".config.rows=True must be an int"),
        ("rope_write", ("config", "rows"), 3, ".config: rows=3 must be a power of"),
        ("rope_write", ("config", "num_warps"), 3, ".config: num_warps=3 must be 1"),
        ("rope_write", ("config",), 7, ".config must be an object, got 7"),
        ("lora_shrink", ("config", "block_k"), 128, "d_in=64 must be a multiple of"),
        ("lora_shrink", ("config", "lookup"), "no", ".config.lookup='no' must be one"),
        ("lora_shrink", ("shape", "page_elems"), 72, "block_k=16 must divide page_el"),
        ("lora_expand", ("config", "block_n"), 64, "block_n=64 must divide 32"),
        ("lora_expand", ("shape", "columns"), 64, ".shape.columns=64 must be a list"),
        ("lora_expand", ("shape", "y_columns"), [0], "must be as many"),
        ("attention_prefill", ("config", "bm"), 16, "bm=16 must hold a block of 32"),
        ("attention_decode", ("config", "splits"), 0, ".config: splits=0 must be at"),
    ],
)
def test_wrong_entry_is_refused_by_file_key_and_rule(tmp_path, op, place, value, rule):
    entries = copy.deepcopy(ENTRIES)
    at = entries[entry_index(op)]
    *path, name = place
    for step in path:
        at = at[step]
    if value is None:
        del at[name]
    else:
        at[name] = value
    file = write(tmp_path, entries)
    with pytest.raises(ConfigError) as error:
        read_table(file, DEVICE, TUNABLES)
    assert str(error.value).startswith(f"{file}: entries[{entry_index(op)}]")
    assert rule in str(error.value)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"device": "NVIDIA A40"}, "device='NVIDIA A40' must be 'NVIDIA Test 9000'"),
        ({"entries": {}}, "entries must be a list"),
        ({"made": "today"}, "has unknown ['made']"),
        ({"entries": ENTRIES[:1] * 2}, "entries[1]: lora_shrink has an entry of this"),
    ],
)
def test_wrong_file_is_refused(tmp_path, change, rule):
    path = table_path(DEVICE, tmp_path)
    path.write_text(json.dumps({"device": DEVICE, "entries": []} | change))
    with pytest.raises(ConfigError, match=re.escape(f"{path}")) as error:
        read_table(path, DEVICE, TUNABLES)
    assert rule in str(error.value)
    path.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_table(path, DEVICE, TUNABLES)


def test_engine_on_a_gpu_takes_its_table_and_refuses_a_wrong_one(
    tmp_path, monkeypatch, table
):
    monkeypatch.setattr(gpu_tunables, "table_path", lambda d: table_path(d, tmp_path))
    where = {"platform": "gpu", "dtype": np.dtype("float32"), "model": TINY}
    where |= {"capability": "8.6", "device_kind": DEVICE}
    assert operations.choose_operations(
        "pallas", **where
    ) is operations.pallas_operations("sm_86", tuned=table)
    other = operations.choose_operations("auto", **where | {"device_kind": "other"})
    assert other is operations.pallas_operations("sm_86")
    # "auto" leaves kernels out that do not serve, but not because a file is wrong.
    write(tmp_path, [])
    table_path(DEVICE, tmp_path).write_text("[]")
    with pytest.raises(ConfigError, match=r"nvidia-test-9000\.json must be an object"):
        operations.choose_operations("auto", **where)


def ladder(run, launches, name, table, explicit):
    """Return (launch, values) of each rung: a given config, the table's, the chosen."""
    out = []
    for options in ({"config": explicit, "tuned": table}, {"tuned": table}, {}):
        values = run(**options)
        out.append((launches[name], values))
    return out


def attend_and_check(step, **options):
    """Run interpreted attention over a step and compare it with the reference."""
    out = paged_attention_gpu(
        jnp.asarray(step.q),
        jnp.asarray(step.after),
        jnp.asarray(step.table),
        jnp.asarray(step.positions),
        jnp.asarray(step.context),
        kv_heads=2,
        block_tokens=16,
        interpret=True,
        **options,
    )
    check_attention(out, step)


def test_decode_attention_takes_given_then_tuned_then_chosen(table, launches):
    step = make_step(
        SMALL, [Part(40, 1), Part(99, 1)], num_tokens=10, tile=1, max_context=160
    )

    explicit = DecodeConfig(bn=16, splits=2, num_warps=1, num_stages=2)
    rungs = ladder(
        functools.partial(attend_and_check, step),
        launches,
        "paged_attention_decode",
        table,
        explicit,
    )
    chosen = decode_config(10, 2, 16, 160, arch=None)
    wanted = [explicit, CONFIGS["attention_decode"], chosen]
    for (launch, _), config in zip(rungs, wanted, strict=True):
        assert {n: launch[n] for n in dataclasses.asdict(config)} == (
            dataclasses.asdict(config)
        )


def test_prefill_attention_takes_given_then_tuned_then_chosen(table, launches):
    step = make_step(
        SMALL, [Part(20, 32), Part(0, 20)], num_tokens=96, tile=32, max_context=64
    )

    explicit = PrefillConfig(bm=32, bn=32, num_warps=1, num_stages=2)
    rungs = ladder(
        functools.partial(attend_and_check, step),
        launches,
        "paged_attention_prefill",
        table,
        explicit,
    )
    sizes = [(launch["bm"], launch["bn"], launch["num_warps"]) for launch, _ in rungs]
    assert sizes == [(32, 32, 1), (64, 16, 2), (32, 16, 4)]


def test_rope_write_takes_given_then_tuned_then_chosen(table, launches):
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(rng.standard_normal((128, 3)), jnp.float32)
    rope = tuple(jnp.asarray(rng.standard_normal((8, 3)), jnp.float32) for _ in "cs")

    def run(**options):
        q, pool = rope_write_gpu(
            qkv,
            jnp.zeros((4, 1024)),
            rope,
            jnp.array([2, 2, 3]),
            jnp.array([0, 1, 15]),
            heads=4,
            kv_heads=2,
            block_tokens=16,
            interpret=True,
            **options,
        )
        return np.asarray(q), np.asarray(pool)

    explicit = KvConfig(rows=4, num_warps=4)
    rungs = ladder(run, launches, "rope_write", table, explicit)
    sizes = [(launch["tile_rows"], launch["num_warps"]) for launch, _ in rungs]
    assert sizes == [(4, 4), (2, 2), (1, 1)]
    for _, (q, pool) in rungs[1:]:
        assert (q == rungs[0][1][0]).all() and (pool == rungs[0][1][1]).all()


def test_lora_takes_given_then_tuned_then_chosen(table, launches):
    rng = np.random.default_rng(0)
    width = LAYOUT.pages_per_chunk
    pool = jnp.asarray(rng.standard_normal((2 + 5 * width, 1024)), jnp.float32)
    pool = pool.at[0].set(0.0)
    chunks = 2 + np.arange(5 * width, dtype=np.int32).reshape(5, width)
    work = GpuLoraWork(
        **build_gpu_lora_work(
            np.array([0, 0, -1, 1], np.int32),
            [chunks[:4], chunks[4:]],
            prefill=False,
            max_chunks=6,
            pages_per_chunk=width,
        )
    )
    x = jnp.asarray(rng.standard_normal((64, TOKENS)), jnp.float32)
    y = jnp.asarray(rng.standard_normal((128, TOKENS)), jnp.float32)
    call = functools.partial(
        multi_lora_gpu, y, x, pool, work, group=QKV, interpret=True
    )
    given = {
        "shrink": dataclasses.replace(SHRINK, block_k=32, splits=1),
        "expand": dataclasses.replace(EXPAND, num_warps=2),
    }
    found = []
    for options in ({**given, "tuned": table}, {"tuned": table}, {}):
        values = np.asarray(call(**options))
        used = launches["lora_shrink_qkv"], launches["lora_expand_qkv"]
        found.append((*(launch["config"] for launch in used), values))
    rungs = [tuple(given.values()), (CONFIGS["lora_shrink"], CONFIGS["lora_expand"])]
    rungs.append((SHRINK, EXPAND))
    for (shrink, expand, values), rung in zip(found, rungs, strict=True):
        assert (shrink, expand) == rung
        np.testing.assert_allclose(values, found[0][2], rtol=1e-5, atol=1e-3)
    assert np.abs(found[0][2] - np.asarray(y)).max() > 1


def test_tuned_forms_reach_the_operations(table):
    ops = operations.pallas_operations(None, interpret=True, tuned=table)
    for form in (ops.paged_attention, ops.multi_lora, ops.rope_write):
        assert form.keywords["tuned"] == table


def test_lookup_happens_while_tracing_alone(table):
    """A table adds nothing to a compiled program."""
    q = jax.ShapeDtypeStruct((4, 16, 10), jnp.float32)
    shapes = [q, jax.ShapeDtypeStruct((9, 1024), jnp.float32)]
    shapes += [
        jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((10, 10), (10,), (10,))
    ]
    call = functools.partial(
        paged_attention_gpu, kv_heads=2, block_tokens=16, interpret=True
    )
    given = functools.partial(call, config=CONFIGS["attention_decode"])
    by_table = functools.partial(call, tuned=table)
    texts = [str(jax.make_jaxpr(function)(*shapes)) for function in (given, by_table)]
    assert texts[0] == texts[1]
