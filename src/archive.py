"""The zip archive that `torch.save` writes: where its entries lie, and whether their bytes are what was written.

torch itself compares neither checksums nor sizes, and computes where entries lie from their order. Here the
archive's directory is read strictly, entry by entry, so that tensors can be read by name; and every byte is
compared with its CRC-32: of small files always, of large ones once per file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import sys
import zipfile
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from src.errors import CheckpointError
from src.system import cache_folder, read_at, read_into

CHECKED_ONCE_BYTES = 1 << 30
"""Files of this size and larger are compared with their checksums once, smaller ones whenever they are opened."""

PICKLE = "data.pkl"
"""The entry with everything but the tensors' bytes."""

_CHUNK_BYTES = 1 << 20
_MOST_THREADS = 8

_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Magic, and the lengths of the name and of the padding that follow it."""

_ENCRYPTED = 1


@dataclass(frozen=True)
class Entry:
    """One uncompressed entry.

    Attributes:
        start: position of its first byte in the file.
        size_bytes: its length.
        crc: CRC-32 of its bytes as written in the directory.
    """

    start: int
    size_bytes: int
    crc: int


def read_directory(file: BinaryIO, path: str) -> dict[str, Entry]:
    """Name without the common top folder -> entry.

    Args:
        file: the opened archive.
        path: its name, for messages.

    Raises:
        CheckpointError: the directory is missing or contradicts the file, entries are compressed, or another
            program wrote it.
    """
    file_bytes = os.fstat(file.fileno()).st_size
    try:
        if not zipfile.is_zipfile(file):
            raise CheckpointError(
                f"{path} is incomplete: its {file_bytes} bytes begin like a .pth file, but the directory at its end is "
                "missing; copy or download it again"
            )
        # A directory's own fields may be anything, and the module tells in as many ways.
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, EOFError, OverflowError) as error:
        raise _damaged(path, f"the directory at its end cannot be read ({error})") from error
    except OSError as error:
        raise _damaged(path, f"the directory at its end cannot be read ({error.strerror})") from error
    names = [info.filename.partition("/")[2] for info in infos]
    if "constants.pkl" in names:
        raise CheckpointError(f"{path} is a TorchScript program, not a dict of tensors")
    if PICKLE not in names:
        raise CheckpointError(f"{path} is damaged or not a checkpoint; it is a zip archive without {PICKLE}")
    if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & _ENCRYPTED for info in infos):
        raise CheckpointError(
            f"{path} was compressed or encrypted after it was written, so that its tensors cannot be read one by one; "
            f"unpack it once with {conversion(weights_only=True)}"
        )
    entries: dict[str, Entry] = {}
    folders = set()
    free_from = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset < free_from or (not entries and info.header_offset):
            raise _damaged(path, "its entries do not lie one behind the other")
        start = _start_of(file, path, info)
        free_from = start + info.file_size
        if info.file_size != info.compress_size or free_from > file_bytes:
            raise _damaged(path, f"entry {info.filename!r} has no {info.file_size} bytes")
        folder, _, name = info.filename.partition("/")
        folders.add(folder)
        if name in entries:
            raise _damaged(path, f"entry {info.filename!r} is there twice")
        entries[name] = Entry(start, info.file_size, info.CRC)
    if len(folders) > 1:
        raise _damaged(path, f"its entries lie in {len(folders)} folders instead of one")
    return entries


def conversion(weights_only: bool) -> str:
    """The command that rewrites a file as torch writes it today."""
    load = f"torch.load('OLD.pth', map_location='cpu', weights_only={weights_only})"
    return f"python -c \"import torch; torch.save({load}, 'NEW.pth')\""


def read_entry(file: BinaryIO, entry: Entry) -> bytes:
    """All bytes of an entry."""
    return read_at(file.fileno(), entry.size_bytes, entry.start)


def check(file: BinaryIO, path: str, entries: Mapping[str, Entry]) -> None:
    """Compares the bytes of every entry with its CRC-32, in threads; of a large file only the first time.

    A file that was written without checksums gives a warning.

    Raises:
        CheckpointError: an entry's bytes are not those that were written.
    """
    present = {name: entry for name, entry in entries.items() if entry.size_bytes}
    if not any(entry.crc for entry in present.values()):
        print(f"warning: {path} was written without checksums, so damage to it cannot be noticed", file=sys.stderr)
        return
    status = os.fstat(file.fileno())
    mark = _mark(path, status) if status.st_size >= CHECKED_ONCE_BYTES else None
    if mark and os.path.exists(mark):
        return
    if mark:
        print(f"checking   {path}: {status.st_size / 2**30:.1f} GiB against its checksums, once", file=sys.stderr)
    by_size = sorted(present, key=lambda name: present[name].size_bytes, reverse=True)
    count = min(_MOST_THREADS, os.cpu_count() or 1) if status.st_size > _CHUNK_BYTES else 1
    with ThreadPoolExecutor(count) as threads:
        found = (threads.map if count > 1 else map)(lambda name: _crc(file, path, present[name]), by_size)
        wrong = [name for name, crc in zip(by_size, found, strict=True) if crc != present[name].crc]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise _damaged(path, f"the bytes of entry {wrong[0]!r}{more} do not have the checksum they were written with")
    if mark:
        with contextlib.suppress(OSError):  # without a folder for it, the next start checks again
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()


def _start_of(file: BinaryIO, path: str, info: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: behind its own header, which must name it as the directory does."""
    header = read_at(file.fileno(), _LOCAL_HEADER.size, info.header_offset)
    if len(header) == _LOCAL_HEADER.size:
        magic, name_bytes, padding_bytes = _LOCAL_HEADER.unpack(header)
        name = read_at(file.fileno(), name_bytes, info.header_offset + _LOCAL_HEADER.size)
        if magic == b"PK\x03\x04" and name == info.orig_filename.encode():
            return int(info.header_offset + _LOCAL_HEADER.size + name_bytes + padding_bytes)
    raise _damaged(path, f"entry {info.filename!r} is not where the directory says")


def _crc(file: BinaryIO, path: str, entry: Entry) -> int:
    """CRC-32 of an entry's bytes as they are now; other threads may run meanwhile."""
    crc = 0
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, entry.size_bytes)))
    position, end = entry.start, entry.start + entry.size_bytes
    while position < end:
        read_bytes = read_into(file.fileno(), buffer[: end - position], position)
        if not read_bytes:
            raise CheckpointError(f"{path} became shorter while it was read; copy or download it again")
        crc = zlib.crc32(buffer[:read_bytes], crc)
        position += read_bytes
    return crc


def _mark(path: str, status: os.stat_result) -> Path | None:
    """The empty file whose presence says that this file was checked; None where users have no folder for such."""
    cache = cache_folder()
    if cache is None:
        return None
    identity = f"{os.path.realpath(path)}\0{status.st_size}\0{status.st_mtime_ns}"
    return Path(cache, "checked", hashlib.sha256(os.fsencode(identity)).hexdigest())


def _damaged(path: str, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {what}; copy or download it again")
