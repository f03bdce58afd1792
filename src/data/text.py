"""Documents from text: entries of many forms, chats through one template, plain text, and generated ones.

Every document ends with the tokenizer's end-of-document token. Where speakers have roles the loss
is taken on answers only, unless a mask says otherwise: an answer's text, the blank line that ends it (chat clients stop
there), and, after the last answer, the end of the document.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from src.config.data import BY_DATA, LossMask
from src.config.fields import Fields
from src.config.templates import THINK
from src.data.containers import BadEntries, Entries
from src.data.documents import Documents
from src.data.forms import TEXT, content_of_entry
from src.data.inputs import LeftOut, MalformedEntry, counted_reasons, decoded, read_whole, unix_lines, unread_keys
from src.data.masks import Marker
from src.data.templates import WORLD_CHAT, ChatTemplate, Part, Rendering
from src.data.turns import formatted_statement, joined_statement
from src.errors import DataError
from src.output import several
from src.tokenizer import Tokenizer


@dataclass
class Findings(Rendering):
    """What was met while entries were read that the user should know of, in numbers.

    Attributes:
        forms: entries by the form they were recognised as.
        left_out: entries that were, by what they have.
        first_left_out: where the first of them stands.
        joined: messages joined to the one before, of the same speaker.
        repeated: documents that equal an earlier one.
        first_repeated: where the first of them stands.
        unread: keys of entries and messages that have no meaning here.
    """

    forms: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    first_left_out: str = ""
    joined: int = 0
    repeated: int = 0
    first_repeated: str = ""
    unread: Counter[str] = field(default_factory=Counter)

    @property
    def plain(self) -> int:
        """Entries of plain text."""
        return self.forms[TEXT]

    @property
    def conversations(self) -> int:
        """Entries with roles."""
        return self.forms.total() - self.plain

    def statements(self, template: ChatTemplate, mask: LossMask = BY_DATA, unit: str = "line") -> list[str]:
        """One sentence each; `unit` is what an entry is in the files."""
        named = [
            f"{form}, {several(count, 'text' if form == TEXT else 'conversation')}"
            for form, count in self.forms.most_common()
        ]
        said = [f"Recognised as {'; '.join(named)}."] if named else []
        written = f'written in the template {template.name}, "{template.shown}"'
        if self.conversations and self.plain and not mask.kind:
            said.append(
                f"Conversations are {written}: the loss is on answers only; of plain text it is on every token."
            )
        elif self.conversations:
            chosen = "; the loss is on answers only" if mask.kind in ("", "qa") else ""
            said.append(f"Conversations are {written}{chosen}.")
        if self.left_out:
            said.append(f"Left out: {counted_reasons(self.left_out, self.first_left_out)}.")
        if self.repeated:
            verbs = ("repeats", "counts", "it stands") if self.repeated == 1 else ("repeat", "count", "they stand")
            said.append(
                f"{several(self.repeated, 'document')} of {self.forms.total():,} {verbs[0]} an earlier one (first: "
                f"{self.first_repeated}) and {verbs[1]} as often as {verbs[2]} there."
            )
        if self.joined:
            said.append(joined_statement(self.joined))
        learnt = "not learnt" if mask.kind in ("", "qa") else "learnt as all others are"
        if self.unanswered:
            said.append(f"{several(self.unanswered, 'conversation')} with a question at the end, which is {learnt}.")
        if self.unasked:
            said.append(
                f"Taken as they are: {several(self.unasked, 'conversation')} with an answer before any question."
            )
        if self.uncounted:
            of_these = f"{several(self.uncounted, 'answer')} of the weight 0"
            said.append(f"{of_these}, read and {learnt}.")
        return said + self._of_rendering(template) + unread_keys(self.unread, unit)

    def _of_rendering(self, template: ChatTemplate) -> list[str]:
        said = []
        if self.blank_lines:
            said.append(
                f"{several(self.blank_lines, 'run')} of blank lines inside turns replaced by a line break each: "
                "a blank line ends a turn."
            )
        if self.line_ends:
            said.append(line_ends_statement(self.line_ends))
        if self.formatted:
            said.append(formatted_statement(self.formatted))
        if self.named:
            said.append(
                f"Trained with their speaker's name twice, since they begin with it: {several(self.named, 'turn')}; "
                "take the name out of the file."
            )
        if self.empty_systems:
            said.append(f"{several(self.empty_systems, 'empty system message')} left out.")
        if self.unthought:
            said.append(
                f"{several(self.unthought, 'answer')} without reasoning written as --template no-think has them."
            )
        if self.reasoning_left_out:
            said.append(
                f"The reasoning of {several(self.reasoning_left_out, 'answer')} left out: --template think has it."
            )
        if self.thought and not template.thinking:
            said.append(
                f"Answers that begin with <think>, which is taken as text: {self.thought:,}; --template {THINK} writes "
                "them as RWKV-7's G1 models do."
            )
        return said


def line_ends_statement(count: int) -> str:
    """Says that CR LF and CR are not trained on."""
    return f"{several(count, 'line end')} CR LF or CR read as LF, as clients send them."


class Conversations:
    """The entries of files as parts of text, one document each; `findings` says what was met once all are read.

    Args:
        paths: files of entries.
        template: in which conversations are written.
        fields: names that stand for the known ones.
        part: which of the entries, in the order of the files.
    """

    def __init__(
        self,
        paths: Sequence[str],
        template: ChatTemplate = WORLD_CHAT,
        *,
        fields: Fields | None = None,
        part: slice = slice(None),
    ) -> None:
        self.paths = paths
        self.findings = Findings()
        self.units: list[str] = []
        self._template, self._fields, self._part = template, fields, part
        self._digests = array("Q")
        self._files, self._numbers = array("q"), array("q")

    def __iter__(self) -> Iterator[tuple[int, int, list[Part]]]:
        """(number of its file, place in it, parts) of every document.

        Raises:
            DataError: a file cannot be read; entries are malformed, which are named together, after the last of the
                documents; or every one is left out, or none is taken.
        """
        bad = BadEntries()
        for file, number, entry in islice(self._entries(), self._part.start, self._part.stop):
            try:
                if isinstance(entry, MalformedEntry):
                    raise entry
                parts = self._parts(entry)
            except MalformedEntry as error:
                bad.add(self.paths[file], self.units[file], number, error)
            except LeftOut as reason:
                self.findings.left_out[str(reason)] += 1
                self.findings.first_left_out = self.findings.first_left_out or self._named(file, number)
            else:
                digest = hashlib.blake2b("\0".join(text for text, _ in parts).encode(), digest_size=8)
                self._digests.append(int.from_bytes(digest.digest(), "little"))
                self._files.append(file)
                self._numbers.append(number)
                if not bad:
                    yield file, number, parts
        bad.refuse()
        none_taken = self._part != slice(None) and not (self.findings.forms or self.findings.left_out)
        if none_taken and any(True for _ in self._entries()):
            raise DataError(
                f"{', '.join(self.paths[:3])}: --sft_split takes none of the entries; leave it out, or take more."
            )
        self._find_repeated()
        if self.findings.left_out and not self.findings.forms:
            raise DataError(
                f"{', '.join(self.paths[:3])} cannot be used, because every entry is left out: "
                f"{counted_reasons(self.findings.left_out, self.findings.first_left_out)}."
            )

    @property
    def unit(self) -> str:
        """What an entry is in all of the files."""
        return self.units[0] if len(set(self.units)) == 1 else "entry"

    def _entries(self) -> Iterator[tuple[int, int, dict[str, object] | MalformedEntry]]:
        for file, path in enumerate(self.paths):
            entries = Entries(path)
            self.units.append(entries.unit)
            for number, content in entries:
                yield file, number, content

    def _parts(self, entry: dict[str, object]) -> list[Part]:
        """Parts of one document."""
        content = content_of_entry(entry, self._fields)
        self.findings.forms[content.form] += 1
        self.findings.unread.update(content.unread)
        self.findings.joined += content.joined
        if content.turns:
            return self._template.render(content.turns, self.findings)
        text, line_ends = unix_lines(content.text)
        self.findings.line_ends += line_ends
        return [Part(text, counted=True)]

    def _named(self, file: int, number: int) -> str:
        return f"{self.paths[file]}, {self.units[file]} {number}"

    def _find_repeated(self) -> None:
        digests = np.frombuffer(self._digests, dtype=np.uint64)
        _, firsts = np.unique(digests, return_index=True)
        self.findings.repeated = len(digests) - len(firsts)
        if self.findings.repeated:
            again = np.ones(len(digests), dtype=np.bool_)
            again[firsts] = False
            first = int(np.flatnonzero(again)[0])
            self.findings.first_repeated = self._named(self._files[first], self._numbers[first])


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
        self._files: list[int] = []
        self._masked = False

    def add(self, parts: Sequence[Part], file: int, number: int) -> None:
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
        self._files.append(file)

    def documents(
        self, source: str, conversations: Conversations, vocab_size: int, statements: Sequence[str]
    ) -> Documents:
        sizes = np.array(self._sizes, dtype=np.int64)
        if self._marker is not None and self._searched:
            amount = several(self._searched, "line")
            self._marker.refuse(source, amount, others=self._searched < len(sizes))
            statements = [*statements, *self._marker.statements(amount)]
        masked = self._marker is not None or (self._masked and not self._mask.takes_all)
        return Documents.from_stream(
            source,
            np.frombuffer(self._tokens, dtype=np.uint16),
            np.cumsum(sizes) - sizes,
            sizes,
            vocab_size,
            unit=conversations.unit,
            numbers=np.array(self._numbers, dtype=np.int64),
            files=tuple(conversations.paths) if len(conversations.paths) > 1 else (),
            file_of=np.array(self._files, dtype=np.int64) if len(conversations.paths) > 1 else None,
            stream_counted=np.frombuffer(self._counted, dtype=np.bool_) if masked else None,
            statements=statements,
        )


def read_entries(
    paths: Sequence[str],
    tokenizer: Tokenizer,
    vocab_size: int,
    *,
    source: str = "",
    template: ChatTemplate = WORLD_CHAT,
    fields: Fields | None = None,
    part: slice = slice(None),
    mask: LossMask = BY_DATA,
) -> Documents:
    """Reads files of entries, one document each, in the forms of `src.data.forms`.

    Args:
        paths: the files.
        tokenizer: of the model's vocabulary.
        vocab_size: its size.
        source: what all of them are called; "": the first's path.
        template: in which conversations are written.
        fields: names that stand for the known ones.
        part: which of the entries, in the order of the files.
        mask: what the loss is taken on; `qa` goes by roles where an entry has them, and by its text where it has none.

    Raises:
        DataError: a file is missing, empty or not UTF-8; entries are malformed (named with file, number and reason);
            or the documents cannot be trained on.
    """
    collector = _Collector(tokenizer, mask)
    conversations = Conversations(paths, template, fields=fields, part=part)
    for file, number, parts in conversations:
        collector.add(parts, file, number)
    statements = conversations.findings.statements(template, mask, conversations.unit)
    return collector.documents(source or paths[0], conversations, vocab_size, statements)


def read_text(
    path: str, tokenizer: Tokenizer, vocab_size: int, piece_tokens: int, *, mask: LossMask = BY_DATA
) -> Documents:
    """Reads a text file as one document, and hands it on in pieces that fit a row.

    A piece has `piece_tokens` tokens at most and begins with the last token of the piece before,
    so every token but the first is a target exactly once. Line ends become "\n". A mask goes by the whole text.

    Raises:
        DataError: the file is missing, empty, blank or not UTF-8.
    """
    assert piece_tokens >= 2, "a piece needs an input and a target"
    text, line_ends = unix_lines(decoded(path, read_whole(path, packed=True)))
    if text.isspace():
        raise DataError(f"{path} holds white space alone, expected a text: look at the file.")
    ids = tokenizer.encode(text)
    stream = np.array([*ids, tokenizer.end_of_document] if ids else [], dtype=np.uint16)
    starts = np.arange(0, max(len(stream) - 1, 0), piece_tokens - 1, dtype=np.int64)
    sizes = np.minimum(len(stream) - starts, piece_tokens)
    statements = [line_ends_statement(line_ends)] if line_ends else []
    if len(starts) > 1:
        statements.append(
            f"A text file is one document; its {len(stream)} tokens are read as {len(starts)} pieces of at "
            f"most {piece_tokens}. A file of short documents is better given as JSON lines or a table."
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
