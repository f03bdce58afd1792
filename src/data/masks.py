"""Which tokens of a document the loss is taken on, found in its text.

The text that tokens stand for is searched, since the same words are other tokens beside other characters: `Assistant:`
is one thing before a space and another before a quote. A token counts when it begins inside a stretch of the text that
counts; the end of a document counts when such a stretch reaches up to it. What closes an answer, a blank line or a
text given for it, is part of the stretch: a model that never saw it there would not stop.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Protocol

import numpy as np

from src.config.data import LossMask
from src.data.documents import Documents, Mask, Tokens
from src.data.inputs import shown
from src.data.turns import SPEAKERS, Stretch, answers_in
from src.errors import DataError
from src.tokenizer import Decoder

_LINE_END = re.compile(r"\r\n?|\n")


class Finder(Protocol):
    """Finds what counts in texts, one after the other, and keeps count of what it met."""

    def find(self, text: str, number: int) -> list[Stretch]:
        """The stretches of a text in order; `number` is that of its document, for messages."""
        ...

    def refuse(self, source: str, documents: str, *, others: bool) -> None:
        """Raises DataError where what was met cannot be trained on.

        Args:
            source: the file.
            documents: how many were searched.
            others: whether there is something to train on in further ones.
        """
        ...

    def statements(self, documents: str) -> list[str]:
        """What the user should know, one sentence each."""
        ...


class _Answers:
    """`qa`: what is said in answer, see `src.data.turns`."""

    def __init__(self) -> None:
        self._found = self._in_lines = self._blank = self._unmarked = self._repeating = 0
        self._first_repeated = ""

    def find(self, text: str, number: int) -> list[Stretch]:
        """See Finder."""
        answers = answers_in(text)
        if answers.repeated is not None:
            place, name = answers.repeated
            self._repeating += 1
            if not self._first_repeated:
                self._first_repeated = f"first in number {number}: {name}: after {name}: at character {place}"
            return []
        self._found += len(answers.stretches)
        self._in_lines += answers.in_lines
        self._blank += answers.blank
        self._unmarked += not answers.stretches and any(f"{speakers.answering}:" in text for speakers in SPEAKERS)
        return list(answers.stretches)

    def refuse(self, source: str, documents: str, *, others: bool = False) -> None:
        """See Finder."""
        if not self._found and not others and self._repeating:
            raise DataError(
                f"{source} cannot be used with --loss_mask qa: in {self._repeating} of {documents} a speaker follows "
                f"themselves ({self._first_repeated}), and no other holds an answer; join such turns, or take out what "
                "only looks like one."
            )
        if not self._found and not others:
            labels = " or ".join(f"{speakers.answering}:" for speakers in SPEAKERS)
            inside = f", though {self._unmarked} hold such a word" if self._unmarked else ""
            raise DataError(
                f"{source} cannot be used with --loss_mask qa: of {documents} none holds an answer, which begins with "
                f"{labels} at the start of a line{inside}; --loss_mask pad trains on every token."
            )

    def statements(self, documents: str) -> list[str]:
        """See Finder."""
        said = []
        if self._repeating:
            said.append(
                f"Not learnt from, since a speaker follows themselves there: {self._repeating} of {documents} "
                f"({self._first_repeated})."
            )
        if self._in_lines:
            said.append(
                f"Turns are told apart by line ends alone, for want of blank lines, in {self._in_lines} of {documents}."
            )
        if self._blank:
            said.append(f"Answers without text, which are not trained on: {self._blank}.")
        return said


class _Between:
    """`se`: from behind one text up to the end of another, or of the document."""

    def __init__(self, begin: str, end: str) -> None:
        self._begin, self._end = begin, end
        self._patterns = {text: re.compile(_any_line_end(text)) for text in (begin, end)}
        self._documents_with = dict.fromkeys((begin, end), 0)
        self._found = self._open = self._blank = 0

    def find(self, text: str, number: int) -> list[Stretch]:
        """See Finder."""
        for mark, pattern in self._patterns.items():
            self._documents_with[mark] += pattern.search(text) is not None
        stretches = []
        place = 0
        while begin := self._patterns[self._begin].search(text, place):
            end = self._patterns[self._end].search(text, begin.end())
            place = end.end() if end else len(text)
            if text[begin.end() : end.start() if end else len(text)].strip():
                stretches.append(Stretch(begin.end(), place))
                self._open += end is None
            else:
                self._blank += 1
        self._found += len(stretches)
        return stretches

    def refuse(self, source: str, documents: str, *, others: bool = False) -> None:
        """See Finder."""
        missing = [shown(mark) for mark, count in self._documents_with.items() if not count]
        if missing:
            raise DataError(
                f"{source} cannot be used with --loss_mask se: of {documents} none holds "
                f"{' or '.join(missing)} of --mask_id; compare with what --preview 1 "
                "--loss_mask pad shows."
            )
        if not self._found:
            raise DataError(
                f"{source} cannot be used with --loss_mask se: of {documents} none holds a text "
                f"between {shown(self._begin)} and {shown(self._end)}; mask1 of --mask_id begins, mask0 ends."
            )

    def statements(self, documents: str) -> list[str]:
        """See Finder."""
        said = []
        if self._open:
            said.append(f"Up to the end of the document, for want of {shown(self._end)}: {self._open} stretches.")
        if self._blank:
            said.append(f"Stretches without text, which are not trained on: {self._blank}.")
        return said


class Marker:
    """Marks the tokens of documents that the loss is taken on.

    Args:
        mask: one of kind qa or se.
        decoder: of the tokens.
    """

    def __init__(self, mask: LossMask, decoder: Decoder) -> None:
        assert mask.kind in ("qa", "se")
        self._finder: Finder = _Answers() if mask.kind == "qa" else _Between(mask.begin, mask.end)
        self._decoder = decoder

    def mark(self, tokens: Tokens, number: int) -> Mask:
        """bool aligned with the tokens of a document; ends of documents inside it divide it."""
        counted = np.zeros(len(tokens), dtype=np.bool_)
        end_token = self._decoder.ends_documents
        ends = [] if end_token is None else np.flatnonzero(tokens == end_token).tolist()
        begin = 0
        for end in (*ends, len(tokens)):
            if end > begin:
                self._mark_text(tokens[begin:end], counted[begin : end + 1], number)
            begin = end + 1
        return counted

    def refuse(self, source: str, documents: str, *, others: bool = False) -> None:
        """See Finder."""
        self._finder.refuse(source, documents, others=others)

    def statements(self, documents: str) -> list[str]:
        """See Finder."""
        return self._finder.statements(documents)

    def _mark_text(self, tokens: Tokens, counted: Mask, number: int) -> None:
        """Sets `counted`, which has one place more where the end of the document follows."""
        pieces = self._decoder.pieces(tokens.tolist())
        # Bytes that are no text keep their places: the handlers take them through a text and back.
        encoding = self._decoder.encoding
        kept = "surrogateescape" if encoding == "utf-8" else "surrogatepass"
        content = b"".join(pieces)
        text = content[: len(content) // 2 * 2 if encoding == "utf-16-le" else None].decode(encoding, kept)
        stretches = self._finder.find(text, number)
        if not stretches:
            return
        lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
        places = [place for stretch in stretches for place in stretch]
        encoded = [len(text[begin:end].encode(encoding, kept)) for begin, end in pairwise([0, *places])]
        borders = np.searchsorted(np.cumsum(lengths) - lengths, np.cumsum(encoded))
        for first, after in borders.reshape(-1, 2):
            counted[first:after] = True
        if stretches[-1].end == len(text):
            counted[len(tokens) :] = True


def _any_line_end(text: str) -> str:
    """A pattern for a text in which every line end may be LF, CR LF or CR."""
    return r"(?:\r\n?|\n)".join(map(re.escape, _LINE_END.split(text)))


def marked(documents: Documents, mask: LossMask, decoder: Decoder) -> Documents:
    """The documents with what a mask of kind qa or se finds in each.

    Raises:
        DataError: it finds nothing, or turns that cannot be.
    """
    marker = Marker(mask, decoder)
    counted = np.zeros(len(documents.stream), dtype=np.bool_)
    for index, (start, size) in enumerate(zip(documents.starts.tolist(), documents.sizes.tolist(), strict=True)):
        counted[start : start + size] = marker.mark(documents.tokens(index), int(documents.numbers[index]))
    amount = f"{len(documents)} {documents.unit}s"
    marker.refuse(documents.source, amount)
    return documents.masked(counted, marker.statements(amount))
