"""`jchameleon info` and `export`, and `generate` from what `export` wrote."""

import json
import math
import subprocess
import sys

import ml_dtypes  # noqa: F401 - registers bfloat16 with numpy
import numpy as np
import pytest
from model_files import tiny_tensors, write_gguf, write_hf
from safetensors.numpy import load_file

from jchameleon.cli import main
from jchameleon.config import EngineConfig, ModelConfig, default_max_model_len
from jchameleon.models.loader import load_model
from jchameleon.models.params import tensor_shapes

SMALL = ["--max-running", "2", "--max-batch-tokens", "64", "--max-model-len", "64"]


def facts_of(capsys, *argv):
    assert main(["info", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def qwen3(tmp_path):
    return write_hf(
        tmp_path / "a-qwen",
        model_type="qwen3",
        head_dim=8,
        use_sliding_window=True,
        sliding_window=48,
        max_window_layers=1,
        eos_token_id=[2, 5],
        tensors=tiny_tensors(qk_norm=True),
    )


def test_info_says_what_a_directory_holds(capsys, qwen3):
    facts = facts_of(capsys, "--model", str(qwen3))
    tensors = load_file(qwen3 / "model.safetensors")
    parameters = sum(tensor.size for tensor in tensors.values())
    assert facts == {
        "model": "a-qwen",
        "family": "qwen3",
        "source": str(qwen3),
        "weights_bytes": (qwen3 / "model.safetensors").stat().st_size,
        "parameters": parameters,
        "parameter_bytes": 4 * parameters,
        "dtype": "float32",
        "layers": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "qkv_bias": False,
        "o_bias": False,
        "qk_norm": True,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "context_tokens": 128,
        "sliding_window_tokens": 48,
        "default_max_model_len": 48,
        "vocabulary": 96,
        "tied_embeddings": False,
        "bos_token_id": 1,
        "eos_token_ids": [2, 5],
        "tokenizer": None,
        "chat_template": False,
        # 2 layers, key and value of 2 heads of 8 in 4 bytes; 16 tokens to a page.
        "kv_bytes_per_token": 2 * 2 * 16 * 4,
        "page_bytes": 16 * 2 * 2 * 16 * 4,
        "lora_targets": ["q", "k", "v", "o"],
        # Each projection's inputs and outputs.
        "adapter_bytes_per_rank": 2 * 4 * (64 + 48 + 48 + 64),
        # 8 ranks hold 3 x 8 x 32 + 8 x 64 elements for q, k and v and 8 x 32 + 8 x 32
        # for o, which is 3.5 of the pages of 512 elements a layer.
        "adapter_pool_bytes_per_8_ranks": 4 * 16 * 2 * 2 * 16 * 4,
    }


def test_info_of_presets_agrees_with_the_engine(capsys):
    for name in ("tiny", "llama-7b"):
        facts = facts_of(
            capsys, "--model", name, "--dtype", "bfloat16", "--lora-targets", "up,q"
        )
        model = ModelConfig.preset(name)
        parameters = sum(math.prod(shape) for _, shape in tensor_shapes(model))
        assert facts["parameters"] == parameters
        assert facts["parameter_bytes"] == 2 * parameters
        assert facts["default_max_model_len"] == default_max_model_len(model)
        assert facts["lora_targets"] == ["q", "up"]
        assert facts["kv_bytes_per_token"] == 4 * model.kv_dim * model.num_layers
        block = EngineConfig().kv_block_tokens
        assert facts["page_bytes"] == block * facts["kv_bytes_per_token"]
        assert facts["adapter_pool_bytes_per_8_ranks"] % facts["page_bytes"] == 0
        assert (
            facts["adapter_pool_bytes_per_8_ranks"]
            >= 8 * facts["adapter_bytes_per_rank"]
        )
    assert facts["source"] == "a shape without weights"


def test_info_in_words_and_of_a_gguf_file(capsys, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", tensors=tiny_tensors(tied=True))
    assert main(["info", "--model", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    words = dict(line.split(None, 1) for line in lines)
    assert words["family"] == "llama"
    assert words["tied_embeddings"] == "yes"
    assert words["tokenizer"] == words["rope_scaling"] == "-"
    assert words["eos_token_ids"] == "2"
    assert words["weights_bytes"] == str(path.stat().st_size)
    columns = {
        len(line) - len(word) for line, word in zip(lines, words.values(), strict=True)
    }
    assert len(columns) == 1


def test_info_neither_loads_jax_nor_reads_weights(qwen3, tmp_path):
    (qwen3 / "model.safetensors").write_bytes(b"not read")
    code = (
        "import sys\n"
        "from jchameleon.cli import main\n"
        f"assert main(['info', '--model', {str(qwen3)!r}]) == 0\n"
        "loaded = {'jax', 'flax', 'orbax'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "no-such"], "unknown model 'no-such'"),
        (["--model", "tiny", "--dtype", "int8"], "dtype='int8'"),
        (["--model", "tiny", "--lora-targets", "q,x"], "targets=('q', 'x')"),
        (["--model", "tiny", "--lora-targets", ""], "targets=('',)"),
    ],
)
def test_info_wrong_input_is_one_line(capsys, argv, words):
    assert main(["info", *argv]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def answers(capsys, model):
    argv = ["generate", "--model", str(model), "--raw", *SMALL, "--json"]
    assert main([*argv, "--prompt", "Hello", "--max-tokens", "8"]) == 0
    return json.loads(capsys.readouterr().out)["token_ids"]


def test_exported_models_answer_as_the_original(capsys, tmp_path):
    folders = {form: tmp_path / form for form in ("hf", "orbax")}
    for form, folder in folders.items():
        argv = ["export", "--model", "tiny", "--out", str(folder), "--format", form]
        assert main(argv) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"{folder}  {form}  float32  ")
    expected = answers(capsys, "tiny")
    assert answers(capsys, folders["orbax"]) == expected
    # The Hugging Face directory holds the same bits; no second compilation to say so.
    tiny = load_model("tiny", dtype="float32").params
    again = load_model(str(folders["hf"]), dtype="float32").params
    np.testing.assert_array_equal(tiny["embed"], again["embed"])


def test_export_keeps_the_stored_dtype_unless_told_otherwise(capsys, tmp_path):
    source = write_hf(
        tmp_path / "in",
        tensors={
            name: tensor.astype("bfloat16") for name, tensor in tiny_tensors().items()
        },
    )
    for argv, dtype in (([], "bfloat16"), (["--dtype", "float32"], "float32")):
        out = tmp_path / dtype
        assert main(["export", "--model", str(source), "--out", str(out), *argv]) == 0
        assert f"  hf  {dtype}  " in capsys.readouterr().out
        stored = load_file(out / "model.safetensors")
        assert {tensor.dtype.name for tensor in stored.values()} == {dtype}
        config = json.loads((out / "config.json").read_text())
        assert config["torch_dtype"] == dtype


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--out", "{tmp}/full"], "is not empty"),
        (["--out", "{tmp}/no/where"], "is no directory"),
        (["--out", "{tmp}/out", "--format", "onnx"], "format='onnx'"),
        (["--out", "{tmp}/out", "--dtype", "int8"], "dtype='int8'"),
        (["--out", "{tmp}/out", "--model", "llama-7b"], "has no weights"),
        (["--out", "{tmp}/out", "--model", "nope"], "unknown model 'nope'"),
    ],
)
def test_export_wrong_input_is_one_line_and_writes_nothing(
    capsys, tmp_path, argv, words
):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    argv = [part.replace("{tmp}", str(tmp_path)) for part in argv]
    assert main(["export", "--model", "tiny", *argv]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_export_without_target_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["export", "--model", "tiny"])
    assert ended.value.code == 2
    assert "--out" in capsys.readouterr().err
