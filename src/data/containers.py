"""Entries of data files, one after the other, however they stand there.

JSON lines, one JSON array, a table with a header (CSV, TSV), or Parquet; packed or not. Every one of them is read piece
by piece: what is in memory is one entry, or of Parquet one group of rows.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from src.config.recognition import (
    ARRAY,
    LINES,
    NEEDS_PYARROW,
    PARQUET,
    PEEKED_BYTES,
    QUESTION_ANSWER,
    TABLE,
    container_of,
    delimiter_of,
)
from src.data.inputs import (
    MalformedEntry,
    content_of,
    decoded,
    json_object,
    numbered_lines,
    opened,
    shown,
)
from src.errors import DataError
from src.output import plural_of

UNITS = {LINES: "line", ARRAY: "entry", TABLE: "line", PARQUET: "row"}
"""What entries are counted by, from 1: lines of the file, or the entries themselves."""

_SHOWN_REASONS, _SHOWN_PLACES, _LONGEST_REASON = 5, 6, 250
_CSV_FIELD_LIMIT = 2**31 - 1
_PIECE_BYTES = 1 << 20
_BATCH_ROWS = 1024
_STRUCTURE = re.compile(rb'["\[\]{},]')
_UTF8_BOM = b"\xef\xbb\xbf"
_OPENED_ALONE = re.compile(rb'(\xef\xbb\xbf)?\s*\{[ \t]*\r?\n\s*"')


class Entry(NamedTuple):
    """An entry of a file.

    Attributes:
        number: its place, see `UNITS`.
        content: values by key; or why it is none.
    """

    number: int
    content: dict[str, Any] | MalformedEntry


class Entries:
    """The entries of a file, to go through once; blank lines are passed over.

    Args:
        path: the file.

    Attributes:
        container: how they stand in it.
        unit: what `Entry.number` counts.
        columns: of a table, once its header is read.

    Raises:
        DataError: the file is missing, no ordinary file or cannot be read; while going on: it is damaged, not UTF-8,
            or was changed meanwhile.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        with content_of(path) as file:
            self.head = file.read(PEEKED_BYTES)
        self.container = container_of(self.head, path)
        if self.container == LINES and _OPENED_ALONE.match(self.head):
            raise DataError(
                f"{path} begins with a JSON object that takes several lines: write an array of entries, [{{…}}, …], or "
                "each entry on one line."
            )
        self.unit = UNITS[self.container]
        self.columns: list[str] = []

    def __iter__(self) -> Iterator[Entry]:
        if self.container == PARQUET:
            return self._of_parquet()
        if self.container == ARRAY:
            return self._of_array()
        return self._of_table() if self.container == TABLE else self._of_lines()

    def _of_lines(self) -> Iterator[Entry]:
        for number, line in numbered_lines(self.path):
            try:
                yield Entry(number, json_object(line))
            except MalformedEntry as error:
                yield Entry(number, error)

    def _of_array(self) -> Iterator[Entry]:
        with content_of(self.path) as file:
            for number, (line, element) in enumerate(_elements(self.path, file), start=1):
                try:
                    yield Entry(number, json_object(decoded(self.path, element, line)))
                except MalformedEntry as error:
                    yield Entry(number, MalformedEntry(f"{error.reason}; it begins in line {line}", error.expected))

    def _of_table(self) -> Iterator[Entry]:
        rows = self._rows()
        _, header = next(rows, (1, []))
        self.columns = [name.strip() for name in header]
        repeated = [name for name in self.columns if name and self.columns.count(name) > 1]
        if repeated:
            raise DataError(f"{self.path} has several columns {shown(repeated[0])}: give each a name of its own.")
        for line, fields in rows:
            if len(fields) > len(self.columns):
                yield Entry(line, _too_many(fields, self.columns))
            else:
                yield Entry(line, dict(zip(self.columns, fields, strict=False)))

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        """(line on which it begins, fields) of every row that is not blank.

        The strict reader is used because the lenient one takes an unbalanced quote for the start of a field that
        reaches to the end of the file.
        """
        text = self.head.decode("utf-8-sig", errors="replace").lstrip()
        delimiter = delimiter_of(next(iter(text.splitlines()), ""), self.path)
        # The limit is the whole program's, in which nothing else reads CSV; it stays, since files may be read by turns.
        csv.field_size_limit(_CSV_FIELD_LIMIT)
        line = 1
        try:
            with content_of(self.path) as file:
                reader = csv.reader(_texts(self.path, file), delimiter=delimiter, strict=True)
                for fields in reader:
                    if fields:
                        yield line, fields
                    line = reader.line_num + 1
        except csv.Error as error:
            reason = "has a quote that is never closed" if "end of data" in str(error) else f"is no CSV ({error})"
            raise DataError(
                f"{self.path} line {line} {reason}: put fields with quotes, commas or line breaks in quotes, "
                "and write each quote inside twice."
            ) from error

    def _of_parquet(self) -> Iterator[Entry]:
        try:
            import pyarrow.parquet
        except ImportError:
            raise DataError(f"{self.path} is a Parquet table, which {NEEDS_PYARROW}.") from None
        with opened(self.path) as file:
            number = 0
            try:
                table = pyarrow.parquet.ParquetFile(file)
                self.columns = list(table.schema_arrow.names)
                for batch in table.iter_batches(batch_size=_BATCH_ROWS):
                    for row in batch.to_pylist():
                        number += 1
                        yield Entry(number, _with_empty_half(_filled(row), row))
            except (pyarrow.ArrowException, OSError) as error:
                reason = str(error).splitlines()[0][:200]
                raise DataError(f"{self.path} is damaged, or no Parquet table ({reason}): make it again.") from error


class BadEntries:
    """Entries that cannot be read: the first reasons with the first places of each, and how many there are."""

    def __init__(self) -> None:
        self._places: dict[str, list[tuple[str, str, int]]] = {}
        self._expected: dict[str, str] = {}
        self._others: list[tuple[str, str, int]] = []
        self._counts: Counter[str] = Counter()
        self._total = 0

    def __bool__(self) -> bool:
        return self._total > 0

    def add(self, file: str, unit: str, number: int, error: MalformedEntry) -> None:
        """Notes one; `unit` is what `number` counts in the file."""
        self._total += 1
        reason = error.reason.removesuffix(".")
        self._expected[reason] = error.expected
        if reason in self._places or len(self._places) < _SHOWN_REASONS:
            self._counts[reason] += 1
            if self._counts[reason] <= _SHOWN_PLACES:
                self._places.setdefault(reason, []).append((file, unit, number))
        elif len(self._others) < _SHOWN_PLACES:
            self._others.append((file, unit, number))

    def refuse(self) -> None:
        """Raises DataError, which names all of them, where there are any."""
        if not self._total:
            return
        files = {file for places in (*self._places.values(), self._others) for file, _, _ in places}
        often = Counter(self._expected[reason] for reason in self._places)
        parts = []
        for reason, places in self._places.items():
            rest = self._counts[reason] - len(places)
            more = f" and {rest:,} more" if rest else ""
            words = reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]}…"
            expected = self._expected[reason]
            once = f", expected {expected}" if expected and often[expected] == 1 else ""
            parts.append(f"{_placed(places, with_file=len(files) > 1)}{more}: {words}{once}")
        if self._total == 1:
            raise DataError(f"{files.pop()}, {parts[0]}.")
        rest = self._total - self._counts.total()
        if rest:
            more = f" and {rest - len(self._others):,} more" if rest > len(self._others) else ""
            parts.append(f"{_placed(self._others, with_file=len(files) > 1)}{more}: other reasons")
        beginning = f"{files.pop()}: " if len(files) == 1 else ""
        expected = " ".join(f"Expected are {text}." for text, times in often.items() if text and times > 1)
        said = f"{beginning}{self._total:,} entries cannot be read: {'; '.join(parts)}."
        raise DataError(f"{said} {expected}".rstrip())


def _placed(places: list[tuple[str, str, int]], *, with_file: bool) -> str:
    """Where entries stand: lines 2, 5."""
    first, unit, _ = places[0]
    numbers = [f"{number}" if file == first else f"{file} {number}" for file, _, number in places]
    units = unit if len(numbers) == 1 else plural_of(unit)
    return f"{f'{first}, ' if with_file else ''}{units} {', '.join(numbers)}"


def _too_many(fields: list[str], columns: list[str]) -> MalformedEntry:
    return MalformedEntry(
        f"it has {len(fields)} fields, the header {len(columns)}: put fields with commas in quotes (the last field "
        f"read is {shown(fields[-1])})"
    )


def _texts(path: str, file: BinaryIO) -> Iterator[str]:
    """Lines with their ends; these may be CR alone, too."""
    number = 0
    for stretch in file:
        for line in stretch.splitlines(keepends=True):
            number += 1
            yield decoded(path, line, number, nul=True)


def _with_empty_half(filled: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """A row in which an empty cell beside a question, or an answer, is an empty text, as it is in a CSV."""
    if "text" in filled or any({question, answer} <= filled.keys() for question, answer in QUESTION_ANSWER):
        return filled
    for pair in QUESTION_ANSWER:
        if row.keys() >= set(pair) and filled.keys() & set(pair):
            return dict.fromkeys(pair, "") | filled
    return filled


def _filled(value: Any) -> Any:
    """A row without what is null in it; tables have every field in every row. What a message says stays, if empty."""
    if isinstance(value, dict):
        filled = {key: _filled(inner) for key, inner in value.items() if inner is not None}
        said = "value" if "from" in filled else "content" if "role" in filled else ""
        return {**filled, said: None} if said in value and said not in filled else filled
    return [_filled(inner) for inner in value] if isinstance(value, list) else value


def _elements(path: str, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(line on which it begins, bytes) of every element of the array that a file is; whether each is JSON is not asked.

    Brackets and strings are all that is looked at, so that a file of any size needs the memory of its largest element.

    Raises:
        DataError: the array is not closed, or something follows it.
    """
    buffer = file.read(_PIECE_BYTES).removeprefix(_UTF8_BOM)
    start = place = buffer.index(b"[") + 1  # of the element, and of what was not looked at
    line = 1 + buffer.count(b"\n", 0, start)
    depth, in_string = 1, False
    while depth:
        end = _string_end(buffer, place) if in_string else _structure(buffer, place)
        if end < 0:
            rest = buffer[start:]
            place = place - start if in_string else len(rest)  # a string is looked at from its beginning again
            more = file.read(max(_PIECE_BYTES, len(rest)))
            if not more:
                raise DataError(f"{path} ends inside the list that begins it: it was cut short, make it again.")
            buffer, start = rest + more, 0
            continue
        character, place = buffer[end : end + 1], end + 1
        if character == b'"':
            in_string = not in_string
        elif character in b"[{":
            depth += 1
        else:
            depth -= character != b","
        if depth == 0 and character != b"]":
            raise DataError(f"{path}, line {line}: an object is closed that was not opened; make the file again.")
        if depth == 0 or (depth == 1 and character == b","):
            element = buffer[start:end]
            if element.strip() or depth:
                lead = len(element) - len(element.lstrip())
                yield line + element.count(b"\n", 0, lead), element
            line += element.count(b"\n")
            start = place
    rest = buffer[start:]
    while rest:
        if rest.strip():
            line += rest[: len(rest) - len(rest.lstrip())].count(b"\n")
            raise DataError(f"{path}, line {line}: something follows the list that begins the file.")
        line += rest.count(b"\n")
        rest = file.read(_PIECE_BYTES)


def _structure(buffer: bytes, place: int) -> int:
    """Where the next character stands that is more than a value; -1 if nowhere."""
    found = _STRUCTURE.search(buffer, place)
    return -1 if found is None else found.start()


def _string_end(buffer: bytes, begin: int) -> int:
    """Where the quote stands that closes a string, from behind the one that opens it; -1 if nowhere."""
    end = buffer.find(b'"', begin)
    while end >= 0:
        before = end
        while before > begin and buffer[before - 1 : before] == b"\\":
            before -= 1
        if (end - before) % 2 == 0:
            return end
        end = buffer.find(b'"', end + 1)
    return -1
