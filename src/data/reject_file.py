"""The CSV that reject generation writes: it grows group by group and survives being cut off.

Beside `OUT.csv` stands `OUT.csv.run.json`: the settings, checksums of the input and of the CSV as it is to be, and
the text of the group that is being written. It is replaced before every group is written. A second start writes what
is missing of that text and goes on; it refuses a CSV or a `.run.json` that somebody else changed, and, once there are
rows, other settings or another input. The file stays after the last row, and tells how the rejects were made.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from src.data.inputs import MalformedEntry, decoded, json_object, read_whole
from src.data.preferences import PreferenceRow
from src.errors import DataError
from src.storage import replacing

HEADER = ("prompt", "chosen", "reject")


@dataclass(frozen=True)
class RejectGroup:
    """Rows that are generated together and written together.

    Attributes:
        start: number of its first row in the input, from 0.
        stop: number after its last row.
        generated: rows of it that get a new reject; the others keep what they have.
    """

    start: int
    stop: int
    generated: tuple[int, ...]


def plan_groups(rows: Sequence[PreferenceRow], size: int, *, overwrite: bool) -> list[RejectGroup]:
    """Divides rows into groups with `size` rows to generate each, the last one perhaps fewer.

    A row with a prompt gets a reject if it has none, or in any case with `overwrite`.
    """
    wanted = [
        number for number, row in enumerate(rows) if row.prompt.strip() and (overwrite or not row.rejected.strip())
    ]
    batches = [tuple(wanted[first : first + size]) for first in range(0, len(wanted), size)] or [()]
    starts = [0, *(batch[0] for batch in batches[1:]), len(rows)]
    return [
        RejectGroup(start, stop, batch) for start, stop, batch in zip(starts[:-1], starts[1:], batches, strict=True)
    ]


class RejectFile:
    """An output that is being written; use it as a context manager.

    Args:
        path: the CSV.
        rows: of the input.
        settings: everything that the rejects depend on, JSON values by flag name.

    Raises:
        DataError: the file exists but was not begun by such a run, or its rows with other input or settings, or
            it cannot be written.
    """

    def __init__(self, path: str, rows: Sequence[PreferenceRow], settings: Mapping[str, Any]) -> None:
        self._path = Path(path)
        self._progress_path = Path(f"{path}.run.json")
        self._rows = rows
        self._progress: dict[str, Any] = {
            "settings": dict(settings),
            "input_sha256": _checksum([(row.prompt, row.chosen, row.rejected) for row in rows]),
            "rows": len(rows),
            "rows_done": 0,
            "bytes_done": 0,
            "output_sha256": "",
            "last_group": "",
        }
        self._written = hashlib.sha256()
        try:
            self._file = self._open()
        except OSError as error:
            raise DataError(f"--output_csv {path} cannot be written ({error.strerror}): choose another.") from error

    @property
    def rows_done(self) -> int:
        """Rows that are in the file."""
        return int(self._progress["rows_done"])

    def append(self, group: RejectGroup, rejects: Mapping[int, str]) -> None:
        """Writes the group's rows and puts them on the disk.

        Args:
            group: the next one.
            rejects: new reject by row number, for `group.generated`.
        """
        assert group.start == self.rows_done
        lines = [
            (row.prompt, row.chosen, rejects.get(number, row.rejected))
            for number, row in enumerate(self._rows[group.start : group.stop], start=group.start)
        ]
        try:
            self._write(lines, rows_done=group.stop)
        except OSError as error:
            raise DataError(
                f"{self._path} cannot be written after row {group.start} ({error.strerror}): free some "
                "space and start again, it goes on from there."
            ) from error

    def __enter__(self) -> RejectFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _open(self) -> BinaryIO:
        content = self._take_up() if os.path.exists(self._path) else b""
        if not content:
            # First the progress: a file without it would be taken for somebody else's.
            self._plan(_csv_text([HEADER]), rows_done=0)
            self._path.touch()
        file: BinaryIO = open(self._path, "r+b")  # noqa: SIM115
        missing = self._progress["last_group"].encode()
        file.seek(self._progress["bytes_done"] - len(missing))
        _write_durably(file, missing)
        return file

    def _take_up(self) -> bytes:
        """What is to stand in an existing file, if it is one of ours and of this run; nothing to begin it anew."""
        content = read_whole(str(self._path))
        progress = _read_progress(self._progress_path)
        if progress is None:
            raise DataError(
                f"--output_csv {self._path} exists and is not the beginning of such a run "
                f"({self._progress_path.name} is missing, unreadable or was changed): name another file, or remove it."
            )
        last_group: bytes = progress["last_group"].encode()
        present = len(content) - (progress["bytes_done"] - len(last_group))
        whole = content + last_group[max(present, 0) :]
        if present < 0 or hashlib.sha256(whole).hexdigest() != progress["output_sha256"]:
            raise DataError(
                f"{self._path} was changed since it was written: name another --output_csv, or remove that one."
            )
        if not progress["rows_done"]:
            return b""  # a start that failed, for want of memory or of a model: the next may have other settings
        for name, value in self._progress["settings"].items():
            before = progress["settings"].get(name)
            if before != value:
                before, now = (some if some != "" else "left out" for some in (before, value))
                raise DataError(
                    f"{self._path} was begun with --{name} {before}, now it is {now}: give the same, or "
                    "name another --output_csv."
                )
        if progress["input_sha256"] != self._progress["input_sha256"]:
            raise DataError(f"{self._path} was begun with other input rows: name another --output_csv, or remove it.")
        self._progress = progress
        self._written.update(whole)
        return whole

    def _write(self, lines: Sequence[Sequence[str]], rows_done: int) -> None:
        text = _csv_text(lines)
        self._plan(text, rows_done)
        _write_durably(self._file, text.encode())

    def _plan(self, text: str, rows_done: int) -> None:
        """Notes what is about to be written, so that a later start can complete it."""
        content = text.encode()
        self._written.update(content)
        progress = {
            **self._progress,
            "rows_done": rows_done,
            "bytes_done": self._progress["bytes_done"] + len(content),
            "output_sha256": self._written.hexdigest(),
            "last_group": text,
        }
        with replacing(self._progress_path) as file:
            signed = {**progress, "sha256": _checksum(progress)}
            file.write(json.dumps(signed, indent=1).encode())
        self._progress = progress


def _csv_text(lines: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(lines)
    return text.getvalue()


def _write_durably(file: BinaryIO, content: bytes) -> None:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def _checksum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read_progress(path: Path) -> dict[str, Any] | None:
    """What the file says; None if it is missing or not as it was written."""
    try:
        progress = json_object(decoded(str(path), read_whole(str(path))))
    except (DataError, MalformedEntry):
        return None
    signature = progress.pop("sha256", None)
    return progress if signature == _checksum(progress) else None
