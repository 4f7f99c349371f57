"""Vocabularies in GGUF metadata, rebuilt as `tokenizers` objects."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
)
from tokenizers.models import BPE

from jchameleon.errors import ModelLoadError
from jchameleon.models.files import one_line

# Types of tokens; 5 (unused) and 6 (byte) need no name here.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

# How byte-level vocabularies cut text before merging; each is part of what the
# vocabulary was trained with.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_GPT2_NAMES = ("gpt-2", "gpt2", "default")
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GgufVocabulary:
    """A tokenizer and what the file says to put around a text."""

    backend: Tokenizer
    adds_bos: bool
    adds_eos: bool


def gguf_vocabulary(metadata: Mapping[str, Any]) -> GgufVocabulary | None:
    """Build from the `tokenizer.ggml.*` keys, None without any.

    Model "gpt2" is byte-level BPE, cut as `pre` says; model "llama" is SentencePiece
    BPE with byte fallback, its merges recovered from the scores.

    Raises:
      ModelLoadError: another model or `pre`, or tables that do not fit together.
    """
    meta = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    model = meta.get("model")
    if model in (None, "no_vocab"):
        return None
    if model not in ("gpt2", "llama"):
        raise ModelLoadError(
            f"tokenizer.ggml.model={model!r} must be 'gpt2' or 'llama'"
        )
    tokens = _table(meta, "tokens", str, None)
    types = _table(meta, "token_type", int, len(tokens))
    if model == "gpt2":
        pre = meta.get("pre", "default")
        backend = _byte_level_backend(tokens, _table(meta, "merges", str, None), pre)
        adds_bos = pre in _LLAMA3_NAMES
    else:
        scores = _table(meta, "scores", float, len(tokens))
        add_space = bool(meta.get("add_space_prefix", True))
        backend = _sentencepiece_backend(tokens, scores, types, add_space)
        adds_bos = True
    for special, kind in ((True, _CONTROL), (False, _USER_DEFINED)):
        backend.add_tokens(
            [
                AddedToken(token, normalized=False, special=special)
                for token, found in zip(tokens, types, strict=True)
                if found == kind and token
            ]
        )
    return GgufVocabulary(
        backend=backend,
        adds_bos=bool(meta.get("add_bos_token", adds_bos)),
        adds_eos=bool(meta.get("add_eos_token", False)),
    )


def _byte_level_backend(tokens: list[str], merges: list[str], pre: Any) -> Tokenizer:
    """Build byte-level BPE over GGUF tables."""
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise ModelLoadError("tokenizer.ggml.merges has an entry that is no pair")
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = _bpe_backend(vocab, pairs, ignore_merges=pre in _LLAMA3_NAMES)
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=pre in ("smollm", *_GPT2_NAMES)
    )
    if pre in _GPT2_NAMES:
        backend.pre_tokenizer = byte_level
    elif pre == "smollm":
        # Digits come apart before anything else, so blanks before a number are one run.
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    elif pre == "qwen2" or pre in _LLAMA3_NAMES:
        pattern = _QWEN2_SPLIT if pre == "qwen2" else _LLAMA3_SPLIT
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        if pre == "qwen2":
            backend.normalizer = normalizers.NFC()
    else:
        raise ModelLoadError(
            f"tokenizer.ggml.pre={pre!r} must be one of smollm, qwen2, "
            + ", ".join(_LLAMA3_NAMES + _GPT2_NAMES)
        )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_backend(
    tokens: list[str], scores: list[float], types: list[int], add_space: bool
) -> Tokenizer:
    """Build SentencePiece BPE over GGUF tables.

    SentencePiece joins the neighbours whose union scores best. As merges that is:
    every split of a token into two tokens, in falling order of the token's score.
    """
    vocab = {token: i for i, token in enumerate(tokens)}
    # The other types are matched whole or never; no merge may make them.
    joinable = {token: i for token, i in vocab.items() if types[i] == _NORMAL}
    pairs: list[tuple[float, int, int, tuple[str, str]]] = []
    for token, i in joinable.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in joinable and right in joinable:
                order = (-scores[i], joinable[left], joinable[right])
                pairs.append((*order, (left, right)))
    pairs.sort()
    unknown = next((t for t, i in vocab.items() if types[i] == _UNKNOWN), None)
    backend = _bpe_backend(
        vocab,
        [pair[3] for pair in pairs],
        byte_fallback=True,
        fuse_unk=True,
        unk_token=unknown,
    )
    # As in llama.cpp and in Llama 2's tokenizer.json: a blank goes before every text,
    # and before the text after a special token.
    blanks = normalizers.Replace(" ", "▁")
    prefixed = normalizers.Sequence([normalizers.Prepend("▁"), blanks])
    backend.normalizer = prefixed if add_space else blanks
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_space:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    return backend


def _bpe_backend(vocab: dict[str, int], pairs: list[Any], **options: Any) -> Tokenizer:
    try:
        return Tokenizer(BPE(vocab, pairs, **options))
    except Exception as error:  # the library raises bare Exception
        raise ModelLoadError(
            f"tokenizer.ggml.merges do not fit the tokens: {one_line(error)}"
        ) from error


def _table(meta: Mapping[str, Any], name: str, kind: type, size: int | None) -> Any:
    value = meta.get(name)
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        raise ModelLoadError(
            f"tokenizer.ggml.{name} must be an array of {kind.__name__}"
        )
    if size is not None and len(value) != size:
        raise ModelLoadError(
            f"tokenizer.ggml.{name} has {len(value)} entries for {size} tokens"
        )
    return value
