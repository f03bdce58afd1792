"""Documents from text: JSON lines, chats through one template, plain text, and generated ones.

Every document ends with the tokenizer's end-of-document token. Where speakers have roles the loss
is taken on answers only: an answer's text, the blank line that ends it (chat clients stop there),
and, after the last answer, the end of the document.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from src.data.documents import Documents
from src.errors import DataError
from src.tokenizer import Tokenizer

LINE_FORMS = '{"text": …}, {"prompt": …, "response": …} or {"messages": [{"role": …, "content": …}, …]}'

_BLANK_LINES = re.compile(r"\n{2,}")
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


class Part(NamedTuple):
    """A stretch of text tokenised on its own, and whether the loss is taken on it."""

    text: str
    counted: bool


@dataclass(frozen=True)
class ChatTemplate:
    """Writes a conversation as text: `Name: content` per turn, a blank line after each.

    Because clients take a blank line for the end of a turn, none may stand inside one: runs of
    line breaks within a turn become a single one.
    """

    name: str
    speakers: dict[str, str]
    answering: str = "assistant"
    turn_end: str = "\n\n"

    def render(self, messages: Sequence[tuple[str, str]]) -> tuple[list[Part], int]:
        """Parts of a conversation of (role, content), and how many blank lines were replaced.

        An uncounted part ends in "Assistant:" as a client's prompt does; the answer that follows
        begins with the space.
        """
        parts: list[Part] = []
        prompt = ""
        replaced = 0
        for role, content in messages:
            turn, blank_lines = self.clean(content)
            replaced += blank_lines
            if role == self.answering:
                parts.append(Part(f"{prompt}{self.speakers[role]}:", counted=False))
                parts.append(Part(f" {turn}{self.turn_end}", counted=True))
                prompt = ""
            else:
                prompt += f"{self.speakers[role]}: {turn}{self.turn_end}"
        if prompt:
            parts.append(Part(prompt, counted=False))
        return parts, replaced

    def clean(self, content: str) -> tuple[str, int]:
        """A turn's text without outer white space and blank lines, and how many lines those were."""
        return _BLANK_LINES.subn("\n", _unix_lines(content).strip())


WORLD_CHAT = ChatTemplate("World chat", {"system": "System", "user": "User", "assistant": "Assistant"})


class _Collector:
    """Grows the token stream and the mask of documents read one by one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens = array("H")
        self._counted = bytearray()
        self._sizes: list[int] = []
        self._numbers: list[int] = []
        self.masked = False

    def add(self, parts: Sequence[Part], number: int) -> None:
        """Appends one document and its end; the end counts when the last part does."""
        before = len(self._tokens)
        for text, counted in parts:
            ids = self._tokenizer.encode(text)
            self._tokens.extend(ids)
            self._counted += bytes((counted,)) * len(ids)
            self.masked |= not counted
        self._tokens.append(self._tokenizer.end_of_document)
        self._counted.append(parts[-1].counted)
        self._sizes.append(len(self._tokens) - before)
        self._numbers.append(number)

    def documents(self, source: str, vocab_size: int, statements: Sequence[str]) -> Documents:
        sizes = np.array(self._sizes, dtype=np.int64)
        return Documents.from_stream(
            source,
            np.frombuffer(self._tokens, dtype=np.uint16),
            np.cumsum(sizes) - sizes,
            sizes,
            vocab_size,
            unit="line",
            numbers=np.array(self._numbers, dtype=np.int64),
            stream_counted=np.frombuffer(self._counted, dtype=np.bool_) if self.masked else None,
            statements=statements,
        )


def read_jsonl(path: str, tokenizer: Tokenizer, vocab_size: int) -> Documents:
    """Reads JSON lines, one document each; blank lines of the file are passed over.

    Of a line's keys "messages" comes first, then "prompt" with "response", then "text", which is
    taken as it stands. Other keys are ignored. A "system" message may only come first.

    Raises:
        DataError: the file is missing, empty or not UTF-8; a line is malformed (named with file,
            number and reason); or the documents cannot be trained on.
    """
    collector = _Collector(tokenizer)
    replaced = 0
    for number, line in _lines(path):
        try:
            parts, blank_lines = _parts(_entry(line), WORLD_CHAT)
            replaced += blank_lines
            collector.add(parts, number)
        except (_MalformedLine, DataError) as error:
            raise DataError(f"{path}, line {number}: {str(error).removesuffix('.')}.") from error
    statements = []
    if collector.masked:
        statements.append(f"Conversations are written in the template {WORLD_CHAT.name}; the loss is on answers only.")
    if replaced:
        subject = "1 run of blank lines" if replaced == 1 else f"{replaced} runs of blank lines"
        statements.append(f"{subject} inside turns replaced by a line break each: a blank line ends a turn.")
    return collector.documents(path, vocab_size, statements)


def read_text(path: str, tokenizer: Tokenizer, vocab_size: int, piece_tokens: int) -> Documents:
    """Reads a text file as one document, and hands it on in pieces that fit a row.

    A piece has `piece_tokens` tokens at most and begins with the last token of the piece before,
    so every token but the first is a target exactly once. Line ends become "\n".

    Raises:
        DataError: the file is missing, empty or not UTF-8.
    """
    assert piece_tokens >= 2, "a piece needs an input and a target"
    with _opened(path) as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _wrong_encoding(path, content, content.count(b"\n", 0, error.start) + 1, error) from error
    ids = tokenizer.encode(_unix_lines(text))
    stream = np.array([*ids, tokenizer.end_of_document] if ids else [], dtype=np.uint16)
    starts = np.arange(0, max(len(stream) - 1, 0), piece_tokens - 1, dtype=np.int64)
    sizes = np.minimum(len(stream) - starts, piece_tokens)
    statements = []
    if len(starts) > 1:
        statements.append(
            f"A text file is one document; its {len(stream)} tokens are read as {len(starts)} pieces of at "
            f"most {piece_tokens}. A file of short documents is better given as --data_type jsonl."
        )
    return Documents.from_stream(
        path,
        stream,
        starts,
        sizes,
        vocab_size,
        unit="piece",
        numbers=np.arange(1, len(starts) + 1, dtype=np.int64),
        statements=statements,
    )


def generated_documents(vocab_size: int) -> Documents:
    """Documents to try a run with: counting upwards from a random id in random strides.

    Each has 32 to 128 tokens, ids from 1 up modulo the vocabulary, and ends with token 0. The same
    every time.

    Raises:
        DataError: a vocabulary of fewer than three entries.
    """
    if vocab_size < 3:
        raise DataError(f"Generated data need a vocabulary of at least 3 entries, not {vocab_size}.")
    rng = np.random.default_rng(0)
    sizes = rng.integers(32, 129, size=64)
    pieces = []
    for size in sizes:
        start, stride = rng.integers(0, vocab_size - 1), rng.integers(1, min(vocab_size - 1, 16) + 1)
        pieces.append(1 + (start + stride * np.arange(size - 1)) % (vocab_size - 1))
        pieces.append(np.zeros(1, dtype=np.int64))
    return Documents.from_stream(
        "generated data", np.concatenate(pieces).astype(np.int64), np.cumsum(sizes) - sizes, sizes, vocab_size
    )


class _MalformedLine(Exception):
    """Reason why a line is none of the known forms."""


def _entry(line: str) -> dict[str, Any]:
    """The JSON object of a line."""
    try:
        entry = json.loads(line.rstrip())  # a line break would count as another line, from column 1
    except json.JSONDecodeError as error:
        reason = f"not valid JSON ({error.msg} at column {error.colno})"
        raise _MalformedLine(f"{reason}; every line is one object: {LINE_FORMS}") from error
    except RecursionError as error:
        raise _MalformedLine(f"nested too deeply; every line is one object: {LINE_FORMS}") from error
    if not isinstance(entry, dict):
        raise _MalformedLine(f"it is {_kind(entry)}, expected an object: {LINE_FORMS}")
    return entry


def _parts(entry: dict[str, Any], template: ChatTemplate) -> tuple[list[Part], int]:
    """Parts of one line's document, and the blank lines replaced in it."""
    if "messages" in entry:
        return template.render(_messages(entry["messages"], template))
    if "prompt" in entry and "response" in entry:
        turns = [("user", _string(entry, "prompt")), (template.answering, _string(entry, "response"))]
        if not turns[1][1].strip():
            raise _MalformedLine('"response" is empty')
        return template.render(turns)
    if "text" in entry:
        return [Part(_string(entry, "text"), counted=True)], 0
    keys = ", ".join(map(repr, entry)) or "none"
    raise _MalformedLine(f"its keys are {keys}, expected {LINE_FORMS}")


def _messages(messages: object, template: ChatTemplate) -> list[tuple[str, str]]:
    if not isinstance(messages, list):
        raise _MalformedLine(f'"messages" is {_kind(messages)}, expected a list')
    turns: list[tuple[str, str]] = []
    for position, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise _MalformedLine(f"message {position} is {_kind(message)}, expected an object")
        missing = [key for key in ("role", "content") if key not in message]
        if missing:
            raise _MalformedLine(f'message {position} has no "{missing[0]}"')
        role, content = _string(message, "role"), _string(message, "content")
        if role not in template.speakers:
            known = ", ".join(template.speakers)
            raise _MalformedLine(f"message {position} has the role {role!r}; known are {known}")
        if role == "system" and turns:
            raise _MalformedLine(f"message {position} is a system message; it may only come first")
        if role == template.answering and not content.strip():
            raise _MalformedLine(f"message {position}, an answer, is empty")
        turns.append((role, content))
    if template.answering not in (role for role, _ in turns):
        raise _MalformedLine(f'no message has the role "{template.answering}", so there is nothing to learn')
    return turns


def _string(entry: dict[str, Any], key: str) -> str:
    value = entry[key]
    if not isinstance(value, str):
        raise _MalformedLine(f'"{key}" is {_kind(value)}, expected a string')
    return value


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _unix_lines(text: str) -> str:
    return text.replace("\r\n", "\n")


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of every line that is not blank."""
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _wrong_encoding(path, line, number, error) from error
            if text.strip():
                yield number, text


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """The file to read; a DataError says why it cannot be."""
    _must_be_a_file(path)
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def _must_be_a_file(path: str) -> None:
    if Path(path).is_file():
        return
    if Path(path).is_dir():
        raise DataError(f"{path} is a directory; --data_file names one file.")
    advice = "check the path"
    if Path(f"{path}.idx").is_file():
        advice = f"for {path}.idx use --data_type binidx"
    elif Path(f"{path}.jsonl").is_file():
        advice = f"there is {path}.jsonl"
    raise DataError(f"{path} does not exist; {advice}.")


def _wrong_encoding(path: str, content: bytes, line: int, error: UnicodeDecodeError) -> DataError:
    if content.startswith(_UTF16_BOMS):
        return DataError(
            f"{path} is UTF-16, expected UTF-8; convert it: `iconv -f UTF-16 -t UTF-8 {path} > utf8-file`."
        )
    byte = content[error.start] if error.start < len(content) else 0
    return DataError(f"{path}, line {line}: not UTF-8 (byte 0x{byte:02x}: {error.reason}); save the file as UTF-8.")
