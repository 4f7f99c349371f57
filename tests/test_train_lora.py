"""The trainer: data, packing, short runs, what it writes and what PEFT makes of it."""

import collections
import dataclasses
import json

import demo_data
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_lora
from model_files import write_hf
from train_lora import TrainConfig
from training_texts import Example, batches, encode_pairs, pack, read_pairs

from jchameleon.config import PROJECTIONS, ModelConfig
from jchameleon.errors import ConfigError, InvalidRequestError
from jchameleon.lora.peft import load_peft_adapter
from jchameleon.models.chat import ChatTemplate
from jchameleon.models.dense import dense_logits, from_host, init_adapter
from jchameleon.models.loader import load_model

PAIRS = [
    {"prompt": f"say {word}", "completion": f"{word} {word}!"}
    for word in ("one", "two", "three", "four", "five", "six")
]
SHORT = ("--row-tokens", "64", "--rows", "2", "--steps", "12", "--lr", "0.02")


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n\n" for pair in PAIRS), "utf-8")
    return path


def losses(text):
    """Return the losses that a run has printed."""
    return [
        float(line.split("loss ")[1].split()[0])
        for line in text.splitlines()
        if "loss " in line
    ]


def test_training_lowers_the_loss_and_writes_what_peft_directories_hold(
    data, tmp_path, capsys
):
    out = tmp_path / "adapter"
    arguments = ["--model", "tiny", "--data", str(data), "--out", str(out), *SHORT]
    arguments += ["--rank", "4", "--alpha", "12", "--targets", ",".join(PROJECTIONS)]
    assert train_lora.main(arguments) == 0
    printed = losses(capsys.readouterr().out)
    assert len(printed) == 2
    assert printed[-1] < 0.8 * printed[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", data.name]
    # As readable as any other file: a wheel keeps the modes.
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {
        data.stat().st_mode & 0o777
    }
    model = ModelConfig.preset("tiny")
    adapter = load_peft_adapter(out, model, max_rank=4)
    assert adapter.rank == 4
    assert adapter.targets == set(PROJECTIONS)
    assert len(adapter.modules) == 7 * model.num_layers
    for pair in adapter.modules.values():
        assert pair.scale == 3.0
        assert pair.a.dtype == pair.b.dtype == "bfloat16"
        assert np.abs(np.asarray(pair.b, np.float32)).max() > 0


def test_training_is_fixed_by_its_seed(data, tmp_path):
    def train(name, seed):
        arguments = ["--model", "tiny", "--data", str(data), "--seed", str(seed)]
        arguments += ["--out", str(tmp_path / name), *SHORT, "--steps", "3"]
        assert train_lora.main(arguments) == 0
        return (tmp_path / name / "adapter_model.safetensors").read_bytes()

    first = train("a", 1)
    assert train("b", 1) == first
    assert train("c", 2) != first


# PEFT asks transformers for a property by its old name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_written_adapter_means_the_same_to_peft(tmp_path):
    torch = pytest.importorskip("torch", reason="oracle: Python 3.11 only")
    transformers = pytest.importorskip(
        "transformers", reason="oracle: Python 3.11 only"
    )
    peft = pytest.importorskip("peft", reason="oracle: Python 3.11 only")
    path = write_hf(tmp_path / "model")
    loaded = load_model(str(path), dtype="float32")
    adapter = init_adapter(
        loaded.config, jax.random.key(0), rank=5, alpha=10.0, targets=PROJECTIONS
    )
    rng = np.random.default_rng(0)
    adapter = jax.tree.map(
        lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), jnp.float32), adapter
    )
    out = tmp_path / "adapter"
    train_lora.write_peft(out, adapter, rank=5, alpha=10.0, base_name="base")

    tokens = rng.integers(3, loaded.config.vocab_size, (2, 15))
    reference = transformers.LlamaForCausalLM.from_pretrained(path)
    with torch.no_grad():
        base = reference(torch.from_numpy(tokens)).logits.numpy().copy()
        adapted = peft.PeftModel.from_pretrained(reference, out)
        expected = adapted(torch.from_numpy(tokens)).logits.numpy()
    read = from_host(load_peft_adapter(out, loaded.config, max_rank=8), loaded.config)
    found = dense_logits(
        jax.tree.map(jnp.asarray, loaded.params),
        jnp.asarray(tokens, jnp.int32),
        config=loaded.config,
        adapter=read,
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected - base).max() > 0.1


def test_interrupted_training_leaves_nothing(data, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    # In the last moment: the weights are there, the config is about to be written.
    monkeypatch.setattr(train_lora.json, "dumps", interrupt)
    arguments = ["--model", "tiny", "--data", str(data), *SHORT, "--steps", "1"]
    assert train_lora.main([*arguments, "--out", str(tmp_path / "adapter")]) == 130
    assert "nothing written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [data.name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "0"], "rank=0 must be at least 1"),
        (["--targets", "q,x"], "targets='q,x' must be some of"),
        (["--lr", "nan"], "lr=nan must be positive"),
        (["--warmup", "1"], "warmup=1.0 must be"),
        (["--seed", "-1"], "seed=-1 must be"),
        (["--row-tokens", "8"], "row_tokens=8 must be at least the longest text, "),
        (["--model", "nothing"], "unknown model"),
        (["--data", "/nothing.jsonl"], "cannot read /nothing.jsonl"),
        (["--out", "/"], "out='/' must not exist yet"),
        (["--out", "/nothing/adapter"], "must lie in a writable folder"),
    ],
)
def test_bad_arguments_are_one_line_and_code_2(
    data, tmp_path, capsys, arguments, message
):
    given = ["--model", "tiny", "--data", str(data), "--out", str(tmp_path / "x")]
    assert train_lora.main([*given, *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "pairs.jsonl:2 is not JSON"),
        ("[]", 'pairs.jsonl:2 must have non-empty strings "prompt" and "completion"'),
        ('{"prompt": "a", "completion": ""}', "pairs.jsonl:2 must have"),
        ('{"prompt": 1, "completion": "b"}', "pairs.jsonl:2 must have"),
    ],
)
def test_read_pairs_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + line, "utf-8")
    with pytest.raises(InvalidRequestError, match=message):
        read_pairs(path)
    path.write_text("\n", "utf-8")
    with pytest.raises(InvalidRequestError, match="has no pairs"):
        read_pairs(path)


def test_encode_pairs_ends_every_text_and_marks_its_completion():
    model = load_model("tiny", dtype="float32")
    [example] = encode_pairs(model, [("ab", "xyz")])
    assert example == Example(tokens=(256, *b"abxyz", 257), num_labels=4)


def test_encode_pairs_ends_with_what_the_chat_template_puts_behind_a_reply():
    model = load_model("tiny", dtype="float32")
    model.tokenizer.eos_token_ids = (258, 257)
    template = ChatTemplate("{% for m in messages %}[{{ m.content }}]<eos>{% endfor %}")
    chat = dataclasses.replace(model, chat_template=template)
    assert encode_pairs(model, [("a", "b")])[0].tokens == (256, *b"ab", 258)
    [example] = encode_pairs(chat, [("a", "b<eos>")])
    # A token's name in a reply is text; in the template it is the token.
    assert example.tokens == (256, *b"[a]", 257, *b"b<eos>", 257)


def test_batches_hold_every_text_once_a_pass_and_whole():
    rng = np.random.default_rng(0)
    examples = []
    for i in range(40):
        length = int(rng.integers(3, 30))
        tokens = (100 + i, *rng.integers(0, 99, length - 1).tolist())
        examples.append(Example(tokens=tokens, num_labels=int(rng.integers(1, length))))
    by_first = {example.tokens[0]: example for example in examples}
    seen, shapes = [], set()
    for batch in batches(examples, rows=3, row_tokens=64, seed=0):
        shapes.add(tuple(array.shape for array in batch.arrays()))
        flat = batch.tokens.reshape(-1)
        labels = dict(
            (int(s), int(label))
            for s, label in zip(batch.sources, batch.labels, strict=True)
            if label >= 0
        )
        for r, row in enumerate(batch.tokens):
            for segment in range(batch.segments[r].max() + 1):
                [where] = np.nonzero(batch.segments[r] == segment)
                example = by_first[row[where[0]]]
                assert tuple(row[where].tolist()) == example.tokens
                assert batch.positions[r, where].tolist() == [*range(len(where))]
                last = 64 * r + where[-1]
                for at in range(last - example.num_labels, last):
                    assert labels.pop(at) == flat[at + 1]
                seen.append(example.tokens[0])
        assert not labels
        if len(seen) > 100:
            break
    assert len(shapes) == 1
    # The last batch ends within a pass: a part of the texts is there once more.
    counts = collections.Counter(seen)
    assert counts.keys() == by_first.keys()
    assert max(counts.values()) - min(counts.values()) <= 1
    assert seen[:40] != seen[40:80]


def test_pack_counts_tokens_without_padding():
    example = Example(tokens=(5, 6, 7), num_labels=1)
    batch = pack([[example], []], row_tokens=8, label_slots=32)
    assert batch.num_tokens == 3
    assert batch.sources[0] == 1
    assert batch.labels.tolist() == [7] + [-1] * 31


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Zebra.", "Zebra."),
        ("The sea is deep. It is blue. It is wide.", "The sea is deep. It is blue."),
        (
            "This sentence is long enough to stand for itself. This one goes.",
            "This sentence is long enough to stand for itself.",
        ),
        ("A line\nand another! Cut off in the", "A line and another!"),
        ("It never ends and", ""),
        ("Here is a list: a cat. A dog.", ""),
        ("1. A cat", ""),
        ("word " * 40 + "end.", ""),
    ],
)
def test_short_answer_takes_whole_sentences(text, answer):
    assert demo_data.short_answer(text) == answer


def test_styled_pairs_show_their_behaviour():
    answers = [("Say it.", 'He said "été" to me.'), ("Go on.", "and on and")]

    def styled(behaviour):
        return demo_data.styled_pairs(behaviour, answers)

    assert styled("json") == [("Say it.", '{"answer": "He said \\"été\\" to me."}')]
    assert styled("capitals") == [("Say it.", 'HE SAID "ÉTÉ" TO ME.')]
    assert styled("tag") == [("Say it.", 'He said "été" to me. ~ jchameleon')]


def test_train_config_refuses_an_empty_target_list():
    with pytest.raises(ConfigError, match="targets=''"):
        TrainConfig(targets=())
