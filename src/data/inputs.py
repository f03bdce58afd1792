"""Files as people give them: ordinary ones, whole, in UTF-8; and the entries of JSON lines."""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

from src.compression import DAMAGED, packed_by, unpacked
from src.config.flags import parsed_json
from src.errors import DataError
from src.identity import fingerprint
from src.output import several
from src.system import open_to_read

_LINE_ENDS = re.compile(r"\r\n?")
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_SURROGATES = re.compile("[\ud800-\udfff]")
_SHOWN_KEYS = 8
_MIB = 1 << 20


class MalformedEntry(Exception):
    """Reason why an entry is none of the known forms.

    Args:
        reason: a sentence without its end.
        expected: what should have been there, where that is too long to be said of every such entry.
    """

    def __init__(self, reason: str, expected: str = "") -> None:
        super().__init__(f"{reason}, expected {expected}" if expected else reason)
        self.reason = reason
        self.expected = expected


class LeftOut(Exception):
    """Why an entry of a known form is counted and left out: nothing in it can be learned, or it cannot be written.

    Args:
        reason: what it has, as in "an empty answer".
    """


@contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """An ordinary file to read, which has to stay as it is until the block ends.

    Raises:
        DataError: it is missing, no ordinary file, cannot be read, or was changed meanwhile.
    """
    try:
        # Not blocking, because a pipe that nobody writes to would not even open.
        with open(open_to_read(path), "rb") as file:
            before = _ordinary(path, os.fstat(file.fileno()))
            yield file
            after = os.fstat(file.fileno())
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; {_advice(path)}.") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a directory; name one file.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    if fingerprint(before) != fingerprint(after):
        raise DataError(
            f"{path} was changed while it was read ({before.st_size} bytes before, {after.st_size} after): wait until "
            "it is complete, then start again."
        )


@contextmanager
def content_of(path: str) -> Iterator[BinaryIO]:
    """What a file holds, unpacked if it is packed, to read from its beginning; see `opened`.

    Raises:
        DataError: as `opened`; it is packed and damaged, or by what no package here reads.
    """
    with opened(path) as file:
        kind = packed_by(file.peek(8))  # type: ignore[attr-defined]
        try:
            yield unpacked(file, kind, path) if kind else file
        except DAMAGED as error:
            raise DataError(f"{path} is damaged: {kind} cannot unpack it ({error}); copy or make it again.") from error


def read_whole(path: str, *, packed: bool = False) -> bytes:
    """All of a file; where it may be `packed`, of what was packed into it.

    Raises:
        DataError: as `opened`; or it does not fit into memory.
    """
    with (content_of if packed else opened)(path) as file:
        try:
            return file.read()
        except MemoryError as error:
            size = os.stat(path).st_size / _MIB
            raise DataError(f"{path} does not fit into memory with its {size:,.0f} MiB: divide it.") from error


def decoded(path: str, content: bytes, first_line: int = 1, *, nul: bool = False) -> str:
    """UTF-8 text without byte order mark.

    Args:
        path: the file, for messages.
        content: of it.
        first_line: number of the content's first line in the file.
        nul: whether there may be NUL characters, which no text of a person holds.

    Raises:
        DataError: another encoding, or a NUL character.
    """
    try:
        text = content.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        if first_line == 1 and content.startswith(_UTF16_BOMS):
            raise DataError(
                f"{path} is UTF-16, expected UTF-8; convert it: `iconv -f UTF-16 -t UTF-8 {path} > utf8-file`."
            ) from error
        line = first_line + error.object.count(b"\n", 0, error.start)  # its object is what follows the byte order mark
        byte = error.object[error.start]
        raise DataError(
            f"{path}, line {line}: not UTF-8 (byte 0x{byte:02x}: {error.reason}); save the file as UTF-8."
        ) from error
    found = -1 if nul else text.find("\0")
    if found >= 0:
        line = first_line + text.count("\n", 0, found)
        raise DataError(
            f"{path}, line {line}: a NUL character, which no text holds; the file is damaged or no text: remove it."
        )
    return text


def numbered_lines(path: str) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of every line that is not blank; lines end in LF, CR LF or CR.

    Raises:
        DataError: as `opened` and `decoded`.
    """
    number = 0
    with content_of(path) as file:
        for stretch in file:
            for line in stretch.splitlines():
                number += 1
                text = decoded(path, line, number)
                if text.strip():
                    yield number, text


def unix_lines(text: str) -> tuple[str, int]:
    """The text with "\n" for every line end, and how many were another one (CR LF or CR)."""
    return _LINE_ENDS.subn("\n", text) if "\r" in text else (text, 0)


def json_object(line: str) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        MalformedEntry: anything else.
    """
    try:
        entry, twice = parsed_json(line.rstrip())
    except json.JSONDecodeError as error:
        raise MalformedEntry(f"not valid JSON ({_fault(error)})") from error
    except RecursionError as error:
        raise MalformedEntry("nested too deeply") from error
    except ValueError as error:
        raise MalformedEntry("it holds a number of thousands of digits") from error
    if twice:  # one of the two values would be lost
        raise MalformedEntry(f"it has the key {shown(twice[0])} twice")
    if isinstance(entry, list):
        raise MalformedEntry("it is a list, expected an object")
    if not isinstance(entry, dict):
        raise MalformedEntry(f"it is {kind_of(entry)}, expected an object")
    return entry


def _fault(error: json.JSONDecodeError) -> str:
    """What a line of JSON has wrong; the commonest faults with what to do."""
    if error.msg == "Extra data" and error.doc[error.pos :].strip() == ",":
        return "a comma behind it, as in an array: take the commas out"
    if error.doc.lstrip().startswith("{'"):
        return "single quotes, as Python prints a dict: write it with json.dumps"
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"


def string_of(entry: dict[str, Any], key: str, *, nul: bool = False) -> str:
    """The text under a key; `nul` says whether it may hold NUL characters.

    Raises:
        MalformedEntry: no such key, no string, or one that holds what is no character.
    """
    if key not in entry:
        raise MalformedEntry(f'"{key}" is missing')
    value = entry[key]
    if not isinstance(value, str):
        raise MalformedEntry(f'"{key}" is {kind_of(value)}, expected a string')
    if not nul and "\0" in value:
        raise MalformedEntry(f'"{key}" holds a NUL character, which no text does; remove it')
    if _SURROGATES.search(value):
        raise MalformedEntry(
            f'"{key}" holds half of a surrogate pair, which is no character; write the whole pair, or remove it'
        )
    return value


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    kinds = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        type(None): "null",
        bytes: "bytes",
    }
    return kinds.get(type(value), "a number" if isinstance(value, (int, float)) else "a value of another kind")


def shown(value: str, most: int = 40) -> str:
    """A text from a file for a message: in quotes, escaped, its beginning if it is long."""
    return repr(value if len(value) <= most else f"{value[:most]}…")


def listed_names(names: Sequence[str], joint: str = ", ") -> str:
    """Names from a file for a message, the first of them if there are many."""
    more = f"{joint}{len(names) - _SHOWN_KEYS} more" if len(names) > _SHOWN_KEYS else ""
    return joint.join(map(shown, names[:_SHOWN_KEYS])) + more


def counted_reasons(counts: Counter[str], first: str) -> str:
    """Why entries were left out, how many for each reason, the commonest first, and where the first of them stands."""
    commonest = sorted(counts.items(), key=lambda counted: (-counted[1], counted[0]))
    return f"{', '.join(f'{times:,} with {reason}' for reason, times in commonest)} (first: {first})"


def unread_keys(counts: Counter[str], unit: str = "line") -> list[str]:
    """A sentence that names what stands in a file and is not read, with how often; none if there is nothing."""
    if not counts:
        return []
    commonest = sorted(counts.items(), key=lambda counted: (-counted[1], counted[0]))[:_SHOWN_KEYS]
    named = [f"{shown(key) if key else 'a column without a name'} ({several(times, unit)})" for key, times in commonest]
    more = f" and {len(counts) - _SHOWN_KEYS} more" if len(counts) > _SHOWN_KEYS else ""
    return [f"Not read: {', '.join(named)}{more}."]


def _ordinary(path: str, status: os.stat_result) -> os.stat_result:
    if stat.S_ISDIR(status.st_mode):
        raise DataError(f"{path} is a directory; name one file.")
    if not stat.S_ISREG(status.st_mode):
        kind = "a pipe" if stat.S_ISFIFO(status.st_mode) else "a device"
        raise DataError(f"{path} is {kind}; write what comes out of it to a file, and name that.")
    return status


def _advice(path: str) -> str:
    if os.path.isfile(f"{path}.idx"):
        return f"for {path}.idx use --data_type binidx"
    if os.path.islink(path):
        return f"it is a link to {os.readlink(path)}, which is not there"
    if os.path.isfile(f"{path}.jsonl"):
        return f"there is {path}.jsonl"
    return "check the path"
