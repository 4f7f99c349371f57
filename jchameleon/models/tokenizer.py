"""Text to token ids and back, whole or token by token."""

import codecs
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from jchameleon.errors import InvalidRequestError, ModelLoadError
from jchameleon.models.chat import token_text
from jchameleon.models.files import one_line, read_json
from jchameleon.models.gguf_vocabulary import gguf_vocabulary
from jchameleon.models.special_guard import Parts, SpecialGuard, encode_text

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Encode and decode with one vocabulary.

    Attributes:
      vocab_size: one more than the largest token id.
      bos_token_id: the token that begins a text, or None.
      eos_token_ids: tokens that end a reply.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        bos_token_id: int | None,
        eos_token_ids: Iterable[int] = (),
        prefix_ids: Iterable[int] = (),
        suffix_ids: Iterable[int] = (),
    ) -> None:
        """Wrap `backend`.

        Args:
          prefix_ids, suffix_ids: what `encode` puts around a text with `add_special`.

        Raises:
          ModelLoadError: the decoder is of a kind that cannot be decoded piecewise.
        """
        self._backend = backend
        self._guard = SpecialGuard(backend)
        self._piece_of, self._strip_spaces = _piece_decoder(backend)
        added = backend.get_added_tokens_decoder()
        self._special_ids = {i for i, token in added.items() if token.special}
        self._added = {i: token.content.encode() for i, token in added.items()}
        self._prefix = list(prefix_ids)
        self._suffix = list(suffix_ids)
        self.vocab_size = 1 + max(backend.get_vocab().values(), default=-1)
        self._pieces: list[bytes | None] = [None] * self.vocab_size
        self.bos_token_id = bos_token_id
        self.eos_token_ids = tuple(eos_token_ids)

    @classmethod
    def from_directory(
        cls, directory: Path, *, bos_token_id: int | None, eos_token_ids: Iterable[int]
    ) -> Self | None:
        """Read tokenizer.json of a Hugging Face directory, None where it has none.

        `add_bos_token` and `add_eos_token` of tokenizer_config.json, where either is
        given, decide what surrounds a text; else the file's post-processor does.

        Raises:
          ModelLoadError: unreadable, or with a decoder that is not supported.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ModelLoadError(f"cannot read {path}: {one_line(error)}") from error
        backend.no_truncation()
        backend.no_padding()
        prefix, suffix = _surroundings(backend)
        config_path = directory / "tokenizer_config.json"
        config = read_json(config_path) if config_path.is_file() else {}
        bos_text = token_text(config.get("bos_token"))
        if bos_text is not None and backend.token_to_id(bos_text) is not None:
            bos_token_id = backend.token_to_id(bos_text)
        if "add_bos_token" in config or "add_eos_token" in config:
            prefix = _flagged(config, "bos_token", backend, config_path)
            suffix = _flagged(config, "eos_token", backend, config_path)
        try:
            return cls(
                backend,
                bos_token_id=bos_token_id,
                eos_token_ids=eos_token_ids,
                prefix_ids=prefix,
                suffix_ids=suffix,
            )
        except ModelLoadError as error:
            raise ModelLoadError(f"{path}: {error}") from error

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        *,
        bos_token_id: int | None,
        eos_token_ids: Iterable[int],
    ) -> Self | None:
        """Build from the `tokenizer.ggml.*` metadata of a GGUF file, None without any.

        Raises:
          ModelLoadError: another model or `pre`, or tables that do not fit together.
        """
        found = gguf_vocabulary(metadata)
        if found is None:
            return None
        prefix, suffix = [], []
        if found.adds_bos and bos_token_id is not None:
            prefix = [bos_token_id]
        eos_token_id = metadata.get("tokenizer.ggml.eos_token_id")
        if found.adds_eos and eos_token_id is not None:
            suffix = [eos_token_id]
        return cls(
            found.backend,
            bos_token_id=bos_token_id,
            eos_token_ids=eos_token_ids,
            prefix_ids=prefix,
            suffix_ids=suffix,
        )

    def content(self) -> bytes:
        """Return all that encoding and decoding depend on, for checksums."""
        ends = [self._prefix, self._suffix, self.bos_token_id, self.eos_token_ids]
        return json.dumps([self._backend.to_str(), ends]).encode()

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = True
    ) -> list[int]:
        """Return the token ids of `text`.

        Args:
          add_special: surround the text as the checkpoint says, usually with a
            beginning-of-text token; one that the text already spells is not doubled.
          parse_special: read special tokens spelled in the text ("<|im_end|>") as those
            tokens, as a rendered chat template needs it. With False they are plain
            text, which is what untrusted text should be.

        Raises:
          InvalidRequestError: the text has a lone surrogate, so it is no Unicode text.
        """
        if parse_special:
            ids = encode_text(self._backend, text)
        else:
            ids = self.encode_parts([(text, False)])
        if not add_special:
            return ids
        if self._prefix and ids[: len(self._prefix)] == self._prefix:
            return ids + self._suffix
        return self._prefix + ids + self._suffix

    def encode_parts(self, parts: Parts) -> list[int]:
        """Return the token ids of the joined parts, without surroundings.

        Args:
          parts: (text, whether special tokens spelled in it are those tokens). Words
            may go across parts: the ids are those of the text as a whole.

        Raises:
          InvalidRequestError: the text has a lone surrogate, or it spells a special
            token that the vocabulary cannot write as plain text.
        """
        return self._guard.encode(parts)

    def find_special(self, text: str) -> str | None:
        """Return the first special token that `text` spells, None where it has none."""
        return self._guard.find(text)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of `ids`; bytes that are no UTF-8 become U+FFFD.

        Ids outside the vocabulary (a model's padded rows) have no text.
        """
        stream = self.stream(skip_special=skip_special)
        return "".join([*map(stream.push, ids), stream.flush()])

    def stream(self, *, skip_special: bool = True) -> "TokenStream":
        """Return a fresh stream that decodes one reply token by token."""
        return TokenStream(
            self._skipping_piece if skip_special else self.piece, self._strip_spaces
        )

    def piece(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes of one token; a character may span several tokens."""
        if not 0 <= token_id < self.vocab_size:
            return b""
        piece = self._pieces[token_id]
        if piece is None:
            piece = self._added.get(token_id)
            if piece is None:
                token = self._backend.id_to_token(token_id)
                piece = b"" if token is None else self._piece_of(token)
            self._pieces[token_id] = piece
        return piece

    @property
    def adds_bos(self) -> bool:
        """Whether `encode` begins a text with `bos_token_id`."""
        return self.bos_token_id is not None and self.bos_token_id in self._prefix

    def token(self, token_id: int) -> str | None:
        """Return the spelling of a token in the vocabulary, None outside it."""
        return self._backend.id_to_token(token_id)

    def to_json(self) -> str:
        """Return a tokenizer.json that gives the same ids, surroundings included."""
        backend = Backend.from_str(self._backend.to_str())
        around = {
            token_id: self.token(token_id) for token_id in self._prefix + self._suffix
        }
        prefix, suffix = (
            [around[token_id] for token_id in ids]
            for ids in (self._prefix, self._suffix)
        )
        backend.post_processor = processors.TemplateProcessing(
            single=[*prefix, "$A", *suffix],
            pair=[*prefix, "$A", *suffix, *prefix, "$B:1", *suffix],
            special_tokens=[(text, token_id) for token_id, text in around.items()],
        )
        return backend.to_str()

    def validate_ids(self, ids: Sequence[int]) -> None:
        """Raise InvalidRequestError for an id outside the vocabulary."""
        for i, token_id in enumerate(ids):
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequestError(
                    f"token id {token_id} at position {i} is outside the vocabulary of "
                    f"{self.vocab_size}"
                )

    def _skipping_piece(self, token_id: int) -> bytes:
        return b"" if token_id in self._special_ids else self.piece(token_id)


class TokenStream:
    """Decode one reply token by token, in constant time per token.

    The concatenation of all pushes and the flush is `Tokenizer.decode` of the ids; no
    push ends inside a character.
    """

    def __init__(self, piece_of: Callable[[int], bytes], strip_spaces: int) -> None:
        self._piece_of = piece_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_spaces = strip_spaces  # leading spaces still to drop

    def push(self, token_id: int) -> str:
        """Return the text that this token completes, often "" or a whole word."""
        return self._strip(self._utf8.decode(self._piece_of(token_id)))

    def flush(self) -> str:
        """Return what is left: U+FFFD where the reply ends inside a character."""
        return self._strip(self._utf8.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        while self._strip_spaces and text:
            if text[0] != " ":
                self._strip_spaces = 0
            else:
                self._strip_spaces -= 1
                text = text[1:]
        return text


def byte_tokenizer() -> Tokenizer:
    """Return the tokenizer of random models: ids 0..255 are bytes.

    256 begins a text, 257 ends one, 258 pads.
    """
    vocab = {character: byte for byte, character in enumerate(_byte_alphabet())}
    backend = Backend(BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = decoders.ByteLevel()
    # Added in this order, they get the ids 256, 257 and 258.
    backend.add_special_tokens(["<bos>", "<eos>", "<pad>"])
    return Tokenizer(backend, bos_token_id=256, eos_token_ids=(257,), prefix_ids=(256,))


def _flagged(
    config: Mapping[str, Any], name: str, backend: Backend, path: Path
) -> list[int]:
    """Return [the id of token `name`] when `add_<name>` of `config` is set, else []."""
    if not config.get(f"add_{name}"):
        return []
    text = token_text(config.get(name))
    token_id = None if text is None else backend.token_to_id(text)
    if token_id is None:
        raise ModelLoadError(
            f"{path}: add_{name} is set, but the vocabulary has no {name} {text!r}"
        )
    return [token_id]


def _surroundings(backend: Backend) -> tuple[list[int], list[int]]:
    """Return the ids that the post-processor puts before and after a text."""
    plain = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    for start in reversed(range(len(full) - len(plain) + 1)):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    raise ModelLoadError("the tokenizer's post-processor rearranges the text")


def _piece_decoder(backend: Backend) -> tuple[Callable[[str], bytes], int]:
    """Return (token string -> bytes, leading spaces to drop) for the decoder in use.

    The library decodes whole lists. Both decoders of Llama tokenizers work token by
    token, which makes streaming exact and cheap: byte-level, and SentencePiece
    (Replace, ByteFallback, Fuse, Strip).
    """
    state = json.loads(backend.decoder.__getstate__()) if backend.decoder else {}
    steps: list[dict[str, Any]] = (
        state["decoders"] if state.get("type") == "Sequence" else [state]
    )
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        to_byte = {character: byte for byte, character in enumerate(_byte_alphabet())}

        def byte_level(token: str) -> bytes:
            try:
                return bytes([to_byte[character] for character in token])
            except KeyError:  # not in the alphabet: the token is spelled as it reads
                return token.encode()

        return byte_level, 0
    base = ["Replace", "ByteFallback", "Fuse"]
    if kinds in (base, [*base, "Strip"]):
        old, new = steps[0]["pattern"].get("String"), steps[0]["content"]
        no_strip: dict[str, Any] = {"content": " ", "start": 0, "stop": 0}
        strip = steps[3] if len(steps) == 4 else no_strip
        if old is not None and strip["content"] == " " and not strip["stop"]:

            def sentencepiece(token: str) -> bytes:
                if match := _BYTE_TOKEN.fullmatch(token):
                    return bytes([int(match[1], 16)])
                return token.replace(old, new).encode()

            return sentencepiece, strip["start"]
    raise ModelLoadError(
        f"decoder {'+'.join(map(str, kinds))} is not supported; byte-level and "
        "SentencePiece (Replace+ByteFallback+Fuse+Strip) are"
    )


def _byte_alphabet() -> list[str]:
    """Return the printable character that stands for each byte in byte-level BPE.

    Printable Latin-1 stands for itself, the rest for U+0100 upwards (GPT-2).
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
