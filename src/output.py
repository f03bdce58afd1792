"""Standard output and error of a process that goes on when nobody reads them any more."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO


def several(number: int, noun: str) -> str:
    """So many of something, in words."""
    return f"{number:,} {noun if number == 1 else plural_of(noun)}"


def plural_of(noun: str) -> str:
    """More than one of it."""
    return f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"


class LastingStream:
    """A text stream that, once it cannot be written, takes everything and shows nothing.

    That happens when its reader died (`| head`), its terminal was closed, or it is a file on a full disk. Its
    descriptor then leads nowhere, so that other code that writes there, the interpreter's end included, does not fail
    either.

    Args:
        stream: what it stands for; everything but writing is asked of it.
        other: what is told of the failure, if it can be written.
    """

    def __init__(self, stream: TextIO, other: TextIO | None = None) -> None:
        self._stream = stream
        self._other = other

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes, if that is possible."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:
            self._give_up(error)
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes them, one after the other."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flushes, if that is possible."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _give_up(self, error: OSError | ValueError) -> None:
        if isinstance(error, UnicodeError):  # a ValueError, too, and about the text
            raise error
        name = getattr(self._stream, "name", "output")
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        except (OSError, ValueError):
            self._stream = io.StringIO()
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        if self._other is not None:
            with contextlib.suppress(OSError, ValueError):
                print(
                    f"warning: {name} cannot be written ({reason}); going on without it", file=self._other, flush=True
                )


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Inside, writing to standard output and error never fails; what their encoding lacks is written as escapes."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file that is opened would take its place, and get what is printed
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != descriptor:
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
    out, err = sys.stdout, sys.stderr
    with contextlib.ExitStack() as opened:
        real_out, real_err = (
            stream or opened.enter_context(open(os.devnull, "w", encoding="utf-8"))  # None: closed from the start
            for stream in (out, err)
        )
        for stream in (real_out, real_err):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        sys.stdout = LastingStream(real_out, real_err)
        sys.stderr = LastingStream(real_err)
        try:
            yield
        finally:
            for lasting in (sys.stdout, sys.stderr):
                lasting.flush()
            sys.stdout, sys.stderr = out, err
