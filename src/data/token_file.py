"""Tokens that stay in their file, because there are more of them than one wants in memory."""

from __future__ import annotations

import os
import weakref
from typing import Any

import numpy as np

from src.data.documents import Tokens
from src.errors import DataError
from src.identity import change_between, fingerprint
from src.system import open_to_read, read_at


class FileTokens:
    """A file of token ids as an array to take slices of, each of them read when it is asked for.

    Not mapped: a map whose file is cut short meanwhile ends the program. The file stays open, so that another one may
    take its name; it must not be written to.

    Args:
        path: the file; nothing but tokens.
        dtype: of a token in it.

    Raises:
        DataError: it cannot be opened; and from a slice: it was changed since, or holds an id that is refused.
    """

    def __init__(self, path: str, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self._path = path
        self._id_limit: int | None = None
        try:
            self._descriptor = open_to_read(path)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from error
        weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        self._as_opened = fingerprint(status)
        self._length = status.st_size // dtype.itemsize

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, span: slice) -> Tokens:
        start, stop, step = span.indices(self._length)
        assert step == 1
        wanted_bytes = max(stop - start, 0) * self.dtype.itemsize
        try:
            content = read_at(self._descriptor, wanted_bytes, start * self.dtype.itemsize)
            now = fingerprint(os.fstat(self._descriptor))
        except OSError as error:
            raise DataError(f"{self._path} cannot be read any more: {error.strerror}.") from error
        if now != self._as_opened or len(content) != wanted_bytes:
            raise DataError(
                f"{self._path} was changed while the program reads it: {change_between(self._as_opened, now)}; leave "
                "the file alone until the run is over."
            )
        tokens: Tokens = np.frombuffer(content, self.dtype)
        self._check_ids(tokens, start)
        return tokens

    def refuse_ids_from(self, limit: int) -> None:
        """From now on, slices with a negative id or one of `limit` or more are refused."""
        self._id_limit = limit

    def _check_ids(self, tokens: Tokens, start: int) -> None:
        if self._id_limit is None or not len(tokens):
            return
        if int(tokens.min()) < 0 or int(tokens.max()) >= self._id_limit:
            place = int(np.flatnonzero((tokens < 0) | (tokens >= self._id_limit))[0])
            raise DataError(
                f"{self._path} holds id {int(tokens[place])} as token {start + place}, but the model's vocabulary has "
                f"ids 0 to {self._id_limit - 1}; it did not when the run began."
            )
