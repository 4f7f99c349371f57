"""The command line: what it prints, and how it ends."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from jchameleon import __version__
from jchameleon.cli import main
from jchameleon.config import ModelConfig

# Few, small programs: every start compiles them.
SMALL_ENGINE = ["--max-running", "4", "--max-batch-tokens", "64", "--max-model-len"]
TINY = ["generate", "--model", "tiny", "--raw", *SMALL_ENGINE, "128"]


def write_adapter(path, *, seed, rank=4, layers=(0, 1), **config):
    """Write a PEFT directory for the tiny model, on q and v, large enough to matter."""
    model = ModelConfig.preset("tiny")
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in layers:
        for name in ("q", "v"):
            d_in, d_out = model.projection_shape(name)
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}_proj"
            a = rng.standard_normal((rank, d_in))
            b = rng.standard_normal((d_out, rank))
            tensors[f"{stem}.lora_A.weight"] = a.astype(np.float32)
            tensors[f"{stem}.lora_B.weight"] = b.astype(np.float32)
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["q_proj", "v_proj"],
        **config,
    }
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path


def ended(argv):
    """Run in this process; return the exit code however the command ends."""
    try:
        return main(argv)
    except SystemExit as error:
        return error.code


def start(argv, **kwargs):
    """Start the command line as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "jchameleon", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def test_version_is_the_packages(capsys):
    assert ended(["--version"]) == 0
    assert capsys.readouterr().out == f"jchameleon {__version__}\n"


@pytest.mark.parametrize("argv", [["--help"], ["generate", "-h"], ["adapters", "-h"]])
def test_help_ends_well(argv, capsys):
    assert ended(argv) == 0
    assert capsys.readouterr().out.startswith("usage: jchameleon")


PROMPT = ["--prompt", "x"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "COMMAND"),
        (["bogus"], "bogus"),
        (["generate", "--bogus"], "bogus"),
        (["generate", "--promp", "x"], "--promp"),
        (["adapters"], "ACTION"),
        (["adapters", "inspect"], "DIR"),
        (["generate"], "no prompt"),
        (["generate", "--prompt", ""], "prompt 0 is empty"),
        (["generate", "--prompt", "x", ""], "prompt 1 is empty"),
        (["generate", "--prompt", "\udcff"], "prompt 0 is not valid UTF-8"),
        (["generate", "--prompt-file", "/no/such"], "'/no/such' cannot be read"),
        (["generate", *PROMPT, "--adapter", "noequals"], "'noequals' must be NAME=DIR"),
        (["generate", *PROMPT, "--adapter", "=d"], "'=d' must be NAME=DIR"),
        (["generate", *PROMPT, "--adapter", "a="], "'a=' must be NAME=DIR"),
        (["generate", *PROMPT, "--adapter", "a=b", "a=c"], "'a' is given twice"),
        (["generate", *PROMPT, "--adapter", "base=b"], "'base' is taken"),
        (["generate", *PROMPT, "--use", "y"], "use='y' is none of base"),
        (["generate", *PROMPT, "--use", "base", "base"], "2 times for 1 prompts"),
        (["generate", *PROMPT, "--raw", "--chat"], "not allowed with"),
        (["generate", *PROMPT, "--temperature", "nan"], "temperature=nan"),
        (["generate", *PROMPT, "--temperature", "-1"], "temperature=-1"),
        (["generate", *PROMPT, "--top-p", "inf"], "top_p=inf"),
        (["generate", *PROMPT, "--top-k", "1.5"], "--top-k"),
        (["generate", *PROMPT, "--max-tokens", "4294967295"], "max_tokens=4294967295"),
        (["generate", *PROMPT, "--max-tokens", "9" * 5000], "--max-tokens"),
        (["generate", *PROMPT, "--seed", "-1"], "seed=-1"),
        (["generate", *PROMPT, "--stop", ""], "stop has a string of 0"),
        (["generate", *PROMPT, "--stop-token-id", "-5"], "stop_token_ids=-5"),
        (["generate", *PROMPT, "--n", "2"], "n=2 must be 1 at temperature=0"),
        (["generate", *PROMPT, "--n", "65"], "n=65 must be from 1 to 64"),
        (["generate", *PROMPT, "--min-p", "1.5"], "min_p=1.5"),
        (["generate", *PROMPT, "--min-tokens", "65"], "min_tokens=65"),
        (["generate", *PROMPT, "--repetition-penalty", "0"], "repetition_penalty=0.0"),
        (["generate", *PROMPT, "--presence-penalty", "3"], "presence_penalty=3.0"),
        (["generate", *PROMPT, "--frequency-penalty", "x"], "--frequency-penalty"),
        (["generate", *PROMPT, "--logit-bias", "5"], "'5' must be ID=X"),
        (["generate", *PROMPT, "--logit-bias", "5=x"], "'5=x' must be ID=X"),
        (["generate", *PROMPT, "--logit-bias", "5=101"], "logit_bias[5]=101.0"),
        (["generate", *PROMPT, "--logprobs", "21", "--json"], "logprobs=21"),
        (["generate", *PROMPT, "--logprobs", "1"], "--logprobs needs --json"),
        (["generate", *PROMPT, "--prompt-logprobs", "1"], "--prompt-logprobs needs"),
        (["generate", *PROMPT, "--time-limit-s", "nan"], "time_limit_s=nan"),
        (["generate", *PROMPT, "--truncate-prompt-tokens", "0"], "truncate_prompt"),
        (["generate", *PROMPT, "--dtype", "float16"], "dtype='float16'"),
        (["generate", *PROMPT, "--pool-bytes", "3X"], "'3X' must be a number"),
        (["generate", *PROMPT, "--pool-bytes", "0"], "pool_bytes=0"),
        (["generate", *PROMPT, "--max-running", "0"], "max_running=0"),
        (["generate", *PROMPT, "--lora-targets", "q,w"], "lora_targets has 'w'"),
        (
            ["generate", *PROMPT, "--policy", "lur"],
            "policy='lur' is no preset; did you",
        ),
        (["generate", *PROMPT, "--policy", "no/such.toml"], "no/such.toml"),
        (["generate", *PROMPT, "--host-cache-bytes", "0"], "host_cache_bytes=0"),
        (["generate", *PROMPT, "--plan-log", ""], "plan_log='' must be"),
        (["adapters", "inspect", "/no/such"], "/no/such"),
        (["adapters", "inspect", ".", "--model", "q"], "model 'q'"),
        (["adapters", "inspect", ".", "--model", "no/such.gguf"], "no/such.gguf"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(argv, message, capsys):
    assert ended(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and err.endswith("\n")
    assert err.startswith("jchameleon")
    assert message in err


@pytest.mark.parametrize("option", ["--use=y", "--policy=y", "--policy=FOLDER/x.toml"])
def test_wrong_usage_is_found_before_jax_is_loaded(option, tmp_path):
    (tmp_path / "x.toml").write_text('preset = "fifo-lru"\neviction = {x = 1}')
    option = option.replace("FOLDER", str(tmp_path))
    code = (
        "import sys\n"
        "from jchameleon.cli import main\n"
        f"assert main(['generate', '--prompt', 'x', {option!r}]) == 2\n"
        "assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("content", [b"\xff\xfe\n", b"\n  \n", b""])
def test_prompt_file_without_text_is_refused(content, tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    assert ended(["generate", "--prompt-file", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_inspect_describes_an_adapter(tmp_path, capsys):
    path = write_adapter(tmp_path / "a", seed=0, layers=(0, 1))
    argv = ["adapters", "inspect", str(path), "--model", "tiny"]
    assert ended([*argv, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["model"] == "tiny"
    assert facts["rank"] == 4
    assert facts["targets"] == ["q", "v"]
    assert facts["layers"] == [0, 1]
    assert facts["scales"] == [2.0]
    assert facts["num_modules"] == 4
    assert facts["dtypes"] == ["float32"]
    assert len(facts["uid"]) == 64

    assert ended(argv) == 0
    lines = dict(
        line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()
    )
    assert lines["rank"] == "4"
    assert lines["targets"] == "q, v"
    assert lines["layers"] == "0-1"
    assert lines["ranks"] == "q 4; v 4"
    assert lines["scales"] == "2"


def test_inspect_reads_the_shape_from_a_model_directory(tmp_path, capsys):
    path = write_adapter(tmp_path / "a", seed=0)
    model = tmp_path / "model"
    model.mkdir()
    tiny = ModelConfig.preset("tiny")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "vocab_size": tiny.vocab_size,
        "hidden_size": tiny.hidden_size,
        "intermediate_size": tiny.intermediate_size,
        "num_hidden_layers": tiny.num_layers,
        "num_attention_heads": tiny.num_heads,
        "num_key_value_heads": tiny.num_kv_heads,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 257,
    }
    (model / "config.json").write_text(json.dumps(config))
    assert ended(["adapters", "inspect", str(path), "--model", str(model)]) == 0
    assert "rank" in capsys.readouterr().out


def test_inspect_refuses_an_adapter_that_does_not_fit(tmp_path, capsys):
    path = write_adapter(tmp_path / "a", seed=0)
    assert ended(["adapters", "inspect", str(path), "--model", "smollm2-135m"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and str(path) in err


def test_inspect_refuses_what_it_cannot_apply_exactly(tmp_path, capsys):
    path = write_adapter(tmp_path / "a", seed=0, use_dora=True)
    assert ended(["adapters", "inspect", str(path), "--model", "tiny"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "use_dora" in err


def test_inspect_does_without_jax(tmp_path):
    path = write_adapter(tmp_path / "a", seed=0)
    code = (
        "import sys\n"
        "from jchameleon.cli import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "assert 'jax' not in sys.modules"
    )
    argv = ["adapters", "inspect", str(path), "--model", "tiny"]
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_reader_that_goes_away_gets_no_traceback(tmp_path):
    path = write_adapter(tmp_path / "a", seed=0)
    process = start(["adapters", "inspect", str(path), "--model", "tiny"])
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr.read() == ""
    process.stderr.close()


def test_generate_json_answers_every_prompt_through_its_adapter(tmp_path, capsys):
    adapters = [
        f"{name}={write_adapter(tmp_path / name, seed=seed)}"
        for seed, name in enumerate(("one", "two"))
    ]
    argv = [*TINY, "--json", "--max-tokens", "12", "--ignore-eos"]
    argv += ["--adapter", *adapters, "--prompt", *["same"] * 4]
    argv += ["--use", "base", "one", "two", "one"]
    assert ended(argv) == 0
    out, err = capsys.readouterr()
    records = [json.loads(line) for line in out.splitlines()]
    assert [r["index"] for r in records] == [0, 1, 2, 3]
    assert [r["adapter"] for r in records] == [None, "one", "two", "one"]
    assert len({r["request_id"] for r in records}) == 4
    for record in records:
        assert record["finish_reason"] == "length"
        assert record["error"] is None and record["fault"] is None
        assert len(record["token_ids"]) == 12
        assert all(0 <= t < 259 for t in record["token_ids"])
        assert 0 <= record["timing"]["ttft_s"] <= record["timing"]["total_s"]
    base, one, two, again = (r["token_ids"] for r in records)
    assert one == again
    assert len({tuple(base), tuple(one), tuple(two)}) == 3


def test_generate_json_has_every_completion_and_log_probabilities(capsys):
    argv = [*TINY, "--json", "--max-tokens", "5", "--ignore-eos", "--n", "3"]
    argv += ["--temperature", "1", "--seed", "1", "--logprobs", "2"]
    argv += ["--prompt-logprobs", "0", "--truncate-prompt-tokens", "4"]
    argv += ["--min-p", "0.001", "--repetition-penalty", "1.1", "--min-tokens", "2"]
    argv += ["--presence-penalty", "0.1", "--frequency-penalty", "0.1"]
    argv += ["--logit-bias", "65=-100", "66=-3.5", "--time-limit-s", "600"]
    argv += ["--include-stop", "--prompt", "some text"]
    assert ended(argv) == 0
    record = json.loads(capsys.readouterr().out)
    assert bytes(record["prompt_token_ids"]) == b"text"
    first, *rest = record["prompt_logprobs"]
    assert first is None
    assert [[int(i) for i in one] for one in rest] == [[i] for i in b"ext"]
    assert [one["index"] for one in record["outputs"]] == [0, 1, 2]
    assert len({tuple(one["token_ids"]) for one in record["outputs"]}) == 3
    for one in record["outputs"]:
        assert len(one["token_ids"]) == len(one["logprobs"]) == 5
        for token, found in zip(one["token_ids"], one["logprobs"], strict=True):
            assert next(iter(found)) == str(token) and 2 <= len(found) <= 3
            assert all(value <= 0 for value in found.values())
    for field in ("text", "token_ids", "logprobs", "finish_reason", "timing", "error"):
        assert record[field] == record["outputs"][0][field]


def test_generate_prints_every_completion(capsys):
    argv = [*TINY, "--max-tokens", "3", "--ignore-eos", "--prompt", "a", "--n", "2"]
    assert ended([*argv, "--temperature", "1"]) == 0
    out = capsys.readouterr().out
    headers = [line for line in out.splitlines() if line.startswith("===")]
    assert headers[0] == "=== 0 | adapter base | 3 tokens | length | a"
    assert headers[1] == "=== 0.1 | adapter base | 3 tokens | length | a"


def test_generate_prints_labelled_blocks_for_several_prompts(capsys):
    argv = [*TINY, "--max-tokens", "3", "--ignore-eos", "--prompt", "a", "b\nc"]
    assert ended(argv) == 0
    out = capsys.readouterr().out
    headers = [line for line in out.splitlines() if line.startswith("===")]
    assert headers[0] == "=== 0 | adapter base | 3 tokens | length | a"
    assert headers[1] == "=== 1 | adapter base | 3 tokens | length | b c"


def test_generate_refuses_a_prompt_that_does_not_fit_the_context(capsys):
    assert ended([*TINY, "--prompt", "x" * 200]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "128" in err


@pytest.mark.parametrize("model", ["no-such-model", "/no/such/dir", "no/such.gguf"])
def test_generate_with_an_unknown_model_is_one_line(model, capsys):
    assert ended(["generate", "--model", model, *PROMPT]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and model in err


def test_generate_streams_one_prompt_and_ctrl_c_ends_it():
    argv = ["generate", "--model", "tiny", "--raw", *SMALL_ENGINE, "4096"]
    argv += ["--max-tokens", "4000", "--ignore-eos", "--prompt", "x"]
    # A shell that runs tests in the background has them, and their children, ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = start(argv, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    finally:
        signal.signal(signal.SIGINT, before)
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert first
    assert len(rest) < 4000
    assert err == "jchameleon: interrupted\n"
    assert process.returncode == 130
