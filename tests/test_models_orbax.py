"""Orbax checkpoints of parameters: round trips, and what is refused."""

import json
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from model_files import tiny_tensors, write_hf, write_json

from jchameleon.errors import ModelLoadError, ModelSaveError
from jchameleon.llm import LLM
from jchameleon.models.export import save_model
from jchameleon.models.loader import exact_dtype, load_model
from jchameleon.models.params import tensor_views
from jchameleon.sampling import SamplingParams


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return (directory, the model in it, a Qwen3 with all that a variant adds)."""
    root = tmp_path_factory.mktemp("orbax")
    source = write_hf(
        root / "hf",
        model_type="qwen3",
        head_dim=8,
        attention_bias=True,
        tensors=variant_tensors(),
    )
    model = load_model(str(source), dtype="float32")
    save_model(model, root / "model", form="orbax")
    return root / "model", model


def variant_tensors():
    tensors = tiny_tensors(seed=3, qkv_bias=True, qk_norm=True)
    rng = np.random.default_rng(5)
    for i in range(2):
        name = f"model.layers.{i}.self_attn.o_proj.bias"
        tensors[name] = rng.standard_normal(32).astype(np.float32)
    return tensors


@pytest.fixture
def copy(saved, tmp_path):
    """Return a copy that a test may damage."""
    return shutil.copytree(saved[0], tmp_path / "copy")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_restored_params_are_the_saved_ones_rounded_as_numpy_does(saved, dtype):
    directory, model = saved
    assert exact_dtype(str(directory)) == "float32"
    again = load_model(str(directory), dtype=dtype)
    target = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    views = tensor_views(again.config, again.params)
    assert set(views) == set(variant_tensors())
    for name, tensor in variant_tensors().items():
        assert type(views[name]) is np.ndarray
        assert views[name].dtype == target
        np.testing.assert_array_equal(views[name], tensor.astype(target))


def test_bfloat16_is_kept_and_widens_exactly(saved, tmp_path):
    model = load_model(str(saved[0]), dtype="bfloat16")
    save_model(model, tmp_path / "narrow", form="orbax")
    assert exact_dtype(str(tmp_path / "narrow")) == "bfloat16"
    wide = load_model(str(tmp_path / "narrow"), dtype="float32")
    for name, view in tensor_views(wide.config, wide.params).items():
        expected = tensor_views(model.config, model.params)[name].astype(np.float32)
        np.testing.assert_array_equal(view, expected)


def test_checkpoint_holds_the_params_and_nothing_else(saved):
    directory, model = saved
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.metadata(directory / "params").item_metadata.tree
    shapes = jax.tree.map(lambda leaf: tuple(leaf.shape), tree)
    assert shapes == jax.tree.map(lambda array: array.shape, model.params)


def test_llm_saves_what_it_loaded_and_answers_the_same(saved, tmp_path):
    prompts = [[5, 6, 7], [9] * 40]
    greedy = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    small = {"max_running": 2, "max_batch_tokens": 64, "max_model_len": 128}
    answers = []
    path = saved[0].parent / "hf"
    for form in ("orbax", "hf"):
        with LLM(path, **small) as llm:
            answers.append([o.token_ids for o in llm.generate(prompts, None, greedy)])
            path = tmp_path / form
            llm.save(path, form=form)
            with pytest.raises(ModelSaveError, match="not empty"):
                llm.save(path, form=form)
    assert answers[0] == answers[1]
    again = load_model(str(tmp_path / "hf"), dtype="float32")
    for name, view in tensor_views(again.config, again.params).items():
        np.testing.assert_array_equal(view, variant_tensors()[name])


def refuse(directory, *words):
    with pytest.raises(ModelLoadError) as raised:
        load_model(str(directory), dtype="float32")
    assert "\n" not in str(raised.value)
    for word in words:
        assert word in str(raised.value)


def test_directory_without_commit_marker_is_refused(copy):
    (copy / "params" / "_CHECKPOINT_METADATA").unlink()
    refuse(copy, "_CHECKPOINT_METADATA", "missing", "no complete Orbax checkpoint")


@pytest.mark.parametrize("committed", [None, "now"])
def test_marker_without_commit_time_is_refused(copy, committed):
    write_json(
        copy / "params" / "_CHECKPOINT_METADATA",
        {"commit_timestamp_nsecs": committed},
    )
    refuse(copy, "commit_timestamp_nsecs", "not committed")


def test_directory_without_config_is_refused(copy):
    (copy / "config.json").unlink()
    refuse(copy, "config.json")
    refuse(copy / "params", "Orbax checkpoint without a config", "config.json")


def test_directory_with_two_sets_of_weights_is_refused(copy, saved):
    shutil.copy(saved[0].parent / "hf" / "model.safetensors", copy)
    refuse(copy, "params/", "model.safetensors", "keep one")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": 64}, ["embed", "[96, 32]", "[96, 64]"]),
        ({"vocab_size": 97}, ["embed", "[96, 32]", "[97, 32]"]),
        ({"intermediate_size": 60}, ["layers.0.down", "[32, 64]", "[32, 60]"]),
        ({"num_hidden_layers": 3}, ["layers.2", "missing"]),
        ({"num_hidden_layers": 1}, ["unexpected", "layers.1", "qwen3"]),
        ({"tie_word_embeddings": True}, ["unexpected", "lm_head"]),
        ({"attention_bias": False}, ["unexpected", "bias"]),
        (
            {"model_type": "llama", "architectures": None},
            ["unexpected", "_norm", "llama"],
        ),
        ({"model_type": "gemma"}, ["model_type='gemma'"]),
    ],
)
def test_config_of_another_model_is_refused(copy, fields, words):
    config = json.loads((copy / "config.json").read_text())
    write_json(copy / "config.json", {**config, **fields})
    refuse(copy, *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t["layers"][1].pop("o"), ["layers.1.o", "missing"]),
        (lambda t: t.update(extra=np.ones(3, np.float32)), ["unexpected", "extra"]),
        (
            lambda t: t.update(final_norm=np.ones(32, np.int32)),
            ["final_norm", "int32", "float32, bfloat16, float16"],
        ),
        (lambda t: t.update(final_norm=np.ones(31, np.float32)), ["[31]", "[32]"]),
        (lambda t: t.update(layers={}), ["layers.0", "missing"]),
    ],
)
def test_checkpoint_of_other_arrays_is_refused(copy, saved, change, words):
    tree = jax.tree.map(np.copy, saved[1].params)
    change(tree)
    shutil.rmtree(copy / "params")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(copy / "params", tree)
    refuse(copy, *words)


def test_half_precision_checkpoint_of_another_program_loads(copy, saved):
    tree = jax.tree.map(lambda array: array.astype(np.float16), saved[1].params)
    shutil.rmtree(copy / "params")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(copy / "params", tree)
    assert exact_dtype(str(copy)) == "float32"
    again = load_model(str(copy), dtype="float32")
    jax.tree.map(
        lambda found, array: np.testing.assert_array_equal(
            found, array.astype(np.float32)
        ),
        again.params,
        tree,
    )


# Reads of other arrays are still under way when one fails, and Orbax closes their event
# loop under them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_damaged_file_is_refused_or_harmless(copy, saved):
    """Cut, emptied and removed files never give other parameters."""
    refused = 0
    files = [path for path in sorted((copy / "params").rglob("*")) if path.is_file()]
    assert len(files) > 5
    for path in files:
        whole = path.read_bytes()
        for damaged in (whole[: len(whole) // 2], b"", None):
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            try:
                found = load_model(str(copy), dtype="float32")
            except ModelLoadError as error:
                refused += 1
                assert "\n" not in str(error)
            else:
                jax.tree.map(
                    np.testing.assert_array_equal, found.params, saved[1].params
                )
            path.write_bytes(whole)
    assert refused > len(files)
    load_model(str(copy), dtype="float32")


def test_orbax_is_imported_for_orbax_models_only(saved):
    code = (
        "import sys\n"
        "import jchameleon.llm, jchameleon.cli.generate\n"
        "from jchameleon.models.loader import load_model\n"
        "load_model('tiny', dtype='float32')\n"
        "assert 'orbax' not in sys.modules, 'imported for nothing'\n"
        f"load_model({str(saved[0])!r}, dtype='float32')\n"
        "assert 'orbax.checkpoint' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
