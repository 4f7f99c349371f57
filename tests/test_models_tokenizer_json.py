"""Directories with a tokenizer.json: encoded as the library does, or refused."""

import json

import pytest
from model_files import write_json
from spm_vocabulary import SPM_TOKENS, SPM_WORDS
from tokenizers import AddedToken, decoders, normalizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from jchameleon.errors import ModelLoadError
from jchameleon.models.tokenizer import Tokenizer


def llama2_backend() -> Backend:
    """A tokenizer shaped as Llama 2's tokenizer.json is."""
    vocab = {token: i for i, token in enumerate(SPM_TOKENS + SPM_WORDS)}
    merges = [("b", "c"), ("a", "bc"), ("a", "b"), ("▁", "a"), ("▁a", "b"), ("▁", "▁")]
    backend = Backend(
        BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    backend.add_special_tokens(
        [AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    )
    return backend


def from_directory(directory):
    return Tokenizer.from_directory(directory, bos_token_id=1, eos_token_ids=(2,))


def test_directory_without_tokenizer_has_none(tmp_path):
    assert from_directory(tmp_path) is None


def test_directory_llama2_file_encodes_and_decodes_as_the_library(tmp_path):
    backend = llama2_backend()
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    tokenizer = from_directory(tmp_path)
    for text in ["", "abc", " a  b", "é語", "ab<s>", "</s>", "aa bb cc " * 9]:
        ids = tokenizer.encode(text)
        assert ids == backend.encode(text).ids
        for skip in (True, False):
            assert tokenizer.decode(ids, skip_special=skip) == backend.decode(
                ids, skip_special_tokens=skip
            )
    assert (
        tokenizer.encode("<s>abc")
        == backend.encode("<s>abc", add_special_tokens=False).ids
    )  # no second one


@pytest.mark.parametrize(
    ("config", "first", "last"),
    [
        ({}, 1, None),
        ({"add_bos_token": False}, None, None),
        ({"add_bos_token": True, "bos_token": "<s>"}, 1, None),
        ({"add_eos_token": True, "eos_token": {"content": "</s>"}}, None, 2),
    ],
)
def test_directory_flags_go_before_the_post_processor(tmp_path, config, first, last):
    llama2_backend().save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", config)
    tokenizer = from_directory(tmp_path)
    middle = tokenizer.encode("abc", add_special=False)
    expected = [i for i in (first, *middle, last) if i is not None]
    assert tokenizer.encode("abc") == expected


def test_directory_flag_without_token_is_refused(tmp_path):
    llama2_backend().save(str(tmp_path / "tokenizer.json"))
    config = {"add_bos_token": True, "bos_token": "<nope>"}
    write_json(tmp_path / "tokenizer_config.json", config)
    with pytest.raises(ModelLoadError, match="add_bos_token.*<nope>"):
        from_directory(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {"type": "?"}}'])
def test_directory_corrupt_file_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json") as raised:
        from_directory(tmp_path)
    assert "\n" not in str(raised.value)


def test_directory_decoder_of_other_kind_is_refused(tmp_path):
    backend = llama2_backend()
    table = json.loads(backend.to_str())
    for decoder in (None, {"type": "WordPiece", "prefix": "##", "cleanup": True}):
        write_json(tmp_path / "tokenizer.json", {**table, "decoder": decoder})
        with pytest.raises(ModelLoadError, match="decoder .*not supported"):
            from_directory(tmp_path)
