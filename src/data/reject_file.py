"""The CSV that reject generation writes: it grows group by group and survives being cut off.

Beside `OUT.csv` stands `OUT.csv.run.json`: the settings, a checksum of the input, and how many rows and bytes
of the CSV are complete. It is replaced after every group, once the group's rows are on the disk. A second
start cuts off what was written after that and goes on; other settings or another input are refused once there
are rows. It stays after the last row, and tells how the rejects were made.
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
            "input_sha256": _checksum(rows),
            "rows": len(rows),
            "rows_done": 0,
            "bytes_done": 0,
        }
        try:
            self._file = self._open()
            if not self._progress["bytes_done"]:
                self._write([HEADER], rows_done=0)
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
                f"{self._path} cannot be written after row {self.rows_done} ({error.strerror}): free some "
                "space and start again, it goes on from there."
            ) from error

    def __enter__(self) -> RejectFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _open(self) -> BinaryIO:
        if self._path.exists():
            self._take_up()
        else:
            # First the progress: a file without it would be taken for somebody else's.
            self._write_progress()
            self._path.touch()
        file: BinaryIO = open(self._path, "r+b")  # noqa: SIM115
        file.truncate(self._progress["bytes_done"])
        file.seek(0, os.SEEK_END)
        return file

    def _take_up(self) -> None:
        """Goes on with an existing file, if it is one of ours and of this run."""
        progress = _read_progress(self._progress_path)
        if progress is None:
            raise DataError(
                f"--output_csv {self._path} exists and is not the beginning of such a run "
                f"({self._progress_path.name} is missing or unreadable): name another file, or remove it."
            )
        if not progress["rows_done"]:
            return  # a start that failed, for want of memory or of a model: the next may have other settings
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
        if self._path.stat().st_size < progress["bytes_done"]:
            raise DataError(
                f"{self._path} is shorter than when it was written, it was changed since: name another "
                "--output_csv, or remove that one."
            )
        self._progress = progress

    def _write(self, lines: Sequence[Sequence[str]], rows_done: int) -> None:
        text = io.StringIO()
        csv.writer(text).writerows(lines)
        self._file.write(text.getvalue().encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._progress = {**self._progress, "rows_done": rows_done, "bytes_done": self._file.tell()}
        self._write_progress()

    def _write_progress(self) -> None:
        with replacing(self._progress_path) as file:
            file.write(json.dumps(self._progress, indent=1, ensure_ascii=False).encode())


def _checksum(rows: Sequence[PreferenceRow]) -> str:
    content = json.dumps([(row.prompt, row.chosen, row.rejected) for row in rows])
    return hashlib.sha256(content.encode()).hexdigest()


def _read_progress(path: Path) -> dict[str, Any] | None:
    try:
        progress = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    expected = {"settings": dict, "input_sha256": str, "rows": int, "rows_done": int, "bytes_done": int}
    if isinstance(progress, dict) and all(isinstance(progress.get(name), kind) for name, kind in expected.items()):
        return progress
    return None
