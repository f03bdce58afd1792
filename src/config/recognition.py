"""Which files a path stands for, and what kind of data they hold, seen from their names and beginnings."""

from __future__ import annotations

import csv
import functools
import importlib.util
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from src.compression import DAMAGED, SUFFIXES, packed_by, unpacked
from src.errors import ConfigError, DataError

DATA_TYPES = ("binidx", "jsonl", "utf-8", "dummy")
LINES, ARRAY, TABLE, PARQUET = "JSON lines", "a JSON array", "a table", "Parquet"
"""How entries stand in a file of the type jsonl."""
QUESTION_ANSWER = (
    ("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("instruction", "response"),
    ("question", "answer"), ("query", "response"), ("input", "output"),
)  # fmt: skip
"""Fields of a question and its answer, the first that are there count."""

MOST_IN_FOLDER = 20_000
"""Entries of a folder of data and of all those in it; beyond, a folder was named that is more than that, as / is."""
NEEDS_PYARROW = "needs a package: pip install pyarrow, or write it as JSON lines"
PEEKED_BYTES = 1 << 20
_PEEKED_LINES = 5
_DELIMITERS = ",\t;"
_TABLE_SUFFIXES = (".csv", ".tsv")
_ENTRY_SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet", *_TABLE_SUFFIXES)
_TEXT_SUFFIXES = (".txt",)
_BINIDX_MAGIC = (b"MMIDIDX", b"TNTIDX")
_PARQUET_MAGIC = b"PAR1"
_OBJECTS = re.compile(r'\s*\[\s*\{\s*"')
_FORMATS: dict[bytes, str] = {
    b"PK": "is a zip archive, as .pth and .save files are: pairs go to --rlhf_train_file with --orpo 1, models to "
    "--load_model",
}
"""First bytes of what is no training data, and what to do with it."""


@dataclass(frozen=True)
class Recognised:
    """What kind of data a file holds.

    Attributes:
        data_type: one of DATA_TYPES; where there is doubt, what its name says.
        problem: why it cannot be said or used without more ado, a sentence that goes on after the file's name; "" if
            it can.
        surprise: "" where name and content agree, else what the content is.
    """

    data_type: str
    problem: str = ""
    surprise: str = ""


@dataclass(frozen=True)
class Folder:
    """What is read of a folder and those in it, in the order of their names; hidden files are not looked at.

    Attributes:
        files: that hold data by their names; of binidx the common prefix of its two files.
        left_out: the others.
    """

    files: tuple[str, ...]
    left_out: tuple[str, ...]


def folder_of(path: str) -> Folder:
    """What a folder holds; folders that are linked into it belong to it.

    Raises:
        ConfigError: there is more in it than a folder of data has, or a part of it cannot be listed.
    """

    def refuse(error: OSError) -> None:
        if isinstance(error, FileNotFoundError):  # gone since its name was read
            return
        raise ConfigError(f"{error.filename} cannot be listed ({error.strerror}): name files or another folder")

    files, left_out = [], []
    seen = 0
    places = set()  # a link may lead back
    for place, folders, names in os.walk(path, onerror=refuse, followlinks=True):
        places.add(os.path.realpath(place))
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(place, name)) not in places
        )
        seen += len(folders) + len(names)
        if seen > MOST_IN_FOLDER:
            raise ConfigError(
                f"{path} holds more than {MOST_IN_FOLDER:,} files: name the folder, or the files, of the data alone"
            )
        for name in sorted(name for name in names if not name.startswith(".")):
            whole = os.path.join(place, name)
            stem, suffix = os.path.splitext(whole)
            if suffix == ".idx":
                files.append(stem)
            elif suffix_of(name) in (*_ENTRY_SUFFIXES, *_TEXT_SUFFIXES):
                files.append(whole)
            elif suffix != ".bin" or f"{os.path.splitext(name)[0]}.idx" not in names:
                left_out.append(whole)
    return Folder(tuple(files), tuple(left_out))


def files_of(text: str) -> tuple[str, ...]:
    """The files that a path, a folder, or several of them divided by commas stand for; binidx by its prefix.

    A path that exists is one, whatever stands in its name. What does not exist stays, so that it can be named.
    """
    if os.path.isdir(text) and not os.path.isfile(f"{text}.idx"):
        return folder_of(text).files
    if "," not in text or os.path.exists(text) or os.path.isfile(f"{text}.idx"):
        return (text,)
    parts = [part.strip() for part in text.split(",")]
    return tuple(file for part in parts if part for file in files_of(part)) or (text,)


def left_out_of(text: str) -> tuple[str, ...]:
    """What stands in the folders that a text names, and is not read."""
    if os.path.isdir(text):
        return () if os.path.isfile(f"{text}.idx") else folder_of(text).left_out
    if "," not in text or os.path.exists(text):
        return ()
    return tuple(file for part in text.split(",") if part.strip() for file in left_out_of(part.strip()))


def suffix_of(name: str) -> str:
    """What a name ends with, in small letters, whatever packed the file."""
    stem, suffix = os.path.splitext(name.lower())
    return os.path.splitext(stem)[1] if suffix in SUFFIXES else suffix


def recognise(data_file: str) -> Recognised:
    """The data type of a file by its content, of several together, or of the common prefix of a binidx' two files.

    A file that is missing, or cannot be read, has the type its name says; its reader tells what is wrong.
    """
    files = files_of(data_file)
    if not files:
        return Recognised("utf-8")
    found = {file: _recognise(file) for file in files}
    first = next(iter(found.values()))
    if len(files) == 1 and files[0] == data_file:
        return first
    for file, of_file in found.items():
        if of_file.problem:
            return Recognised(of_file.data_type, f"holds {file}, which {of_file.problem}")
    types = {of_file.data_type: file for file, of_file in found.items()}
    if len(types) > 1:
        named = " and ".join(f"{file} ({data_type})" for data_type, file in types.items())
        return Recognised(first.data_type, f"holds several kinds of data, {named}: name files of one kind")
    return Recognised(first.data_type)


def container_of(head: bytes, path: str) -> str:
    """How entries stand in a file: LINES, ARRAY, TABLE or PARQUET.

    Args:
        head: the beginning of what the file holds, unpacked.
        path: of the file.
    """
    if head.startswith(_PARQUET_MAGIC):
        return PARQUET
    text = head.decode("utf-8-sig", errors="replace").lstrip()
    if text.startswith("["):
        return ARRAY
    if text.startswith("{"):
        return LINES
    return TABLE if suffix_of(path) in _TABLE_SUFFIXES or _has_known_columns(text) else LINES


def delimiter_of(header: str, path: str) -> str:
    """What stands between the fields of a table: a tab, a comma or a semicolon."""
    if suffix_of(path) == ".tsv":
        return "\t"
    return max(_DELIMITERS, key=lambda delimiter: len(_names(header, delimiter)))


def _names(header: str, delimiter: str) -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
    except csv.Error:  # longer than fields may be
        return []


def _has_known_columns(text: str) -> bool:
    """Whether the first line names a question and an answer, or the two of a preference."""
    header = next(iter(text.splitlines()), "")
    names = {name.lower() for name in _names(header, delimiter_of(header, ""))}
    return any({question, answer} <= names for question, answer in (*QUESTION_ANSWER, ("prompt", "chosen")))


def _recognise(path: str) -> Recognised:
    suffix = suffix_of(path)
    if suffix in (".bin", ".idx"):
        return Recognised("binidx")
    named = "jsonl" if suffix in _ENTRY_SUFFIXES else "utf-8"
    is_prefix = os.path.isfile(path + ".idx")
    if not os.path.isfile(path):
        is_other = os.path.exists(path) and not is_prefix  # a pipe, a device, a folder
        return Recognised(named if is_other or named == "jsonl" else "binidx")
    if is_prefix:
        return Recognised("binidx", f"is a file, and {path}.idx is there too: say with --data_type which is meant")
    try:
        status = os.stat(path)
        return _recognise_content(path, named, status.st_size, status.st_mtime_ns)
    except (OSError, *DAMAGED):
        return Recognised(named)


@functools.lru_cache(maxsize=4096)
def _recognise_content(path: str, named: str, size: int, changed: int) -> Recognised:
    """Of a file that is as it was at a time."""
    with open(path, "rb") as file:
        kind = packed_by(file.read(8))
        file.seek(0)
        try:
            head = unpacked(file, kind, path).read(PEEKED_BYTES) if kind else file.read(PEEKED_BYTES)
        except DataError as error:
            return Recognised(named, str(error).removeprefix(f"{path} ").removesuffix("."))
    return _by_content(head, named, path)


def _by_content(head: bytes, named: str, path: str) -> Recognised:
    if head.startswith(_BINIDX_MAGIC):
        return Recognised("binidx", "is the index of binidx data: call it NAME.idx, with NAME.bin beside it")
    for magic, problem in _FORMATS.items():
        if head.startswith(magic):
            return Recognised(named, problem)
    if head.startswith(_PARQUET_MAGIC):
        missing = importlib.util.find_spec("pyarrow") is None
        return Recognised("jsonl", f"is a Parquet table, which {NEEDS_PYARROW}" if missing else "")
    text = head.decode("utf-8-sig", errors="replace")
    filled = [line for line in text.splitlines() if line.strip()][: _PEEKED_LINES + 1]
    if not filled:
        return Recognised(named)
    header = {name.strip().strip("\"'") for name in re.split("[,;\t]", filled[0])}
    if {"prompt", "chosen"} <= header:
        return Recognised(
            named,
            "is a table of preference pairs: make pairs of it with PrepareOrpoDataset.py --input_csv and train on them "
            "with --orpo 1",
        )
    if named == "jsonl" and suffix_of(path) not in _TABLE_SUFFIXES:
        return Recognised(named)
    return _by_lines(text, filled, named, is_whole=len(head) < PEEKED_BYTES)


def _by_lines(text: str, filled: Sequence[str], named: str, *, is_whole: bool) -> Recognised:
    """Of what a name says little about: is it JSON, a table, or a text?"""
    if not is_whole and len(filled) == 1:
        objects = [filled[0].lstrip().startswith('{"')]  # cut off, so that no more can be said
    else:
        complete = filled if is_whole else filled[:-1]
        objects = [_is_json(line, dict) for line in complete[:_PEEKED_LINES]]
    if all(objects):
        return Recognised("jsonl", surprise=LINES)
    if _OBJECTS.match(text):
        return Recognised("jsonl", surprise=ARRAY)
    if any(objects) or _is_json(filled[0], list) or filled[0].strip() in ("{", "["):
        return Recognised(
            named,
            "is in part JSON, but not an object on every line: say with --data_type whether it is jsonl or utf-8 "
            "(plain text)",
        )
    if named == "utf-8" and _has_known_columns(text.lstrip()):
        return Recognised("jsonl", surprise=TABLE)
    return Recognised(named)


def _is_json(line: str, kind: type) -> bool:
    try:
        return isinstance(json.loads(line), kind)
    except (ValueError, RecursionError):
        return False
