"""Exported directories: what transformers and this package read back from them."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import ml_dtypes
import numpy as np
import pytest
from model_files import tiny_tensors, write_gguf, write_hf, write_json
from smollm2 import smollm2_path

from jchameleon.errors import ConfigError, ModelSaveError
from jchameleon.models import export
from jchameleon.models.conversation import conversation_tokens
from jchameleon.models.export import check_target, save_model
from jchameleon.models.loader import exact_dtype, load_model
from jchameleon.models.params import random_params, tensor_views

FAMILIES = {
    "Llama": {"attention_bias": True},
    "Mistral": {"sliding_window": 64, "head_dim": 12},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {
        "use_sliding_window": True,
        "sliding_window": 32,
        "layer_types": ["full_attention", "sliding_attention"],
        "attention_bias": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 5e3, "factor": 2.0},
    },
}
SHAPE = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": [2, 5],
}
TEXTS = [
    "Hello, world!",
    "  two  blanks\n\n\tand 1234567 numbers ",
    "naïve café 🙂 日本語",
    "<|im_start|>user\nHi<|im_end|>",
    "",
]


@pytest.fixture(scope="module")
def oracle():
    transformers = pytest.importorskip(
        "transformers", reason="oracle: Python 3.11 only"
    )
    torch = pytest.importorskip("torch", reason="oracle: Python 3.11 only")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield transformers, torch
    torch.set_num_threads(threads)


def random_family(oracle, family, folder, *, dtype="float32"):
    """Return a random model of a family, saved by transformers itself."""
    transformers, torch = oracle
    torch.manual_seed(4)
    config = getattr(transformers, f"{family}Config")(**SHAPE, **FAMILIES[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, value in model.named_parameters():
        value.data.normal_(mean=float("norm" in name), std=0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    # Read back, because casting a module also rounds its rotary frequencies.
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def logits_of(oracle, model, num_tokens=100):
    _, torch = oracle
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(0, SHAPE["vocab_size"], (1, num_tokens)))
    with torch.no_grad():
        return model.float()(ids).logits.numpy()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hf_to_orbax_to_hf_is_the_same_model_to_transformers(
    oracle, tmp_path, family, dtype
):
    transformers, _ = oracle
    saved = random_family(oracle, family, tmp_path / "first", dtype=dtype)
    folder = tmp_path / "first"
    for form in ("orbax", "hf"):
        assert exact_dtype(str(folder)) == dtype
        model = load_model(str(folder), dtype=dtype)
        folder = tmp_path / form
        save_model(model, folder, form=form)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert type(loaded) is type(saved)
    assert loaded.dtype == saved.dtype
    state = saved.state_dict()
    assert set(loaded.state_dict()) == set(state)
    for name, tensor in loaded.state_dict().items():
        np.testing.assert_array_equal(tensor.float().numpy(), state[name].float())
    # Beyond the sliding window too: 100 tokens, windows of 32 and 64.
    np.testing.assert_array_equal(logits_of(oracle, loaded), logits_of(oracle, saved))
    for field in ("bos_token_id", "eos_token_id", "max_position_embeddings"):
        assert getattr(loaded.config, field) == getattr(saved.config, field)
    assert loaded.generation_config.eos_token_id == [2, 5]


def assert_same_model(first, second):
    """Every parameter has the same bits, and the configs differ in their name only."""
    assert dataclasses.replace(second.config, name=first.config.name) == first.config
    views = tensor_views(second.config, second.params)
    for name, view in tensor_views(first.config, first.params).items():
        assert view.dtype == views[name].dtype
        np.testing.assert_array_equal(view, views[name])


@pytest.mark.parametrize("form", ["hf", "orbax"])
def test_tiny_preset_round_trips_with_its_tokenizer(oracle, tmp_path, form):
    transformers, _ = oracle
    model = load_model("tiny", dtype="float32")
    save_model(model, tmp_path / "out", form=form)
    again = load_model(str(tmp_path / "out"), dtype="float32")
    assert_same_model(model, again)
    assert again.tokenizer.eos_token_ids == model.tokenizer.eos_token_ids
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        ids = model.tokenizer.encode(text)
        assert again.tokenizer.encode(text) == theirs.encode(text) == ids
        assert again.tokenizer.decode(ids) == theirs.decode(
            ids, skip_special_tokens=True
        )


def test_gguf_file_round_trips(oracle, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", tensors=tiny_tensors(seed=2))
    model = load_model(str(path), dtype=exact_dtype(str(path)))
    save_model(model, tmp_path / "hf", form="hf")
    transformers, torch = oracle
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    for name, tensor in tiny_tensors(seed=2).items():
        np.testing.assert_array_equal(theirs.state_dict()[name].numpy(), tensor)
    assert not (tmp_path / "hf" / "tokenizer.json").exists()  # the file has none


def test_smollm2_export_is_smollm2_to_transformers(oracle, tmp_path):
    transformers, torch = oracle
    smollm2_path()
    model = load_model("smollm2-135m", dtype="bfloat16")
    out = tmp_path / "smollm2"
    save_model(model, out, form="hf")
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    for text in TEXTS:
        ids = model.tokenizer.encode(text)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == model.tokenizer.decode(ids, skip_special=False)
    talk = [
        {"role": "user", "content": "Why is the sky blue?"},
        {"role": "assistant", "content": "Because."},
        {"role": "user", "content": "Go on\n\nplease."},
    ]
    expected = theirs.apply_chat_template(
        talk, add_generation_prompt=True, return_dict=False
    )
    assert conversation_tokens(model.chat_template, model.tokenizer, talk) == expected
    weights = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert weights.dtype == torch.bfloat16
    views = tensor_views(model.config, model.params)
    for name, tensor in weights.state_dict().items():
        if name != "lm_head.weight":
            expected = views[name].astype(np.float32)
            np.testing.assert_array_equal(tensor.float().numpy(), expected)
    shutil.rmtree(out)


def test_side_files_are_copied_as_they_are(tmp_path):
    source = write_hf(tmp_path / "in")
    save_model(load_model("tiny", dtype="float32"), tmp_path / "tiny", form="hf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "tiny" / name, source / name)
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    write_json(source / "special_tokens_map.json", {"bos_token": "<bos>"})
    write_json(source / "generation_config.json", {"eos_token_id": [3], "top_k": 7})
    (source / "README.md").write_text("not the model's")
    save_model(load_model(str(source), dtype="float32"), tmp_path / "out", form="orbax")
    copied = {path.name for path in (tmp_path / "out").iterdir()}
    assert copied == {
        *("config.json", "params", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "special_tokens_map.json", "generation_config.json"),
    }
    for name in copied - {"config.json", "params"}:
        expected = (source / name).read_bytes()
        assert (tmp_path / "out" / name).read_bytes() == expected
    (source / "tokenizer.json").rename(source / "gone.json")
    model = load_model("tiny", dtype="float32")
    gone = dataclasses.replace(model, source=str(source))
    with pytest.raises(ModelSaveError, match=r"tokenizer\.json is there no more"):
        save_model(gone, tmp_path / "again", form="hf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "tiny"]


def test_shards_and_index_are_written_only_when_needed(oracle, tmp_path):
    model = load_model("tiny", dtype="float32")
    save_model(model, tmp_path / "one", form="hf")
    assert (tmp_path / "one" / "model.safetensors").is_file()
    assert not list((tmp_path / "one").glob("*index*"))
    save_model(model, tmp_path / "many", form="hf", max_shard_bytes=100_000)
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size < 110_000 for path in shards)
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    assert_same_model(model, load_model(str(tmp_path / "many"), dtype="float32"))
    theirs = oracle[0].AutoModelForCausalLM.from_pretrained(tmp_path / "many")
    embed = theirs.state_dict()["model.embed_tokens.weight"].numpy()
    np.testing.assert_array_equal(embed, model.params["embed"])


@pytest.mark.parametrize("form", ["hf", "orbax"])
def test_target_that_holds_something_is_left_alone(tmp_path, form):
    model = load_model("tiny", dtype="float32")
    full, file, link = (tmp_path / name for name in ("full", "file", "link"))
    full.mkdir()
    (full / "mine").write_text("x")
    file.write_text("x")
    link.symlink_to(tmp_path / "nowhere")
    for out, message in [
        (full, "is not empty"),
        (file, "no directory"),
        (link, "no directory"),
        (tmp_path / "no" / "where", "is no directory"),
    ]:
        with pytest.raises(ModelSaveError, match=message):
            save_model(model, out, form=form)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full", "link"]
    (tmp_path / "empty").mkdir()
    save_model(model, tmp_path / "empty", form=form)
    assert_same_model(model, load_model(str(tmp_path / "empty"), dtype="float32"))


def test_unknown_format_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="format='gguf' must be one of hf, orbax"):
        check_target(tmp_path / "out", "gguf")


@pytest.mark.parametrize("form", ["hf", "orbax"])
def test_disk_that_is_full_leaves_nothing(tmp_path, form):
    code = (
        "import resource, signal\n"
        "from pathlib import Path\n"
        "from jchameleon.errors import ModelSaveError\n"
        "from jchameleon.models.export import save_model\n"
        "from jchameleon.models.loader import load_model\n"
        "model = load_model('tiny', dtype='float32')\n"
        f"if {form!r} == 'orbax': import jchameleon.models.orbax_params\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try:\n"
        f"    save_model(model, Path({str(tmp_path / 'out')!r}), form={form!r})\n"
        "except ModelSaveError as error:\n"
        "    print(error)\n"
    )
    # Orbax's own threads may say more on standard error, before or after.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("cannot write "), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_threads_that_still_write_after_an_error_leave_nothing(tmp_path):
    """As those of Orbax do when one of them has failed."""
    done = threading.Event()
    folders = []

    def write(folder):
        for place in range(50):
            with contextlib.suppress(OSError):
                (folder / f"late{place}").mkdir()
            time.sleep(0.002)
        done.set()

    with pytest.raises(OSError, match="full"):
        with export._new_directory(tmp_path / "out") as folder:
            folders.append(folder)
            for place in range(2000):  # a removal takes longer than a late write
                (folder / f"early{place}").mkdir()
            threading.Thread(target=write, args=(folder,)).start()
            raise OSError("full")
    done.wait()
    assert list(tmp_path.iterdir()) == []


def test_killed_save_never_leaves_a_model(tmp_path):
    """The target is absent for as long as anything of it is missing."""
    code = (
        "from pathlib import Path\n"
        "import jchameleon.models.orbax_params, sys\n"
        "from jchameleon.models.export import save_model\n"
        "from jchameleon.models.loader import load_model\n"
        "model = load_model('tiny', dtype='float32')\n"
        "print('ready', flush=True)\n"
        "for i in range(1000):\n"
        f"    out = Path({str(tmp_path)!r}) / str(i)\n"
        "    save_model(model, out, form=('hf', 'orbax')[i % 2])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            time.sleep(1.5)
        finally:
            process.send_signal(signal.SIGKILL)
    complete = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert len(complete) >= 2
    expected = load_model("tiny", dtype="float32")
    for path in sorted(complete, key=lambda path: int(path.name))[-2:]:
        assert_same_model(expected, load_model(str(path), dtype="float32"))


def test_written_files_follow_the_umask(tmp_path):
    umask = os.umask(0o027)
    try:
        save_model(load_model("tiny", dtype="float32"), tmp_path / "out", form="hf")
    finally:
        os.umask(umask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def test_random_biases_and_norms_of_a_variant_are_neutral(tmp_path):
    config = load_model(
        str(write_hf(tmp_path / "x", model_type="mistral")), dtype="float32"
    ).config
    config = dataclasses.replace(
        config,
        family="qwen3",
        qk_norm=True,
        qkv_bias=True,
        o_bias=True,
        sliding_window=None,
        sliding_layers=(),
    )
    params = random_params(config, np.dtype(ml_dtypes.bfloat16), seed=0)
    for name, view in tensor_views(config, params).items():
        if "norm" in name:
            assert np.all(view == 1)
        elif name.endswith("bias"):
            assert np.all(view == 0)
