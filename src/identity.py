"""Which file a base model is: its size and SHA-256, found while other work goes on."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

from src.errors import CheckpointError

_CHUNK_BYTES = 1 << 24


def fingerprint(status: os.stat_result) -> tuple[int, int]:
    """What changes when a file is written to: its size in bytes, and the time of the last change."""
    return status.st_size, status.st_mtime_ns


def change_between(before: tuple[int, int], now: tuple[int, int]) -> str:
    """What tells two fingerprints of a file apart, for a sentence about it."""
    if before[0] == now[0]:
        return f"it was written to, and has {now[0]:,} bytes as before"
    return f"it had {before[0]:,} bytes, now it has {now[0]:,}"


class FileIdentity:
    """Size and SHA-256 of a file that exists; the latter is computed once, by a thread.

    Args:
        path: of the file.
        at_once: whether the thread starts now, or when the SHA-256 is asked for.

    Attributes:
        name: of the file, without its folder.
        size_bytes: when it was looked at.
    """

    def __init__(self, path: str | Path, *, at_once: bool = True) -> None:
        self.name = Path(path).name
        self._as_named = fingerprint(Path(path).stat())
        self.size_bytes = self._as_named[0]
        self._path = path
        self._digest = ""
        self._problem = ""
        self._thread = threading.Thread(target=self._compute, daemon=True)
        self._started = at_once
        if at_once:
            self._thread.start()

    @property
    def sha256(self) -> str:
        """In hexadecimal digits; waits for it.

        Raises:
            CheckpointError: the file could not be read, or was changed.
        """
        if not self._started:
            self._started = True
            self._thread.start()
        self._thread.join()
        if self._problem:
            raise CheckpointError(f"{self._path} {self._problem}")
        return self._digest

    def as_dict(self) -> dict[str, str | int]:
        """What is written beside results."""
        return {"file": self.name, "size_bytes": self.size_bytes, "sha256": self.sha256}

    def _compute(self) -> None:
        digest = hashlib.sha256()
        try:
            with open(self._path, "rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
                if fingerprint(os.fstat(file.fileno())) != self._as_named:
                    self._problem = "was changed since the program began: leave it alone until the program ends"
        except OSError as error:
            self._problem = f"cannot be read: {error.strerror}"
        self._digest = digest.hexdigest()
