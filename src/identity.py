"""Which file a base model is: its size and SHA-256, found while other work goes on."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

_CHUNK_BYTES = 1 << 24


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
        self.size_bytes = Path(path).stat().st_size
        self._path = path
        self._digest = ""
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._compute, daemon=True)
        self._started = at_once
        if at_once:
            self._thread.start()

    @property
    def sha256(self) -> str:
        """In hexadecimal digits; waits for it.

        Raises:
            OSError: the file could not be read.
        """
        if not self._started:
            self._started = True
            self._thread.start()
        self._thread.join()
        if self._error is not None:
            raise self._error
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
        except OSError as error:
            self._error = error
        self._digest = digest.hexdigest()
