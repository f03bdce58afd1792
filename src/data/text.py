"""Documents from text: JSON lines, chats through one template, plain text, and generated ones.

Every document ends with the tokenizer's end-of-document token. Where speakers have roles the loss
is taken on answers only, unless a mask says otherwise: an answer's text, the blank line that ends it (chat clients stop
there), and, after the last answer, the end of the document.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from src.config.data import BY_DATA, LossMask
from src.data.documents import Documents
from src.data.inputs import (
    MalformedEntry,
    decoded,
    json_object,
    kind_of,
    listed_names,
    numbered_lines,
    read_whole,
    shown,
    string_of,
    unix_lines,
    unread_keys,
)
from src.data.masks import Marker
from src.data.tools import call_text, result_text, tools_text
from src.data.turns import formatted_statement, is_formatted
from src.errors import DataError
from src.tokenizer import Tokenizer

LINE_FORMS = '{"text": …}, {"prompt": …, "response": …} or {"messages": [{"role": …, "content": …}, …]}'

_BLANK_LINES = re.compile(r"\n{2,}")


class Part(NamedTuple):
    """A stretch of text tokenised on its own, and whether the loss is taken on it."""

    text: str
    counted: bool


@dataclass
class Findings:
    """What was met while a file was read that the user should know of, in numbers.

    Attributes:
        conversations, plain: lines with roles, and lines of plain text.
        blank_lines: runs of them inside turns, replaced by a line break.
        line_ends: of another kind than LF, replaced by it.
        formatted: prompts that stand in a template already and were taken as they are.
        named: turns that begin with their speaker's name themselves.
        empty_systems: system messages without text, left out.
        unread: keys of entries and messages that have no meaning here.
    """

    conversations: int = 0
    plain: int = 0
    blank_lines: int = 0
    line_ends: int = 0
    formatted: int = 0
    named: int = 0
    empty_systems: int = 0
    unread: Counter[str] = field(default_factory=Counter)

    def statements(self, template: ChatTemplate, mask: LossMask = BY_DATA) -> list[str]:
        """One sentence each."""
        said = []
        if self.conversations and self.plain and not mask.kind:
            said.append(
                f"{_several(self.conversations, 'conversation')} in the template {template.name}: the loss is on "
                f"answers only; {_several(self.plain, 'line')} of plain text: it is on every token."
            )
        elif self.conversations:
            chosen = "; the loss is on answers only" if mask.kind in ("", "qa") else ""
            said.append(f"Conversations are written in the template {template.name}{chosen}.")
        if self.blank_lines:
            said.append(
                f"{_several(self.blank_lines, 'run')} of blank lines inside turns replaced by a line break each: "
                "a blank line ends a turn."
            )
        if self.line_ends:
            said.append(line_ends_statement(self.line_ends))
        if self.formatted:
            said.append(formatted_statement(self.formatted))
        if self.named:
            said.append(
                f"Trained with their speaker's name twice, since they begin with it: {_several(self.named, 'turn')}; "
                "take the name out of the file."
            )
        if self.empty_systems:
            said.append(f"{_several(self.empty_systems, 'empty system message')} left out.")
        return said + unread_keys(self.unread)


def line_ends_statement(count: int) -> str:
    """Says that CR LF and CR are not trained on."""
    return f"{_several(count, 'line end')} CR LF or CR read as LF, as clients send them."


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

    def render(self, messages: Sequence[tuple[str, str]], findings: Findings) -> list[Part]:
        """Parts of a conversation of (role, content).

        An uncounted part ends in "Assistant:" as a client's prompt does; the answer that follows
        begins with the space. A question in which that stands already is taken as it is, and a system
        message without text is left out.
        """
        findings.conversations += 1
        parts: list[Part] = []
        prompt = ""
        ready = False
        for place, (role, content) in enumerate(messages):
            text, line_ends = unix_lines(content)
            text = text.strip()
            findings.line_ends += line_ends
            is_answered = messages[place + 1 : place + 2] and messages[place + 1][0] == self.answering
            if role == "user" and is_answered and is_formatted(text):
                findings.formatted += 1
                prompt += text
                ready = True
                continue
            turn, blank_lines = _BLANK_LINES.subn("\n", text)
            findings.blank_lines += blank_lines
            findings.named += turn.startswith(f"{self.speakers[role]}:")
            if role == self.answering:
                parts.append(Part(prompt if ready else f"{prompt}{self.speakers[role]}:", counted=False))
                parts.append(Part(f" {turn}{self.turn_end}", counted=True))
                prompt, ready = "", False
            elif role == "system" and not turn:
                findings.empty_systems += 1
            else:
                prompt += f"{self.speakers[role]}: {turn}{self.turn_end}"
        if prompt:
            parts.append(Part(prompt, counted=False))
        return parts

    def asked(self, question: str) -> str:
        """A question as a model reads it before it answers, up to and with "Assistant:"."""
        prompt, _ = self.render([("user", question), (self.answering, "")], Findings())
        return prompt.text


WORLD_CHAT = ChatTemplate("World chat", {"system": "System", "user": "User", "assistant": "Assistant"})


class _Collector:
    """Grows the token stream and the mask of documents read one by one."""

    def __init__(self, tokenizer: Tokenizer, mask: LossMask) -> None:
        self._tokenizer = tokenizer
        self._mask = mask
        self._marker = Marker(mask, tokenizer) if mask.finds_in_text else None
        self._searched = 0
        self._tokens = array("H")
        self._counted = bytearray()
        self._sizes: list[int] = []
        self._numbers: list[int] = []
        self._masked = False

    def add(self, parts: Sequence[Part], number: int) -> None:
        """Appends one document and its end; the end counts when the last part does."""
        before = len(self._tokens)
        for text, counted in parts:
            ids = self._tokenizer.encode(text)
            self._tokens.extend(ids)
            self._counted += bytes((counted,)) * len(ids)
        self._tokens.append(self._tokenizer.end_of_document)
        self._counted.append(parts[-1].counted)
        is_plain = all(part.counted for part in parts)
        self._masked |= not is_plain
        if self._marker is not None and (is_plain or self._mask.kind == "se"):
            self._searched += 1
            tokens = np.array(self._tokens[before:], dtype=np.int64)
            self._counted[before:] = self._marker.mark(tokens, number).tobytes()
        self._sizes.append(len(self._tokens) - before)
        self._numbers.append(number)

    def documents(self, source: str, vocab_size: int, statements: Sequence[str]) -> Documents:
        sizes = np.array(self._sizes, dtype=np.int64)
        if self._marker is not None and self._searched:
            amount = _several(self._searched, "line")
            self._marker.refuse(source, amount, others=self._searched < len(sizes))
            statements = [*statements, *self._marker.statements(amount)]
        masked = self._marker is not None or (self._masked and not self._mask.takes_all)
        return Documents.from_stream(
            source,
            np.frombuffer(self._tokens, dtype=np.uint16),
            np.cumsum(sizes) - sizes,
            sizes,
            vocab_size,
            unit="line",
            numbers=np.array(self._numbers, dtype=np.int64),
            stream_counted=np.frombuffer(self._counted, dtype=np.bool_) if masked else None,
            statements=statements,
        )


def read_jsonl(
    path: str,
    tokenizer: Tokenizer,
    vocab_size: int,
    *,
    fields: tuple[str, str] | None = None,
    part: slice = slice(None),
    mask: LossMask = BY_DATA,
) -> Documents:
    """Reads JSON lines, one document each; blank lines of the file are passed over.

    Of a line's keys "messages" comes first, then "prompt" with "response", then "text", which is
    taken as it stands, with Unix line ends. "system" and "history" (questions with answers) come before
    a "prompt", "system" before "messages". Keys without a meaning are named. A "system" message may only
    come first.

    Args:
        path: the file.
        tokenizer: of the model's vocabulary.
        vocab_size: its size.
        fields: keys of question and answer, instead of all that.
        part: which of the lines that are not blank.
        mask: what the loss is taken on; `qa` goes by roles where a line has them, and by its text where it has none.

    Raises:
        DataError: the file is missing, empty or not UTF-8; a line is malformed (named with file,
            number and reason); or the documents cannot be trained on.
    """
    collector = _Collector(tokenizer, mask)
    findings = Findings()
    for number, line in islice(numbered_lines(path), part.start, part.stop):
        try:
            collector.add(_parts(_entry(line), WORLD_CHAT, findings, fields), number)
        except (MalformedEntry, DataError) as error:
            raise DataError(f"{path}, line {number}: {str(error).removesuffix('.')}.") from error
    return collector.documents(path, vocab_size, findings.statements(WORLD_CHAT, mask))


def read_text(
    path: str, tokenizer: Tokenizer, vocab_size: int, piece_tokens: int, *, mask: LossMask = BY_DATA
) -> Documents:
    """Reads a text file as one document, and hands it on in pieces that fit a row.

    A piece has `piece_tokens` tokens at most and begins with the last token of the piece before,
    so every token but the first is a target exactly once. Line ends become "\n". A mask goes by the whole text.

    Raises:
        DataError: the file is missing, empty or not UTF-8.
    """
    assert piece_tokens >= 2, "a piece needs an input and a target"
    text, line_ends = unix_lines(decoded(path, read_whole(path)))
    ids = tokenizer.encode(text)
    stream = np.array([*ids, tokenizer.end_of_document] if ids else [], dtype=np.uint16)
    starts = np.arange(0, max(len(stream) - 1, 0), piece_tokens - 1, dtype=np.int64)
    sizes = np.minimum(len(stream) - starts, piece_tokens)
    statements = [line_ends_statement(line_ends)] if line_ends else []
    if len(starts) > 1:
        statements.append(
            f"A text file is one document; its {len(stream)} tokens are read as {len(starts)} pieces of at "
            f"most {piece_tokens}. A file of short documents is better given as --data_type jsonl."
        )
    counted = None
    if mask.finds_in_text and ids:
        marker = Marker(mask, tokenizer)
        counted = marker.mark(stream, 1)
        marker.refuse(path, "1 document")
        statements += marker.statements("1 document")
    return Documents.from_stream(
        path,
        stream,
        starts,
        sizes,
        vocab_size,
        unit="piece",
        numbers=np.arange(1, len(starts) + 1, dtype=np.int64),
        stream_counted=counted,
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


def _entry(line: str) -> dict[str, Any]:
    """The JSON object of a line."""
    try:
        return json_object(line)
    except MalformedEntry as error:
        raise MalformedEntry(f"{error}; every line is one object: {LINE_FORMS}") from error


def _parts(
    entry: dict[str, Any], template: ChatTemplate, findings: Findings, fields: tuple[str, str] | None
) -> list[Part]:
    """Parts of one line's document."""
    if fields is not None:
        missing = [name for name in fields if name not in entry]
        if missing:
            raise MalformedEntry(f"its keys are {_keys(entry)}, and --sft_field names {shown(missing[0])}")
        turns = [(role, _filled(entry, name)) for role, name in zip(("user", template.answering), fields, strict=True)]
        read = set(fields)
    elif "messages" in entry:
        turns = _messages(entry["messages"], template, findings)
        read = {"messages"}
        if entry.get("system"):
            if turns[0][0] == "system":
                raise MalformedEntry('there are a "system" and a system message; keep one')
            turns.insert(0, ("system", string_of(entry, "system")))
            read.add("system")
        if entry.get("tools") is not None:
            told = [turns.pop(0)[1].strip()] if turns[0][0] == "system" else []
            turns.insert(0, ("system", "\n".join([*filter(None, told), tools_text(entry["tools"])])))
            read.add("tools")
    elif "prompt" in entry and "response" in entry:
        turns = [
            *([("system", string_of(entry, "system"))] if entry.get("system") is not None else []),
            *_history(entry.get("history") or [], template),
            ("user", _filled(entry, "prompt")),
            (template.answering, _filled(entry, "response")),
        ]
        read = {"system", "history", "prompt", "response"}
    elif "text" in entry:
        findings.unread.update(entry.keys() - {"text"})
        findings.plain += 1
        text, line_ends = unix_lines(string_of(entry, "text"))
        findings.line_ends += line_ends
        return [Part(text, counted=True)]
    elif "prompt" in entry and "chosen" in entry:
        raise MalformedEntry(
            "it is a preference pair; make pairs with PrepareOrpoDataset.py --input_csv FILE and train with --orpo 1"
        )
    else:
        raise MalformedEntry(f"its keys are {_keys(entry)}, expected {LINE_FORMS}")
    findings.unread.update(entry.keys() - read)
    return template.render(turns, findings)


def _keys(entry: dict[str, Any]) -> str:
    return listed_names(list(entry)) or "none"


def _history(history: object, template: ChatTemplate) -> list[tuple[str, str]]:
    """The turns of a list of [question, answer]."""
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise MalformedEntry('"history" is no list of [question, answer] pairs')
    roles = ("user", template.answering)
    return [
        (role, _filled({"history": text}, "history"))
        for pair in history
        for role, text in zip(roles, pair, strict=True)
    ]


def _messages(messages: object, template: ChatTemplate, findings: Findings) -> list[tuple[str, str]]:
    if not isinstance(messages, list):
        raise MalformedEntry(f'"messages" is {kind_of(messages)}, expected a list')
    turns: list[tuple[str, str]] = []
    unread: set[str] = set()
    for position, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise MalformedEntry(f"message {position} is {kind_of(message)}, expected an object")
        calls = message.get("tool_calls") is not None and message.get("role") == template.answering
        missing = [key for key in ("role", *(() if calls else ("content",))) if key not in message]
        if missing:
            raise MalformedEntry(f'message {position} has no "{missing[0]}"')
        role = string_of(message, "role")
        if role == "tool":
            role, content = "user", result_text(message, position)
        else:
            content = call_text(message, position) if calls else string_of(message, "content")
        if role not in template.speakers:
            known = ", ".join([*template.speakers, "tool"])
            raise MalformedEntry(f"message {position} has the role {shown(role)}; known are {known}")
        if role == "system" and turns:
            raise MalformedEntry(f"message {position} is a system message; it may only come first")
        if role != "system" and not content.strip():
            kind = "an answer" if role == template.answering else "a question"
            raise MalformedEntry(f"message {position}, {kind}, is empty")
        if turns and role == turns[-1][0]:
            raise MalformedEntry(f"message {position} is a second {role} message in a row; join it to the one before")
        turns.append((role, content))
        unread |= message.keys() - {"role", "content", *(("tool_calls",) if calls else ())}
    if template.answering not in (role for role, _ in turns):
        raise MalformedEntry(f'no message has the role "{template.answering}", so there is nothing to learn')
    findings.unread.update(f"messages: {key}" for key in unread)
    return turns


def _filled(entry: dict[str, Any], key: str) -> str:
    """The text of a turn, which an empty one would end at once."""
    text = string_of(entry, key)
    if not text.strip():
        raise MalformedEntry(f'"{key}" is empty; text without a question is given as {{"text": …}}')
    return text


def _several(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
