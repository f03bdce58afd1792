"""binidx: token data as `NAME.idx` (what is where) and `NAME.bin` (the tokens).

Little-endian, packed. `.idx`: 9 bytes magic, u64 version 1, u8 dtype code, u64 n items, u64 m
entries of a document index, then i32[n] item sizes in tokens, i64[n] byte offsets of the items in
`.bin`, i64[m] first item of each document. `.bin`: the tokens of all items and nothing else.

An item is a document here, as its makers write them; token 0 marks no border, since in some
vocabularies it is an ordinary token.

Source: Megatron-LM's MMapIndexedDataset, as json2binidx_tool and make_data.py write it.
"""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from src.config.recognition import recognise
from src.data.documents import Documents, Positions, Tokens
from src.data.inputs import opened, read_whole
from src.data.token_file import FileTokens
from src.errors import DataError
from src.storage import replacing
from src.system import read_at

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
_WRITTEN_CODE = 8
_WRITTEN = DTYPES[_WRITTEN_CODE]

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
    if not any(os.path.exists(path) for path in (prefix, index_path, tokens_path)):
        raise DataError(
            f"{prefix} does not exist, neither as a file or folder nor as binidx data ({index_path} is missing); "
            f"check the path.{_hint(prefix)}"
        )
    how = " --data_file takes their common path without suffix."
    for path in (index_path, tokens_path):
        if not os.path.exists(path):
            raise DataError(f"{path} is missing: binidx data is {index_path} and {tokens_path}.{_hint(prefix) or how}")
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


class BinidxWriter:
    """Writes documents one by one, as uint16; the files take their names together, once all are written.

    Args:
        prefix: of the two files.
        repeat: how often all documents are written, pass after pass.
        seed: of the order of each pass; None: the one in which they came.

    Raises:
        DataError: a file cannot be written.
    """

    def __init__(self, prefix: str, *, repeat: int = 1, seed: int | None = None) -> None:
        self._prefix, self._repeat, self._seed = prefix, repeat, seed
        self._sizes = array("i")
        self._finished = False

    def __enter__(self) -> BinidxWriter:
        with self._refusing(), contextlib.ExitStack() as held:
            # Left in reverse order: the tokens take their name first, and a reader compares their size with the index.
            self._index = held.enter_context(replacing(f"{self._prefix}.idx"))
            self._tokens = held.enter_context(replacing(f"{self._prefix}.bin"))
            folder = os.path.dirname(os.path.abspath(self._prefix))
            in_order = self._repeat == 1 and self._seed is None
            self._spool = self._tokens if in_order else held.enter_context(tempfile.TemporaryFile(dir=folder))
            self._held = held.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        with self._refusing():
            if kind is None:
                assert self._finished
            self._held.__exit__(kind, *rest)

    @property
    def documents(self) -> int:
        """How many were added."""
        return len(self._sizes)

    def add(self, tokens: Sequence[int] | Tokens) -> None:
        """Takes a document with its end."""
        with self._refusing():
            self._sizes.append(len(tokens))
            self._spool.write(np.asarray(tokens, dtype=_WRITTEN).tobytes())

    def finish(self) -> int:
        """Writes what remains, and says how many tokens there are."""
        sizes = np.frombuffer(self._sizes, dtype=np.int32) if self._sizes else np.empty(0, np.int32)
        starts = np.cumsum(sizes, dtype=np.int64) - sizes
        passes = []
        with self._refusing():
            self._spool.flush()
            for number in range(self._repeat):
                order = self._order(number)
                passes.append(sizes[order])
                if self._spool is not self._tokens:
                    self._copy(order, starts, sizes)
            written = np.concatenate(passes)
            ends = np.cumsum(written, dtype=np.int64)
            self._index.write(_HEADER.pack(MAGIC, VERSION, _WRITTEN_CODE, len(written), len(written) + 1))
            self._index.write(written.astype("<i4").tobytes())
            self._index.write(((ends - written) * _WRITTEN.itemsize).astype("<i8").tobytes())
            self._index.write(np.arange(len(written) + 1, dtype="<i8").tobytes())
        self._finished = True
        return int(ends[-1]) if len(ends) else 0

    def _order(self, number: int) -> Positions:
        count = self.documents
        return (
            np.arange(count) if self._seed is None else np.random.default_rng((self._seed, number)).permutation(count)
        )

    def _copy(self, order: Positions, starts: Positions, sizes: Tokens) -> None:
        for document in order.tolist():
            wanted = int(sizes[document]) * _WRITTEN.itemsize
            self._tokens.write(read_at(self._spool.fileno(), wanted, int(starts[document]) * _WRITTEN.itemsize))

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{self._prefix}.bin and .idx cannot be written ({error.strerror}): choose another OUT."
            ) from (error)


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
    """What to do when `prefix` is a file of its own or stands beside one; "" when it does not."""
    for path in (Path(prefix), Path(f"{prefix}.jsonl"), Path(f"{prefix}.txt")):
        if os.path.isfile(path):
            return f" For {path} use --data_type {recognise(str(path)).data_type} --data_file {path}."
    return ""
