"""Text to token ids and back.

Two tokenizers, chosen by the model's vocabulary. In both, id 0 ends a document and stands for
no text, and every byte has an id of its own, so any text can be encoded and a piece of UTF-8
can be split over several tokens. Decoding therefore works on bytes. Tokens of a vocabulary of 256 are bytes themselves:
they can be read, but in which encoding text becomes them only its maker knows.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from functools import cache, cached_property
from typing import Any, Protocol

from src.errors import DataError

END_OF_DOCUMENT = 0
WORLD_VOCABULARY = 65536
BYTE_VOCABULARIES = range(257, 513)
PLAIN_BYTES = 256

REPLACEMENT = "\ufffd"
_LINE_START = re.compile(r"\n(?=\S)")
_BLOCK_CHARACTERS = 1 << 20


class Decoder(Protocol):
    """What can be read of tokens.

    Attributes:
        ends_documents: the id that ends a document; None where every id stands for text.
        encoding: of the text whose bytes the tokens stand for.
    """

    ends_documents: int | None
    encoding: str = "utf-8"

    def pieces(self, ids: Iterable[int]) -> list[bytes]:
        """The bytes that each id stands for: none for the end of a document, U+FFFD for an id without an entry."""
        ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for together."""
        return b"".join(self.pieces(ids))

    def decode(self, ids: Iterable[int]) -> str:
        """`decode_bytes` as text, U+FFFD standing for what is not valid in the encoding."""
        return self.decode_bytes(ids).decode(self.encoding, errors="replace")


class Tokenizer(Decoder, Protocol):
    """What every tokenizer can do."""

    end_of_document: int = END_OF_DOCUMENT
    ends_documents: int | None = END_OF_DOCUMENT

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without an end-of-document token.

        Raises:
            DataError: the text holds half of a surrogate pair, which UTF-8 cannot express.
        """
        ...


class PlainBytes(Decoder):
    """Token = byte of a text in UTF-16 (little-endian), which has bytes of 0, or in UTF-8, which has none."""

    ends_documents = None

    def __init__(self, sample: Iterable[int]) -> None:
        self.encoding = "utf-16-le" if 0 in sample else "utf-8"

    def pieces(self, ids: Iterable[int]) -> list[bytes]:
        return [bytes((token,)) for token in ids]


class ByteTokenizer(Tokenizer):
    """Token = byte of the UTF-8 text + 1."""

    def encode(self, text: str) -> list[int]:
        return [byte + 1 for byte in _utf8(text)]

    def pieces(self, ids: Iterable[int]) -> list[bytes]:
        replacement = REPLACEMENT.encode()
        return [bytes((token - 1,)) if 1 <= token <= 256 else b"" if token == 0 else replacement for token in ids]


class WorldTokenizer(Tokenizer):
    """The RWKV World tokenizer: greedy longest match over 65529 byte strings, ids from 1.

    `pyrwkv-tokenizer` encodes. It does not decode, because its decoder panics on a split
    character and on ids beyond its vocabulary; a table parsed from its vocabulary file does.
    """

    def __init__(self) -> None:
        try:
            from pyrwkv_tokenizer import RWKVTokenizer
        except ImportError as error:
            raise DataError(
                f"The World tokenizer of a {WORLD_VOCABULARY} vocabulary needs the package pyrwkv-tokenizer, "
                f"which does not import ({error}); `pip install pyrwkv-tokenizer`, or use --data_type binidx."
            ) from error
        self._encoder: Any = RWKVTokenizer()
        self._known: dict[int, bytes] = {0: b""}

    def encode(self, text: str) -> list[int]:
        _utf8(text)
        ids: list[int] = []
        start = 0
        while start < len(text):
            # No entry goes from a line break on to a visible character, so a cut there changes no
            # token, and the encoder's memory stays bounded.
            line_start = _LINE_START.search(text, start + _BLOCK_CHARACTERS)
            end = line_start.end() if line_start else len(text)
            ids += self._encoder.encode(text[start:end])
            start = end
        return ids

    def pieces(self, ids: Iterable[int]) -> list[bytes]:
        known = self._known
        return [known[token] if token in known else self._piece(token) for token in ids]

    def _piece(self, token: int) -> bytes:
        """An id's bytes, parsed when it first comes: all of them would take half a second of every start."""
        lines = self._lines
        if not 0 < token <= len(lines):
            return REPLACEMENT.encode()
        number, _, rest = lines[token - 1].partition(" ")
        literal, _, length = rest.rpartition(" ")
        value = ast.literal_eval(literal)
        piece: bytes = value.encode() if isinstance(value, str) else value
        path = self._encoder.vocab_filepath
        assert int(number) == token, f"{path}: ids are not consecutive at {number}"
        assert int(length) == len(piece), f"{path}: entry {number} is not {length} bytes long"
        self._known[token] = piece
        return piece

    @cached_property
    def _lines(self) -> list[str]:
        """The vocabulary file's, of ids 1 … 65529: id, Python literal, length in bytes."""
        with open(self._encoder.vocab_filepath, encoding="utf-8", newline="\n") as file:
            return file.readlines()


@cache
def _world_tokenizer() -> WorldTokenizer:
    """One for all, because its tables take half a second to build."""
    return WorldTokenizer()


def tokenizer_for_vocabulary(vocab_size: int) -> Tokenizer:
    """The tokenizer of models with `vocab_size` entries.

    Raises:
        DataError: no tokenizer belongs to this vocabulary, or its package is not installed.
    """
    if vocab_size == WORLD_VOCABULARY:
        return _world_tokenizer()
    if vocab_size in BYTE_VOCABULARIES:
        return ByteTokenizer()
    raise DataError(
        f"No tokenizer is known for a vocabulary of {vocab_size}: text needs {WORLD_VOCABULARY} (World) or "
        f"{BYTE_VOCABULARIES.start} to {BYTE_VOCABULARIES.stop - 1} (bytes); tokens (--data_type "
        "binidx, or pairs in a .save file) work with every vocabulary."
    )


def decoder_for_vocabulary(vocab_size: int, sample: Iterable[int]) -> Decoder:
    """What reads the tokens of models with `vocab_size` entries; `sample` are some of them.

    Raises:
        DataError: as `tokenizer_for_vocabulary`.
    """
    return PlainBytes(sample) if vocab_size == PLAIN_BYTES else tokenizer_for_vocabulary(vocab_size)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"The text holds {text[error.start]!r} at character {error.start}, half of a surrogate pair, "
            "which is no character; write the whole pair, or remove it."
        ) from error
