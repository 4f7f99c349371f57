"""SentencePiece vocabularies of GGUF files, against the definition of their BPE."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spm_vocabulary import SPM_SCORES, SPM_TOKENS, SPM_TYPES, SPM_WORDS, spm_metadata

from jchameleon.models.tokenizer import Tokenizer


def spm_reference(text: str) -> list[int]:
    """SentencePiece BPE from its definition: join the best-scoring neighbours."""
    scores = dict(zip(SPM_WORDS, SPM_SCORES[259:], strict=True))
    pieces = list(("▁" + text.replace(" ", "▁")) if text else "")
    while True:
        joins = [
            (-scores[left + right], i)
            for i, (left, right) in enumerate(zip(pieces, pieces[1:], strict=False))
            if left + right in scores
        ]
        if not joins:
            break
        _, i = min(joins)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    ids: list[int] = []
    for piece in pieces:
        if piece in scores:
            ids.append(259 + SPM_WORDS.index(piece))
        else:
            ids += [3 + byte for byte in piece.encode()]
    return ids


@pytest.fixture(scope="module")
def spm():
    return Tokenizer.from_gguf(spm_metadata(), bos_token_id=1, eos_token_ids=(2,))


@settings(max_examples=300)
@given(text=st.text(alphabet="aaabbbccc  é語", max_size=30))
def test_sentencepiece_ids_follow_the_definition(spm, text):
    ids = spm.encode(text)
    assert ids == [1, *spm_reference(text)]
    assert spm.decode(ids) == text


@settings(max_examples=200)
@given(ids=st.lists(st.integers(0, 259 + len(SPM_WORDS)), max_size=30))
def test_sentencepiece_stream_is_decode_of_all(spm, ids):
    stream = spm.stream()
    streamed = "".join([*map(stream.push, ids), stream.flush()])
    assert streamed == spm.decode(ids)
    raw = b"".join(spm.piece(i) for i in ids if i not in (1, 2))
    assert streamed == raw.removeprefix(b" ").decode("utf-8", "replace")


def test_sentencepiece_bytes_and_blanks(spm):
    assert spm.decode([1, 259 + SPM_WORDS.index("▁ab"), 3 + 0xC3, 3 + 0xA9]) == "abé"
    assert spm.decode([259, 259, 260]) == " a"
    no_prefix = Tokenizer.from_gguf(
        spm_metadata(add_space_prefix=False, add_bos_token=False),
        bos_token_id=1,
        eos_token_ids=(2,),
    )
    assert no_prefix.encode("ab") == [259 + SPM_WORDS.index("ab")]
    assert no_prefix.decode(no_prefix.encode(" a")) == " a"


def test_sentencepiece_specials(spm):
    assert spm.encode("</s>")[-1] == 2
    assert 2 not in spm.encode("</s>", parse_special=False)
    assert spm.encode("<s>a") == [1, 259 + SPM_WORDS.index("▁a")]


def test_sentencepiece_user_defined_tokens_match_whole():
    table = spm_metadata()
    table["tokenizer.ggml.token_type"] = [*SPM_TYPES[:-1], 4]
    table["tokenizer.ggml.tokens"] = [*SPM_TOKENS, *SPM_WORDS[:-1], "<think>"]
    made = Tokenizer.from_gguf(table, bos_token_id=1, eos_token_ids=(2,))
    token_id = len(SPM_TYPES) - 1
    assert made.encode("a<think>a").count(token_id) == 1
    assert "<think>" in made.decode([token_id])  # not special, so it is text
