"""binidx: token data as `NAME.idx` (what is where) and `NAME.bin` (the tokens).

Little-endian, packed. `.idx`: 9 bytes magic, u64 version 1, u8 dtype code, u64 n items, u64 m
entries of a document index, then i32[n] item sizes in tokens, i64[n] byte offsets of the items in
`.bin`, i64[m] first item of each document. `.bin`: the tokens of all items and nothing else.

An item is a document here, as its makers write them; token 0 marks no border, since in some
vocabularies it is an ordinary token.

Source: Megatron-LM's MMapIndexedDataset, as json2binidx_tool and make_data.py write it.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from src.config.recognition import recognise
from src.data.documents import Documents, Positions
from src.data.inputs import opened, read_whole
from src.data.token_file import FileTokens
from src.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
OLDER_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
FLOAT_CODES = (6, 7)

_IN_MEMORY_BYTES = 256 << 20
"""Up to here nothing that happens to the file later touches the run."""

_HEADER = struct.Struct("<9sQBQQ")


def read_binidx(prefix: str, vocab_size: int) -> Documents:
    """Opens `prefix.idx` and `prefix.bin`, which stays in its file if it is large; either suffix is tolerated.

    Raises:
        DataError: a file is missing, damaged or of another kind, the two disagree, or the
            documents cannot be trained on (see `Documents.from_stream`).
    """
    if Path(prefix).suffix in (".idx", ".bin"):
        prefix = prefix[: -len(".idx")]
    index_path, tokens_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (index_path, tokens_path):
        if not os.path.exists(path):
            raise DataError(f"{path} is missing: binidx data is {index_path} and {tokens_path}.{_hint(prefix)}")
    dtype, sizes, offsets = _read_index(index_path)

    starts = np.concatenate((np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)))[:-1]
    wrong = np.flatnonzero(offsets != starts * dtype.itemsize)
    if len(wrong):
        document = wrong[0]
        raise DataError(
            f"{index_path} is damaged: document {document} should begin at byte "
            f"{starts[document] * dtype.itemsize}, it says {offsets[document]}; make the data again."
        )
    expected_bytes = int(sizes.sum(dtype=np.int64)) * dtype.itemsize
    with opened(str(tokens_path)) as file:
        actual_bytes = os.fstat(file.fileno()).st_size
    if actual_bytes != expected_bytes:
        raise DataError(
            f"{index_path} and {tokens_path} disagree: the index speaks of {expected_bytes} bytes of "
            f"{dtype.name} tokens, the other file has {actual_bytes}; they are not from one run, or one is "
            "cut short: copy both again."
        )
    if actual_bytes <= _IN_MEMORY_BYTES:
        stream = np.frombuffer(read_whole(str(tokens_path)), dtype)
        return Documents.from_stream(prefix, stream, starts, sizes, vocab_size)
    in_file = FileTokens(str(tokens_path), dtype)
    documents = Documents.from_stream(prefix, in_file, starts, sizes, vocab_size)
    in_file.refuse_ids_from(vocab_size)
    return documents


def _read_index(path: Path) -> tuple[np.dtype[Any], Positions, Positions]:
    """Token dtype, item sizes in tokens and item offsets in bytes, from a file checked throughout."""
    content = read_whole(str(path))
    if content.startswith(OLDER_MAGIC):
        raise DataError(
            f"{path} is an index of the older kind TNTIDX; make the data again with json2binidx_tool's "
            "--dataset-impl mmap."
        )
    if not content.startswith(MAGIC):
        raise DataError(f"{path} is no binidx index: it begins with {content[:9]!r}, not {MAGIC!r}.")
    if len(content) < _HEADER.size:
        raise DataError(f"{path} is cut short: {len(content)} bytes, the header alone has {_HEADER.size}.")
    _, version, code, items, documents = _HEADER.unpack_from(content)
    if version != VERSION:
        raise DataError(f"{path} has version {version} of its format; version {VERSION} is the one known.")
    if code in FLOAT_CODES:
        raise DataError(
            f"{path} says that the tokens are floating-point numbers (dtype code {code}); ids are integers: "
            f"one of {', '.join(dtype.name for dtype in DTYPES.values())}."
        )
    if code not in DTYPES:
        raise DataError(f"{path} has dtype code {code}; known are {', '.join(map(str, DTYPES))}.")
    expected = _HEADER.size + 12 * items + 8 * documents
    if len(content) != expected:
        raise DataError(
            f"{path} is damaged: {len(content)} bytes, but {items} documents and {documents} entries of the "
            f"document index make {expected}; copy it or make it again."
        )
    sizes = np.frombuffer(content, "<i4", items, _HEADER.size).astype(np.int64)
    offsets = np.frombuffer(content, "<i8", items, _HEADER.size + 4 * items).astype(np.int64)
    firsts = np.frombuffer(content, "<i8", documents, _HEADER.size + 12 * items)
    if items and sizes.min() < 0:
        index = int(np.argmin(sizes))
        raise DataError(f"{path} is damaged: document {index} has {sizes[index]} tokens; make the data again.")
    if documents and (firsts.min() < 0 or firsts.max() > items or (np.diff(firsts) < 0).any()):
        raise DataError(
            f"{path} is damaged: its document index does not ascend from 0 to {items}; make the data again."
        )
    return DTYPES[code], sizes, offsets


def _hint(prefix: str) -> str:
    """What to do when `prefix` is a file of its own or stands beside one."""
    for path in (Path(prefix), Path(f"{prefix}.jsonl"), Path(f"{prefix}.txt")):
        if os.path.isfile(path):
            return f" For {path} use --data_type {recognise(str(path)).data_type} --data_file {path}."
    return " --data_file takes their common path without suffix."
