"""Lines on a terminal where a progress bar may stand."""

from __future__ import annotations

import sys
from typing import TextIO

from tqdm import tqdm


def tell(text: str, stream: TextIO | None = None) -> None:
    """Prints a line by itself, above the bar if there is one; on standard output unless told otherwise."""
    stream = sys.stdout if stream is None else stream
    tqdm.write(text, file=stream)
    stream.flush()


def warn(text: str) -> None:
    """Prints a warning to standard error, on every rank."""
    tell(f"warning: {text}", sys.stderr)
