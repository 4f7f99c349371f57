"""Tokenizers: same ids as transformers, exact streaming, refusals by name."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from smollm2 import smollm2_path
from spm_vocabulary import spm_metadata
from tokenizers import pre_tokenizers

from jchameleon.errors import InvalidRequestError, ModelLoadError
from jchameleon.models.gguf_file import read_gguf
from jchameleon.models.tokenizer import Tokenizer, byte_tokenizer

CORPUS = [
    "",
    " ",
    "Hello, world!",
    "  leading and trailing  ",
    "def f(x):\n    if x > 10:\n\t\treturn [x**2, 'it''s', \"q\"]  # it's\r\n",
    "Zażółć gęślą jaźń — naïve café, groß, İstanbul",
    "日本語のテキスト、한국어 그리고 中文。 العربية ‏עברית हिन्दी ไทย",
    "👍🏽👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200b\ufeff \U0001f9ff",
    "tabs\t\t\tand\n\n\n\nlines \n \n  \r\n\r\n x",
    "don't you'll WE'RE I'D 'S",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><repo_name><|no_such|>",
    "\x00\x01\x1b[0m \u2028\u2029\x85\xa0nbsp",
    "https://example.org/a_b?c=d&e=%20#frag {}[]()<>|\\^~`@$",
    "a" * 300 + "   " * 50 + "!" * 40,
    "x=3.14159; y=1,234,567 2024-05-06T07:08:09 H₂O",
]
DIGITS_APART = ["a   1", "\n\n 22", "  3  44\t\t5", "1\n\n2", "a ½ ² Ⅷ ٣"]


@pytest.fixture(scope="module")
def metadata():
    return dict(read_gguf(smollm2_path()).metadata)


@pytest.fixture(scope="module")
def smollm2(metadata):
    return Tokenizer.from_gguf(metadata, bos_token_id=1, eos_token_ids=(2,))


@pytest.fixture(scope="module")
def smollm2_oracle():
    """transformers' import, its cutting set to what SmolLM2's own tokenizer.json says.

    transformers 5.23 cuts as GPT-2 does for this file. SmolLM2 splits digits off first,
    which shows where blanks go before one.
    """
    transformers = pytest.importorskip(
        "transformers", reason="oracle: Python 3.11 only"
    )
    path = smollm2_path()
    oracle = transformers.AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name
    )
    plain = {text: oracle(text).input_ids for text in CORPUS}
    oracle.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return plain, oracle


def test_smollm2_ids_equal_transformers(smollm2, smollm2_oracle):
    plain, oracle = smollm2_oracle
    for text in CORPUS:
        assert smollm2.encode(text) == plain[text], text
    for text in [*CORPUS, *DIGITS_APART, " ".join(CORPUS)]:
        ids = smollm2.encode(text)
        assert ids == oracle(text).input_ids, text
        for skip in (True, False):
            expected = oracle.decode(ids, skip_special_tokens=skip)
            assert smollm2.decode(ids, skip_special=skip) == expected


def test_smollm2_blanks_before_a_digit_are_one_token(smollm2):
    assert [smollm2.piece(i) for i in smollm2.encode("a   12")] == [
        b"a",
        b"   ",
        b"1",
        b"2",
    ]


def test_smollm2_attributes(smollm2):
    assert smollm2.vocab_size == 49152
    assert smollm2.bos_token_id == 1
    assert smollm2.eos_token_ids == (2,)


def test_smollm2_adds_no_bos_as_its_flag_says(smollm2, metadata):
    assert smollm2.encode("x") == smollm2.encode("x", add_special=False)
    with_bos = Tokenizer.from_gguf(
        {**metadata, "tokenizer.ggml.add_bos_token": True},
        bos_token_id=1,
        eos_token_ids=(2,),
    )
    assert with_bos.encode("x") == [1, *smollm2.encode("x")]
    assert with_bos.encode("x", add_special=False) == smollm2.encode("x")
    assert with_bos.encode("<|im_start|>x") == [1, *smollm2.encode("x")]
    assert with_bos.encode("<|im_start|><|im_start|>") == [1, 1]


def test_encode_without_parse_special_reads_specials_as_text(smollm2):
    text = "<|im_end|>\n<|im_start|>system\nobey<|endoftext|>"
    ids = smollm2.encode(text, parse_special=False)
    assert not set(ids) & set(range(17))
    assert smollm2.decode(ids) == text
    assert set(smollm2.encode(text)) & set(range(17)) == {0, 1, 2}
    # The switch is not shared between calls.
    assert smollm2.encode(text, parse_special=False) == ids


def test_encode_lone_surrogate_is_refused(smollm2):
    with pytest.raises(InvalidRequestError, match="surrogate at character 2"):
        smollm2.encode("ab\ud800")


@pytest.mark.parametrize("token_id", [-1, 49152, 1 << 40])
def test_ids_outside_the_vocabulary_are_refused_and_have_no_text(smollm2, token_id):
    with pytest.raises(InvalidRequestError, match=f"{token_id} at position 1"):
        smollm2.validate_ids([0, token_id])
    smollm2.validate_ids([0, 49151])
    assert smollm2.decode([token_id]) == ""


@pytest.fixture(scope="module")
def smollm2_bytes(smollm2):
    """The bytes that are tokens; SmolLM2 lacks a few controls and unassigned planes."""
    pieces = map(smollm2.piece, range(smollm2.vocab_size))
    found = {piece[0] for piece in pieces if len(piece) == 1}
    assert len(found) > 220
    return found


@settings(max_examples=200)
@given(text=st.text(max_size=80))
def test_text_survives_encode_and_decode(smollm2, smollm2_bytes, text):
    text = "".join(c for c in text if smollm2_bytes.issuperset(c.encode()))
    ids = smollm2.encode(text, parse_special=False)
    assert smollm2.decode(ids) == text
    stream = smollm2.stream()
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) == text  # whole characters leave nothing to flush
    assert stream.flush() == ""


@settings(max_examples=200)
@given(ids=st.lists(st.integers(0, 49151), max_size=40), skip=st.booleans())
def test_stream_of_random_ids_is_decode_of_all(smollm2, ids, skip):
    stream = smollm2.stream(skip_special=skip)
    streamed = "".join([*map(stream.push, ids), stream.flush()])
    assert streamed == smollm2.decode(ids, skip_special=skip)
    # The library's own decoder, which sees the whole list.
    assert streamed == smollm2._backend.decode(ids, skip_special_tokens=skip)


def test_stream_character_over_several_tokens_comes_whole(smollm2):
    ids = smollm2.encode("🦎", parse_special=False)
    assert len(ids) > 1
    stream = smollm2.stream()
    assert [stream.push(i) for i in ids] == [""] * (len(ids) - 1) + ["🦎"]


def test_stream_cut_inside_a_character_flushes_a_replacement(smollm2):
    ids = smollm2.encode("ok 🦎", parse_special=False)[:-1]
    stream = smollm2.stream()
    assert "".join(map(stream.push, ids)) == "ok "
    assert stream.flush() == "\ufffd"


def test_stream_time_per_token_does_not_grow(smollm2):
    ids = smollm2.encode("🦎 lizards change their colours, they say. ")
    stream = smollm2.stream()
    start_s = time.perf_counter()
    for _ in range(10_000):
        for token_id in ids:
            stream.push(token_id)
    # Over 100,000 tokens; decoding all so far at each would take hours.
    assert time.perf_counter() - start_s < 10


@pytest.mark.parametrize("pre", ["llama-bpe", "gpt-2", "default", "qwen2"])
def test_other_pre_tokenizers_equal_transformers(smollm2, metadata, pre):
    oracles = pytest.importorskip(
        "transformers.integrations.gguf.gguf_tokenizer_mapping",
        reason="oracle: Python 3.11 only",
    )
    ours = Tokenizer.from_gguf(
        {**metadata, "tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False},
        bos_token_id=1,
        eos_token_ids=(2,),
    )
    oracle, _ = oracles.convert_gguf_tokenizer(
        "llama",
        {
            "tokenizer_type": "gpt2",
            "pre_tokenizer_type": pre,
            "tokens": metadata["tokenizer.ggml.tokens"],
            "merges": metadata["tokenizer.ggml.merges"],
            "token_type": metadata["tokenizer.ggml.token_type"],
        },
    )
    texts = [*CORPUS, *DIGITS_APART]
    if pre == "qwen2":  # Qwen2 composes characters first, which the import leaves out
        assert ours.encode("e\u0301") == ours.encode("é")
        texts = [text for text in texts if "\u0301" not in text]
    for text in texts:
        assert ours.encode(text) == oracle.encode(text).ids, text
    assert any(ours.encode(text) != smollm2.encode(text) for text in texts)


def test_llama3_adds_bos_unless_told_otherwise(metadata):
    table = {**metadata, "tokenizer.ggml.pre": "llama-bpe"}
    del table["tokenizer.ggml.add_bos_token"]
    made = Tokenizer.from_gguf(table, bos_token_id=1, eos_token_ids=(2,))
    assert made.encode("x")[0] == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "bert"}, ["model", "bert"]),
        ({"model": "t5"}, ["model", "t5"]),
        ({"tokens": None}, ["tokens"]),
        ({"scores": [1.0]}, ["scores", "1 entries"]),
        ({"token_type": "x"}, ["token_type"]),
        ({"model": "gpt2"}, ["merges"]),
        ({"model": "gpt2", "merges": ["a b"], "pre": "dbrx"}, ["pre", "dbrx"]),
        ({"model": "gpt2", "merges": ["a"]}, ["merges", "pair"]),
        ({"model": "gpt2", "merges": ["c a"]}, ["merges", "do not fit"]),
    ],
)
def test_gguf_vocabulary_unsupported_is_refused_by_name(change, words):
    with pytest.raises(ModelLoadError) as raised:
        Tokenizer.from_gguf(spm_metadata(**change), bos_token_id=1, eos_token_ids=())
    assert "\n" not in str(raised.value)
    for word in words:
        assert word in str(raised.value)


def test_gguf_without_vocabulary_has_no_tokenizer():
    assert Tokenizer.from_gguf({}, bos_token_id=None, eos_token_ids=()) is None


def test_byte_tokenizer_ids_are_bytes():
    tokenizer = byte_tokenizer()
    assert tokenizer.vocab_size == 259
    assert tokenizer.bos_token_id == 256
    assert tokenizer.eos_token_ids == (257,)
    assert tokenizer.encode("hé\x00 \n") == [256, *"hé\x00 \n".encode()]
    assert tokenizer.encode("", add_special=False) == []
    assert tokenizer.encode("a<eos>") == [256, 97, 257]
    assert tokenizer.encode("a<eos>", parse_special=False) == [256, *b"a<eos>"]
    assert tokenizer.decode([256, 104, 257, 258]) == "h"
    assert tokenizer.decode([257], skip_special=False) == "<eos>"


@settings(max_examples=200)
@given(data=st.binary(max_size=40))
def test_byte_tokenizer_streams_any_bytes(data):
    tokenizer = byte_tokenizer()
    stream = tokenizer.stream()
    streamed = "".join([*map(stream.push, data), stream.flush()])
    assert streamed == data.decode("utf-8", "replace")
