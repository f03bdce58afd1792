"""Writes binidx data for tests; `src.data.binidx` says what the two files hold."""

import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from src.data.binidx import DTYPES, MAGIC, VERSION
from src.data.documents import Tokens


def write_binidx(
    prefix: str | os.PathLike[str],
    documents: Iterable[Sequence[int] | Tokens],
    dtype: npt.DTypeLike = np.uint16,
) -> None:
    """Writes `prefix.bin` and `prefix.idx`, one item per document as it is given, its end token included."""
    (code,) = (code for code, known in DTYPES.items() if known == np.dtype(dtype))
    items = [np.array(document, DTYPES[code]) for document in documents]
    ends = np.cumsum([0, *map(len, items)])
    Path(f"{prefix}.bin").write_bytes(b"".join(item.tobytes() for item in items))
    Path(f"{prefix}.idx").write_bytes(
        struct.pack("<9sQBQQ", MAGIC, VERSION, code, len(items), len(items) + 1)
        + np.diff(ends).astype("<i4").tobytes()
        + (ends[:-1] * DTYPES[code].itemsize).astype("<i8").tobytes()
        + np.arange(len(items) + 1, dtype="<i8").tobytes()
    )
