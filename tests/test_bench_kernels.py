"""The bench of the kernels without a GPU: inputs, floors, rivals, and a whole run."""

import dataclasses
import math
import sys

import aot_target
import bench_kernels
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_backends import has_nvidia_gpu
from kernel_baselines import (
    add_slabs,
    attention_baseline,
    attention_floor,
    lora_floor,
    lora_forms,
    rope_baseline,
    rope_floor,
)
from kernel_cases import all_cases, worst_error
from kernel_timing import Timing, compile_program, measure
from kernel_world import Load, make_world
from tool_runs import run_bench

from jchameleon.config import EngineConfig, ModelConfig
from jchameleon.models.llama import Llama
from jchameleon.models.params import random_params
from jchameleon.pallas import _compat
from jchameleon.pallas.operations import pallas_operations
from jchameleon.pallas.tuned import UNTUNED, TunedTable
from jchameleon.runtime.batch import BatchBuilder
from jchameleon.runtime.programs import ModelParams, model_step
from jchameleon.runtime.setup import chunk_layout

TINY = ModelConfig.preset("tiny")
SMALL = EngineConfig(dtype="float32", max_model_len=64)
LOADS = {
    "decode": Load(phase="decode", tokens=3, context_tokens=33, ranks=(8, 17)),
    "prefill": Load(phase="prefill", tokens=64, context_tokens=32, ranks=(8, 17)),
}


def world_of(phase, model=TINY, config=SMALL):
    load = LOADS[phase] if isinstance(phase, str) else phase
    return make_world(model, config, load, arch=None, interpret=True, max_turns=2)


@pytest.mark.parametrize("phase", LOADS)
def test_turns_have_pages_of_their_own(phase):
    world = world_of(phase)
    assert len(world.steps) == 2
    taken = []
    for step, adapters in zip(world.steps, world.adapter_pages, strict=True):
        table, context = np.asarray(step["table"]), np.asarray(step["context"])
        used = {int(page) for row in table for page in row if page}
        for row, tokens in zip(table, context, strict=True):
            assert (row[: -(-int(tokens) // 16)] > 1).all()
        taken += [*used, *(int(page) for pages in adapters for page in pages.ravel())]
    assert len(set(taken)) == len(taken) == world.num_pages - 2
    assert world.pool.shape == (world.num_pages, 1024)
    assert not np.asarray(world.pool[0]).any()


@pytest.mark.parametrize("phase", LOADS)
def test_engines_look_up_what_is_tuned(phase, monkeypatch):
    """Every launch of a step finds its entry under the key of its case."""
    world = world_of(phase)
    table = TunedTable(
        entries=tuple(
            (case.key, dataclasses.replace(case.chosen, num_stages=7))
            for case in all_cases(world)
        )
    )
    ops = pallas_operations(None, interpret=True, tuned=table)
    layout = chunk_layout(TINY, SMALL, ())
    builder = BatchBuilder(
        layout,
        block_tokens=16,
        max_blocks=4,
        max_chunks=layout.num_chunks(SMALL.max_lora_rank),
        dtype=np.dtype("float32"),
        ops=ops,
    )
    batch = builder.build([], world.load.tokens, prefill=phase == "prefill")
    tree = random_params(TINY, np.dtype("float32"), seed=0)
    params = ModelParams.from_model(Llama(TINY, jax.tree.map(jnp.asarray, tree)))
    stages = {}
    launch = _compat.triton_call

    def note(kernel, *, name, num_stages, **options):
        stages[name] = num_stages
        return launch(kernel, name=name, num_stages=num_stages, **options)

    monkeypatch.setattr(_compat, "triton_call", note)
    pools = [jnp.zeros((4, 1024))] * 2
    jax.eval_shape(
        lambda leaves, pools, batch: model_step(
            leaves,
            pools,
            batch,
            treedef=params.treedef,
            layout=layout,
            block_tokens=16,
            ops=ops,
        ),
        params.leaves,
        pools,
        batch,
    )
    assert len(stages) == 6
    assert set(stages.values()) == {7}, stages


@pytest.mark.parametrize("phase", LOADS)
def test_all_forms_give_the_values_of_the_reference(phase):
    world = world_of(phase, config=dataclasses.replace(SMALL, lora_targets=("q", "v")))
    for case in all_cases(world):
        steps = world.steps
        if case.group is None:
            kind = rope_baseline if case.name == "rope_write" else attention_baseline
            forms = {"xla": kind(world)[0]}
        else:
            if case.name.startswith("lora_shrink"):
                continue
            steps = add_slabs(world, case.group)
            forms = {
                name: lambda pool, step, arrays, form=form: form(pool, step, *arrays)
                for name, form in lora_forms(world, case.group).items()
            }
            assert set(forms) == {"xla", "one-hot", "gather"}
        inputs = (world.pool, steps[1], case.make_arrays())
        expected = jax.jit(case.reference)(*inputs)
        for name, form in {**forms, "kernel": case.values(case.chosen)}.items():
            assert worst_error(jax.jit(form)(*inputs), expected) < 1e-3, name


def test_floors_of_a_7b_layer_are_the_sums_by_hand():
    config = EngineConfig(dtype="bfloat16")
    load = Load(phase="decode", tokens=16, context_tokens=1024, ranks=(32,))
    world = world_of(load, ModelConfig.preset("llama-7b"), config)
    qkv, o = world.layout.groups
    a = 16 * 32 * 3 * 4096  # sixteen adapters of rank 32, three projections
    x, h, y = 16 * 4096, 16 * 3 * 32, 16 * 12288
    assert lora_floor(world, qkv, "shrink").bytes == 2 * (a + x + h)
    assert lora_floor(world, qkv, "expand").bytes == 2 * (a + h + 2 * y)
    assert lora_floor(world, qkv, "both").bytes == 2 * (2 * a + x + 2 * y)
    assert lora_floor(world, qkv, "both").flops == 4 * a
    assert lora_floor(world, o, "both").bytes == 2 * (2 * 16 * 32 * 4096 + 3 * x)
    # Keys and values of 1024 tokens in 32 heads of 128, queries in, results out.
    found = attention_floor(world)
    assert found.bytes == 2 * (16 * 1024 * 2 * 4096 + 2 * 16 * 4096)
    assert found.flops == 4 * 16 * 1024 * 4096
    assert found.seconds(696e9, 150e12) == found.bytes / 696e9
    assert found.seconds(1e30, 150e12) == found.flops / 150e12
    assert rope_floor(world).bytes == 2 * 2 * y + 16 * 128 * 4
    prompts = dataclasses.replace(load, phase="prefill", tokens=2048)
    world = world_of(prompts, ModelConfig.preset("llama-7b"), config)
    assert attention_floor(world).flops == 2 * sum(
        4 * 4096 * (i + 1) for i in range(1024)
    )
    assert lora_floor(world, qkv, "both").flops == 4 * 2048 * 32 * 3 * 4096


def test_loads_that_are_no_step_are_refused():
    for load, rule in (
        (Load(phase="decode", tokens=1, context_tokens=65, ranks=(8,)), "max_len=64"),
        (Load(phase="prefill", tokens=96, context_tokens=64, ranks=(8,)), "multiple"),
        (
            Load(phase="decode", tokens=1, context_tokens=1, ranks=(999,)),
            "max_lora_rank",
        ),
    ):
        with pytest.raises(ValueError, match=rule):
            world_of(load)


def test_samples_are_as_many_as_rounds_and_hand_the_state_on():
    def program(state, step):
        return state + step, ()

    state, step = jnp.zeros(()), jnp.ones(())
    programs = {name: compile_program(program, state, step) for name in "ab"}
    found = measure(
        programs, state, step, kernels=3, timing=Timing(rounds=4, queue_s=1e-4)
    )
    assert {name: len(samples) for name, samples in found.items()} == {"a": 4, "b": 4}
    assert all(0 < s < math.inf for samples in found.values() for s in samples)
    # A sample is a kernel's: of so many in a call, next to nothing each.
    quick = Timing(rounds=1, queue_s=1e-4)
    found = measure(programs, jnp.zeros(()), step, kernels=10**9, timing=quick)
    assert all(samples[0] < 1e-7 for samples in found.values())
    with pytest.raises(ValueError, match="rounds=0 must be at least 1"):
        Timing(rounds=0)
    with pytest.raises(ValueError, match="queue_s=0 must be more than 0"):
        Timing(queue_s=0)


@pytest.mark.parametrize(
    ("kind", "capability", "name", "how"),
    [
        ("NVIDIA A40", "8.6", "a40", "a40 by name"),
        ("NVIDIA A100-SXM4-80GB", "8.0", "a100", "a100 by name"),
        ("NVIDIA H100 80GB HBM3", "9.0", "h100", "h100 by name"),
        ("NVIDIA H200", "9.0", "h100", "h100 by compute capability alone"),
        ("NVIDIA A4000", "8.6", "a40", "a40 by compute capability alone"),
        ("NVIDIA L4", "8.9", None, "none known"),
    ],
)
def test_peaks_are_those_of_the_device_or_of_its_kin(kind, capability, name, how):
    target, found = aot_target.find_target(kind, capability)
    assert (target and target.name) == name
    assert found == how


def test_kernel_of_other_values_is_not_timed():
    world = world_of("decode")
    contest = next(
        c for c in bench_kernels.contests(world, UNTUNED) if c.name == "rope_write"
    )
    form, program = contest.forms["xla"]

    def wrong(*inputs):
        q, pool = form(*inputs)
        return q, pool * 1.1

    broken = dataclasses.replace(contest, forms={"kernel": (wrong, program)})
    with pytest.raises(RuntimeError, match="rope_write: kernel is off by 0.1"):
        bench_kernels.run_contest(broken, world, Timing(rounds=1), None)


def test_report_has_every_kernel_beside_its_rivals(tmp_path):
    options = "--model tiny --interpret --decode 2 --prefill --context 32 --ranks 8 17"
    more = "--targets q v --dtype float32 --max-model-len 64 --rounds 2 --turns 2"
    arguments = [*options.split(), *more.split()]
    text, report = run_bench("bench_kernels", *arguments, folder=tmp_path)
    rivals = {row["kernel"]: set(row["forms"]) for row in report["rows"]}
    assert rivals == {
        "lora_shrink qkv": {"kernel"},
        "lora_expand qkv": {"kernel"},
        "multi_lora qkv": {"kernel", "xla", "gather", "one-hot"},
        "attention_decode": {"kernel", "xla"},
        "rope_write": {"kernel", "xla"},
        "commit": {"kernel"},
    }
    for row in report["rows"]:
        assert row["kernel"] in text and row["floor"]["bytes"] > 0
        for form in row["forms"].values():
            us = form["us"]
            assert 0 < us["min"] <= us["median"] <= us["max"] < math.inf
            assert row["kernel"] == "commit" or form["error"] < 1e-3
    assert report["peaks"] == "none known" and report["versions"]["jax"]


def test_percent_of_floor_is_floor_over_median():
    world = world_of("decode")
    contest = bench_kernels.commit_contest(world)
    target = aot_target.read_target("a40")
    row = bench_kernels.run_contest(contest, world, Timing(rounds=3), target)
    floor_us = 2 * 4 * world.layout.pages_per_chunk * 1024 * 4 / 696e9 * 1e6
    assert row["floor_us"] == pytest.approx(floor_us)
    median = row["forms"]["kernel"]["us"]["median"]
    assert row["percent_of_floor"] == pytest.approx(100 * floor_us / median)


@pytest.mark.skipif(has_nvidia_gpu(), reason="there is a GPU")
def test_bench_without_a_gpu_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--model", "llama-7b"])
    assert bench_kernels.main() == 2
    assert capsys.readouterr().err == "bench_kernels: no GPU was seen\n"
